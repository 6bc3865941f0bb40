"""What the QRNN's kernel must do: run by test_qrnn.py, on a GPU or by Triton's interpreter on the CPU."""
import pytest
import torch

from nbutils import qrnn

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Triton's interpreter cuts digits off where a GPU rounds to bfloat16.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.04 if GPU else 0.2}


def gates(shape, dtype, gated=True, memory=True):
    random = torch.Generator().manual_seed(0)
    draw = torch.randn(3, *shape, generator=random)
    c = torch.rand(shape[1:], generator=random) * 2 - 1
    made = [draw[0].tanh(), draw[1].sigmoid(), draw[2].sigmoid() if gated else None, c if memory else None]
    wide = torch.promote_types(dtype, torch.float32)
    kinds = (dtype, dtype, dtype, wide)
    return [None if t is None else t.to(DEVICE, kind).requires_grad_() for t, kind in zip(made, kinds)]


def results(pool, given):
    """Outputs and gradients in float64, for a fixed weighting of the outputs."""
    h, last = pool(*given)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=random).to(t) for t in (h, last)]
    leaves = [t for t in given if t is not None]
    return [t.double() for t in (h, last, *torch.autograd.grad((h, last), leaves, weights))]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 2, 3), (5, 2, 64), (6, 3, 100)])
def test_kernel_is_the_loop_in_float64(shape, gated, dtype):
    """Columns less than a block, just one, and some; from the gates as they were rounded."""
    given = gates(shape, dtype, gated)
    truth = results(qrnn.pool_loop, [None if t is None else t.detach().double().requires_grad_() for t in given])
    for ours, theirs in zip(results(qrnn.pool_kernel, given), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCES[dtype])


def test_dtypes_that_come_out():
    z, f, o, c = gates((3, 2, 5), torch.bfloat16)
    h, last = qrnn.pool_kernel(z, f, o, c)
    assert h.dtype == torch.bfloat16 and last.dtype == torch.float32
    found = torch.autograd.grad((h.sum() + last.sum()), (z, f, o, c))
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32]


def test_memory_is_kept_in_float32():
    """Steps that bfloat16 would lose: from 1 to 0 by 1/1000 of what is left."""
    n = 200
    z, f = torch.zeros(n, 1, 4, device=DEVICE, dtype=torch.bfloat16), torch.full((n, 1, 4), 1e-3, device=DEVICE, dtype=torch.bfloat16)
    _, last = qrnn.pool_kernel(z, f, None, torch.ones(1, 4, device=DEVICE))
    torch.testing.assert_close(last, torch.full_like(last, (1 - f[0, 0, 0].item()) ** n), rtol=1e-4, atol=0)


def test_no_memory_means_zeros():
    z, f, o, _ = gates((4, 2, 3), torch.float64, memory=False)
    for ours, theirs in zip(qrnn.pool_kernel(z, f, o), qrnn.pool_kernel(z, f, o, z.new_zeros(2, 3))):
        assert torch.equal(ours, theirs)


def test_gates_and_gradients_that_are_not_contiguous():
    z, f, o, c = gates((4, 3, 6), torch.float64)

    def turned(pool):
        h, last = pool(*(t.transpose(1, 2) for t in (z, f, o)), c.t())
        return torch.autograd.grad(h.transpose(0, 1).sum() + last.sum(), (z, f, o, c))     # an expanded gradient

    for ours, theirs in zip(turned(qrnn.pool_kernel), turned(qrnn.pool_loop), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_only_one_of_the_outputs_is_used():
    given = gates((4, 2, 3), torch.float64)
    for pick in (0, 1):
        ours, theirs = (torch.autograd.grad(pool(*given)[pick].sum(), given, allow_unused=True, materialize_grads=True)
                        for pool in (qrnn.pool_kernel, qrnn.pool_loop))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def penalized(pool, given):
    """Gradients of a sum plus a penalty on its gradient at z: of all gates, though only z's gradient is penalized."""
    loss = pool(*given)[0].sum()
    gradient, = torch.autograd.grad(loss, given[0], create_graph=True)
    return torch.autograd.grad(loss + gradient.square().sum(), [t for t in given if t is not None])


@pytest.mark.parametrize("gated", [True, False])
def test_a_penalty_on_the_gradient(gated):
    ours, loop = (penalized(pool, gates((4, 2, 3), torch.float64, gated)) for pool in (qrnn.pool_kernel, qrnn.pool_loop))
    for a, b in zip(ours, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_streams():
    z = torch.zeros(3, 0, 4, device=DEVICE)
    h, last = qrnn.pool_kernel(z, z, z)
    assert h.shape == (3, 0, 4) and last.shape == (0, 4)


@pytest.mark.skipif(not GPU, reason="the kernel is chosen on a GPU")
def test_lengths_do_not_compile_anew():
    kernels = qrnn._load_kernels()
    for steps in (1, 2, 16, 17, 70):
        results(qrnn.pool_kernel, gates((steps, 4, 32), torch.float32))
        if steps == 1:
            before = [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]
    assert [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels] == before


@pytest.mark.skipif(not GPU, reason="the kernel is chosen on a GPU")
def test_the_layer_takes_the_kernel_on_a_gpu(monkeypatch):
    calls, kernel = [], qrnn.pool_kernel
    monkeypatch.setattr(qrnn, "pool_kernel", lambda *a: calls.append(1) or kernel(*a))
    layer = qrnn.QRNN(6, 5, window=2).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        h, (c, _) = layer(torch.randn(4, 3, 6, device=DEVICE))
    assert calls and h.dtype == torch.bfloat16 and c.dtype == torch.float32
