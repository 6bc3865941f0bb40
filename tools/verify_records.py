#!/usr/bin/env python
"""Check every record of a run, and every table cell that is computed from records.

    python tools/verify_records.py                     records, README.md, the stored notebooks
    python tools/verify_records.py --site _build/html  the built pages too

Each record is held against its form, against itself and against its row (nbutils.checks, bench/forms.py); whatever else
lies among them, a link above all, is named. The tables are then computed
again from the JSON files, past nbutils.records: another mean, scipy's quantile of Student's t, other
rounding. A cell that shows something else is named with file, row, column and both values, and the
exit status is 1. Records of settings or recipes that are no longer a row's are listed; that is no error.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import stat
import statistics
import sys
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import forms  # noqa: E402  (bench/forms.py)
from nbutils.checks import check_record  # noqa: E402
from nbutils.experiment import SIZES, TASKS, get_task  # noqa: E402
from nbutils.records import printable, read_json, record_problems  # noqa: E402

ASIDE = re.compile(r"\d+(\.(bf16|fp16|fp32|recipe\d+-[0-9a-f]{16}))+(-\d+)?\.json")   # of other settings or another precision
BLOCK = re.compile(r"<!-- table:(\w+):(\w+)(?::([\w-]+))? -->\n(.*?)<!-- /table -->", re.S)
LINK = re.compile(r"runs\.html#(\w+?)-(\w+?)-(.+)")
PUBLISHED = ", published"


# --- records -------------------------------------------------------------------------------------
def entries(folder):
    """Yield (path, mode) of everything below a folder; links are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        mode = entry.stat(follow_symlinks=False).st_mode
        yield Path(entry.path), mode
        if stat.S_ISDIR(mode):
            yield from entries(entry.path)


def kind_problem(mode):
    if stat.S_ISLNK(mode):
        return "a symbolic link, whose target would be published: put the file itself there, or take it away"
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "neither a file nor a folder: take it away"
    return None


def walk(folder):
    """Yield (path, problem or None) of everything in the folder of records but the folders that may be there."""
    if problem := kind_problem(os.lstat(folder).st_mode):
        yield folder, problem
        return
    for path, mode in entries(folder):
        below, is_folder = path.relative_to(folder), stat.S_ISDIR(mode)
        of, deep = below.parts[0], len(below.parts)
        if problem := kind_problem(mode):
            yield path, problem
        elif of not in (*TASKS, *forms.FORMS):
            if deep == 1:
                yield path, "neither a task nor a benchmark: give it a form in bench/forms.py, or take it away"
        elif of in forms.FORMS and (deep > 2 or is_folder == (deep == 2) or deep == 2 and path.suffix != ".json"):
            yield path, "not a .json file in the folder's root"
        elif not is_folder:
            yield path, None if of in forms.FORMS else name_problem(below)


def name_problem(path):
    if len(path.parts) != 4 or path.parts[1] not in SIZES:
        return "not at task/size/row/seed.json"
    if ASIDE.fullmatch(path.name) or re.fullmatch(r"(0|[1-9]\d*)\.json", path.name):
        return None
    return "not named by its seed: what a killed run left, or a stray file"


@dataclass
class Found:
    """What was read: problems as sentences, stale records, and those that count, as plain JSON."""

    problems: list = field(default_factory=list)
    stale: list = field(default_factory=list)
    records: list = field(default_factory=list)
    files: list = field(default_factory=list)
    others: int = 0
    unread: list = field(default_factory=list)
    tables: int = 0
    cells: int = 0


def read(folder, found):
    for path, problem in walk(folder):
        below = path.relative_to(folder)
        shown = printable(below.as_posix())
        found.files.append(below)
        if problem:
            found.problems.append(f"{shown}: {problem}")
        elif below.parts[0] in forms.FORMS:
            found.others += 1
            found.problems += [f"{shown}: not a record: {p}" for p in itertools.islice(forms.problems(path), 20)]
        elif ASIDE.fullmatch(path.name):
            found.stale.append(f"{shown}: set aside")
            found.problems += [f"{shown}: {p}" for p in form_problems(path)]
        else:
            verdict = check_record(path, folder)
            found.problems += [f"{shown}: {p}" for p in verdict.problems]
            if not verdict.problems:
                record = json.loads(path.read_text(encoding="utf-8"))
                if counts(record) == bool(verdict.stale):
                    found.problems.append(f"{shown}: nbutils says that it {'does not count' if verdict.stale else 'counts'}, "
                                          "and its hash, computed here, says otherwise")
                elif verdict.stale:
                    found.stale.append(f"{shown}: {verdict.stale}")
                else:
                    found.records.append(record)


def form_problems(path):
    """What is wrong with the form of a record of a run: of one that was set aside, nothing else is asked."""
    try:
        return list(itertools.islice(record_problems(read_json(path)), 20))
    except ValueError as error:
        return [str(error)]


