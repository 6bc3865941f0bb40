"""Exact evaluation and the continuous cache: against definitions in plain Python, at every size of block."""
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from children import Child
from torch import nn

from nbutils.cache_pointer import (CACHE_2018, Evaluation, add_cache, cache_distribution, cache_log_probs,
                                   evaluate_tokens, mix_cache, perplexity, sweep)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import cache as bench_cache  # noqa: E402  (bench/cache.py)

VOCABULARY = 11


class Output(NamedTuple):
    logits: torch.Tensor
    state: object
    raw: torch.Tensor


class Small(nn.Module):
    """An embedding, two recurrent layers with states of their own, dropout and a linear layer."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.layers = nn.ModuleList([nn.GRU(5, 6), nn.LSTM(6, 4)])
        self.drop, self.decoder = nn.Dropout(0.5), nn.Linear(4, VOCABULARY)
        self.calls = []
        self.to(dtype)

    def forward(self, tokens, state=None):
        self.calls.append((tuple(tokens.shape), state, torch.is_grad_enabled(), self.training))
        x, states = self.embedding(tokens), []
        for layer, before in zip(self.layers, state or (None, None)):
            x, after = layer(x, before)
            states.append(after)
        return Output(self.decoder(self.drop(x)), tuple(states), x)


def draw(n, seed=0, words=VOCABULARY):
    return torch.randint(0, words, (n,), generator=torch.Generator().manual_seed(seed))


def history(n, seed=0, features=4, words=6, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    raw = torch.randn(n, features, generator=random, dtype=torch.float64).to(dtype)
    return raw, torch.randint(0, words, (n,), generator=random)


def logsumexp(values):
    top = max(values, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(v - top) for v in values))


def in_plain_python(raw, targets, theta, window):
    """log p_cache of each target by the definition, without torch."""
    raw, targets, found = raw.double().tolist(), targets.tolist(), []
    for t, word in enumerate(targets):
        past = range(max(0, t - window), t)
        scores = {i: theta * sum(a * b for a, b in zip(raw[t], raw[i])) for i in past}
        matches = logsumexp([scores[i] for i in past if targets[i] == word])
        found.append(matches - logsumexp(list(scores.values())) if matches > -math.inf else -math.inf)
    return torch.tensor(found, dtype=torch.float64)


# --- evaluation ------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [1, 2, 7, 39, 40, 1000])
def test_every_token_but_the_first_is_a_target_once(chunk):
    model, tokens = Small(), draw(41)
    out = model.eval()(tokens[:-1, None])                      # the whole text in one call
    expected = torch.stack([out.logits[t, 0].log_softmax(0)[tokens[t + 1]] for t in range(40)])
    found = evaluate_tokens(model, tokens, chunk=chunk)
    assert found.log_probs.shape == (40,) and found.raw.shape == (40, 4)
    torch.testing.assert_close(found.log_probs, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.raw, out.raw[:, 0].detach(), rtol=0, atol=1e-12)
    assert torch.equal(found.targets, tokens[1:])
    assert perplexity(found.log_probs) == pytest.approx(math.exp(-expected.mean().item()), rel=1e-12)


def test_model_is_called_in_chunks_with_the_state_and_without_gradients():
    model = Small().train()
    found = evaluate_tokens(model, draw(24), chunk=10)
    (probe, state, _, _), *calls = model.calls
    assert probe == (1, 1) and state is None                   # asks for the vocabulary's size
    assert [shape for shape, *_ in calls] == [(10, 1), (10, 1), (3, 1)]
    assert [state is None for _, state, _, _ in calls] == [True, False, False]
    assert not any(grad or training for _, _, grad, training in model.calls)
    tensors = [found.log_probs, found.raw, calls[1][1][0], *calls[1][1][1]]
    assert not any(t.requires_grad or t.grad_fn for t in tensors)
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_put_back_one_by_one(fails):
    model = Small().train()
    model.layers[0].eval()                                     # a frozen part
    before = [m.training for m in model.modules()]
    tokens = draw(9)
    if fails:
        tokens[4] = VOCABULARY
        with pytest.raises(ValueError, match="outside"):
            evaluate_tokens(model, tokens)
    else:
        evaluate_tokens(model, tokens)
    assert [m.training for m in model.modules()] == before



SWITCHES = {
    "default": "",
    "asked for": "torch.set_float32_matmul_precision('medium')",
    "older": "b.cudnn.allow_tf32 = b.cuda.matmul.allow_tf32 = True",
    "off": "b.cudnn.allow_tf32 = False",
    "newer": "b.cudnn.rnn.fp32_precision, b.cudnn.conv.fp32_precision = 'ieee', 'tf32'; b.cuda.matmul.fp32_precision = 'tf32'",
    "for all": "b.fp32_precision = 'tf32'",
}


def switches():
    """What torch says of rounding in float32, by its older and its newer switches; None where it cannot say."""
    b = torch.backends
    found = [part.fp32_precision for part in (b.cudnn.rnn, b.cudnn.conv, b.cuda.matmul, b.mkldnn.rnn, b.mkldnn.conv, b.mkldnn.matmul)]
    for read in (lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


def evaluate_under(setting):
    """In a process of its own, for some of these switches cannot be put back: what they are before, inside, after; also an error."""
    b = torch.backends  # noqa: F841
    exec(SWITCHES[setting])
    before, inside = switches(), []

    class Looks(Small):
        def forward(self, *args):
            inside.append(switches())
            if fail:
                raise KeyError("amid")
            return super().forward(*args)

    fail = False
    evaluate_tokens(Looks(), draw(8))
    after, fail = [switches()], True
    with pytest.raises(KeyError):
        evaluate_tokens(Looks(), draw(8))
    with pytest.raises(ValueError):
        evaluate_tokens(Small(), draw(8), chunk=0)
    print(json.dumps([before, inside, [*after, switches()]]))


@pytest.mark.parametrize("setting", SWITCHES)
def test_float32_is_float32_inside_and_afterwards_as_it_was(setting):
    with Child(evaluate_under, setting) as child:
        assert child.wait() == 0, child.err
        before, inside, after = json.loads(child.out)
    assert len(inside) == 3 and inside == [["ieee"] * 6 + [False, False, "highest"]] * 3
    assert after == [before, before]
    if setting != "off":
        assert before[:2] != ["ieee"] * 2 and before[6] is not False, "there was nothing to switch off"


def test_dropout_is_off():
    model, tokens = Small().train(), draw(30)
    assert torch.equal(evaluate_tokens(model, tokens).log_probs, evaluate_tokens(model, tokens).log_probs)


def test_logits_are_not_kept():
    """No tensor as large as a whole text's logits lives beside the chunk's."""
    class Wide(nn.Module):
        def forward(self, tokens, state):
            logits = torch.zeros(len(tokens), 1, 1000)
            alive.append(sum(ref() is not None for ref in made))
            made.append(weakref.ref(logits))
            return Output(logits, None, torch.zeros(len(tokens), 1, 2))

    import weakref

    made, alive = [], []
    found = evaluate_tokens(Wide(), torch.zeros(500, dtype=torch.int64), chunk=50)
    assert len(made) == 11 and max(alive[2:]) <= 1             # at most the probe's single step
    assert perplexity(found.log_probs) == pytest.approx(1000, rel=1e-5)


def test_precisions():
    tokens = draw(50)
    single, double = (evaluate_tokens(Small(dtype), tokens) for dtype in (torch.float32, torch.float64))
    assert single.log_probs.dtype == single.raw.dtype == torch.float32 and double.raw.dtype == torch.float64
    torch.testing.assert_close(single.log_probs.double(), double.log_probs, rtol=0, atol=1e-5)


def test_half_precision_logits_are_widened():
    class Pairs(Small):                                        # without a state: autocast has no LSTM on every CPU
        def forward(self, tokens, state=None):
            raw = self.embedding(tokens)[..., :4]
            return Output(self.decoder(raw), None, raw)

    tokens = draw(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = evaluate_tokens(Pairs(torch.float32), tokens)
        logits = Pairs(torch.float32)(tokens[:-1, None]).logits
    assert logits.dtype == torch.bfloat16 and half.log_probs.dtype == torch.float32
    expected = logits[:, 0].double().log_softmax(1).gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(half.log_probs.double(), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens, error, words", [
    (draw(0), ValueError, r"shape \[0\]"), (draw(1), ValueError, r"shape \[1\].*first token"),
    (draw(8).view(4, 2), ValueError, r"shape \[4, 2\]"), (draw(8).int(), TypeError, "torch.int32.*int64"),
    (draw(8).double(), TypeError, "torch.float64"),
    (torch.tensor([0, 1, VOCABULARY, 2]), ValueError, "token 11 at position 2.*vocabulary of 11"),
    (torch.tensor([0, 1, 2, -1]), ValueError, "token -1 at position 3"),
])
def test_wrong_tokens(tokens, error, words):
    with pytest.raises(error, match=words):
        evaluate_tokens(Small(), tokens)


@pytest.mark.parametrize("value", [0, -3, 2.0, True, None, "5"])
def test_wrong_whole_numbers(value):
    raw, targets = history(5)
    for call, name in ((lambda: evaluate_tokens(Small(), draw(5), chunk=value), "chunk"),
                       (lambda: cache_log_probs(raw, targets, theta=1.0, window=value), "window"),
                       (lambda: cache_log_probs(raw, targets, theta=1.0, window=3, block=value), "block")):
        if name == "block" and value is None:
            continue                                           # the device chooses
        with pytest.raises(ValueError, match=f"{name} is {value!r}.*whole number"):
            call()


def test_model_with_streams_first_is_refused():
    class Turned(Small):
        def forward(self, tokens, state=None):
            out = super().forward(tokens, state)
            return out._replace(**{self.turned: getattr(out, self.turned).transpose(0, 1)})

    for name in ("logits", "raw"):
        model = Turned()
        model.turned = name
        with pytest.raises(ValueError, match=rf"{name} have shape \[1, 7, .*time first"):
            evaluate_tokens(model, draw(8))


# --- perplexity ------------------------------------------------------------------------------------
def test_perplexity_of_k_equal_choices_is_k():
    assert perplexity(torch.full((7,), -math.log(5.0))) == pytest.approx(5, rel=1e-6)


def test_truncated_as_in_2018():
    values = -torch.arange(7, dtype=torch.float64)
    assert perplexity(values, truncate=3) == pytest.approx(math.exp(15 / 6))
    assert perplexity(values, truncate=7) == perplexity(values) == pytest.approx(math.exp(3))
    for tokens, scored in ((217_646, 216_000), (245_569, 244_000)):
        marked = torch.zeros(tokens - 1)
        marked[scored:] = -1e6                                 # nothing of the rest is counted
        assert perplexity(marked, truncate=2000) == 1.0


def test_perplexity_sums_in_float64():
    """The mean of float32 numbers as accurate as their sum in plain Python."""
    values = -torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 10
    assert perplexity(values) == pytest.approx(math.exp(-math.fsum(values.tolist()) / 200_000), rel=1e-13)


def test_impossible_targets_and_faults():
    assert perplexity(torch.tensor([-1.0, -math.inf])) == math.inf
    assert perplexity(torch.tensor([-800.0])) == math.inf
    with pytest.raises(ValueError, match=r"log_probs\[1\] is NaN"):
        perplexity(torch.tensor([-1.0, math.nan]))
    for wrong in (torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="shape"):
            perplexity(wrong)
    with pytest.raises(ValueError, match="4 targets hold no whole chunk of 5"):
        perplexity(torch.zeros(4), truncate=5)
    with pytest.raises(ValueError, match="truncate is 0"):
        perplexity(torch.zeros(4), truncate=0)


# --- the cache -------------------------------------------------------------------------------------
@pytest.mark.parametrize("theta", [0, 0.662, 50.0])
@pytest.mark.parametrize("window", [1, 2, 9, 36, 37, 1000])
@pytest.mark.parametrize("block", [1, 5, 36, 37, 64])
def test_blocks_are_the_definition(theta, window, block):
    """n = 37: windows shorter, as long and longer than the text; blocks that divide it and do not."""
    raw, targets = history(37, seed=block)
    found = cache_log_probs(raw, targets, theta=theta, window=window, block=block)
    expected = in_plain_python(raw, targets, theta, window)
    assert found[0] == -math.inf and torch.equal(found.isinf(), expected.isinf())
    seen = expected.isfinite()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("words", [1, 2])
def test_shortest_texts(n, words):
    raw, targets = history(n, words=words)
    found = cache_log_probs(raw, targets, theta=1.0, window=2)
    torch.testing.assert_close(found, in_plain_python(raw, targets, 1.0, 2), rtol=0, atol=1e-12)


def test_only_one_word_has_probability_one():
    raw, _ = history(50)
    found = cache_log_probs(raw, torch.full((50,), 3), theta=2.0, window=20, block=7)
    torch.testing.assert_close(found[1:], torch.zeros(49, dtype=torch.float64), rtol=0, atol=1e-12)


def test_distribution_is_the_definition():
    raw, targets = history(40)
    blocks = cache_log_probs(raw, targets, theta=0.7, window=15)
    for t in range(1, 40):
        past = slice(max(0, t - 15), t)
        p = cache_distribution(raw[t], raw[past], targets[past], theta=0.7, vocabulary=9)
        assert p.shape == (9,) and p.sum().item() == pytest.approx(1, abs=1e-12)
        assert p[targets[t]].item() == pytest.approx(blocks[t].exp().item(), abs=1e-12)
    with pytest.raises(ValueError, match="history is empty"):
        cache_distribution(raw[0], raw[:0], targets[:0], theta=0.7, vocabulary=9)


def test_future_and_present_do_not_matter():
    raw, targets = history(40)
    before = cache_log_probs(raw, targets, theta=1.0, window=10, block=16)
    raw[25:], targets[26:] = 100 * raw[25:], 0
    after = cache_log_probs(raw, targets, theta=1.0, window=10, block=16)
    assert torch.equal(before[:25], after[:25]) and not torch.equal(before[25:], after[25:])


def test_what_left_the_window_does_not_matter():
    raw, targets = history(40)
    before = cache_log_probs(raw, targets, theta=1.0, window=10, block=16)
    raw[:20], targets[:20] = 7 * raw[:20], targets[:20].flip(0)
    after = cache_log_probs(raw, targets, theta=1.0, window=10, block=16)
    torch.testing.assert_close(before[30:], after[30:], rtol=0, atol=1e-12)
    assert not torch.allclose(before[20:30], after[20:30])


@pytest.mark.parametrize("size", [1.0, 20.0])
def test_float32_is_stable(size):
    """At size 20 scores reach thousands: e to that is infinite in float32, e to minus that 0."""
    raw, targets = history(300, words=40)
    raw = (size * raw).float()
    found = cache_log_probs(raw, targets, theta=2.0, window=100, block=64)
    expected = in_plain_python(raw, targets, 2.0, 100)
    seen = expected.isfinite()
    assert found.dtype == torch.float32 and torch.equal(found.isfinite(), seen)
    if size > 1:
        assert expected[seen].min() < -200                     # log(exp(.)) would have lost it
    torch.testing.assert_close(found[seen].double(), expected[seen], rtol=1e-5, atol=1e-5 * size**2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype):
    raw, targets = history(60, dtype=dtype)
    torch.testing.assert_close(cache_log_probs(raw, targets, theta=1.0, window=20),
                               cache_log_probs(raw.float(), targets, theta=1.0, window=20), rtol=0, atol=0)


def test_products_are_true_float32_and_settings_are_put_back(monkeypatch):
    raw, targets = history(300, features=64, dtype=torch.float32)
    plain = cache_log_probs(raw, targets, theta=1.0, window=100)
    seen, backends = [], (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    import nbutils.cache_pointer as module

    inner = module._scores
    monkeypatch.setattr(module, "_scores", lambda *a, **k: seen.append(
        ([b.fp32_precision for b in backends], torch.is_autocast_enabled("cpu"))) or inner(*a, **k))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cache_log_probs(raw, targets, theta=1.0, window=100), plain)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        monkeypatch.setattr(module, "_scores", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache_log_probs(raw, targets, theta=1.0, window=100)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and all(found == (["ieee", "ieee"], False) for found in seen)


def test_memory_stays_within_the_block():
    """The largest tensor made is [block, window + block], and not [n, n]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return result

    raw, targets = history(3000, features=2)
    with Largest() as largest:
        cache_log_probs(raw, targets, theta=1.0, window=100, block=50)
    assert largest.numbers <= max(50 * 150, 3000 * 2)


