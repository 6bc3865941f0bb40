"""Lies planted in a small book, in its records, its README, a notebook, its pages: tools/verify_records.py names each."""
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import verify_records  # tools/verify_records.py, which conftest.py puts on the path
from sound_records import sound, write

from nbutils.experiment import get_task
from nbutils.records import config_hash, mean_interval

ROOT = Path(__file__).resolve().parent.parent
CELLS = [("adamw-30", seed) for seed in range(5)] + [("adamw-18", seed) for seed in range(2)] + [("sgd-30", 0)]


def tables(root, **options):
    return get_task("cifar10").table("full", folder=root / "book/records", **options)


@pytest.fixture(scope="module")
def true_book(tmp_path_factory):
    """A book of eight records, a README, a notebook and a site, all of which agree."""
    root = tmp_path_factory.mktemp("book")
    for row, seed in CELLS:
        write(root / "book/records", sound(row=row, seed=seed))
    shutil.copytree(ROOT / "book/records/bench", root / "book/records/bench")
    (root / "README.md").write_text(f"# A book\n\n<!-- table:cifar10:full -->\n{tables(root).to_markdown()}\n<!-- /table -->\n")
    html = tables(root, caption="Size full")._repr_html_().replace("Size full", "A net, size full")
    output = {"output_type": "display_data", "data": {"text/html": [html]}, "metadata": {}}
    (root / "nbs").mkdir()
    (root / "nbs/11-x.ipynb").write_text(json.dumps({"cells": [{"id": "t", "cell_type": "code", "source": "", "outputs": [output]}]}))
    site = root / "site"
    for folder in ("nbs", "book"):
        (site / folder).mkdir(parents=True)
    (site / "nbs/11-x.html").write_text(f"<html><p>A page.</p>{html}<table><tr><td>a</td></tr></table></html>")
    links = "".join(f'<a href="../records/cifar10/full/{row}/{seed}.json">record</a>' for row, seed in CELLS)
    (site / "book/runs.html").write_text(links)
    shutil.copytree(root / "book/records", site / "records")
    return root


@pytest.fixture
def book(true_book, tmp_path):
    shutil.copytree(true_book, tmp_path / "book")
    return tmp_path / "book"


def problems(book, site=True):
    return verify_records.verify(book, book / "site" if site else None).problems


def test_a_true_book(book):
    found = verify_records.verify(book, book / "site")
    assert not found.problems and not found.stale and len(found.records) == 8 and found.others == 1
    assert found.tables == 3 and found.cells == 3 * 9 * len(tables(book).header[1:])


def test_a_table_of_some_rows(book):
    """A block with a prefix shows the rows that begin so, and must show all of them."""
    part = task_table(book, [row for row in get_task("cifar10").rows("full") if row.startswith("wd0")])
    readme = book / "README.md"
    readme.write_text(readme.read_text() + f"\n<!-- table:cifar10:full:wd0 -->\n{part}\n<!-- /table -->\n")
    assert not verify_records.verify(book, book / "site").problems
    readme.write_text(readme.read_text().replace("<!-- table:cifar10:full:wd0 -->", "<!-- table:cifar10:full:adamw -->"))
    assert any("is not shown" in p for p in verify_records.verify(book, book / "site").problems)


def task_table(book, rows):
    return get_task("cifar10").table("full", rows, folder=book / "book/records").to_markdown()


def record_of(book, row="adamw-30", seed=3):
    return book / f"book/records/cifar10/full/{row}/{seed}.json"


def in_record(change):
    def lie(book):
        fields = json.loads(record_of(book).read_text())
        change(fields)
        record_of(book).write_text(json.dumps(fields, indent=1) + "\n")
    return lie


def changed(path, old, new, count=1):
    def lie(book):
        text = (book / path).read_text()
        assert re.search(old, text), f"nothing to change in {path}"
        (book / path).write_text(re.sub(old, new, text, count=count))
    return lie


def metric_and_history(fields):
    """A lie that is consistent with itself: only the tables know better."""
    fields["metrics"]["error"] = 0.01
    fields["history"][-1]["accuracy"] = 0.99


def rehashed(fields):
    fields["config"]["tail"] = 0.2
    fields["config_hash"] = config_hash(fields["config"])


def moved(book):
    record_of(book).rename(book / "book/records/cifar10/full/sgd-30/3.json")


def copied(book):
    fields = json.loads(record_of(book).read_text()) | {"seed": 9}
    write(book / "book/records", fields)


def in_benchmark(book, **changes):
    (path,) = (book / "book/records/bench").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def link(book, place, target):
    (book / "book/records" / place).symlink_to(target)


