#!/usr/bin/env python
"""Run launch copies as a reader on Colab would: in an environment of Colab's packages, outside the checkout.

    python tools/try_launch.py dist 01-sgd 11-cifar10      # or --all

DIST holds what `make launch` wrote: wheel, archive and launch/. Each copy runs from its first cell to
its last in an empty folder; its install cell installs the wheel. The environment is made from
tools/colab-packages.txt once. It is then held against itself: whatever was there must have kept its
version. The cell for a GPU runs as its comment says for a machine without one.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "colab-packages.txt"
LIST = "import importlib.metadata as m; print(*sorted({f'{d.name}=={m.version(d.name)}' for d in m.distributions() if d.name}), sep='\\n')"
RUN = """
import sys, nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
path, timeout = sys.argv[1], int(sys.argv[2])
book = nbformat.read(path, 4)
last = book.cells[-1]
if last.id == "gpu":
    last.source = last.source.split("\\n")[0].partition("in seconds: ")[2] + " --device cpu"
    assert last.source.startswith("!nbutils run"), last.source
    book.cells.append(nbformat.v4.new_code_cell("if _exit_code: raise RuntimeError(f'the command ended with {_exit_code}')"))
client = NotebookClient(book, timeout=timeout, kernel_name="python3")
try:
    client.execute()
except CellExecutionError as error:
    sys.exit(f"{path}: a cell failed\\n{error}")
for cell in book.cells:
    if cell.id in ("install", "gpu"):
        print(*[output.get("text", "").strip() for output in cell.outputs], sep="\\n")
"""


def clean():
    """The environment's variables, without ours and Python's."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("NBUTILS_", "PYTHON", "OMP_", "MKL_", "CUDA_", "IN_TEST", "MPLBACKEND"))}


def make(place, installer):
    """An environment with Colab's packages; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin/python"
    subprocess.run([*(w.format(python=python) for w in installer.split()), "-r", str(PACKAGES)], check=True, env=clean())
    return python


def packages(python):
    found = subprocess.run([python, "-c", LIST], check=True, text=True, stdout=subprocess.PIPE, env=clean(), cwd=Path(python).parent).stdout
    return set(found.split("\n")) - {""}


def launch(python, path, timeout=600):
    """Run one copy in an empty folder; returns its seconds and what its install cell said."""
    with tempfile.TemporaryDirectory() as home:
        start = time.monotonic()
        home = Path(home).resolve()
        settings = {"HOME": str(home), "IPYTHONDIR": str(home / ".ipython"), "JUPYTER_DATA_DIR": str(home / ".jupyter"),
                    "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"}
        (home / "content").mkdir()
        done = subprocess.run([python, "-c", RUN, path, str(timeout)], cwd=home / "content", text=True, capture_output=True,
                              env=clean() | settings)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return time.monotonic() - start, done.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dist", type=Path)
    parser.add_argument("chapters", nargs="*", help="such as 01-sgd")
    parser.add_argument("--all", action="store_true", help="every chapter")
    parser.add_argument("--environment", type=Path, help="where to make the environment, or one that is there; else one that is thrown away")
    parser.add_argument("--installer", default="{python} -m pip install --quiet", help="such as 'uv pip install --python {python}'")
    chosen = parser.parse_args()
    copies = {p.stem: p.resolve() for p in sorted((chosen.dist / "launch").glob("*.ipynb"))}
    names = list(copies) if chosen.all else chosen.chapters
    unknown = [name for name in names if name not in copies]
    if unknown or not names:
        parser.error(f"no copy of {', '.join(unknown) or 'nothing'} in {chosen.dist / 'launch'}; there are {', '.join(copies) or 'none: make launch'}")
    with tempfile.TemporaryDirectory() as thrown:
        place = (chosen.environment or Path(thrown) / "env").resolve()
        python = place / "bin/python"
        if not python.exists():
            make(place, chosen.installer)
        before = {p for p in packages(python) if not p.startswith("nbutils==")}
        failed = 0
        for name in names:
            try:
                seconds, said = launch(python, copies[name])
                print(f"{name}: {seconds:.0f} s; {said}", flush=True)
            except RuntimeError as error:
                failed += 1
                print(f"{name}: {error}", flush=True)
        changed = before - packages(python)
    if changed:
        print(f"changed by the install cell: {', '.join(sorted(changed))}")
    return 1 if failed or changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
