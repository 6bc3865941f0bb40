#!/usr/bin/env python
"""Write book/status.md, the page that says how fresh the book is.

For each chapter: when its outputs were stored (by git's history; "unknown" without one), and what
the last `make test` found when it compared them with fresh ones. For each task and size: how many
rows are complete, and the devices of their records. The page is made by `make book` and not
committed.
"""
import argparse
import platform
import subprocess
from collections import Counter
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import drift  # tools/drift.py
import nb     # tools/nb.py
from markup import code, table  # tools/markup.py
from nbutils.command import missing
from nbutils.experiment import SIZES, TASKS, get_task
from nbutils.records import Markdown, escape_markdown

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "book" / "records"
PAGE = ROOT / "book" / "status.md"
PACKAGES = ("torch", "torchvision", "matplotlib", "fastprogress", "numpy", "pandas", "scikit-learn", "sympy",
            "jupyter-book", "sphinx", "nbval", "nbdev")
DRIFT = ("`make test` runs every notebook again in a fresh kernel and compares each output with the stored "
         "one, to the last character but for what the cells mark as timings; a difference fails the test. ")

HEAD = """# Status

How fresh is this book, what was it built with, and which runs does it lack? Written by the build of {date}.
"""


def git(*words, root=ROOT):
    """What git says, or None where there is no git, no history or only a part of it."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def stored(path, root=ROOT):
    """The date of the commit that last changed a notebook; "unknown" where git cannot tell."""
    if git("rev-parse", "--show-toplevel", root=root) != str(Path(root).resolve()) \
            or git("rev-parse", "--is-shallow-repository", root=root) != "false":
        return "unknown"
    if git("status", "--porcelain", "--", str(path), root=root):
        return "changed, not committed"
    return git("log", "-1", "--format=%cs", "--", str(path), root=root) or "unknown"


def compared(path, found):
    """When a notebook was last compared, how many of its cells, and what differed."""
    entry = drift.current(path, found)
    if entry is None:
        before = found.get(path.name)
        return [f"before it changed ({before['date'][:10]})" if before else "not by this copy", "–", "unknown"]
    differ = ", ".join(entry["differ"]) or "none"
    return [entry["date"][:10], f"python {entry['python']}, torch {entry['torch']}, {entry['machine']}",
            f"{differ} ({entry['cells']} cells)"]


def title(path):
    return "".join(nb.read(path).cells[0].source).splitlines()[0].lstrip("# ")


def chapters(found):
    """A line for each notebook."""
    rows = [[Markdown(f"[{title(path)}](../nbs/{path.name})"), stored(path), *compared(path, found)] for path in nb.notebooks()]
    return table(["chapter", "last changed", "compared", "with", "drift"], rows)


def drift_summary(found):
    """One sentence: how many chapters were compared as they are now, and which of them drifted."""
    entries = {path: drift.current(path, found) for path in nb.notebooks()}
    known = [entry for entry in entries.values() if entry]
    drifted = [path.name for path, entry in entries.items() if entry and entry["differ"]]
    if not known:
        return "The copy that built this site has not run it: *unknown* means just that."
    text = f"{len(known)} of {len(entries)} chapters were compared as they stand"
    return f"{text}, and {', '.join(map(escape_markdown, drifted)) + ' differ' if drifted else 'none differs'}."


def environment():
    """Versions of what built the site."""
    rows = [["python", platform.python_version()], ["platform", f"{platform.system()} {platform.machine()}"]]
    for name in PACKAGES:
        try:
            rows.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            rows.append([name, "not installed"])
    head = git("rev-parse", "--short=10", "HEAD")
    mine = git("rev-parse", "--show-toplevel") == str(ROOT)
    rows.append(["commit", code(head) if head and mine else "unknown"])
    return table(["", "version"], rows)


def counts(name, size, folder=RECORDS):
    """(complete, incomplete, not run) rows of a task at a size, without its grids."""
    task = get_task(name)
    have = {r.row for r in task.records(size, folder)}
    lacking = {row for _, _, row, _ in missing([name], [size], folder)}
    rows = task.rows(size)
    not_run = [row for row in rows if row not in have]
    return (sum(row not in lacking for row in rows), sum(row in lacking for row in rows) - len(not_run),
            len(not_run))


def runs(folder=RECORDS):
    """A line for each task and size, from small to large: rows by completeness, runs by device."""
    rows = []
    for name in TASKS:
        task = get_task(name)
        for size in SIZES:
            if not task.rows(size):
                continue
            records = task.records(size, folder)
            devices = Counter(r.device for r in records).most_common()
            last = max((r.started[:10] for r in records), default="–").replace("-", "\u2011")  # no line break in a date
            rows.append([name, size, *counts(name, size, folder), len(records), task.seeds[size],
                         "; ".join(f"{device} ({n})" for device, n in devices) or "–", last])
    return table(["task", "size", "complete rows", "incomplete", "not run", "runs", "seeds wanted",
                  "devices (runs)", "last run"], rows)


def page(found, folder=RECORDS):
    today = datetime.now(timezone.utc).date().isoformat()
    parts = [HEAD.format(date=today).strip(),
             "## Chapters",
             f"{DRIFT}{drift_summary(found)} The second column is the date of the notebook's last change "
             "in the project's history; what it stores is no newer.",
             chapters(found),
             "## Rows",
             "A row is complete when it has as many seeds as its task wants at that size. Runs of grids are counted as "
             "runs but not as rows; runs of older settings are not counted. The size smoke is run live in the chapters. [All runs](runs.md), [speed](speed.md).",
             runs(folder),
             "## Built with", environment()]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write")
    chosen = parser.parse_args()
    found = drift.read()
    chosen.page.write_text(page(found), encoding="utf-8")
    print(f"{chosen.page.name}: {len(found)} chapters compared")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