def digest(config):
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def counts(record):
    """Whether the record has its row's settings, recipe and precision, without asking nbutils.records."""
    task = get_task(record["task"])
    rows = {(c.size, c.row): json.loads(json.dumps(asdict(c))) for c in task.configs}
    now = rows.get((record["size"], record["row"]))
    wanted = now and (now["precision"] if now["precision"] != "auto" else task.precisions.get(record["size"], "fp32"))
    return (now == record["config"] and digest(now) == record["config_hash"] and record["recipe"] == task.recipe
            and wanted == record["precision"])


# --- cells ---------------------------------------------------------------------------------------
def expected(values):
    """(mean, half width of the 95 % interval or None)."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return mean, None
    quantile = student.ppf(0.975, min(n, 30) - 1)  # the book keeps the quantile of 30 from there on
    return mean, quantile * statistics.stdev(values) / math.sqrt(n)


def agrees(text, values, digits):
    """Whether a cell's text is the mean and interval of the values, to its last digit."""
    mean, half = expected(values)
    shown = re.fullmatch(r"(-?\d+\.\d+)(?: ± (\d+\.\d+))?", text)
    if not shown or (shown[2] is None) != (half is None):
        return False
    numbers = [s for s in shown.groups() if s is not None]
    if any(len(s.partition(".")[2]) != digits for s in numbers):
        return False
    rounding = 0.5000001 * 10.0**-digits  # the book's quantiles have four decimals
    return abs(float(shown[1]) - mean) <= rounding and (
        half is None or abs(float(shown[2]) - half) <= rounding + 5e-5 * half)


def in_words(values, digits):
    mean, half = expected(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}") + f" (n = {len(values)})"


def check_table(where, name, size, header, rows, found):
    """Hold each cell of one table against the records."""
    task = get_task(name)
    metrics = {heading: (metric, *how) for metric, (heading, *how) in task.columns.items()}
    configs = {c.row: c for c in task.configs if c.size == size}
    found.tables += 1
    for line in rows:
        row, mine = line[0], [r for r in found.records if (r["task"], r["size"], r["row"]) == (name, size, line[0])]
        for heading, text in zip(header[1:], line[1:]):
            found.cells += 1
            if heading == "n":
                right, want = text == str(len(mine)), str(len(mine))
            elif heading.endswith(PUBLISHED):
                metric = metrics[heading.removesuffix(PUBLISHED)][0]
                want = task.published.get(row, {}).get(metric, "–")
                right = text == want
            else:
                metric, factor, digits = metrics[heading]
                values = [factor * r["metrics"][metric] for r in mine if metric in r["metrics"]]
                if values:
                    right, want = agrees(text, values, digits), in_words(values, digits)
                else:
                    dash = mine or (row in configs and not task.measures(configs[row], metric))
                    want = "–" if dash else "not run"
                    right = text == want
            if not right:
                found.problems.append(f"{where}: {name}, size {size}, row {row}, column {heading!r}: shows {text!r}, "
                                      f"and the records give {want!r}")
        if row not in configs:
            found.problems.append(f"{where}: {name}, size {size}: there is no row {row!r}")