@pytest.mark.parametrize("values", [[-2**62, 2**62, -2**62, 5, 2**62, 5], [3, 3, 3], [7, 1, 7, 1]])
def test_words_may_be_any_numbers(values):
    """Also numbers whose products with a text's length are beyond int64."""
    raw, _ = history(len(values))
    targets = torch.tensor(values)
    found = cache_log_probs(raw, targets, theta=1.0, window=4)
    torch.testing.assert_close(found, in_plain_python(raw, targets, 1.0, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 500, 3785, 10**6])
def test_a_gpus_block_is_as_large_as_its_scores_allow(window, monkeypatch):
    """And the text gives what it gives by the CPU's blocks."""
    import nbutils.cache_pointer as module

    block = module._block_size(window, "cuda")
    assert block * (window + block) <= 2**24 < (block + 1) * (window + block + 1)
    assert module._block_size(window, "cpu") == 256
    raw, targets = history(700)
    expected, choose, chosen = cache_log_probs(raw, targets, theta=1.0, window=window), module._block_size, []
    monkeypatch.setattr(module, "_SCORES", 20_000)
    monkeypatch.setattr(module, "_block_size", lambda w, device: chosen.append(choose(w, "cuda")) or chosen[-1])
    torch.testing.assert_close(cache_log_probs(raw, targets, theta=1.0, window=window), expected, rtol=0, atol=1e-12)
    assert chosen and 20 < chosen[0] < 256                    # a window longer than the text counts as the text