LIES = {  # name: (what is done to the book, what each of these problems must say)
    "a mean in README": (changed("README.md", r"\| adamw-30 \| \d\.\d", "| adamw-30 | 4.9"),
                         ["README.md", "row adamw-30, column 'error, %'", "shows '4.9", "the records give '5."]),
    "an interval in README": (changed("README.md", r"± \d\.\d\d", "± 0.01"), ["README.md", "row adamw-30, column 'error, %'", "± 0.01"]),
    "an n in README": (changed("README.md", r"\| 5 \|", "| 6 |"), ["README.md", "row adamw-30, column 'n': shows '6', and the records give '5'"]),
    "a published figure": (changed("README.md", r"\| 5\.66 \|", "| 5.96 |"), ["column 'error, %, published': shows '5.96', and the records give '5.66'"]),
    "a figure that was not run": (changed("README.md", r"\| wd0-30 \| not run", "| wd0-30 | 6.11"), ["row wd0-30", "shows '6.11', and the records give 'not run'"]),
    "a row left out of README": (changed("README.md", r"\| sgd-30 .*\n", ""), ["README.md", "row 'sgd-30' has records and is not shown"]),
    "a row that does not exist": (changed("README.md", r"\| sgd-30 ", "| sgd-31 "), ["there is no row 'sgd-31'"]),
    "digits that were not kept": (changed("README.md", r"\| adamw-30 \| (\d\.\d)\d", r"| adamw-30 | \1"), ["row adamw-30, column 'error, %'"]),
    "a figure in a notebook": (changed("nbs/11-x.ipynb", r"#cifar10-full-adamw-30\\\">\d\.\d", r'#cifar10-full-adamw-30\\">4.9'),
                               ["11-x.ipynb, cell t", "row adamw-30", "shows '4.9"]),
    "a size in a caption": (changed("nbs/11-x.ipynb", "size full", "size laptop"), ["11-x.ipynb, cell t", "must say one size"]),
    "a link to other runs": (changed("nbs/11-x.ipynb", r"#cifar10-full-adamw-30\\\"", r'#cifar10-full-sgd-30\\"'), ["row adamw-30: links to the runs of sgd-30"]),
    "a figure on a page": (changed("site/nbs/11-x.html", r"(#cifar10-full-sgd-30\">)\d\.\d", r"\g<1>1.1"), ["nbs/11-x.html", "row sgd-30, column 'error, %': shows '1.1"]),
    "a page of runs that lacks one": (changed("site/book/runs.html", "adamw-30/3.json", "adamw-30/4.json"), ["book/runs.html: cifar10/full/adamw-30/3.json is not shown"]),
    "another record on the site": (changed("site/records/cifar10/full/adamw-30/3.json", '"seconds": 332', '"seconds": 331'),
                                   ["adamw-30/3.json: missing, or not the record that was checked"]),
    "a metric in a record": (in_record(lambda f: f["metrics"].update(error=0.01)), ["cifar10/full/adamw-30/3.json: metrics.error is 0.01"]),
    "a metric and its history": (in_record(metric_and_history), ["README.md", "11-x.ipynb", "nbs/11-x.html", "row adamw-30, column 'error, %'"]),
    "a NaN": (in_record(lambda f: f["metrics"].update(loss=math.nan)), ["adamw-30/3.json: metrics.loss is nan"]),
    "a truncated history": (in_record(lambda f: f["history"].pop()), ["adamw-30/3.json: the history has 29 epochs"]),
    "settings without their hash": (in_record(lambda f: f["config"].update(lr=0.01)), ["adamw-30/3.json: config_hash is ", "they were edited"]),
    "settings with their hash": (in_record(rehashed), ["column 'n': shows '5', and the records give '4'"]),
    "a record in another row's folder": (moved, ["sgd-30/3.json: it lies in another cell's place"]),
    "a copy under another seed": (copied, ["adamw-30/9.json: its history is that of seed 3"]),
    "a record taken away": (lambda book: record_of(book).unlink(), ["row adamw-30, column 'n': shows '5', and the records give '4'"]),
    "half a file": (lambda book: record_of(book).write_text(record_of(book).read_text()[:500]), ["adamw-30/3.json: it is not JSON"]),
    "a stray file": (lambda book: (book / "book/records/cifar10/full/adamw-30/notes.txt").write_text("x"), ["adamw-30/notes.txt: not named by its seed"]),
    "what a killed run left": (lambda book: (book / "book/records/cifar10/full/adamw-30/.7.json.x.part").write_text("x"), [".7.json.x.part: not named by its seed"]),
    "a seed with a zero before it": (lambda book: write(book / "book/records", sound(seed=7), name="cifar10/full/adamw-30/07.json"), ["07.json: not named by its seed"]),
    "a record one folder too high": (lambda book: write(book / "book/records", sound(seed=7), name="cifar10/full/7.json"), ["not at task/size/row/seed.json"]),
    "an unknown folder": (lambda book: write(book / "book/records", sound(), name="cifar11/full/adamw-30/0.json"), ["cifar11: neither a task nor a benchmark"]),
    "an unknown file": (lambda book: (book / "book/records/index.html").write_text("x"), ["index.html: neither a task nor a benchmark"]),
    "a benchmark that holds a NaN": (lambda book: in_benchmark(book, seconds=math.nan), ["2-threads.json: not a record: seconds is nan, not a number from"]),
    "a benchmark under another name": (lambda book: in_benchmark(book, name="x"), ["2-threads.json: not a record: name is 'x', and the file's is '2026-"]),
    "a benchmark's picture": (lambda book: (book / "book/records/bench/x.png").write_text("x"), ["bench/x.png: not a .json file in the folder's root"]),
    "a folder of a benchmark": (lambda book: (book / "book/records/bench/x.json").mkdir(), ["bench/x.json: not a .json file in the folder's root"]),
    "a link to a record": (lambda book: link(book, "cifar10/full/adamw-30/7.json", "3.json"), ["adamw-30/7.json: a symbolic link, whose target would be published"]),
    "a link to a folder": (lambda book: link(book, "cifar10/full/etc", "/etc"), ["cifar10/full/etc: a symbolic link"]),
    "a link to a folder at the top": (lambda book: link(book, "cars", "/etc"), ["cars: a symbolic link"]),
    "a link that leads nowhere": (lambda book: link(book, "bench/x.json", "nowhere"), ["bench/x.json: a symbolic link"]),
    "a link in the place of all": (lambda book: ((book / "book/records").rename(book / "kept"), link(book, "", "../kept")), [".: a symbolic link"]),
    "a pipe": (lambda book: os.mkfifo(book / "book/records/cifar10/full/adamw-30/7.json"), ["adamw-30/7.json: neither a file nor a folder"]),
    "a link on the site": (lambda book: (book / "site/records/etc").symlink_to("/etc"), ["site/records/etc: no record that was checked"]),
    "a stray file on the site": (lambda book: (book / "site/records/x.json").write_text("{}"), ["site/records/x.json: no record that was checked"]),
    "a script that was set aside": (lambda book: write(book / "book/records", sound(seed=2, device="<script>"), name="cifar10/full/adamw-30/2.recipe1-0123456789abcdef.json"),
                                    ["0123456789abcdef.json: device is '<script>'"]),
    "a table without its marks": (changed("README.md", r"<!-- /?table.*-->\n?", "", count=2), ["README.md: a table of runs without its marks"]),
}


