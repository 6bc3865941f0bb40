#!/usr/bin/env python
"""Bring the README's tables up to the records.

A block between `<!-- table:TASK:SIZE -->` and `<!-- /table -->` is replaced by the table that the
records of that task and size give now. `--check` changes nothing and exits 1 if it would.
"""
import argparse
import re
from pathlib import Path

from nbutils.experiment import get_task

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table:(\w+):(\w+) -->\n).*?(<!-- /table -->)", re.S)


def markdown(name, size):
    """The table of one task and size as Markdown; rows without records say `not run`."""
    return get_task(name).table(size, folder=ROOT / "book" / "records").to_markdown()


def updated(text):
    return BLOCK.sub(lambda m: f"{m[1]}{markdown(m[2], m[3])}\n{m[4]}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if new == text:
        return 0
    if check:
        print("README.md's tables are older than the records: run `make tables`")
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md: tables brought up to the records")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
