"""The QRNN: each way of pooling is the loop, in numbers and gradients; the layer, its state, its drops; the benchmark."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from qrnn_cases import gates, penalized, results

from nbutils import qrnn
from nbutils.core import seed_everything
from nbutils.qrnn import QRNN, pool_kernel, pool_loop, pool_scan, qrnn_layers, recurrent_pool

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CASES = re.findall(r"^def (test_\w+)", (HERE / "qrnn_cases.py").read_text(), re.M)
ON_GPU_ONLY = {"test_lengths_do_not_compile_anew", "test_the_layer_takes_the_kernel_on_a_gpu"}
RECORDS = sorted((ROOT / "book/records/qrnn").glob("*.json"))

sys.path.insert(0, str(ROOT / "bench"))
import qrnn as bench  # noqa: E402  (bench/qrnn.py)


def cpu_gates(shape, dtype=torch.float64, gated=True):
    return [None if t is None else t.detach().cpu().requires_grad_() for t in gates(shape, dtype, gated)]


# --- the kernel, in a process of its own ---------------------------------------------------------
@pytest.fixture(scope="module")
def outcomes():
    """Each case's line, from one process: on the GPU, or where Triton's interpreter plays the GPU."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "--noconftest", "-p", "no:cacheprovider", "-c",
                           os.devnull, "--rootdir", str(HERE), str(HERE / "qrnn_cases.py")],
                          env=environment, cwd=HERE, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_case(case, outcomes):
    if case in ON_GPU_ONLY and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    lines = re.findall(rf"^(PASSED|FAILED|ERROR|SKIPPED).*::{case}(?:\[|\s|$)", outcomes, re.M)
    assert lines and set(lines) == {"PASSED"}, outcomes[-6000:]


# --- the ways of pooling ---------------------------------------------------------------------------
def test_loop_is_its_formula():
    z, f, o, c = (t.tolist() for t in cpu_gates((5, 1, 1)))
    memory = c[0][0]
    h, last = pool_loop(*(torch.tensor(t, dtype=torch.float64) for t in (z, f, o, c)))
    for t in range(5):
        memory = f[t][0][0] * z[t][0][0] + (1 - f[t][0][0]) * memory
        assert h[t].item() == pytest.approx(o[t][0][0] * memory, abs=1e-15)
    assert last.item() == pytest.approx(memory, abs=1e-15)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 2, 3), (3, 300, 500), (70, 20, 200), (2, 600, 500)])
def test_scan_is_the_loop(shape, gated):
    """Sizes of one chunk, of one and a part, of a chunk a step, of steps larger than a chunk."""
    given = cpu_gates(shape, gated=gated)
    for ours, theirs in zip(results(pool_scan, given), results(pool_loop, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 6, 7, 24, 10**6])