def test_gradients_are_not_kept():
    raw, targets = history(20)
    assert not cache_log_probs(raw.requires_grad_(), targets, theta=1.0, window=5).requires_grad


@pytest.mark.parametrize("theta", [-0.1, math.inf, math.nan, -math.inf])
def test_wrong_theta(theta):
    raw, targets = history(5)
    with pytest.raises(ValueError, match=f"theta is {theta!r}.*0 or more"):
        cache_log_probs(raw, targets, theta=theta, window=3)
    with pytest.raises(ValueError, match="theta is"):
        sweep(Evaluation(targets.double(), raw, targets), thetas=[1.0, theta], lams=[0.1], window=3)


def test_wrong_history():
    raw, targets = history(6)
    with pytest.raises(ValueError, match=r"\[6, 4\] and targets have \[5\]"):
        cache_log_probs(raw, targets[:5], theta=1.0, window=3)
    with pytest.raises(ValueError, match=r"\[0, 4\]"):
        cache_log_probs(raw[:0], targets[:0], theta=1.0, window=3)
    with pytest.raises(ValueError, match=r"\[6, 1, 4\]"):
        cache_log_probs(raw[:, None], targets, theta=1.0, window=3)
    with pytest.raises(TypeError, match="torch.int32"):
        cache_log_probs(raw, targets.int(), theta=1.0, window=3)
    for value in (math.nan, math.inf):
        raw, targets = history(6)
        raw[4, 1] = raw[5, 0] = value
        with pytest.raises(ValueError, match=r"raw\[4\] holds NaN or infinity, in 2 of 6"):
            cache_log_probs(raw, targets, theta=1.0, window=3)


