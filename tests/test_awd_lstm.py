"""AWD-LSTM: each dropout against its slow definition, the layer against a loop, the model's promises."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbutils.awd_lstm import (
    Carried,
    EmbeddingDropout,
    LanguageModel,
    LockedDropout,
    RegularizedLoss,
    WeightDropLSTM,
    awd_lstm,
    detached,
    pad_to,
    token_loss,
)
from nbutils.cache_pointer import evaluate_tokens
from nbutils.core import seed_everything
from nbutils.qrnn import QRNN, qrnn_layers

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def small(**dropouts):
    seed_everything(0)
    return awd_lstm(23, 8, 12, **dropouts)


def text(steps=9, streams=3, words=23, seed=1):
    return torch.randint(words, (steps, streams), generator=torch.Generator().manual_seed(seed))


# --- parameters ----------------------------------------------------------------------------------
def test_the_published_number_of_parameters():
    with torch.device("meta"):
        model = awd_lstm()
    assert sum(p.numel() for p in model.parameters()) == 33_556_479
    assert [tuple(layer.weight_ih.shape) for layer in model.layers] == [(4600, 400), (4600, 1150), (1600, 1150)]


def test_first_weights():
    model = awd_lstm(5000, 64, 100)
    assert model.embedding.weight.abs().max() <= 0.1 and model.embedding.weight.detach().std() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert model.bias.abs().max() <= 0.05 and model.bias.detach().std() == pytest.approx(0.1 / 12**0.5, rel=0.05)
    for layer in model.layers:
        for p in layer.parameters():
            assert p.abs().max() <= layer.hidden_size**-0.5


# --- dropouts ------------------------------------------------------------------------------------
def test_locked_dropout_is_a_mask_for_each_stream_and_feature():
    drop, x = LockedDropout(0.3), torch.randn(7, 40, 50)
    seed_everything(3)
    y = drop(x)
    seed_everything(3)
    mask = torch.empty(1, 40, 50).bernoulli_(0.7) / 0.7
    slow = torch.stack([x_t * mask[0] for x_t in x])
    assert torch.equal(y, slow)
    assert not torch.equal(y != 0, (y != 0)[:, :1].expand_as(y))               # streams have masks of their own
    assert (y != 0).float().mean() == pytest.approx(0.7, abs=0.03)


def test_embedding_dropout_equals_a_dropped_table_in_gradients_too():
    table = nn.Embedding(30, 4)
    words = text(20, 3, 30)
    grads = []
    for way in (lambda: EmbeddingDropout(table, 0.4)(words),
                lambda: F.embedding(words, table.weight * torch.empty(30, 1).bernoulli_(0.6).div_(0.6))):
        seed_everything(5)
        out = way()
        grads.append((out.detach(), *torch.autograd.grad(out.square().sum(), table.weight)))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("module", [LockedDropout(0.4), EmbeddingDropout(nn.Embedding(9, 4), 0.4)])
def test_nothing_is_dropped_in_evaluation(module):
    x = torch.randn(3, 2, 4) if isinstance(module, LockedDropout) else text(3, 2, 9)
    module.eval()
    assert torch.equal(module(x), module(x)) and (module(x) != 0).all()


def test_masks_change_from_batch_to_batch():
    model, words = small(), text()
    model.train()
    assert not torch.equal(model(words).logits, model(words).logits)
    model.eval()
    assert torch.equal(model(words).logits, model(words).logits)


# --- the layer -----------------------------------------------------------------------------------
def loop(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    outputs = []
    for x_t in x:
        i, f, g, o = (x_t @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), (h, c)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("steps, streams, sizes", [(1, 1, (3, 4)), (9, 2, (6, 5)), (30, 4, (5, 8))])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_layer_equals_a_loop_forward_and_backward(steps, streams, sizes, dtype, atol, device):
    seed_everything(0)
    layer = WeightDropLSTM(*sizes, weight_drop=0.5).to(device, dtype)
    x = torch.randn(steps, streams, sizes[0], device=device, dtype=dtype, requires_grad=True)
    h, c = torch.randn(2, streams, sizes[1], device=device, dtype=dtype)
    found = []
    for way in (lambda: layer(x, (h, c)), lambda: loop(x, h, c, *layer.weights())):
        seed_everything(1)
        out, state = way()
        loss = out.square().sum() + state[1].sum()
        found.append([out, *state, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for ours, slow in zip(*found):
        torch.testing.assert_close(ours, slow, atol=atol * max(1, float(slow.detach().abs().max())), rtol=0)


def test_without_drop_it_is_torchs_lstm():
    ours, theirs = WeightDropLSTM(6, 5), nn.LSTM(6, 5)
    for name, p in ours.named_parameters():
        p.data.copy_(getattr(theirs, f"{name}_l0"))
    x = torch.randn(8, 3, 6)
    out, (h, c) = ours(x)
    want, (h1, c1) = theirs(x)
    assert torch.equal(out, want) and torch.equal(h, h1[0]) and torch.equal(c, c1[0])


def test_the_drop_is_real():
    """A port to today's torch may run and do nothing: passes must differ, gradients arrive."""
    layer, x = WeightDropLSTM(40, 40, weight_drop=0.5), torch.randn(9, 3, 40)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer(x)[0].sum().backward()
    assert (layer.weight_hh.grad == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (layer.weight_ih.grad != 0).float().mean() > 0.99 and (layer.bias_hh.grad != 0).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_weights_lie_in_one_piece_in_cudnns_order():
    layer = WeightDropLSTM(6, 5, weight_drop=0.5)
    weights = layer.weights()
    at = 0
    for w, p in zip(weights, layer.parameters()):
        assert w.storage_offset() == at and w.is_contiguous() and w.shape == p.shape
        assert w.untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
        at += p.numel()
    assert weights[0].untyped_storage().nbytes() == 4 * at


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_cudnn_compacts_nothing(precision):
    layer, x = WeightDropLSTM(40, 64, weight_drop=0.5).cuda(), torch.randn(9, 3, 40, device="cuda")
    with warnings.catch_warnings(), torch.autocast("cuda", precision or torch.float16, enabled=precision is not None):
        warnings.simplefilter("error")
        out, _ = layer(x)
        out.float().sum().backward()
    assert out.dtype == (precision or torch.float32) and layer.weight_hh.grad.dtype == torch.float32


def test_autocast_runs_in_the_precision_that_was_asked_for():
    layer, x = WeightDropLSTM(6, 5), torch.randn(9, 3, 6)
    want = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, state = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, atol=0.03, rtol=0)
    out.sum().backward()
    assert layer.weight_hh.grad.dtype == torch.float32 and layer.weight_hh.grad.abs().sum() > 0