@pytest.mark.parametrize("name", LIES)
def test_lie(name, book):
    plant, says = LIES[name]
    plant(book)
    found = problems(book)
    for text in says:
        assert any(text in problem for problem in found), f"{text!r} is not among\n" + "\n".join(found)


def test_stale_records_are_listed(book):
    old = sound(seed=11, recipe=99)
    write(book / "book/records", old)
    write(book / "book/records", copy.deepcopy(old), name="cifar10/full/adamw-30/2.recipe1-0123456789abcdef.json")
    found = verify_records.verify(book)
    assert not found.problems and len(found.stale) == 2 and len(found.records) == 8
    assert any("recipe 99" in line for line in found.stale) and any("set aside" in line for line in found.stale)


@pytest.mark.parametrize("n", [2, 3, 5, 17, 29, 30, 31, 45])
def test_intervals_are_the_books(n):
    """Two ways to the same text, over and over; and a last digit that is wrong is not taken for rounding."""
    import random

    draw = random.Random(n)
    for _ in range(50):
        values = [draw.gauss(6, 0.3) for _ in range(n)]
        text = mean_interval(values).format(2)
        assert verify_records.agrees(text, values, 2)
        mean, half = (float(x) for x in text.split(" ± "))
        assert not verify_records.agrees(f"{mean + 0.01:.2f} ± {half:.2f}", values, 2)
        assert not verify_records.agrees(f"{mean:.2f} ± {half + 0.01:.2f}", values, 2)
        assert not verify_records.agrees(f"{mean:.2f}", values, 2)


def run_tool(*words):
    return subprocess.run([sys.executable, ROOT / "tools/verify_records.py", *map(str, words)], capture_output=True, text=True, timeout=300)


def test_the_book_itself():
    found = verify_records.verify(ROOT)
    assert not found.problems, "\n".join(found.problems)
    assert found.records and found.tables >= 5


def test_exit_status(book):
    LIES["a mean in README"][0](book)
    done = run_tool("--root", book)
    assert done.returncode == 1 and "row adamw-30, column 'error, %'" in done.stdout and "make tables" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_makefile_asks_before_it_builds():
    text = (ROOT / "Makefile").read_text("utf-8")
    recipe = re.search(r"^book:.*\n((?:\t.*\n)+)", text, re.M)
    assert re.match(r"book: .*\bverify\b", recipe[0]), "make book builds pages whose tables were not verified"
    assert "verify_records.py --site" in recipe[1]
    verify = re.search(r"^verify:.*\n((?:\t.*\n)+)", text, re.M)[1]
    assert "verify_records.py" in verify and "readme_tables.py --check" in verify, "a figure of the introduction may be changed by hand"