def test_large_outputs_are_no_fault():
    """A sum of large numbers overflows where the numbers do not: nothing to complain of."""
    raw = torch.full((4, 3), 60_000.0, dtype=torch.float16)
    assert cache_log_probs(raw, torch.zeros(4, dtype=torch.int64), theta=1e-9, window=3)[3] == 0
    with pytest.raises(ValueError, match="theta = 1e.35.*beyond torch.float32"):
        cache_log_probs(raw, torch.zeros(4, dtype=torch.int64), theta=1e35, window=3)


# --- mixture and sweep -------------------------------------------------------------------------------
def evaluation(n=80, seed=3):
    raw, targets = history(n, seed=seed)
    log_probs = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()
    return Evaluation(log_probs, raw, targets)


@pytest.mark.parametrize("lam", [0.0, 0.1279, 1])
def test_mixture(lam):
    model, raw, targets = found = evaluation()
    mixed = add_cache(found, theta=0.662, lam=lam, window=30)
    expected = (1 - lam) * model.exp() + lam * in_plain_python(raw, targets, 0.662, 30).exp()
    expected[0] = model[0].exp()                               # no history
    torch.testing.assert_close(mixed.exp(), expected, rtol=0, atol=1e-12)
    assert mixed.dtype == torch.float64
    assert (perplexity(mixed) == math.inf) == (lam == 1)       # some word was not in the window


