"""The token loss: its kernels against float64, its plain form against torch's to the bit, the choice between them; the benchmark."""
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
from torch.utils._python_dispatch import TorchDispatchMode

from nbutils import awd_lstm
from nbutils.awd_lstm import LanguageOutput, cross_entropy_kernel, token_loss

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CASES = re.findall(r"^def (test_\w+)", (HERE / "loss_cases.py").read_text(), re.M)
ON_GPU_ONLY = {"test_numbers_of_rows_do_not_compile_anew", "test_the_loss_takes_the_kernel_on_a_gpu"}

sys.path.insert(0, str(ROOT / "bench"))
import loss as bench  # noqa: E402  (bench/loss.py)


# --- the kernel, in a process of its own ---------------------------------------------------------
@pytest.fixture(scope="module")
def outcomes():
    """Each case's line, from one process: on the GPU, or where Triton's interpreter plays the GPU."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "--noconftest", "-p", "no:cacheprovider", "-c",
                           os.devnull, "--rootdir", str(HERE), str(HERE / "loss_cases.py")],
                          env=environment, cwd=HERE, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_case(case, outcomes):
    if case in ON_GPU_ONLY and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    lines = re.findall(rf"^(PASSED|FAILED|ERROR|SKIPPED).*::{case}(?:\[|\s|$)", outcomes, re.M)
    assert lines and set(lines) == {"PASSED"}, outcomes[-6000:]


# --- the plain form ------------------------------------------------------------------------------
def output(logits):
    return LanguageOutput(logits, [], None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps, streams, words", [(1, 1, 1), (1, 1, 5), (7, 3, 33), (20, 5, 1000), (2, 2, 33_279)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_on_a_cpu_it_is_torchs_cross_entropy_to_the_bit(dtype, steps, streams, words, scale):
    """Values and gradients, of which records and stored outputs depend; with impossible words too."""
    g = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(steps, streams, words, generator=g)).to(dtype)
    if words > 5:
        logits[..., -3:] = -math.inf
    targets = torch.randint(max(1, words - 3), (steps, streams), generator=g)
    found = []
    for loss in (lambda x: token_loss(output(x), targets), lambda x: F.cross_entropy(x.flatten(0, 1).float(), targets.flatten())):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        found.append((value, torch.autograd.grad(3 * value, leaf)[0]))
    (ours, gradient), (usual, true) = found
    assert ours.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(ours, usual) and torch.equal(gradient, true)


def test_dispatch(monkeypatch):
    """A CPU takes the plain form, under Triton's interpreter too; a GPU the kernel, but not without Triton or for a subclass of Tensor."""
    class Subclass(torch.Tensor):
        pass

    monkeypatch.setattr(awd_lstm, "cross_entropy_kernel", lambda *a: "kernel")
    monkeypatch.setattr(F, "nll_loss", lambda *a: "plain")
    monkeypatch.setattr(awd_lstm, "_TRITON_IS_THERE", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    targets = torch.zeros(2, 3, dtype=torch.int64)

    def taken(kind=torch.Tensor):
        return token_loss(output(torch.zeros(2, 3, 5).as_subclass(kind)), targets)

    assert taken() == "plain"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert taken() == "kernel" and taken(Subclass) == "plain"
    monkeypatch.setattr(awd_lstm, "_TRITON_IS_THERE", False)
    assert taken() == "plain"


def test_why_there_is_no_kernel(monkeypatch):
    logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(awd_lstm, "_TRITON_IS_THERE", True)
    with pytest.raises(ValueError, match="run on CUDA GPUs, and the logits are on cpu; use F.cross_entropy"):
        cross_entropy_kernel(logits, targets)
    monkeypatch.setattr(awd_lstm, "_TRITON_IS_THERE", False)
    with pytest.raises(ValueError, match="Triton, which compiles the kernel, is not installed; use F.cross_entropy"):
        cross_entropy_kernel(logits, targets)


def test_triton_is_not_imported_with_the_module():
    program = "import sys, nbutils.awd_lstm; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("logits, targets, message", [
    (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"logits are torch.float32 of shape \(2, 3, 4\): give floating-point.*\[n, columns\]"),
    (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "logits are torch.int64"),
    (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"targets are torch.int64 of shape \(3,\) on cpu: give torch.int64 of shape \(2,\) on cpu"),
    (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), "targets are torch.int32 .*: give torch.int64"),
    (torch.zeros(2, 3), torch.zeros(2, 3), r"targets are torch.float32 of shape \(2, 3\)"),
    (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64, device="meta"), "on meta: give .* on cpu, as the logits have"),
], ids=["logits of three dimensions", "whole numbers", "number of targets", "int32 targets", "shares", "devices"])
def test_bad_arguments(logits, targets, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=message):
        cross_entropy_kernel(logits, targets)


