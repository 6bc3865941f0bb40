#!/usr/bin/env python
"""Run, clean and check the book's notebooks.

    python tools/nb.py run   [NOTEBOOK ...]    execute in place and store the outputs
    python tools/nb.py clean [NOTEBOOK ...]    normalise metadata; outputs and numbers stay
    python tools/nb.py check [NOTEBOOK ...]    say what is wrong with what is stored

Without names, all of nbs/ in reading order. Exit status 1 when anything is wrong.
Cell ids, tags and outputs are kept; metadata that changes from run to run is dropped, so
that two runs of an unchanged notebook give the same bytes.
"""
import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
MAX_OUTPUT_BYTES = 200_000
BUDGET_SECONDS = 60

# What every kernel of the book runs under. tests/conftest.py uses the same dictionary.
# No graphics processor: its numbers never stand in compared outputs.
KERNEL_ENV = {
    "NBUTILS_NO_BAR": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
# Variables that would change what a notebook does, so that no kernel may see them.
# (nbdev exports nothing under IN_TEST; the inline figures need MPLBACKEND's default.)
UNSET_ENV = ("IN_TEST", "MPLBACKEND")

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEEP_NOTEBOOK_METADATA = ("mystnb",)
KEEP_CELL_METADATA = ("tags", "mystnb")
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
HERE = re.compile(r"(/tmp/|/var/folders/|/home/[^/\s]+/|/Users/[^/\s]+/)\S*")


def notebooks(names=()):
    """The named notebooks, or all of nbs/ with numbered chapters first."""
    if names:
        return [Path(name).resolve() for name in names]
    found = [p for p in NBS.glob("*.ipynb") if not p.name.startswith((".", "_"))]
    return sorted(found, key=in_order)


def in_order(path):
    """Chapters by number, then appendices by letter and number: a10 comes after a9."""
    letter, number, rest = re.match(r"([a-z]?)(\d*)(.*)", path.name).groups()
    return letter, int(number or 0), rest


def short(path):
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def normalise(nb):
    """Drop in place what differs between machines or runs; keep ids, tags and outputs."""
    kept = {k: nb.metadata[k] for k in KEEP_NOTEBOOK_METADATA if k in nb.metadata}
    nb.metadata = nbformat.from_dict(
        {**kept, "kernelspec": dict(KERNELSPEC), "language_info": {"name": "python"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for position, cell in enumerate(nb.cells):
        cell.metadata = nbformat.from_dict(
            {k: cell.metadata[k] for k in KEEP_CELL_METADATA if cell.metadata.get(k)})
        if not cell.get("id"):
            cell["id"] = f"cell-{position}"
        cell.source = cell.source.rstrip()
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            if "metadata" in output:
                output.metadata.pop("needs_background", None)
    nbformat.validate(nb)
    return nb


def write(nb, path):
    """Write in one step, and only if the bytes change. True if they did."""
    data = (nbformat.writes(nb).rstrip("\n") + "\n").encode()
    path = Path(path)
    if path.exists() and path.read_bytes() == data:
        return False
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, temporary = tempfile.mkstemp(prefix=".nb-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return True


def output_bytes(cell):
    """Bytes that a code cell's stored outputs take."""
    total = 0
    for output in cell.outputs:
        total += len(output.get("text", "").encode())
        for value in output.get("data", {}).values():
            total += len((value if isinstance(value, str) else str(value)).encode())
    return total


def printed(cell):
    """What a code cell's outputs show as plain text."""
    parts = [o.get("text", "") for o in cell.outputs]
    parts += [o.data.get("text/plain", "") for o in cell.outputs if "data" in o]
    return "\n".join(parts)


def problems(nb):
    """List, in words, what is wrong with a notebook as stored; empty if all is well."""
    found = []
    ids = [cell.get("id") for cell in nb.cells]
    for name in sorted({i for i in ids if i is None or ids.count(i) > 1}, key=str):
        found.append(f"the cell id {name!r} is used {ids.count(name)} times")
    if dict(nb.metadata.get("kernelspec", {})) != KERNELSPEC:
        found.append("the kernelspec is not the book's (nb.py clean mends it)")
    total = 0
    unrun = [cell for cell in code_cells(nb) if cell.execution_count is None and cell.source.strip()]
    if unrun:
        found.append(f"{len(unrun)} code cells were never run, {unrun[0].get('id')} the first of them")
    for number, cell in enumerate(code_cells(nb), start=1):
        name = f"code cell {number} ({cell.get('id')})"
        if not cell.source.strip():
            found.append(f"{name} is empty")
        elif cell.execution_count is None:
            pass  # counted above
        elif cell.execution_count != number:
            found.append(f"{name} is numbered {cell.execution_count}: not run in order")
        total += output_bytes(cell)
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                found.append(f"{name} stores an error: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                first = output.text.strip().splitlines() or [""]
                found.append(f"{name} wrote to stderr: {first[0][:120]}")
        text = printed(cell)
        for pattern, what in ((ADDRESS, "a memory address"), (HERE, "a path of this machine")):
            match = pattern.search(text)
            if match:
                found.append(f"{name} shows {what}: {match.group(0)}")
    if total >= MAX_OUTPUT_BYTES:
        found.append(f"its outputs take {total:,} bytes; the limit is {MAX_OUTPUT_BYTES:,}")
    return found


def execute(nb, timeout):
    """Run all cells in place in a fresh kernel whose working folder is nbs/."""
    import warnings

    from nbclient import NotebookClient

    environment = {k: v for k, v in os.environ.items() if k not in UNSET_ENV}
    environment.update(KERNEL_ENV)
    for cell in code_cells(nb):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        nb, timeout=timeout, kernel_name="python3", record_timing=False,
        coalesce_streams=True, resources={"metadata": {"path": str(NBS)}},
        extra_arguments=["--HistoryManager.enabled=False", "--IPKernelApp.log_level=40"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client.execute(env=environment)


def run(path, timeout):
    """Execute one notebook and store it; False (and nothing written) if a cell fails."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    nb, start = read(path), time.perf_counter()
    try:
        execute(nb, timeout)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        cells = code_cells(nb)
        failed = [(n, c) for n, c in enumerate(cells, 1)
                  if any(o.output_type == "error" for o in c.outputs)
                  and "raises-exception" not in tags(c)]
        begun = [(n, c) for n, c in enumerate(cells, 1) if c.execution_count or c.outputs]
        number, cell = (failed or begun or [(1, cells[0])])[-1]
        late = f" (limit: {timeout} s)" if isinstance(error, CellTimeoutError) else ""
        print(f"\n{short(path)}: code cell {number} (id {cell.get('id')}) failed{late}; "
              f"nothing written\n{'-' * 72}\n{cell.source}\n{'-' * 72}")
        traceback = [line for o in cell.outputs if o.output_type == "error"
                     for line in o.traceback]
        text = "\n".join(traceback) or f"{type(error).__name__}: {error}"
        print(text if sys.stdout.isatty() else COLOUR.sub("", text), flush=True)
        return False
    normalise(nb)
    seconds = time.perf_counter() - start
    changed = write(nb, path)
    size = sum(map(output_bytes, code_cells(nb)))
    print(f"{short(path)}: {len(nb.cells)} cells, {seconds:.1f} s, outputs {size / 1000:.0f} kB"
          f"{'' if changed else ', unchanged'}", flush=True)
    if seconds > BUDGET_SECONDS:
        print(f"  note: over the budget of {BUDGET_SECONDS} s")
    return report(path, nb)


def report(path, nb):
    found = problems(nb)
    for problem in found:
        print(f"{short(path)}: {problem}", flush=True)
    return not found


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Without names: every notebook of nbs/, in reading order.")
    parser.add_argument("command", choices=("run", "clean", "check"))
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS",
                        help="limit of one cell (default: 300)")
    chosen = parser.parse_intermixed_args(arguments)
    paths = notebooks(chosen.notebooks)
    missing = [short(p) for p in paths if not p.is_file()]
    if missing:
        there = ", ".join(p.name for p in notebooks()) or "none"
        parser.error(f"no such notebook: {', '.join(missing)}; there are: {there}")
    if sys.platform == "win32":
        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    good = True
    for path in paths:
        if chosen.command == "run":
            good &= run(path, chosen.timeout)
        elif chosen.command == "clean":
            if write(normalise(read(path)), path):
                print(f"{short(path)}: cleaned")
        else:
            good &= report(path, read(path))
    if chosen.command == "check" and good:
        print(f"{len(paths)} notebooks, nothing wrong")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