def test_mixture_loses_no_more_than_its_share():
    found = evaluation()
    gain = add_cache(found, theta=3.0, lam=0.3, window=10) - found.log_probs
    assert gain.min().item() == pytest.approx(math.log(0.7), abs=1e-12)


def test_mixture_leaves_its_inputs_alone():
    model, cache = torch.full((3,), -1.0), torch.full((3,), -2.0)
    mix_cache(model, cache, lam=0.5)
    assert torch.equal(model, torch.full((3,), -1.0)) and torch.equal(cache, torch.full((3,), -2.0))


@pytest.mark.parametrize("lam", [-0.01, 1.01, math.nan, math.inf])
def test_wrong_lam(lam):
    found = evaluation(5)
    for call in (lambda: mix_cache(found.log_probs, found.log_probs, lam=lam),
                 lambda: add_cache(found, theta=1.0, lam=lam, window=3),
                 lambda: sweep(found, thetas=[1.0], lams=[0.1, lam], window=3)):
        with pytest.raises(ValueError, match=f"lam is {lam!r}: it must be from 0 to 1"):
            call()


def test_wrong_lengths():
    for other in (torch.zeros(4), torch.zeros(5, 1)):
        with pytest.raises(ValueError, match=r"log_probs have shape \[5\] and cache has"):
            mix_cache(torch.zeros(5), other, lam=0.5)
    with pytest.raises(ValueError, match="shape"):
        mix_cache(torch.zeros(0), torch.zeros(0), lam=0.5)