# --- tables in Markdown and HTML -----------------------------------------------------------------
def cells_in(line):
    """The texts of a line of a Markdown table, without the backslashes that escape something."""
    return [re.sub(r"\\([!-/:-@[-`{-~])", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def check_readme(path, found):
    text = path.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    for line in BLOCK.sub("", text).splitlines():
        if line.startswith("|") and list(task_of(cells_in(line))):
            found.problems.append(f"{path.name}: a table of runs without its marks, so nobody checks it: {line}")
    for name, size, prefix, block in blocks:
        lines = [cells_in(line) for line in block.strip().splitlines()]
        header, rows = lines[0], lines[2:]
        check_table(path.name, name, size, header, rows, found)
        shown = {line[0] for line in rows}
        for row in sorted({r["row"] for r in found.records if (r["task"], r["size"]) == (name, size)} - shown):
            if row.startswith(prefix) and not row.startswith("grid-"):
                found.problems.append(f"{path.name}: {name}, size {size}: row {row!r} has records and is not shown")
    if len(blocks) != text.count("<!-- table:"):
        found.problems.append(f"{path.name}: a table's block does not end with <!-- /table -->")


class Tables(HTMLParser):
    """Collects a page's tables: caption, rows of texts, links."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.into = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append({"caption": "", "rows": [], "links": []})
        if not self.tables:
            return
        table = self.tables[-1]
        if tag == "tr":
            table["rows"].append([])
        elif tag in ("td", "th") and table["rows"]:
            table["rows"][-1].append("")
            self.into = "cell"
        elif tag == "caption":
            self.into = "caption"
        elif tag == "a" and self.into == "cell":
            table["links"] += [(table["rows"][-1][0], v) for k, v in attributes if k == "href"]

    def handle_endtag(self, tag):
        if tag in ("td", "th", "caption", "table"):
            self.into = None

    def handle_data(self, text):
        if self.into == "cell":
            self.tables[-1]["rows"][-1][-1] += text
        elif self.into == "caption":
            self.tables[-1]["caption"] += text


def task_of(header):
    """Yield the tasks whose tables may have this header; none for a table of something else."""
    headings = [h.removesuffix(PUBLISHED) for h in header[1:-1]]
    for name in TASKS:
        known = [heading for heading, *_ in get_task(name).columns.values()]
        if header[0] == "row" and header[-1] == "n" and headings and set(headings) <= set(known):
            yield name


def check_html(where, text, found):
    """Check all tables of runs in a page or in a notebook's output."""
    for table in Tables(text).tables:
        header, *rows = [[" ".join(c.split()) for c in row] for row in table["rows"]] or [[]]
        names = list(task_of(header)) if header else []
        if not names:
            if any(LINK.search(link) for _, link in table["links"]):
                found.unread.append(f"{where}: {table['caption'] or header}")
            continue
        links = {(m[1], m[2]) for _, link in table["links"] if (m := LINK.search(link))}
        said = re.search(rf"\bsize ({'|'.join(SIZES)})\b", table["caption"])
        rows_of = [n for n in names if {r[0] for r in rows} <= {c.row for c in get_task(n).configs}]
        name = rows_of[0] if rows_of else names[0]
        sizes = {size for _, size in links} | ({said[1]} if said else set())
        if len(sizes) != 1 or any(n != name for n, _ in links):
            found.problems.append(f"{where}: the table {table['caption']!r} must say one size in its caption, as in "
                                  f"'size full', and link to runs of it: found {sorted(sizes)} of {sorted({n for n, _ in links})}")
            continue
        for row, link in table["links"]:
            if (m := LINK.search(link)) and m[3] != row:
                found.problems.append(f"{where}: {name}, row {row}: links to the runs of {m[3]}")
        check_table(where, name, sizes.pop(), header, rows, found)


def check_notebook(path, found):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("data", {}).get("text/html", ""))
            check_html(f"{path.name}, cell {cell['id']}", text, found)


def check_site(site, folder, found):
    """The built pages: their tables, and that the records they link to are those that were checked."""
    pages = sorted(site.glob("nbs/*.html")) + sorted(site.glob("book/*.html"))
    if not pages:
        found.problems.append(f"{site}: there are no pages: run `make book`")
    for path in pages:
        check_html(path.relative_to(site).as_posix(), path.read_text(encoding="utf-8"), found)
    runs = site / "book" / "runs.html"
    linked = set(re.findall(r'href="\.\./records/([^"]+)"', runs.read_text(encoding="utf-8"))) if runs.exists() else set()
    for r in found.records:
        name = f"{r['task']}/{r['size']}/{r['row']}/{r['seed']}.json"
        if name not in linked:
            found.problems.append(f"book/runs.html: {name} is not shown")
    below = site / "records"
    copies = {path.relative_to(below): mode for path, mode in entries(below) if not stat.S_ISDIR(mode)} if below.is_dir() else {}
    for name in sorted(copies.keys() | set(found.files)):
        copy, checked = below / name, name in found.files
        if not checked or not stat.S_ISREG(copies.get(name, 0)) or copy.read_bytes() != (folder / name).read_bytes():
            found.problems.append(f"{site}/records/{printable(name)}: " + (
                "missing, or not the record that was checked" if checked else "no record that was checked: take it away"))


def verify(root, site=None):
    """Check a checkout; return what was found."""
    found, folder = Found(), root / "book" / "records"
    read(folder, found)
    check_readme(root / "README.md", found)
    for path in sorted((root / "nbs").glob("*.ipynb")):
        check_notebook(path, found)
    if site is not None:
        check_site(site, folder, found)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    parser.add_argument("--site", type=Path, help="the built pages, to be checked too")
    chosen = parser.parse_args()
    found = verify(chosen.root, chosen.site)
    for line in found.stale:
        print(f"counts in no table: {line}")
    for line in found.unread:
        print(f"links to runs in a form of its own, which `make test` computes again: {line}")
    print(*(printable(problem, 1000) for problem in found.problems), sep="\n", end="\n" if found.problems else "")
    print(f"{len(found.records)} records that count, {len(found.stale)} that do not, {found.others} of other kinds; "
          f"{found.cells} cells in {found.tables} tables; {len(found.problems)} problems")
    if found.problems:
        print("A table that is older than its records: `make tables` and `make run-notebooks` bring it up to them.")
    return 1 if found.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
