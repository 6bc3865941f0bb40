#!/usr/bin/env python
"""Write book/runs.md, the page that lists every run behind a table, from book/records.

A section for each task, size and row, with the anchor `task-size-row` that tables link to, and a
line for each seed with a link to its record. The page is made by `make book` and not committed.
"""
import argparse
from collections import defaultdict
from pathlib import Path

from nbutils.records import mean_interval, read_records

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
        return f"{100 * value:.2f} %"
    return f"{value:.4g}"


def duration(seconds):
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def heading(name):
    return name.replace("_", " ")


def table(header, rows):
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


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
            parts.append(f"{heading(name)} {interval.format(2 if share else 4)}{' %' if share else ''}"
                         f" (n = {interval.n})")
    return "Mean: " + ", ".join(parts) + "." if parts else ""


def runs_table(records):
    """The settings' hash, the mean, and a line for each seed; all runs have the same settings."""
    names, rows = metric_names(records), []
    for r in records:
        commit = f"`{r.commit[:10]}{'+' if r.commit.endswith('+') else ''}`" if r.commit else "–"
        rows.append([r.seed, *(figure(n, r.metrics.get(n)) for n in names), duration(r.seconds),
                     r.device, r.precision, r.versions.get("torch", "–"), commit, r.started[:10],
                     f'<a href="../records/{r.path.as_posix()}">record</a>'])
    header = ["seed", *map(heading, names), "time", "device", "precision", "torch", "commit", "date", ""]
    settings = f"Settings `{records[0].config_hash}`, recipe {records[0].recipe}."
    return [f"{summary(records)} {settings}".strip(), table(header, rows)]


def section(records):
    """Anchor, heading and runs of one row; runs of other settings stand in a table of their own."""
    kinds = defaultdict(list)
    for r in records:
        kinds[r.config_hash, r.recipe].append(r)
    first = records[0]
    parts = [f"({first.task}-{first.size}-{first.row})=\n### {first.row}"]
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
            parts.append(f"## {task}, {size}")
        parts += section(rows[key])
    return "\n\n".join(parts if rows else [HEAD, EMPTY]).rstrip() + "\n"


def all_records(folder):
    """The records of every task; benchmarks have a page and a form of their own."""
    tasks = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    return [r for task in tasks if task != "bench" for r in read_records(folder, task)]


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