def test_sweep_is_a_table_of_add_cache():
    found, thetas, lams = evaluation(), (0, 0.5, 2.0), (0, 0.2, 0.6, 1)
    result = sweep(found, thetas=thetas, lams=lams, window=30, block=32)
    assert result.table.shape == (3, 4) and result.thetas == thetas and result.lams == lams
    for i, theta in enumerate(thetas):
        for j, lam in enumerate(lams):
            expected = perplexity(add_cache(found, theta=theta, lam=lam, window=30))
            assert result.table[i, j].item() == pytest.approx(expected, rel=1e-12)
    i, j = thetas.index(result.theta), lams.index(result.lam)
    assert result.perplexity == result.table[i, j].item() == result.table.min().item()
    assert (result.table[:, 3] == math.inf).all()


def test_sweep_computes_each_theta_once(monkeypatch):
    import nbutils.cache_pointer as module

    thetas, inner = [], module.cache_log_probs
    monkeypatch.setattr(module, "cache_log_probs", lambda *a, theta, **k: thetas.append(theta) or inner(*a, theta=theta, **k))
    sweep(evaluation(20), thetas=iter([1.0, 2.0]), lams=iter([0.1, 0.2, 0.3]), window=5)
    assert thetas == [1.0, 2.0]


@pytest.mark.parametrize("grid", [{"thetas": [], "lams": [0.1]}, {"thetas": [1.0], "lams": []}])
def test_empty_grid(grid):
    with pytest.raises(ValueError, match="thetas or lams is empty"):
        sweep(evaluation(5), window=3, **grid)


def test_settings_of_2018():
    assert CACHE_2018 == {"theta": 0.662, "lam": 0.1279, "window": 3785}
    assert add_cache(evaluation(), **CACHE_2018).shape == (80,)