def test_chunks_do_not_show(chunk, monkeypatch):
    given = cpu_gates((9, 2, 3))
    expected = results(pool_loop, given)
    monkeypatch.setattr(qrnn, "_CHUNK", chunk)
    for ours, theirs in zip(results(pool_scan, given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("gated", [True, False])
def test_scan_in_lower_precision(dtype, atol, gated):
    given = cpu_gates((70, 3, 40), dtype, gated)
    truth = results(pool_loop, [None if t is None else t.detach().double().requires_grad_() for t in given])
    h, last = pool_scan(*given)
    assert h.dtype == dtype and last.dtype == torch.float32
    for ours, theirs in zip(results(pool_scan, given), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_gradcheck():
    assert torch.autograd.gradcheck(pool_scan, cpu_gates((4, 2, 3)))
    z, f, _, c = cpu_gates((4, 2, 3), gated=False)
    assert torch.autograd.gradcheck(lambda z, f, c: pool_scan(z, f, None, c), (z, f, c))


def test_twice_through_one_graph():
    """The backward leaves what was saved as it was."""
    given = cpu_gates((6, 2, 3))
    h, last = pool_scan(*given)
    first, second = (torch.autograd.grad(h.sum() + last.sum(), given, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_scan_can_be_differentiated_twice():
    """A penalty on a gradient must reach all gates; it would silently count as a constant where the backward is cut off."""
    assert torch.autograd.gradgradcheck(pool_scan, cpu_gates((4, 2, 3)))
    z, f, _, c = cpu_gates((4, 2, 3), gated=False)
    assert torch.autograd.gradgradcheck(lambda z, f, c: pool_scan(z, f, None, c), (z, f, c))
    shared = cpu_gates((4, 2, 3))
    for given in (cpu_gates((4, 2, 3)), [shared[0], shared[0], shared[0], shared[3]]):         # one tensor as all gates, too
        for a, b in zip(penalized(pool_scan, given), penalized(pool_loop, given), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", [0.0, 1e-7, 1.0])
def test_gates_at_their_ends(gate):
    """No division, so shut and open gates give numbers: what was kept, or what is new."""
    z, f = torch.linspace(-1, 1, 400).view(400, 1, 1), torch.full((400, 1, 1), gate)
    f.requires_grad_()
    h, last = pool_scan(z, f, None, torch.full((1, 1), 0.5))
    last.sum().backward()
    assert f.grad.isfinite().all()
    assert last.item() == pytest.approx({0.0: 0.5, 1e-7: 0.5, 1.0: 1.0}[gate], abs=1e-4)


def test_layouts_of_gates():
    z, f, o, c = cpu_gates((4, 3, 6))

    def turned(pool):
        h, last = pool(*(t.transpose(1, 2) for t in (z, f, o)), c.t())
        return torch.autograd.grad(h.transpose(0, 1).sum() + last.sum(), (z, f, o, c))

    for ours, theirs in zip(turned(pool_scan), turned(pool_loop), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_dispatch(monkeypatch):
    """The CPU takes the scan; a GPU the kernel, or the scan where Triton is missing."""
    class Gate:
        def __init__(self, device):
            self.device = torch.device(device)
            self.is_cuda = self.device.type == "cuda"

    monkeypatch.setattr(qrnn, "pool_scan", lambda *a: "scan")
    monkeypatch.setattr(qrnn, "pool_kernel", lambda *a: "kernel")
    monkeypatch.setattr(qrnn, "_TRITON_IS_THERE", True)
    assert recurrent_pool(Gate("cpu"), None) == "scan" and recurrent_pool(Gate("cuda"), None) == "kernel"
    monkeypatch.setenv("TRITON_INTERPRET", "1")                  # the interpreter is for those who ask for the kernel
    assert recurrent_pool(Gate("cpu"), None) == "scan"
    monkeypatch.setattr(qrnn, "_TRITON_IS_THERE", False)
    assert recurrent_pool(Gate("cuda"), None) == "scan"


def test_why_there_is_no_kernel(monkeypatch):
    z = torch.zeros(2, 1, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(qrnn, "_TRITON_IS_THERE", True)
    with pytest.raises(ValueError, match="run on CUDA GPUs, and the gates are on cpu; use pool_scan or recurrent_pool"):
        pool_kernel(z, z)
    monkeypatch.setattr(qrnn, "_TRITON_IS_THERE", False)
    with pytest.raises(ValueError, match="Triton, which makes the kernel, is not installed; use pool_scan"):
        pool_kernel(z, z)


def test_triton_is_not_imported_with_the_module():
    program = "import sys, nbutils.qrnn; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("pool", [pool_loop, pool_scan, pool_kernel, recurrent_pool])
def test_bad_gates(pool, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    z = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match=r"z has the shape \(2, 4\): it must be \[steps, streams, channels\]"):
        pool(z[0], z[0])
    with pytest.raises(ValueError, match=r"z has the shape \(0, 2, 4\).* one step at least"):
        pool(z[:0], z[:0])
    with pytest.raises(ValueError, match=r"f is torch.float32 of shape \(2, 2, 4\) and z is .*must be alike"):
        pool(z, z[:2])
    with pytest.raises(ValueError, match="f is torch.float64 .* and z is torch.float32"):
        pool(z, z.double())
    with pytest.raises(ValueError, match=r"o is torch.float32 of shape \(3, 2, 1\)"):
        pool(z, z, z[..., :1])
    with pytest.raises(ValueError, match=r"memory has the shape \(2, 5\).* must be \[streams, channels\], \(2, 4\)"):
        pool(z, z, z, torch.zeros(2, 5))


# --- the layer -------------------------------------------------------------------------------------
def by_hand(layer, x, c=None, before=None):
    """The layer as sums of its gates, with the weights looked up one gate at a time."""
    n, inputs = layer.hidden_size, layer.input_size
    w, b = layer.linear.weight, layer.linear.bias
    c = x.new_zeros(x.shape[1], n) if c is None else c
    before = torch.zeros_like(x[0]) if before is None else before
    out = []
    for x_t in x:
        z, f, *o = (x_t @ w[k:k + n, :inputs].t() + b[k:k + n]
                    + (before @ w[k:k + n, inputs:].t() if layer.window == 2 else 0) for k in range(0, len(b), n))
        f = f.sigmoid()
        c = f * z.tanh() + (1 - f) * c
        out.append(o[0].sigmoid() * c if o else c)
        before = x_t
    return torch.stack(out), c


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("output_gate", [True, False])
def test_layer_is_its_formula(window, output_gate):
    seed_everything(0)
    layer = QRNN(5, 4, window=window, output_gate=output_gate).double()
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    c, before = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for state, given in ((None, ()), ((c, before), (c, before))):
        h, (last, last_x) = layer(x, state)
        expected, memory = by_hand(layer, x, *given)
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(last, memory, rtol=0, atol=1e-12)
        assert torch.equal(last_x, x[-1]) and last_x.untyped_storage().nbytes() == 3 * 5 * 8
    assert tuple(layer.linear.weight.shape) == ((3 if output_gate else 2) * 4, window * 5)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_text_in_two_parts(window, cut):
    layer = QRNN(5, 4, window=window).double()
    x = torch.randn(7, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, 3, 4, dtype=torch.float64)
    whole, _ = layer(x)
    first, state = layer(x[:cut])
    second, _ = layer(x[cut:], state)
    parts = torch.cat([first, second])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(parts, x, g)[0], torch.autograd.grad(whole, x, g)[0],
                               rtol=0, atol=1e-12)


def test_the_last_input_counts():
    layer = QRNN(5, 4, window=2)
    x, (c, before) = torch.randn(3, 2, 5), layer(torch.randn(4, 2, 5))[1]
    assert not torch.allclose(layer(x, (c, before))[0], layer(x, (c, torch.zeros_like(before)))[0], atol=1e-3)


def test_detached_states_end_the_graph():
    layer = QRNN(5, 4, window=2)
    x = torch.randn(3, 2, 5, requires_grad=True)
    state = tuple(t.detach() for t in layer(x)[1])
    layer(torch.randn(3, 2, 5), state)[0].sum().backward()
    assert x.grad is None


def test_weight_drop():
    seed_everything(0)
    layer = QRNN(30, 20, window=2, weight_drop=0.25)
    x = torch.randn(4, 3, 30)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer(x)[0].sum().backward()
    reached = (layer.linear.weight.grad != 0).float().mean().item()
    assert reached == pytest.approx(0.75, abs=4 * math.sqrt(0.25 * 0.75 / layer.linear.weight.numel()))
    assert (layer.linear.bias.grad != 0).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_weight_drop_is_one_mask_for_all_steps():
    """With the same input at each step all steps see the same gates, and so do all streams: c nears z."""
    layer = QRNN(6, 5, weight_drop=0.5, output_gate=False).double()
    h, _ = layer(torch.ones(2000, 2, 6, dtype=torch.float64))
    torch.testing.assert_close(h[:, 0], h[:, 1], rtol=0, atol=1e-12)
    z = h[0] / (1 - (h[2] - h[1]) / (h[1] - h[0]))             # c1 = f z; (c3 - c2) / (c2 - c1) = 1 - f
    torch.testing.assert_close(z, h[-1], rtol=0, atol=1e-9)


def test_weight_drop_is_torchs_dropout():
    layer, twin = QRNN(6, 5, weight_drop=0.5), QRNN(6, 5)
    x = torch.randn(3, 2, 6)
    seed_everything(3)
    ours, _ = layer(x)
    seed_everything(3)
    with torch.no_grad():
        twin.linear.weight.copy_(F.dropout(layer.linear.weight, 0.5))
        twin.linear.bias.copy_(layer.linear.bias)
    assert torch.equal(ours, twin(x)[0])


def test_every_parameter_learns():
    seed_everything(0)
    layers = qrnn_layers(6, 9, n=3)
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=0.01)
    x, target = torch.randn(8, 4, 6), torch.rand(8, 4, 6) * 0.5
    before, losses = [p.clone() for layer in layers for p in layer.parameters()], []
    for _ in range(60):
        h = x
        for layer in layers:
            h, _ = layer(h)
        losses.append(F.mse_loss(h, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all((p != q).any() for p, q in zip(before, (p for layer in layers for p in layer.parameters())))


def test_autocast():
    layer = QRNN(16, 8, window=2)
    x = torch.randn(5, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        h, (c, last) = layer(x)
        again, _ = layer(x, (c, last))
    assert h.dtype == torch.bfloat16 and c.dtype == torch.float32
    torch.testing.assert_close(h.float(), layer(x)[0], rtol=0, atol=0.02)
    again.float().sum().backward()
    assert layer.linear.weight.grad.dtype == torch.float32


def test_parameters_of_the_article():
    with torch.device("meta"):
        layers = qrnn_layers()
    total = sum(p.numel() for layer in layers for p in layer.parameters())
    assert total == 20_010_150 and total + 33_279 * 400 + 33_279 == 33_355_029
    assert [(x.input_size, x.hidden_size, x.window) for x in layers] == [
        (400, 1550, 2), (1550, 1550, 1), (1550, 1550, 1), (1550, 400, 1)]
    assert all(x.output_gate and x.weight_drop == 0.1 for x in layers)


def test_options_of_the_stack():
    layers = qrnn_layers(5, 7, n=1, weight_drop=0.3, window=1)
    assert [(x.input_size, x.hidden_size, x.window, x.weight_drop) for x in layers] == [(5, 5, 1, 0.3)]


def test_weights_start_as_torchs_own():
    layer = QRNN(50, 30, window=2)
    assert layer.linear.weight.abs().max() <= 0.1 * (1 + 1e-6)
    assert layer.linear.weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_repr():
    assert "window=2, output_gate=True, weight_drop=0.1" in repr(QRNN(3, 4, window=2, weight_drop=0.1))


def test_saved_and_loaded():
    a, b = QRNN(3, 4), QRNN(3, 4)
    b.load_state_dict(a.state_dict())
    x = torch.randn(3, 2, 3)
    assert torch.equal(a(x)[0], b(x)[0]) and set(a.state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("options, message", [
    ({"window": 3}, "window is 3: it must be 1 or 2"), ({"window": 0}, "window is 0"),
    ({"input_size": 0}, "input_size is 0 and hidden_size is 4: both must be 1 or more"),
    ({"hidden_size": -1}, "hidden_size is -1"), ({"weight_drop": 1.0}, r"weight_drop is 1.0: it must be in \[0, 1\)"),
    ({"weight_drop": -0.1}, "weight_drop is -0.1"), ({"weight_drop": math.nan}, "weight_drop is nan")])
def test_bad_layers(options, message):
    with pytest.raises(ValueError, match=message):
        QRNN(**{"input_size": 3, "hidden_size": 4} | options)


def test_bad_stack():
    with pytest.raises(ValueError, match="n is 0: there must be one layer at least"):
        qrnn_layers(n=0)


def test_bad_inputs_and_states():
    layer, x = QRNN(3, 4, window=2), torch.zeros(5, 2, 3)
    c, before = torch.zeros(2, 4), torch.zeros(2, 3)
    for wrong, message in ((x[..., :2], r"x has the shape \(5, 2, 2\): this layer takes \[steps, streams, 3\]"),
                           (x[0], r"x has the shape \(2, 3\)"), (x[:0], "x has no steps: give one at least")):
        with pytest.raises(ValueError, match=message):
            layer(wrong)
    for wrong, message in ((c, r"the state is Tensor: it must be two tensors, c \(2, 4\) and the last input \(2, 3\)"),
                           ((c,), "the state is tuple: it must be two tensors"),
                           ((c[:1], before), r"state has the shapes \[\(1, 4\), \(2, 3\)\].* must be \[\(2, 4\), \(2, 3\)\]"),
                           ((c, c), r"shapes \[\(2, 4\), \(2, 4\)\].*give None to begin anew")):
        with pytest.raises(ValueError, match=message):
            layer(x, wrong)


# --- the benchmark -----------------------------------------------------------------------------------
def test_bench_runs_a_case(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", (5, 2, 6))
    chosen = bench.arguments(["--quick", "--threads", "1"])
    for what in bench.KINDS:
        case = bench.measure("cpu", what, "small", "float32", chosen)
        assert case["largest_difference"] < 1e-5 and case["shape"] == [5, 2, 6]
        names = [c["name"] for c in case["contenders"]]
        assert names == (["loop", "scan", "doubling"] if what == "pooling" else ["loop", "scan", "lstm"])
        assert all(len(c["call"]) == 2 and min(c["call"]) > 0 for c in case["contenders"])
        assert bench.ratios(case, "loop", "loop") == [1.0, 1.0] and bench.milliseconds(case, "scan") > 0
        assert "times as fast as the loop" in bench.report(case)


def test_bench_finds_ways_that_differ(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", (5, 2, 6))
    monkeypatch.setattr(qrnn, "pool_scan", lambda z, f, o=None, c=None: pool_loop(z, f * 0.9, o, c))
    with pytest.raises(SystemExit, match="did not do the same work, no record"):
        bench.measure("cpu", "pooling", "small", "float32", bench.arguments(["--quick", "--threads", "1"]))


def test_bench_refuses_what_it_does_not_know(capsys):
    for wrong, message in ((["--sizes", "large"], "unknown size 'large'; there are: small, article"),
                           (["--kinds", "gates"], "unknown kind 'gates'"), (["--layer-rounds", "0"], "--layer-rounds must be 1")):
        with pytest.raises(SystemExit):
            bench.arguments(wrong)
        assert message in capsys.readouterr().err


def test_bench_without_a_gpu_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    assert bench.main(["--device", "cuda", "--anyway", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "not run: no GPU in this machine" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_bench_records_are_whole(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["format"] == 1 and record["name"] == path.stem and len(record["commit"].rstrip("+")) == 40
    assert set(record["load"]) == {"before", "after", "steal", "anyway"}
    for case in record["cases"]:
        if case["not_run"]:
            continue
        assert case["what"] in bench.KINDS and case["shape"] == list(bench.SIZES[case["size"]])
        assert {"loop", "scan"} <= {c["name"] for c in case["contenders"]}
        assert all(len(c["call"]) == case["rounds"] for c in case["contenders"])
        assert case["largest_difference"] < bench.TOLERANCE[case["dtype"]]
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|https?:|site-packages", text), "a path or an address"


def test_there_is_a_record():
    assert RECORDS, "bench/qrnn.py writes one"
