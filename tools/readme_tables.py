#!/usr/bin/env python
"""Bring the tables of the README, the introduction and the parts' pages up to the records.

A block between a mark and its end is replaced by what the records give now:

    <!-- table:TASK:SIZE -->          ... <!-- /table -->     all rows of a task at a size
    <!-- table:TASK:SIZE:PREFIX -->   ... <!-- /table -->     the rows whose names begin with PREFIX
    <!-- cells -->                    ... <!-- /cells -->     CIFAR-10's four cells beside the article's
    <!-- differences -->              ... <!-- /differences -->  what rows differ by, in pairs of one seed
    <!-- verdicts -->                 ... <!-- /verdicts -->  how many claims held, and those that did not
    <!-- verdicts:tally -->           ... <!-- /verdicts -->  how many claims held, in a sentence
    <!-- verdicts:NAME,NAME -->       ... <!-- /verdicts -->  some lines of the ledger
    <!-- loops -->                    ... <!-- /loops -->     what our Learner costs beside a plain loop

`--check` changes nothing and exits 1 if it would.
"""
import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import speed_page  # noqa: E402
from nbutils import verdicts as judging  # noqa: E402
from nbutils.experiment import get_task  # noqa: E402
from nbutils.records import Cell, Markdown, Table, mean_interval  # noqa: E402
from nbutils.verdicts import CLAIMS, VERDICTS, ledger, tally  # noqa: E402

RECORDS = ROOT / "book" / "records"
MARK = re.compile(r"<!-- (/?)(table|cells|differences|verdicts|loops)\b(.*?) -->")
BLOCK = re.compile(r"(<!-- (table|cells|differences|verdicts|loops)((?::[\w,.-]+)*) -->\n).*?(<!-- /\2 -->)", re.S)


def pages():
    """What holds marked blocks: the README, the introduction and the parts' pages."""
    return [ROOT / "README.md", ROOT / "book" / "intro.md", *sorted((ROOT / "book" / "parts").glob("*.md"))]


def table(name, size, prefix=""):
    """The table of one task and size; rows without records say `not run`."""
    task = get_task(name)
    rows = [row for row in task.rows(size) if row.startswith(prefix)]
    if not rows:
        raise SystemExit(f"table:{name}:{size}:{prefix}: no row begins so; there are {', '.join(task.rows(size))}")
    return task.table(size, rows=rows, folder=RECORDS).to_markdown()


def cells():
    """The article's four cells of CIFAR-10: Adam with L2 and AdamW, without amsgrad and with it.

    Each figure links to its runs by the label that they have on their page, so this is for pages of the book.
    """
    task, rows = get_task("cifar10"), []
    records = task.records("full", RECORDS)
    for kind, start in (("AdamW", "adamw-30"), ("Adam with L2", "adam-l2-30")):
        row = [Markdown(f"**{kind}**")]
        for name in (start, f"{start}-amsgrad"):
            values = [100 * r.metrics["error"] for r in records if r.row == name]
            text = mean_interval(values).format(2).replace(" ", "\u00a0") if values else "not run"
            mine = f"[{text} (n\u00a0=\u00a0{len(values)})](#cifar10-full-{name})" if values else text
            row += [Markdown(mine), task.published[name]["error"]]
        rows.append(row)
    return Table(["test error, %", "ours", "article", "with amsgrad, ours", "article"], rows).to_markdown()


CIFAR10 = (  # what differs, and the two rows
    ("AdamW minus Adam with L2", "adamw-30", "adam-l2-30"),
    ("Adam with L2 minus no decay at all", "adam-l2-30", "wd0-30"),
    ("SGD minus AdamW", "sgd-30", "adamw-30"),
    ("amsgrad's cost under AdamW", "adamw-30-amsgrad", "adamw-30"),
    ("amsgrad's cost under Adam with L2", "adam-l2-30-amsgrad", "adam-l2-30"),
)