def test_from_model_to_perplexity():
    """A text that repeats itself: the cache finds it, the untrained model does not."""
    tokens = draw(30).repeat(8)
    found = evaluate_tokens(Small(), tokens, chunk=50)
    alone, both = perplexity(found.log_probs), perplexity(add_cache(found, theta=200.0, lam=0.5, window=100))
    assert both < 0.95 * alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_and_ignores_tf32():
    raw, targets = history(2000, features=400, words=300, dtype=torch.float32)
    expected = cache_log_probs(raw.double(), targets, theta=0.662, window=500)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = cache_log_probs(raw.cuda(), targets.cuda(), theta=0.662, window=500, block=512)
    finally:
        torch.set_float32_matmul_precision(before)
    seen = expected.isfinite()
    assert torch.equal(found.isfinite().cpu(), seen)
    torch.testing.assert_close(found.cpu()[seen].double(), expected[seen], rtol=0, atol=1e-3)
    tokens = draw(200)
    torch.testing.assert_close(evaluate_tokens(Small().cuda(), tokens.cuda()).log_probs.cpu(),
                               evaluate_tokens(Small(), tokens).log_probs, rtol=0, atol=1e-10)


# --- the benchmark and its records -----------------------------------------------------------------
def test_benchmark_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_cache, "WINDOW", 60)
    monkeypatch.setattr(bench_cache, "VOCABULARY", 100)
    chosen = bench_cache.arguments(["--quick", "--threads", "1", "--blocks", "16,128", "--out", str(tmp_path)])
    chosen.tokens = 500
    case = bench_cache.measure("cpu", chosen)
    names = [c["name"] for c in case["contenders"]]
    assert names == ["loop", "one-hot loop", "product alone", "blocks of 16", "blocks of 128"]
    assert all(len(c["seconds"]) == 2 for c in case["contenders"]) and case["largest_difference"] < 1e-4
    assert "goal: 100 times" in bench_cache.report(case)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, words", [
    (["--tokens", "3786"], "leaves 0"), (["--blocks", "8,x"], "whole numbers"), (["--blocks", "0"], "1 or more"),
    (["--rounds", "0"], "--rounds must be"), (["--device", "tpu"], "invalid choice")])
def test_benchmark_refuses(wrong, words, capsys):
    with pytest.raises(SystemExit):
        bench_cache.arguments(wrong)
    assert words in capsys.readouterr().err


def test_benchmark_would_notice_other_work(monkeypatch):
    import nbutils.cache_pointer as module

    monkeypatch.setattr(bench_cache, "WINDOW", 60)
    monkeypatch.setattr(bench_cache, "VOCABULARY", 100)
    inner = module.cache_log_probs
    monkeypatch.setattr(module, "cache_log_probs", lambda *a, theta, **k: inner(*a, theta=1.1 * theta, **k))
    chosen = bench_cache.arguments(["--quick", "--threads", "1"])
    chosen.tokens = 500
    with pytest.raises(SystemExit, match="differ by.*no record"):
        bench_cache.measure("cpu", chosen)


def test_figures_from_a_record():
    case = {"window": 10, "features": 4, "contenders": [
        {"name": "loop", "block": None, "tokens": 10, "seconds": [1.0, 2.0, 3.0]},
        {"name": "blocks of 4", "block": 4, "tokens": 100, "seconds": [1.0, 1.0, 2.0]},
        {"name": "blocks of 8", "block": 8, "tokens": 100, "seconds": [2.0, 2.0, 2.0]}]}
    assert bench_cache.microseconds(case, "loop") == pytest.approx(2e5)
    assert bench_cache.speedup(case, "blocks of 4") == pytest.approx((15, 10, 20))
    assert bench_cache.fastest(case) == "blocks of 4"
    assert bench_cache.products_per_second(case, "blocks of 4") == pytest.approx(8000)
    assert bench_cache.both_splits_seconds(case) == pytest.approx((217_645 + 245_568) / 100)


@pytest.mark.parametrize("path", sorted(bench_cache.RECORDS.glob("*.json")), ids=lambda p: p.stem)
def test_records(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["name"] == path.stem and record["load"]["before"] and record["versions"]
    measured = [case for case in record["cases"] if not case["not_run"]]
    assert measured
    for case in measured:
        assert case["tokens"] == bench_cache.SPLITS["valid"] and case["largest_difference"] < 1e-3
        assert {"loop", "one-hot loop", "product alone"} < {c["name"] for c in case["contenders"]}
        assert all(len(c["seconds"]) == case["rounds"] for c in case["contenders"])


def test_there_is_a_record():
    assert bench_cache.newest()