@pytest.mark.parametrize("make, message", [
    (lambda: WeightDropLSTM(6, 5, weight_drop=1.0), r"weight_drop is 1.0: a share in \[0, 1\)"),
    (lambda: WeightDropLSTM(6, 5, weight_drop=-0.1), "weight_drop is -0.1"),
    (lambda: WeightDropLSTM(0, 5), "input_size is 0"), (lambda: WeightDropLSTM(6, -1), "hidden_size is -1"),
    (lambda: LockedDropout(1.0), "p is 1.0"), (lambda: EmbeddingDropout(nn.Embedding(3, 2), math.nan), "p is nan"),
    (lambda: WeightDropLSTM(6, 5)(torch.randn(4, 6)), r"x has shape \[4, 6\]: give \[steps, streams, 6\]"),
    (lambda: WeightDropLSTM(6, 5)(torch.randn(4, 2, 7)), r"x has shape \[4, 2, 7\]"),
    (lambda: WeightDropLSTM(6, 5)(torch.randn(4, 2, 6), (torch.zeros(1, 5),) * 2), r"the state has shapes.*give h and c, each \[2, 5\]"),
    (lambda: awd_lstm(9, 6, 5, 0), "n_layers is 0"),
    (lambda: LanguageModel(9, 6, [WeightDropLSTM(5, 6)]), "layer 0 reads 5 features, and is given 6"),
    (lambda: LanguageModel(9, 6, [WeightDropLSTM(6, 5)]), "the last layer gives 5 features.*word vectors of 6"),
    (lambda: LanguageModel(9, 6, [WeightDropLSTM(6, 8), WeightDropLSTM(9, 6)]), "layer 1 reads 9 features, and is given 8"),
    (lambda: LanguageModel(9, 6, [WeightDropLSTM(6, 6)], input_dropout=2), "p is 2"),
    (lambda: RegularizedLoss(on="droped"), "on is 'droped'"), (lambda: RegularizedLoss(alpha=-1), "alpha is -1"),
    (lambda: RegularizedLoss(beta=math.inf), "beta is inf"),
], ids=lambda value: value if isinstance(value, str) else "made")
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the model -----------------------------------------------------------------------------------
def test_the_decoder_shares_the_word_vectors_undropped():
    model = small(embedding_dropout=0.9, input_dropout=0.0, weight_drop=0.0, hidden_dropout=0.0, output_dropout=0.5)
    out = model(text())
    want = out.dropped @ model.embedding.weight.T + model.bias
    torch.testing.assert_close(out.logits, want)
    assert sum(p is model.embedding.weight for p in model.parameters()) == 1
    assert torch.equal(out.dropped[out.dropped != 0], (out.raw / 0.5)[out.dropped != 0])


