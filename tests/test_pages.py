"""What the pages promise: every public name has an entry, chapters and API lead to each other,
parts name their chapters, tables are the records', the status page says no more than is known."""
import base64
import importlib
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book" / "_ext")]

import check_site  # noqa: E402
import drift  # noqa: E402
import pdf  # noqa: E402
import readme_tables  # noqa: E402
import status_page  # noqa: E402
import weighing  # noqa: E402

from nbutils import verdicts  # noqa: E402
from nbutils.experiment import get_task  # noqa: E402
from nbutils.records import paired  # noqa: E402

TOC = (ROOT / "_toc.yml").read_text("utf-8")
API = ROOT / "book" / "api"
PARTS = {block.split("\n")[0]: re.findall(r"- file: (\S+)", block) for block in TOC.split("- caption: ")[1:]}


def cells_of(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def exported():
    """Module to the chapter that exports it, but for the package itself."""
    found = {weighing.module_of(cells_of(p)): p for p in sorted((ROOT / "nbs").glob("*.ipynb"))}
    return {module: path for module, path in found.items() if module not in (None, "__init__")}


# --- chapters and API --------------------------------------------------------------------------
def test_modules_are_those_of_the_package():
    assert sorted(exported()) == sorted(p.stem for p in (ROOT / "nbutils").glob("[!_]*.py"))


@pytest.mark.parametrize("module", sorted(exported()))
def test_api_page(module):
    """The module's page documents it, leads to its chapter, and is in the contents and the index."""
    page = (API / f"{module}.md").read_text("utf-8")
    assert f".. automodule:: nbutils.{module}\n   :members:" in page
    assert f"(../../nbs/{exported()[module].name})" in page
    assert f"- file: book/api/{module}\n" in TOC
    index = (API / "index.md").read_text("utf-8")
    assert f"[{module}]({module}.md)" in index and f"(../../nbs/{exported()[module].name})" in index


@pytest.mark.parametrize("module", sorted(exported()))
def test_every_public_name_has_an_entry(module):
    """autodoc shows functions and classes with docstrings; constants need a line of their own."""
    source = (ROOT / "nbutils" / f"{module}.py").read_text("utf-8")
    loaded, page = importlib.import_module(f"nbutils.{module}"), (API / f"{module}.md").read_text("utf-8")
    for name in loaded.__all__:
        value = getattr(loaded, name)
        defined = isinstance(value, (type, types.FunctionType)) and value.__doc__
        commented = re.search(rf"^{name} = .*  #: \w", source, re.M)
        assert defined or commented or f".. autodata:: nbutils.{module}.{name}\n" in page, \
            f"{name}: give it a docstring, or an autodata line in book/api/{module}.md"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_chapter_gets_a_link_to_its_module(path):
    module, source = weighing.module_of(cells_of(path)), "".join(cells_of(path)[0]["source"])
    linked = weighing.link_to_api(source, module)
    page = "index" if module == "__init__" else module
    (line,) = re.findall(r"^> Exported as \[`nbutils.*`\]\(\.\./(book/api/\w+\.md)\)\.$", linked, re.M)
    assert line == f"book/api/{page}.md" and (ROOT / line).is_file()
    assert linked.replace(f">\n{linked.split(chr(10))[4]}\n", "") == source  # the rest is as it was


def test_parts_name_their_chapters():
    for caption, files in PARTS.items():
        opening = ROOT / f"{files[0]}.md"
        assert files[0].startswith("book/parts/"), f"{caption} has no page"
        text = opening.read_text("utf-8")
        assert f"](parts/{opening.name})" in (ROOT / "book/intro.md").read_text("utf-8")
        for file in files[1:]:
            name = Path(file).name
            assert re.search(rf"\]\((\S*/)?{re.escape(name)}\.(md|ipynb)\)", text) or "/api/" in file, \
                f"{opening.name} does not lead to {file}"


def test_every_notebook_is_in_the_contents():
    assert re.findall(r"- file: nbs/(\S+)", TOC) == [p.stem for p in status_page.nb.notebooks()]


# --- glossary ----------------------------------------------------------------------------------
def test_glossary():
    """Each term once, each with a definition that leads to its chapter."""
    text = (ROOT / "book" / "glossary.md").read_text("utf-8")
    entries = re.findall(r"^(\S.*)\n  (\S.*)$", "\n".join(re.findall(r"^:::\{glossary\}\n(.*?)^:::", text, re.M | re.S)), re.M)
    terms = [term for term, _ in entries]
    assert len(terms) > 40 and len(set(terms)) == len(terms)
    for term, definition in entries:
        assert re.search(r"\[(Chapter|Appendix) A?\d+\]\(\.\./nbs/\S+\.ipynb\)\.$", definition), term
    for called, name in re.findall(r"\[(?:Chapter|Appendix) (A?\d+)\]\(\.\./nbs/(\S+)\.ipynb\)", text):
        assert weighing.number_of(f"nbs/{name}") == called


# --- tables in pages ---------------------------------------------------------------------------
def test_a_prefix_chooses_rows():
    whole, some = readme_tables.table("cifar10", "full"), readme_tables.table("cifar10", "full", "adamw-")
    lines = [line for line in whole.splitlines() if line.startswith("| adamw-")]
    assert lines and some.splitlines()[2:] == lines
    with pytest.raises(SystemExit, match="no row begins so; there are adamw-30"):
        readme_tables.updated("<!-- table:cifar10:full:crops- -->\n<!-- /table -->\n")


def test_marks_need_their_ends():
    for text in ("<!-- cells -->\n", "<!-- cells -->\n<!-- /table -->\n", "<!-- /cells -->\n"):
        with pytest.raises(ValueError, match="a mark without its end"):
            readme_tables.updated(text)
    text = readme_tables.updated("a\n<!-- cells -->\nold\n<!-- /cells -->\nb\n")
    assert "old" not in text and text.startswith("a\n<!-- cells -->\n| test error") and text.endswith("<!-- /cells -->\nb\n")
    assert readme_tables.updated(text) == text


SUMMARY = (  # sentences of README and introduction that are words, not figures
    "AdamW and Adam with L2 come back as published, and AdamW is the better of the two.",
    "But that is decay against nothing:",
    "We could not tell SGD with momentum, under a 1cycle schedule of its own, from AdamW.",
    "The harm that the article saw in amsgrad does not come back on CIFAR-10, while our small language models",
    "Stanford Cars and WikiText-2 at the article's size are *not run* yet",
)


def test_the_summaries_say_what_the_records_say(monkeypatch):
    """The records must still bear the sentences of README and introduction that hold no figures."""
    monkeypatch.setenv("NBUTILS_RECORDS", str(ROOT / "book" / "records"))
    for page in (ROOT / "README.md", ROOT / "book" / "intro.md"):
        missing = [sentence for sentence in SUMMARY if sentence not in page.read_text("utf-8")]
        assert not missing, f"{page.name} no longer says {missing}: change the test with it"
    names = ("adamw-30-mean", "adam-l2-30-mean", "adamw-better", "amsgrad-adamw", "amsgrad-adam")
    found = {claim.name: claim.judge().verdict for claim in readme_tables.CLAIMS if claim.name in names}
    assert [found[name] for name in names] == ["held"] * 3 + ["failed"] * 2
    cifar10 = get_task("cifar10").records("full")
    for row, other in (("sgd-30", "adamw-30"), ("adam-l2-30", "wd0-30")):
        gap = paired(cifar10, row, other, "error")
        assert not gap.known and gap.n >= 3
    sgd, adam = (get_task("cifar10").config(row, "full") for row in ("sgd-30", "adam-l2-30"))
    assert (sgd.div, sgd.tail) != (adam.div, adam.tail) and adam.l2 == 1e-6
    cost = verdicts._amsgrad_in_language_models()
    assert cost.known and cost.mean > 0
    assert not any(get_task(name).records("full") for name in ("cars", "wikitext2"))


def test_no_page_says_that_sgd_ran_under_adams_cycle():
    pages = [ROOT / "README.md", *(ROOT / "book").rglob("*.md"), *(ROOT / "nbs").glob("*.ipynb")]
    said = [p.name for p in pages if "under the same cycle" in " ".join(p.read_text("utf-8").split())]
    assert not said, f"{said}: SGD's cycle has another start and another tail"


def test_differences_are_the_records(monkeypatch):
    monkeypatch.setenv("NBUTILS_RECORDS", str(ROOT / "book" / "records"))
    verdicts._records.cache_clear()
    text = readme_tables.updated("<!-- differences -->\n<!-- /differences -->\n")
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")}
    gap = paired(get_task("cifar10").records("full"), "adamw-30-amsgrad", "adamw-30", "error")
    assert rows["amsgrad's cost under AdamW, points of error on CIFAR-10"][:3] == [
        "full", f"{100 * gap.mean:+.2f} ± {100 * gap.half:.2f}", "+0.65"]
    mine, theirs = ({(r.row.removesuffix("-amsgrad"), r.seed): r.metrics["test_cache"]
                     for r in get_task("wikitext2").records("laptop") if r.row.endswith("-amsgrad") is amsgrad}
                    for amsgrad in (True, False))
    logs = [math.log(value / theirs[pair]) for pair, value in mine.items()]
    (cost,) = [cells for says, cells in rows.items() if "language models" in says]
    assert cost[1].startswith(f"{100 * math.expm1(sum(logs) / len(logs)):+.1f} ± ") and cost[3] == f"{len(logs)} |"
    assert readme_tables.updated(text.replace("+0.65", "+0.66")) == text


def test_verdicts_of_no_claim_are_refused():
    with pytest.raises(SystemExit, match="no claim is called nonsense"):
        readme_tables.verdicts([], "nonsense")


# --- status ------------------------------------------------------------------------------------
def report(cell, outcome="passed", when="call", notebook="nbs/one.ipynb"):
    return types.SimpleNamespace(nodeid=f"{notebook}::{cell}", outcome=outcome, when=when)


def one_notebook(folder, cells=2):
    book = status_page.nb.nbformat.v4
    cells = [book.new_markdown_cell("# One"), *(book.new_code_cell(f"{i}") for i in range(cells))]
    status_page.nb.nbformat.write(book.new_notebook(cells=cells), folder / "one.ipynb")
    return folder / "one.ipynb"


def test_drift_is_written_and_expires(tmp_path):
    path, file = one_notebook(tmp_path), tmp_path / "_build" / "drift.json"
    seen = drift.Drift(file, tmp_path)
    for r in (report("Cell 0", when="setup"), report("Cell 0"), report("Cell 1", "failed"),
              report("Cell 1", when="teardown"), report("test", notebook="tests/test_x.py")):
        seen.pytest_runtest_logreport(r)
    seen.pytest_sessionfinish()
    entry = drift.current(path, drift.read(file))
    assert entry["cells"] == 2 and entry["differ"] == ["Cell 1"]
    assert status_page.compared(path, drift.read(file))[2] == "Cell 1 (2 cells)"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    assert drift.current(path, drift.read(file)) is None
    assert status_page.compared(path, drift.read(file))[2] == "unknown"


def test_a_part_of_a_notebook_is_not_a_comparison(tmp_path):
    one_notebook(tmp_path)
    seen = drift.Drift(tmp_path / "drift.json", tmp_path)
    seen.pytest_runtest_logreport(report("Cell 0"))
    seen.pytest_sessionfinish()
    assert drift.read(tmp_path / "drift.json") == {}


def test_without_git_the_date_is_unknown(tmp_path, monkeypatch):
    path = one_notebook(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert status_page.stored(path, tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert status_page.stored(path, tmp_path) == "unknown"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_with_git_the_date_is_the_last_change(tmp_path, monkeypatch):
    path = one_notebook(tmp_path)
    monkeypatch.setenv("GIT_COMMITTER_DATE", "2020-02-02T12:00:00+0000")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, timeout=60)
    assert status_page.stored(path, tmp_path) == "2020-02-02"
    path.write_text("{}", "utf-8")
    assert status_page.stored(path, tmp_path) == "changed, not committed"


def test_rows_are_counted(tmp_path):
    """Without records every row is not run; with the book's, the three kinds make up all rows."""
    rows = len(status_page.get_task("cifar10").rows("full"))
    assert status_page.counts("cifar10", "full", tmp_path) == (0, 0, rows)
    counted = status_page.counts("cifar10", "full")
    assert sum(counted) == rows and counted[0] >= 1


# --- the site ----------------------------------------------------------------------------------
def test_check_site_sees_what_is_wrong(tmp_path):
    (tmp_path / "book/api").mkdir(parents=True)
    (tmp_path / "nbs").mkdir()
    page = '<nav><a href="{nav}">x</a></nav><article class="bd-article"><a href="{link}">x</a>{more}</article>'
    api, chapter = tmp_path / "book/api/adam.html", tmp_path / "nbs/03-adam.html"
    api.write_text(page.format(nav="../../nbs/03-adam.html", link="../../nbs/03-adam.html", more=""))
    chapter.write_text(page.format(nav="../book/api/adam.html", link="../book/api/adam.html", more=""))
    (tmp_path / "index.html").write_text("")
    assert list(check_site.problems(tmp_path)) == []
    chapter.write_text(page.format(nav="../book/api/adam.html", link="#", more='<img src="https://x.example/a.png" alt="">'))
    said = "\n".join(check_site.problems(tmp_path))
    assert "nbs/03-adam.html: https://x.example/a.png comes from the network" in said
    assert "nbs/03-adam.html: does not lead back to book/api/adam.html" in said


GOOD_PAGE = """<html lang="en"><head><title>One</title><script>const A = 1;</script><script>const B = 1;</script></head>
<body><article><h1>One</h1><p>From $HOME on.</p><p>So <code>$x$</code> <span class="math">\\(x\\)</span></p><h2>Two</h2><h3>Three</h3>
<h2>Four</h2><img src="data:," alt="A line."></article></body></html>"""


@pytest.mark.parametrize("good, bad, said", (
    (' lang="en"', "", "no lang"),
    ("<title>One</title>", "<title></title>", "no title"),
    ("<h2>Four</h2>", "<h1>Four</h1>", "2 first headings"),
    ("<h2>Two</h2>", "", "a heading of level 3 below one of level 1"),
    ("<code>$x$</code>", "$x$", "raw markup: $x$"),
    ('<span class="math">\\(x\\)</span>', "\\(x\\)", "raw markup: \\("),
    ("Three", "{cite:t}`adam`", "raw markup: {cite:t}`"),
    ("const B", "const A", "2 scripts declare A"),
    ('alt="A line."', 'alt=" "', "an image without alt text: data:,"),
))
def test_check_site_sees_what_a_reader_would(tmp_path, good, bad, said):
    page = tmp_path / "index.html"
    page.write_text(GOOD_PAGE, "utf-8")
    assert list(check_site.problems(tmp_path)) == []
    assert GOOD_PAGE.count(good) == 1
    page.write_text(GOOD_PAGE.replace(good, bad), "utf-8")
    assert list(check_site.problems(tmp_path)) == [f"index.html: {said}"]


def test_no_script_of_thebe_is_left():
    files = [types.SimpleNamespace(filename="_static/custom.js", attributes={}),
             types.SimpleNamespace(filename="", attributes={"body": "const thebe_selector = 1"}),
             types.SimpleNamespace(filename="_static/sphinx-thebe.js", attributes={}), "_static/old-style.js"]
    context = {"script_files": list(files)}
    weighing.without_thebe(None, "page", "page.html", context, None)
    assert context["script_files"] == [files[0], files[3]]


def test_an_interval_is_not_broken_over_lines():
    cells = [{"outputs": [{"data": {"text/html": ["<td>5.74 ± 0.16", "</td><td>± t</td>"]}}, {"text": "5 ± 1"}]}, {}]
    weighing.whole_intervals(cells)
    assert cells[0]["outputs"] == [{"data": {"text/html": "<td>5.74\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.16</td><td>± t</td>"}},
                                   {"text": "5 ± 1"}]


def test_black_is_seen_on_a_dark_page():
    def cells(color):
        data = base64.b64encode(f'<svg><path style="stroke: {color}"/></svg>'.encode()).decode()
        return [{"outputs": [{"data": {"text/html": [f'<img class="figure" alt="A line." src="data:image/svg+xml;base64,{data}">']}}]}]

    grey, black = cells("#808080"), cells("#000000")
    before = "".join(black[0]["outputs"][0]["data"]["text/html"])
    weighing.dark_twins(grey)
    weighing.dark_twins(black)
    assert "".join(grey[0]["outputs"][0]["data"]["text/html"]) == "".join(cells("#808080")[0]["outputs"][0]["data"]["text/html"])
    light, dark = re.findall("<img[^>]*>", black[0]["outputs"][0]["data"]["text/html"])
    assert light == before.replace('class="figure"', 'class="figure only-light"')
    assert 'class="figure only-dark" alt="A line."' in dark
    assert base64.b64decode(re.search("base64,([^\"]+)", dark)[1]) == b'<svg><path style="stroke: #e0e0e0"/></svg>'


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_figure_is_known_to_the_pages(path):
    """A figure of another form would get no twin, and its black would be lost on dark pages."""
    for cell in cells_of(path):
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", ""))
            assert html.count("data:image/svg+xml") == len(weighing.FIGURE.findall(html)), cell["id"]


# --- PDF ---------------------------------------------------------------------------------------
def test_pdf_says_what_it_needs(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(pdf, "APPLICATIONS", ())
    assert pdf.browser() is None
    assert pdf.main([str(tmp_path / "index.html"), str(tmp_path / "a.pdf")]) == 1
    assert "needs Chromium or Chrome" in capsys.readouterr().out


def test_pdf_is_printed_from_where_its_styles_lie(tmp_path):
    """Sphinx's single page lies in book/, while its links start at the folder above."""
    page = tmp_path / "book" / "intro.html"
    text = '<link href="_static/custom.css?v=1" rel="stylesheet"><script src="_static/math.js"></script>'
    with pytest.raises(SystemExit, match="no folder above it has _static"):
        pdf.place(page, text)
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "custom.css").write_text("")
    with pytest.raises(SystemExit, match=r"not found in .*: _static/math\.js$"):
        pdf.place(page, text)
    (tmp_path / "_static" / "math.js").write_text("")
    assert pdf.place(page, text) == tmp_path


@pytest.mark.parametrize("written, printed", (
    ('<a class="x" href="book/intro.html#here">', '<a class="x" href="#here">'),
    ('<a href="../book/runs.html#here">', '<a href="#here">'),
    ('<a href="11-cifar10.html">', '<a href="#document-nbs/11-cifar10">'),
    ('<a href="../records/a.json">', "<a >"),
    ('<a href="#nowhere">', "<a >"),
    ('<a href="https://x.example/#here">', '<a href="https://x.example/#here">'),
    ('<script src="../_static/lab/lab.js">', '<script src="_static/lab/lab.js">'),
    ('<link href="../_static/lab/lab.css">', '<link href="_static/lab/lab.css">'),
))
def test_links_of_the_pdf_hold_on_paper(written, printed):
    places = '<p id="here"></p><span id="document-nbs/11-cifar10"></span>'
    assert pdf.relinked(places + written) == places + printed


def test_pdf_opens_what_is_folded():
    text = pdf.printable('<html lang="en" data-mode="dark" ><details class="hide"><summary>a</summary></details><details open>')
    assert 'data-mode="light"' in text and 'data-theme="light"' in text
    assert text.count("<details open") == 2 and 'open open' not in text
