#!/usr/bin/env python
"""Write book/runs.md, the page that lists every run behind a table, from book/records.

A section for each task, size and row, with the anchor `task-size-row` that tables link to, and a
line for each seed with a link to its record. The page is made by `make book` and not committed.
"""
import argparse
import re
from collections import defaultdict
from pathlib import Path

from markup import code, heading, record_link, table  # tools/markup.py
from nbutils.records import escape_markdown, mean_interval, read_records

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "book" / "records"
PAGE = ROOT / "book" / "runs.md"
SIZES = ("smoke", "laptop", "colab", "full")

HEAD = """# Runs

Every figure in a table of this book is computed from the runs on this page. A run is one row with one seed; it leaves one record, a small file with all its settings, its history by epoch, the machine, the versions and the state of the code. Nothing here was typed by hand. Tables never mix sizes: *smoke* is seconds on a CPU, *laptop* minutes on two cores, *colab* a quarter of an hour on a T4, *full* the article's own size.
"""
EMPTY = "No run is recorded yet: every cell of the tables says *not run*.\n"


def figure(name, value):
    """A metric as text: shares in per cent, anything else with four digits."""
    if value is None or value != value:
        return "–"
    if any(word in name for word in ("error", "accuracy")):
        return f"{100 * value:.2f}\u00a0%"
    return f"{value:.4g}"


def duration(seconds):
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.1f}\u00a0s"
    minutes = seconds / 60
    return f"{minutes:.1f}\u00a0min" if minutes < 120 else f"{minutes / 60:.1f}\u00a0h"


def spaced(name):
    return name.replace("_", " ")


def metric_names(records):
    return list(dict.fromkeys(name for r in records for name in r.metrics))


def summary(records):
    """Mean, interval and n of each metric of one row, as a sentence."""
    parts = []
    for name in metric_names(records):
        values = [r.metrics[name] for r in records
                  if r.metrics.get(name) is not None and r.metrics[name] == r.metrics[name]]
        if values:
            share = any(word in name for word in ("error", "accuracy"))
            interval = mean_interval([100 * v for v in values] if share else values)
            parts.append(f"{escape_markdown(spaced(name))} {interval.format(2 if share else 4)}{' %' if share else ''}"
                         f" (n = {interval.n})")
    return "Mean: " + ", ".join(parts) + "." if parts else ""


def columns(r):
    """What else is said of a run: heading to text."""
    commit = code(f"{r.commit[:10]}{'+' if r.commit.endswith('+') else ''}") if r.commit else "–"
    return {"device": r.device, "precision": r.precision, "torch": r.versions.get("torch", "–"),
            "commit": commit, "date": r.started[:10]}


def runs_table(records):
    """Mean and what the runs have in common as sentences, then a line for each seed."""
    names, others = metric_names(records), [columns(r) for r in records]
    common = {k for k in others[0] if len({o[k] for o in others}) == 1}
    same = ", ".join(f"{k} {escape_markdown(v)}" for k, v in others[0].items() if k in common)
    text = (f"{summary(records)} Settings {code(records[0].config_hash)}, recipe {escape_markdown(records[0].recipe)}"
            f"{'; ' + same if same else ''}.")
    varied = [k for k in others[0] if k not in common]
    rows = [[r.seed, *(figure(n, r.metrics.get(n)) for n in names), duration(r.seconds),
             *(o[k] for k in varied), record_link(r.path.as_posix())]
            for r, o in zip(records, others)]
    return [text.strip(), table(["seed", *map(spaced, names), "time", *varied, ""], rows)]


def section(records):
    """Anchor, heading and runs of one row; runs of other settings stand in a table of their own."""
    kinds = defaultdict(list)
    for r in records:
        kinds[r.config_hash, r.recipe].append(r)
    first = records[0]
    anchor = re.sub(r"[^A-Za-z0-9_.+-]", "-", f"{first.task}-{first.size}-{first.row}")
    parts = [f"({anchor})=\n### {heading(first.row)}"]
    for runs in kinds.values():
        parts += runs_table(runs)
    return parts


def page(records):
    """The whole page as Markdown."""
    rows = defaultdict(list)
    for r in records:
        rows[r.task, SIZES.index(r.size) if r.size in SIZES else len(SIZES), r.size, r.row].append(r)
    parts, shown = [HEAD], None
    for key in sorted(rows):
        task, _, size, _ = key
        if (task, size) != shown:
            shown = task, size
            parts.append(f"## {heading(task)}, {heading(size)}")
        parts += section(rows[key])
    return "\n\n".join(parts if rows else [HEAD, EMPTY]).rstrip() + "\n"


def all_records(folder):
    """The records of every task; benchmarks have a page and a form of their own."""
    tasks = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return [r for task in tasks for r in read_records(folder, task)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write")
    chosen = parser.parse_args()
    records = all_records(chosen.records)
    chosen.page.write_text(page(records), encoding="utf-8")
    print(f"{chosen.page.name}: {len(records)} runs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