def test_pieces_with_the_state_carried_equal_the_whole():
    model = small().eval()
    words = text(30, 2)
    whole, carried = model(words), Carried(model).eval()
    got = [carried(part) for part in words.split([11, 4, 15])]
    torch.testing.assert_close(torch.cat([g.logits for g in got]), whole.logits)
    torch.testing.assert_close(got[-1].state, whole.state)


def test_the_state_is_forgotten_where_another_text_begins():
    carried, words = Carried(small()).eval(), text(6)
    first = carried(words).logits
    assert not torch.equal(carried(words).logits, first)                     # it went on
    for forget in (carried.eval, lambda: carried.train().eval()):
        forget()
        assert torch.equal(carried(words).logits, first)
    carried(words[:, :1])                                                    # other streams: begins anew
    assert torch.equal(carried(words).logits, first)


def test_no_gradient_runs_into_the_last_batch():
    carried = Carried(small())
    loss = RegularizedLoss()
    for _ in range(3):
        loss(carried(text(6)), text(6, seed=2)).backward()                   # a second backward through the first would raise
    assert not any(s.requires_grad for pair in carried.state for s in pair)


def test_detached_keeps_the_shape_of_a_state():
    a = torch.ones(2, requires_grad=True) * 2
    out = detached([(a, a), a, (a, (a, None))])
    assert isinstance(out, list) and isinstance(out[0], tuple) and out[2][1][1] is None and not out[1].requires_grad


# --- the loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("on", ["raw", "dropped"])
def test_penalties_are_means_of_squares(on):
    out, targets = small()(text()), text(seed=2)
    ar = getattr(out, on).pow(2).mean()
    tar = torch.stack([(out.raw[t + 1] - out.raw[t]).pow(2).mean() for t in range(len(out.raw) - 1)]).mean()
    plain = -torch.stack([out.logits[t, b].log_softmax(0)[targets[t, b]] for t in range(9) for b in range(3)]).mean()
    torch.testing.assert_close(token_loss(out, targets), plain)
    torch.testing.assert_close(RegularizedLoss(2, 1, on)(out, targets), plain + 2 * ar + tar)
    torch.testing.assert_close(RegularizedLoss(0, 0, on)(out, targets), plain)


def test_a_batch_of_one_step_has_no_change_to_penalize():
    out = small()(text(1))
    assert RegularizedLoss(0, 5)(out, text(1)) == token_loss(out, text(1))


# --- padded sizes ----------------------------------------------------------------------------------
def odd_models():
    """Sizes that are multiples of 8, and that are not, in inputs, outputs and words; the two kinds of layers."""
    yield "lstm", awd_lstm(23, 10, 13, weight_drop=0.5)
    yield "lstm, one layer", awd_lstm(23, 9, 1, 1)
    yield "lstm, inputs alone", LanguageModel(24, 8, [WeightDropLSTM(8, 13), WeightDropLSTM(13, 8)])
    yield "lstm, words alone", awd_lstm(25, 8, 16)
    yield "lstm, even", awd_lstm(24, 8, 16)
    yield "qrnn", LanguageModel(23, 10, qrnn_layers(10, 13, 3, weight_drop=0.4), hidden_dropout=0.2)
    yield "qrnn, window of 2 throughout", LanguageModel(24, 9, [QRNN(9, 13, window=2), QRNN(13, 9, window=2, output_gate=False)])


