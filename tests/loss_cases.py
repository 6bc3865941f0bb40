"""What the loss kernel must do: run by test_loss.py, on a GPU or by Triton's interpreter on the CPU."""
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nbutils import awd_lstm
from nbutils.awd_lstm import LanguageOutput, cross_entropy_kernel, token_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INF, NAN = math.inf, math.nan
# A gradient is rounded once, to the logits' dtype; Triton's interpreter cuts digits of bfloat16 off. In float32, exp's own error counts.
ULP = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FLAT = 3e-7                                          # of the gradient that the row gets: where p - 1 cancels


def drawn(n, columns, dtype=torch.float32, scale=5.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, columns, generator=g)).to(dtype)
    return logits.to(DEVICE), torch.randint(columns, (n,), generator=g).to(DEVICE)


def both(logits, targets, upstream=1.0):
    """(loss, gradient) of the kernel and of the definition in float64, each with the loss times ``upstream``."""
    found = []
    for loss, given in ((cross_entropy_kernel, logits), (F.cross_entropy, logits.double())):
        leaf = given.detach().requires_grad_()
        value = loss(leaf, targets)
        found.append((value.detach(), torch.autograd.grad(upstream * value, leaf)[0]))
    return found


def assert_same(logits, targets, upstream=1.0):
    (ours, gradient), (exact, true) = both(logits, targets, upstream)
    assert ours.dtype == torch.float32 and ours.shape == () and gradient.dtype == logits.dtype
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    smallest = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps       # of numbers below the normal ones
    torch.testing.assert_close(gradient.double(), true, rtol=ULP[logits.dtype], equal_nan=True,
                               atol=FLAT * abs(upstream) / len(logits) + smallest)
    return ours, gradient


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("n, columns", [(1, 1), (1, 7), (3, 100), (2, 4096), (2, 4097), (3, 9001)])
def test_kernel_is_the_definition_in_float64(n, columns, dtype):
    """Columns less than a block, just one, one more, and some blocks and a part; at the logits as they were rounded."""
    assert_same(*drawn(n, columns, dtype))


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 32, 33, 61])
def test_edges_of_blocks_do_not_show(columns, monkeypatch):
    monkeypatch.setattr(awd_lstm, "_WIDTH", 16)
    targets = torch.tensor([place for place in (0, 15, 16, columns - 1) if place < columns], device=DEVICE)
    logits, _ = drawn(len(targets), columns)
    assert_same(logits, targets)
    assert_same(logits.sort(dim=1).values, targets)                      # the maximum rises in each block
    assert_same(logits.sort(dim=1, descending=True).values, targets)     # and in none


@pytest.mark.parametrize("seed", range(20))
def test_drawn_cases(seed, monkeypatch):
    r = random.Random(seed)
    monkeypatch.setattr(awd_lstm, "_WIDTH", r.choice([32, 128]))
    n, columns = r.randint(1, 4), r.randint(2, 400)
    dtype, wide = r.choice(list(ULP)), r.randint(0, 9)
    logits, targets = drawn(n, columns + wide, dtype, r.choice([0.01, 1.0, 30.0, 1000.0]), seed)
    logits, targets = logits[:, :columns], targets % columns
    gone = torch.rand(n, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < r.choice([0.0, 0.3, 0.95])
    logits = logits.masked_fill(gone.scatter(1, targets[:, None], False), -INF)
    assert_same(logits, targets, r.choice([1.0, 0.0, -2.5, 1000.0]))


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e6), (torch.float16, 6e4), (torch.bfloat16, 1e30)])
def test_logits_far_from_zero(dtype, far):
    for shift in (far, -far):
        assert_same(drawn(3, 50, torch.float32)[0].add(shift).to(dtype), torch.tensor([0, 7, 49], device=DEVICE))
    spread = torch.tensor([[far, -far, 0.0], [-far, -far, far]], device=DEVICE).to(dtype)
    for targets in ([0, 2], [1, 0]):                                                 # certain and right; certain and wrong
        assert_same(spread, torch.tensor(targets, device=DEVICE))


def test_columns_of_minus_infinity(monkeypatch):
    """Padding at the end; a first block, and a middle one, that hold nothing else."""
    monkeypatch.setattr(awd_lstm, "_WIDTH", 16)
    for gone in (slice(60, 64), slice(0, 16), slice(0, 33), slice(16, 48), slice(1, None)):
        logits, targets = drawn(3, 64)
        logits[:, gone] = -INF
        targets[:] = int(torch.nonzero(logits[0] > -INF)[-1])
        _, gradient = assert_same(logits, targets)
        assert (gradient[:, gone] == 0).all() and gradient[:, int(targets[0])].abs().max() > 0 or gone == slice(1, None)


def test_padding_changes_no_bit_of_the_loss():
    logits, targets = drawn(4, 33, torch.bfloat16)
    plain, padded = (both(x, targets)[0] for x in (logits, F.pad(logits, (0, 7), value=-INF)))
    assert torch.equal(plain[0], padded[0]) and torch.equal(plain[1], padded[1][:, :33]) and (padded[1][:, 33:] == 0).all()


