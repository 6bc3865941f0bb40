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
    token_loss,
)
from nbutils.core import seed_everything

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