# --- the benchmark -------------------------------------------------------------------------------
def chosen(*options):
    return bench.arguments(["--small", "--quick", "--threads", "1", *options])


@pytest.mark.parametrize("what", bench.KINDS)
def test_bench_runs_a_case(what):
    case = bench.measure("cpu", what, "small", "float32", chosen())
    assert case["largest_difference"] < 1e-5 and case["sizes"] == bench.SIZES["small"]
    assert [c["name"] for c in case["contenders"]] == (["definition", "log_softmax"] if what == "loss" else ["unpadded", "padded"])
    assert all(len(c["call"]) == 2 and min(c["call"]) > 0 for c in case["contenders"])
    assert f", {what}, small size, float32; medians of n = 2 rounds" in bench.report(case)


def test_bench_sizes_are_odd_where_the_articles_are():
    for sizes in bench.SIZES.values():
        assert all(sizes[name] % 8 for name in ("words", "lstm", "qrnn"))


@pytest.mark.parametrize("what", ["decoder", "lstm", "qrnn"])
def test_bench_does_pad(what):
    device, sizes, dtype = "cpu", bench.SIZES["small"], torch.float32
    calls = bench.decoders(device, sizes, dtype) if what == "decoder" else bench.layers(what, device, sizes, dtype)
    rows = {}
    for name, call in calls.items():
        with Shapes() as shapes:
            call()
        rows[name] = shapes.seen
    wanted = -(-sizes["words" if what == "decoder" else what] // 8) * 8
    assert not any(n % wanted == 0 for n in rows["unpadded"]) and any(n % wanted == 0 for n in rows["padded"])


class Shapes(TorchDispatchMode):
    """Notes the rows of what is made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.dim() == 2:
            self.seen.add(out.shape[0])
        return out


def test_bench_finds_ways_that_differ(monkeypatch):
    monkeypatch.setattr(bench, "by_log_softmax", lambda logits, targets: 1.01 * bench.definition(logits, targets))
    with pytest.raises(SystemExit, match="did not do the same work, no record"):
        bench.measure("cpu", "loss", "small", "float32", chosen())


def test_bench_refuses_what_it_does_not_know(capsys):
    for wrong, message in ((["--kinds", "gru"], "unknown kind 'gru'; there are: loss, decoder, lstm, qrnn"),
                           (["--rounds", "0"], "--rounds must be 1")):
        with pytest.raises(SystemExit):
            bench.arguments(wrong)
        assert message in capsys.readouterr().err


def test_bench_writes_a_record_of_what_ran(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    folder = tmp_path / "loss"                                    # the kind of the record
    options = ["--anyway", "--threads", "1", "--out", str(folder)]
    assert bench.main(options) == 0
    out = capsys.readouterr().out
    assert "cpu: not run: there it is run at small sizes only: give --small" in out and "no GPU in this machine" in out
    assert not folder.exists()
    assert bench.main([*options, "--small", "--kinds", "loss,qrnn", "--rounds", "3", "--calls", "1"]) == 0
    (path,) = folder.iterdir()
    check_record(path)
    (record,) = bench.newest(folder)
    assert [case["what"] for case in record["cases"] if not case["not_run"]] == ["loss", "qrnn"]


def check_record(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["format"] == 1 and record["name"] == path.stem
    assert set(record["load"]) == {"before", "after", "steal", "anyway"}
    for case in record["cases"]:
        if case["not_run"]:
            continue
        assert case["what"] in bench.KINDS and case["sizes"] == bench.SIZES[case["size"]]
        assert len(case["contenders"]) >= 2 and all(len(c["call"]) == case["rounds"] for c in case["contenders"])
        assert case["largest_difference"] < bench.TOLERANCE[case["dtype"]]
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|https?:|site-packages", text), "a path or an address"


def test_bench_records_are_whole():
    for path in (ROOT / "book/records/loss").glob("*.json"):
        check_record(path)