def test_what_has_no_finite_loss_is_torchs():
    """A target that is impossible: inf, with a finite gradient; a row of -inf, an inf, a NaN: NaN."""
    logits, targets = drawn(2, 40)
    logits[0, targets[0]] = -INF
    ours, gradient = assert_same(logits, targets)
    assert ours == INF and gradient.isfinite().all()
    for value, place in ((-INF, slice(None)), (INF, 3), (NAN, 3), (NAN, slice(None))):
        logits, targets = drawn(2, 40)
        logits[0, place] = value
        ours, gradient = assert_same(logits, targets)
        assert ours.isnan() and gradient[0].isnan().any() and gradient[1].isfinite().all()


def test_rows_that_lie_apart():
    """Gradients arrive where the logits are: in part of a wider tensor, turned, every other row, one row for all."""
    views = [lambda x: x[:, 2:30], lambda x: x.t(), lambda x: x[::2], lambda x: x[:1].expand(4, 37), lambda x: x[:, ::3]]
    for view in views:
        found = []
        for loss, dtype in ((cross_entropy_kernel, torch.float32), (F.cross_entropy, torch.float64)):
            base = drawn(9, 37)[0].to(dtype).requires_grad_()
            logits = view(base)
            value = loss(logits, torch.arange(len(logits), device=DEVICE) % logits.shape[1])
            found.append((value.double(), torch.autograd.grad(value, base)[0].double()))
        for ours, true in zip(*found, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-6)


def test_targets_that_lie_apart():
    logits, targets = drawn(4, 9)
    assert torch.equal(cross_entropy_kernel(logits, torch.stack([targets, targets + 1], 1)[:, 0]), cross_entropy_kernel(logits, targets))


