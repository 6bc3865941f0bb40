"""The kernel that is written from a rule's text: its source, and what it does (kernel_cases.py)."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbutils import kernel
from nbutils.amsgrad import AdamW

HERE = Path(__file__).resolve().parent
CASES = re.findall(r"^def (test_\w+)", (HERE / "kernel_cases.py").read_text(), re.M)
PROGRAM = (("p", "mul", "p", "n0"), ("x1", "sqrt", "g"), ("p", "addcdiv value", "p", "g", "x1", "n1"))


@pytest.fixture(scope="module")
def outcomes():
    """Each case's line, from one process: on the GPU, or where Triton's interpreter plays the GPU."""
    pytest.importorskip("triton", reason="Triton is not installed on this system")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "--noconftest", "-p", "no:cacheprovider", "-c",
                           os.devnull, "--rootdir", str(HERE), str(HERE / "kernel_cases.py")],
                          env=environment, cwd=HERE, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_case(case, outcomes):
    lines = re.findall(rf"^(PASSED|FAILED|ERROR|SKIPPED).*::{case}(?:\[|\s|$)", outcomes, re.M)
    assert lines and set(lines) == {"PASSED"}, outcomes[-6000:]


def test_source_is_text_of_the_rule():
    columns = {"p": torch.float32, "g": torch.float32}
    text = kernel.kernel_source(PROGRAM, columns, 2)
    compile(text, "kernel", "exec")
    assert "p = p * n0" in text and "x1 = root(g)" in text and "p = p + n1 * (g / x1)" in text
    assert "tl.store(at_p" in text and "tl.store(at_g" not in text         # what does not change is not written
    assert "n0, n1, WIDTH" in text and "sqrt_rn" in text


def test_source_for_float64_reads_its_numbers_from_memory():
    text = kernel.kernel_source(PROGRAM, {"p": torch.float64, "g": torch.float64}, 2)
    assert "n1 = tl.load(numbers + 1)" in text and "tensors, numbers, WIDTH" in text and "sqrt_rn" not in text


def test_what_it_lacks():
    assert "'pow', which nbutils.kernel cannot write" in kernel.no_kernel("cuda", (("x0", "pow", "g", "n0"),))
    assert "'pow'" not in str(kernel.no_kernel("cuda", PROGRAM))


def test_why_there_is_no_kernel(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel.no_kernel("cuda") is None or "not installed" in kernel.no_kernel("cuda")
    monkeypatch.setattr(kernel, "_TRITON_IS_THERE", False)
    assert kernel.no_kernel("cuda") == "Triton, which makes the kernel, is not installed"


def test_on_the_cpu_the_engine_says_what_to_take(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel, "_TRITON_IS_THERE", True)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="AdamW: Triton's kernels run on CUDA GPUs, and the parameters are on cpu; "
                                         "use engine='fast', 'compiled' or 'lists'"):
        AdamW([p], engine="kernel").step()
    assert p.tolist() == [1, 1]


def test_formulas_are_arithmetic_and_nothing_else():
    x, y = kernel.Formula("x"), kernel.Formula("y")
    cases = [x + 1, 2 - x, -x ** 2, (-x) ** 2, x / y, 3 / x, x * y - 1, 2 ** x, -(x - y)]
    for a, b in ((0.5, 3.0), (-2.0, 0.25)):
        here = {"x": a, "y": b}
        plain = [a + 1, 2 - a, -a ** 2, (-a) ** 2, a / b, 3 / a, a * b - 1, 2 ** a, -(a - b)]
        assert [eval(c.text, here) for c in cases] == plain
    for needs_value in (lambda: bool(x), lambda: x == 1, lambda: x != 1, lambda: x > 1, lambda: max(x, 1), lambda: float(x),
                        lambda: int(x), lambda: {x: 1}, lambda: x % 2, lambda: abs(x)):
        with pytest.raises(TypeError):
            needs_value()
