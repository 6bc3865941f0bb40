"""Where Triton is not installed, as on macOS, the chapters that interpret kernels say so and go on."""
import os
import sys
from pathlib import Path

import nb  # tools/nb.py, which conftest.py puts on the path
import pytest
from children import Child

NBS = Path(__file__).resolve().parent.parent / "nbs"
SAYS = "Triton is not installed here: the kernel's cells are not run"


def run_cells(name):
    """All code cells of a chapter, in order, in a Python that cannot import Triton."""
    sys.modules["triton"] = None
    sys.path.insert(0, str(NBS.parent))
    os.chdir(NBS)
    import matplotlib
    matplotlib.use("agg")
    space = {"__name__": "__main__"}
    for cell in nb.code_cells(nb.read(NBS / f"{name}.ipynb")):
        exec(compile(cell.source, f"<{cell.id}>", "exec"), space)


@pytest.mark.parametrize("name", ["13-awd-lstm", "14-qrnn", "a6-kernel"])
def test_a_chapter_goes_on(name):
    with Child(run_cells, name, env={"NBUTILS_NO_BAR": "1", "TRITON_INTERPRET": None}) as child:
        assert child.wait() == 0, child.err
        assert child.out.count(SAYS) == 1


@pytest.mark.parametrize("name", ["13-awd-lstm", "14-qrnn", "a6-kernel"])
def test_it_is_not_said_where_triton_is(name):
    for cell in nb.code_cells(nb.read(NBS / f"{name}.ipynb")):
        assert SAYS not in nb.printed(cell), "what is stored was run without Triton: run it where Triton is"