def test_rows_beyond_32_bits():
    """The third row begins 2^31 numbers behind the first. Most of the memory is never touched."""
    apart = 2**30
    logits = torch.empty(2 * apart + 8, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 8), (apart, 1))
    dense = drawn(3, 8, torch.bfloat16)[0]
    logits.copy_(dense)
    targets = torch.tensor([1, 2, 3], device=DEVICE)
    for ours, theirs in zip(both(logits, targets)[0], both(dense, targets)[0], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("upstream", [65536.0, 0.0, -1.0, INF, -INF, NAN])
def test_what_comes_from_above(upstream):
    """A factor on the device, as of a gradient scaler; one that is not finite leaves no finite gradient."""
    found = []
    for loss, dtype in ((cross_entropy_kernel, torch.float16), (F.cross_entropy, torch.float64)):
        logits, targets = drawn(3, 50, torch.float16)
        leaf = logits.to(dtype).requires_grad_()
        (loss(leaf, targets) * torch.tensor(upstream, device=DEVICE)).backward()
        found.append(leaf.grad.to(torch.float16).double())
    if math.isfinite(upstream):
        torch.testing.assert_close(*found, rtol=2**-10, atol=abs(upstream) / 3 * FLAT + 6e-8)
    else:
        assert not any(gradient.isfinite().any() for gradient in found)


def test_it_is_one_term_of_a_sum():
    """The penalties' gradients meet the loss's, at the logits too."""
    found = []
    for loss, dtype in ((cross_entropy_kernel, torch.float32), (F.cross_entropy, torch.float64)):
        logits, targets = drawn(3, 50)
        leaf = logits.to(dtype).requires_grad_()
        (loss(leaf, targets) + 0.1 * leaf.square().mean() + 2 * loss(leaf, targets)).backward()
        found.append(leaf.grad.double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=FLAT)


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_a_rows_gradient_adds_up_to_nothing(dtype):
    logits, targets = drawn(4, 600, dtype)
    _, gradient = both(logits, targets, upstream=4.0)[0]
    size = gradient.double().abs().sum(1)
    assert (gradient.double().sum(1).abs() <= (1e-6 + ULP[dtype]) * size).all() and (size > 0.1).all()


@pytest.mark.parametrize("wrong", [-1, 50, -100, 2**31, 2**40, -2**62])
def test_a_target_outside_is_nan_in_its_row_alone(wrong):
    logits, targets = drawn(3, 50)
    targets[1] = wrong
    leaf = logits.requires_grad_()
    loss = cross_entropy_kernel(leaf, targets)
    gradient = torch.autograd.grad(loss, leaf)[0]
    assert loss.isnan() and gradient[1].isnan().all()
    exact = both(logits, targets.clamp(0, 49))[1][1]
    torch.testing.assert_close(gradient[[0, 2]].double(), exact[[0, 2]], rtol=1e-5, atol=FLAT)


def test_nothing_to_read():
    for shape in ((0, 5), (0, 0)):
        leaf = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        loss = cross_entropy_kernel(leaf, torch.zeros(0, device=DEVICE, dtype=torch.int64))
        assert loss.isnan() and torch.autograd.grad(loss, leaf)[0].shape == shape


def test_the_logits_stay_and_the_graph_can_be_used_twice():
    logits, targets = drawn(3, 50, torch.bfloat16)
    before, leaf = logits.clone(), logits.requires_grad_()
    loss = cross_entropy_kernel(leaf, targets)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(leaf.detach(), before) and first.data_ptr() != leaf.data_ptr()


def test_a_change_of_the_logits_is_noticed():
    logits, targets = drawn(3, 50)
    scores = logits.requires_grad_() * 1
    loss = cross_entropy_kernel(scores, targets)
    with torch.no_grad():
        scores.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_penalty_on_the_gradient():
    """What is differentiated twice is right, or raises; a gradient that silently counts as a constant is neither."""
    found = []
    for loss, dtype in ((cross_entropy_kernel, torch.float32), (F.cross_entropy, torch.float64)):
        logits, targets = drawn(3, 50)
        leaf = logits.to(dtype).requires_grad_()
        value = 2 * loss(leaf * 1, targets)
        gradient = torch.autograd.grad(value, leaf, create_graph=True)[0]
        (value + 10 * gradient.square().sum()).backward()
        found.append(leaf.grad.double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_evaluation_runs_the_forward_alone(monkeypatch):
    logits, targets = drawn(3, 50)
    monkeypatch.setattr(awd_lstm, "_load_kernels", lambda kernels=awd_lstm._load_kernels(): (kernels[0], None))
    leaf = logits.requires_grad_()
    with torch.no_grad():
        loss = cross_entropy_kernel(leaf, targets)
    assert not loss.requires_grad and torch.equal(loss, cross_entropy_kernel(logits.detach(), targets))


class NoWait(TorchDispatchMode):
    """Refuses what makes the CPU wait for the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.name().split(".")[0] not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"), function
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_gpu():
    logits, targets = drawn(3, 50, torch.float16)
    leaf, scale = logits.requires_grad_(), torch.tensor(1024.0, device=DEVICE)
    (cross_entropy_kernel(leaf, targets) * scale).backward()                         # compiles, which may wait
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWait():
            (cross_entropy_kernel(leaf, targets) * scale).backward()
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


class Made(TorchDispatchMode):
    """Notes dtypes of what is as large as the logits."""

    def __init__(self, size):
        super().__init__()
        self.size, self.dtypes = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.numel() >= self.size and not function.is_view:
            self.dtypes.add(out.dtype)
        return out


def test_nothing_as_large_as_the_logits_is_made_in_float32():
    logits, targets = drawn(3, 50, torch.float16)
    leaf = logits.requires_grad_()
    with Made(leaf.numel()) as made:
        cross_entropy_kernel(leaf, targets).backward()
    assert torch.float16 in made.dtypes and torch.float32 not in made.dtypes      # the interpreter makes bytes too


def test_losses_of_rows_that_are_added_up():
    """What comes from above is then one number for all rows, of stride 0."""
    logits, targets = drawn(3, 50)
    leaf = logits.requires_grad_()
    gradient, = torch.autograd.grad(awd_lstm._CrossEntropy.apply(leaf, targets).sum(), leaf)
    torch.testing.assert_close(gradient.double(), 3 * both(logits, targets)[1][1], rtol=1e-5, atol=3 * FLAT)


@pytest.mark.skipif(not GPU, reason="the kernel is chosen on a GPU")
def test_numbers_of_rows_do_not_compile_anew():
    kernels = awd_lstm._load_kernels()
    for n in (1, 2, 16, 17, 70):
        both(*drawn(n, 333, torch.bfloat16))
        if n == 1:
            before = [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]
    assert [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels] == before


@pytest.mark.skipif(not GPU, reason="the kernel is chosen on a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_takes_the_kernel_on_a_gpu(dtype, monkeypatch):
    calls, kernel = [], cross_entropy_kernel
    monkeypatch.setattr(awd_lstm, "cross_entropy_kernel", lambda *a: calls.append(1) or kernel(*a))
    model = awd_lstm.awd_lstm(333, 40, 50).to(DEVICE)
    words = torch.randint(333, (9, 4), device=DEVICE)
    with torch.autocast("cuda", dtype):
        out = model(words[:-1])
    loss = token_loss(out, words[1:])
    loss.backward()
    plain = F.cross_entropy(out.logits.flatten(0, 1).float(), words[1:].flatten())
    assert calls and out.logits.dtype == dtype
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_logits_of_a_language_model():
    """[steps, streams, words], as token_loss flattens them: part of a padded tensor included."""
    logits, targets = drawn(12, 40, torch.bfloat16)
    for given in (logits.view(3, 4, 40), logits.view(3, 4, 40)[..., :37], logits.view(4, 3, 40).transpose(0, 1)):
        out, y = LanguageOutput(given, [], None, None), targets.view(3, 4) % 37
        flat = given.flatten(0, 1)
        torch.testing.assert_close(cross_entropy_kernel(flat, y.flatten()), token_loss(out, y), rtol=1e-6, atol=1e-6)