def differences():
    """The differences that the summaries speak of: mean and 95 % interval over pairs of one seed."""
    published, rows = get_task("cifar10").published, []
    for says, row, other in CIFAR10:
        gap = judging._gap("cifar10", row, other, "error")
        ours = f"{100 * gap.mean:+.2f} ± {100 * gap.half:.2f}" if gap else "not run"
        both = [float(published[name]["error"]) for name in (row, other) if name in published]
        article = f"{both[0] - both[1]:+.2f}" if len(both) == 2 else "–"
        rows.append([f"{says}, points of error on CIFAR-10", "full", ours, article, str(gap.n if gap else 0)])
    cost = judging._amsgrad_in_language_models()
    ours = f"{cost.mean:+.1f} ± {cost.half:.1f}" if cost else "not run"
    says = "amsgrad's cost to language models, % of test perplexity with the cache, WikiText-2"
    rows.append([says, "laptop", ours, "–", str(cost.n if cost else 0)])
    return Table(["difference", "size", "ours", "article", "pairs"], rows).to_markdown()


def verdicts(lines, names=""):
    """Some lines of the ledger; without names the tally, and the lines that did not hold."""
    if names and names != "tally":
        unknown = set(names.split(",")) - {claim.name for claim in CLAIMS}
        if unknown:
            raise SystemExit(f"verdicts: no claim is called {', '.join(sorted(unknown))}")
        chosen = [line for line in lines if line[0].name in names.split(",")]
        return claims(chosen)
    count = tally(lines)
    said = ", ".join(f"**{count[v]}** {'are *not run* yet' if v == 'not run' else v}" for v in VERDICTS if count[v])
    worse = [line for line in lines if line[1].verdict in ("weaker", "failed")]
    text = f"The ledger has {len(lines)} lines, each a claim of the article or a reading of one: {said}."
    return f"{text} Those that did not hold:\n\n{claims(worse)}" if worse and not names else text


def claims(lines):
    rows = [[claim.says, claim.size or "computed", Cell(found.figure or "–"), str(found.n or "–"), found.verdict]
            for claim, found in lines]
    return Table(["claim", "size", "ours", "n", "verdict"], rows).to_markdown()


def loops():
    """The newest benchmark of the loops on each machine, in a line for each device and precision."""
    rows, seen, gpu = [], set(), False
    for record in speed_page.load_records(RECORDS / "bench"):
        if speed_page.machine(record) in seen:
            continue
        seen.add(speed_page.machine(record))
        for found in record["sets"]:
            ours, plain = (speed_page.find(found, f"{loop}+batches") for loop in ("learner", "plain"))
            if not found["not_run"] and ours and plain:
                ratios = speed_page.ratios(ours, plain)
                met = speed_page.median(ratios) <= speed_page.GOAL
                rows.append([f"{speed_page.machine(record)}, {found['precision']}", speed_page.spread(ratios),
                             str(len(ratios)), "met" if met else "missed"])
                gpu = gpu or found["device"] != "cpu"
    header = ["machine", "our Learner over a plain loop, time an epoch", "n", f"goal of {speed_page.GOAL}"]
    said = [Table(header, rows).to_markdown()] * bool(rows) + ["On a GPU: *not run*."] * (not gpu)
    return "\n\n".join(said)


def updated(text):
    """The text with all its blocks as the records give them now; ValueError for a mark without its end."""
    marks = ["/" * bool(end) + kind for end, kind, _ in MARK.findall(text)]
    if marks[1::2] != [f"/{kind}" for kind in marks[::2]]:
        raise ValueError(f"a mark without its end, or an end without its mark: {marks}")
    judged = []

    def block(match):
        opening, kind, given, closing = match.groups()
        given = given.split(":")[1:]
        if kind == "verdicts" and not judged:
            judged.extend(ledger())
        made = {"table": table, "cells": cells, "differences": differences, "loops": loops,
                "verdicts": lambda *names: verdicts(judged, *names)}[kind](*given)
        return f"{opening}{made}\n{closing}"

    return BLOCK.sub(block, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    check, old = parser.parse_args().check, False
    os.environ["NBUTILS_RECORDS"] = str(RECORDS)     # the ledger reads there too
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        new = updated(text)
        if new != text:
            old = True
            if check:
                print(f"{name}: tables older than the records: run `make tables`")
            else:
                page.write_text(new, encoding="utf-8")
                print(f"{name}: tables brought up to the records")
    return int(check and old)


if __name__ == "__main__":
    raise SystemExit(main())