def outcome(model, multiple, words, state=None):
    """All that a step gives: loss, gradients, states, raw and dropped outputs, and the logits."""
    pad_to(model, multiple)
    seed_everything(5)
    out = model(words[:-1], state)
    loss = F.cross_entropy(out.logits.flatten(0, 1), words[1:].flatten()) + out.raw.square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [loss, out.raw, out.dropped, *grads, *(s for pair in out.state for s in pair)], out


@pytest.mark.parametrize("multiple", [2, 8, 7, 64])
@pytest.mark.parametrize("name", [name for name, _ in odd_models()])
def test_padding_is_the_same_function(name, multiple):
    """With a state that is not zero, from the same seed, so with the same masks; two steps, so that a state is handed on."""
    seed_everything(0)
    model = dict(odd_models())[name].double()
    words, shapes = text(), {k: v.shape for k, v in model.state_dict().items()}
    _, out = outcome(model, 1, words)
    state = detached(out.state)
    plain, out = outcome(model, 1, words, state)
    padded, wide = outcome(model, multiple, words, state)
    n = out.logits.shape[2]
    assert n == len(model.bias) and wide.logits.shape[2] % multiple == 0 <= wide.logits.shape[2] - n < multiple
    torch.testing.assert_close(wide.logits[..., :n], out.logits, rtol=0, atol=1e-12)
    assert (wide.logits[..., n:] == -math.inf).all()
    for ours, theirs in zip(padded, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)                  # and the same shapes
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


def test_units_that_padding_adds_stay_zero():
    layer = WeightDropLSTM(6, 5, weight_drop=0.5)
    pad_to(layer, 8)
    shapes, weights = [(32, 8), (32, 8), (32,), (32,)], layer.weights()
    assert [tuple(w.shape) for w in weights] == shapes
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1                # one buffer, in cuDNN's order, without gaps
    assert [w.storage_offset() for w in weights] == [0, 256, 512, 544] and all(w.is_contiguous() for w in weights)
    x, state = F.pad(torch.randn(30, 3, 6), (0, 2)), 2 * (F.pad(torch.randn(1, 3, 5), (0, 3)),)
    out, h, c = torch.lstm(x, state, weights, True, 1, 0.0, True, False, False)
    assert (out[..., 5:] == 0).all() and (c[..., 5:] == 0).all() and (out[..., :5] != 0).all()


def test_padding_draws_what_was_drawn():
    """Initial weights are drawn when the model is made, masks of their own shapes in a call: the generator ends where it did."""
    ends = []
    for multiple in (1, 8):
        model = small(weight_drop=0.5)
        pad_to(model, multiple)
        model(text())
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_padding_under_autocast(device):
    for _, model in odd_models():
        model, words = model.to(device), text().to(device)
        found = []
        for multiple in (1, 8):
            pad_to(model, multiple)
            seed_everything(5)
            with torch.autocast(device, torch.bfloat16):
                out = model(words[:-1])
            found.append(token_loss(out, words[1:]))
            assert out.logits.dtype == torch.bfloat16
            assert all(g.isfinite().all() for g in torch.autograd.grad(found[-1], list(model.parameters())))
        torch.testing.assert_close(*found, rtol=0.01, atol=0)


def test_a_padded_model_is_evaluated_and_carried():
    model, words = small().eval(), text(30, 1)
    found = []
    for multiple in (1, 8):
        pad_to(model, multiple)
        carried = Carried(model).eval()
        parts = torch.cat([carried(part).logits[..., :23] for part in words.split([11, 19])])
        found.append((parts, evaluate_tokens(model, words[:, 0]).log_probs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_switch_is_off_and_can_be_turned_off():
    model = small()
    assert model.pad == 1 and {layer.pad for layer in [*model.layers, QRNN(3, 4)]} == {1}
    pad_to(Carried(model), 8)
    assert model.pad == 8 and {layer.pad for layer in model.layers} == {8} and not hasattr(model.embedding, "pad")
    pad_to(model, 1)
    assert model(text()).logits.shape[2] == 23
    with pytest.raises(ValueError, match="multiple is 0: give 8, or 1 for no padding"):
        pad_to(model, 0)
