"""The pages of a site, built from hostile records as if nobody had checked them, in a browser: they show texts and do nothing.

Every text of tests/hostile.py stands in every place of a page that a record's words can reach: the pages of runs, speed and status,
the tables of README and the parts, tables and pictures in notebooks. The browser reaches the site through a proxy of this test, which
writes down whatever is asked of whom. A page on which the same texts are not escaped shows that they would act.
"""
import copy
import dataclasses
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlencode, urljoin, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "tools", "bench")]

import forms  # noqa: E402  (bench/forms.py)
import readme_tables  # noqa: E402
import records_page  # noqa: E402
import speed_page  # noqa: E402
import status_page  # noqa: E402
import survey  # noqa: E402
from hostile import PAYLOADS  # noqa: E402
from sound_records import sound  # noqa: E402
from test_lab import BROWSERS  # noqa: E402

from nbutils.experiment import Task, get_task  # noqa: E402
from nbutils.records import Cell, Record, Table, printable, table  # noqa: E402

SITE, EVIL = "book.example", "evil.example"
SECRET = "words of a file beside the book"
PAGES = ("book/intro", "book/runs", "book/speed", "book/status", "book/tables", "nbs/hostile")
TEXTS = {name: text for name, text in PAYLOADS.items() if name != "half a pair"}     # which no file can hold


# --- hostile records, of which no check is asked ---------------------------------------------------
def texts():
    """The texts, in which the file to be included lies outside the book, as seen from its pages."""
    return [text.replace("INCLUDED", "../../secret.md") for text in TEXTS.values()]


def runs(every):
    """Two runs a text, with the text in each field that a page may show; what is the same for both stands in a sentence."""
    for i, text in enumerate(every):
        for seed in (0, 1):
            yield Record(**sound(seed=seed) | {
                "task": f"t{i} {text}", "size": text, "row": text, "device": text, "precision": f"{text} {seed}", "commit": f"{text}+",
                "config_hash": text, "started": text, "recipe": text, "versions": {"torch": text}, "metrics": {text: 0.5, "error": 0.05}})


def spoiled(value, text, keep=(), key=""):
    """A benchmark's record with a text in the place of each of its own, but for the names by which figures are looked up."""
    if isinstance(value, dict):
        return {text if k in ("torch", "0") else k: spoiled(v, text, keep, k) for k, v in value.items()}
    if isinstance(value, list):
        return [spoiled(one, text, keep, key) for one in value]
    return text if isinstance(value, str) and (key not in keep or key == "name" and value.startswith("20")) else value


def benchmarks(kind, every, keep):
    path = sorted((ROOT / "book/records" / kind).glob("*.json"))[-1]
    record = json.loads(path.read_text("utf-8"))
    for case in record.get("cases", record.get("sets", record.get("entries", [])))[1:2]:
        record.get("cases", record.get("sets", record.get("entries"))).append({**case, "not_run": "x"})
    return [spoiled(copy.deepcopy(record), text, keep) | {"load": record["load"] | {"before": {"averages": [text], "busy_cores": text}}} for text in every]


KEEP = {"bench": ("name",), "steps": ("name",), "decode": (), "epochs": ("name", "model")}


def cell_of(notebook, name):
    cells = json.loads((ROOT / "nbs" / notebook).read_text("utf-8"))["cells"]
    return "".join(next(cell for cell in cells if cell["id"] == name)["source"])


def shown_by(notebook, name, **given):
    """What the last line of a chapter's cell shows, with a record that the cell before it has read."""
    lines = cell_of(notebook, name).rstrip().rsplit("\n", 1)
    space = dict(given)
    exec(lines[0], space)
    return eval(lines[1], space)


def notebook(every):
    """A notebook whose outputs are tables and pictures of hostile records, as the chapters show them."""
    (cars,) = (ROOT / "book/records/cases").glob("*.json")
    found, (conformance,) = json.loads(cars.read_text("utf-8")), (ROOT / "book/records/conformance").glob("*.json")
    entry = json.loads(conformance.read_text("utf-8"))["entries"][0]
    cases = [spoiled(copy.deepcopy(found["cases"][0]), text, ("kind",)) | {"kind": kind} for text in every for kind in ("right", "wrong")]
    optimizers = {"entries": [spoiled(copy.deepcopy(entry), text, ("family", "lr_at", "missing", "count")) | {"arguments": {text: True}, "passed": None} for text in every]}
    tables = [
        shown_by("12-cars.ipynb", "cases-figure", found={"cases": cases}, html=html),
        Table(["library", *survey.COLUMNS], [[*row[:-1], Cell(row[-1], f"../records/{text}")] for row, text in
                                             zip(survey.rows(optimizers), every)], every[0]),
        Table(every[:4], [[text, Cell(text, f"x.html#{text}"), Cell(text, f"javascript:{text}"), text] for text in every], "a caption " + " ".join(every)),
        table(list(runs(every[:1]))[:1], every, {"error": ("error, %", 100, 2)}, caption=every[1])]
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells = [nbformat.v4.new_markdown_cell("# A notebook")]
    for i, one in enumerate(tables):
        output = nbformat.v4.new_output("execute_result", {"text/html": one._repr_html_(), "text/plain": repr(one)}, execution_count=i + 1)
        book.cells.append(nbformat.v4.new_code_cell("shown", outputs=[output], execution_count=i + 1))
    said = nbformat.v4.new_output("stream", name="stdout", text="\n".join(every))
    book.cells.append(nbformat.v4.new_code_cell("print(said)", outputs=[said], execution_count=9))
    return book


def project(folder, pages):
    """A small book of some pages with the settings, extensions and styles of ours, and a file beside it."""
    folder.mkdir()
    (folder.parent / "secret.md").write_text(SECRET)
    for name in ("_config.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / name, folder / "book" / name)
    shutil.copy(ROOT / "book/references.bib", folder / "book")
    lines = ["format: jb-book", f"root: {pages[0]}"] + ["chapters:", *(f"- file: {page}" for page in pages[1:])] * (len(pages) > 1)
    (folder / "_toc.yml").write_text("\n".join(lines) + "\n")


def without_chapters(text):
    """A page's Markdown without the links to chapters, which are not among PAGES."""
    return re.sub(r"\[([^\]]*)\]\(\.\./nbs/[\w-]+\.ipynb\)", r"\1", text)


def build(folder):
    return subprocess.run([Path(sys.executable).with_name("jupyter-book"), "build", ".", "--all", "-n", "--keep-going"], cwd=folder,
                          capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, the Markdown of its pages, and what the build said."""
    folder = tmp_path_factory.mktemp("around") / "book"
    project(folder, PAGES)
    every, book = texts(), folder / "book"
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        hostile = list(runs(every))
        (book / "runs.md").write_text(records_page.page(hostile), "utf-8")
        bench = {kind: benchmarks(kind, every, keep) for kind, keep in KEEP.items()}
        speed = speed_page.page(bench["bench"], bench["steps"], bench["decode"], bench["epochs"])
        (book / "speed.md").write_text(without_chapters(speed), "utf-8")
        m.setattr(Task, "records", lambda self, size, folder=None: [
            dataclasses.replace(r, task=self.name, size=size, row=self.rows(size)[0], precision="bf16") for r in hostile if self.rows(size)])
        compared = [{path.name: {"date": text, "python": text, "torch": text, "machine": text, "differ": [text], "cells": text,
                                 "sha256": status_page.drift.digest(path)} for path, text in zip(status_page.nb.notebooks(), every[start:])}
                    for start in range(0, len(every), len(status_page.nb.notebooks()))]
        status = [status_page.page(compared[0]), *map(status_page.chapters, compared[1:])]
        (book / "status.md").write_text(without_chapters("\n\n".join(status) + "\n"), "utf-8")
        m.setattr(speed_page, "load_records", lambda folder: bench["bench"])
        parts = ["# Tables", readme_tables.loops(), Table(["a", "b"], [[text, text] for text in every]).to_markdown(),
                 *(readme_tables.table(name, "full") for name in ("cifar10", "wikitext2"))]
        (book / "tables.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (book / "intro.md").write_text("# A book\n\nof hostile records.\n")
    (folder / "nbs").mkdir()
    nbformat.write(notebook(every), folder / "nbs/hostile.ipynb")
    done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout + done.stderr


# --- a browser behind a proxy ----------------------------------------------------------------------
class Proxy(http.server.BaseHTTPRequestHandler):
    """Serves the site under the name of SITE; whatever else is asked is written down, and answered by nothing."""

    def do_GET(self):
        parts = urlsplit(self.path)
        self.server.asked.append(self.path)
        path = (self.server.folder / unquote(parts.path).lstrip("/")).resolve()
        good = parts.hostname == SITE and path.is_relative_to(self.server.folder) and path.is_file()
        body = path.read_bytes() if good else b""
        self.send_response(200 if good else 404)
        self.send_header("Content-Type", self.guess(path) if good else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def do_CONNECT(self):
        self.server.asked.append(f"https://{self.path}")
        self.send_error(403)

    @staticmethod
    def guess(path):
        return {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}.get(path.suffix, "application/octet-stream")

    def log_message(self, *args):
        pass


def find_browser():
    named = os.environ.get("NBUTILS_BROWSER", "")
    for name in BROWSERS if named in ("", "required") else (named,):
        found = shutil.which(name)
        if found and not found.startswith("/snap/"):
            return found
    if named:
        pytest.fail(f"NBUTILS_BROWSER={named}, and there is no such browser; looked for {BROWSERS}")
    pytest.skip("NO BROWSER: no page of hostile records was opened; install Chromium or Chrome, or name one in NBUTILS_BROWSER")


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function of a folder and a page: the page's document after its scripts have run, and everything that was asked for."""
    browser, profile = find_browser(), tmp_path_factory.mktemp("profile")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()

    def look(folder, page):
        server.folder, server.asked = Path(folder).resolve(), []
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-extensions",
             "--disable-background-networking", "--disable-component-update", "--disable-quic", "--disable-default-apps",
             f"--user-data-dir={profile}", "--window-size=1000,1200", f"--proxy-server=http://127.0.0.1:{server.server_port}",
             "--virtual-time-budget=10000", "--dump-dom", f"http://{SITE}/{page}"],
            capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=300)
        assert "</html>" in done.stdout, f"{browser} gave no page:\n{done.stderr[-2000:]}"
        return done.stdout, list(server.asked)

    yield look
    server.shutdown()
    server.server_close()
    thread.join()


class Document(HTMLParser):
    """Collects what a page would do with a text of ours, and the text that it shows."""

    ACTIVE = {"script", "style", "iframe", "object", "embed", "base", "meta", "link", "form"}
    LEADS = {"href", "src", "action", "data", "xlink:href", "formaction", "poster"}

    def __init__(self, text):
        super().__init__()
        self.acts, self.said, self.inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        for key, value in attributes:
            value = value or ""
            leads = urlsplit(urljoin(f"http://{SITE}/book/page.html", value)) if key in self.LEADS else urlsplit("")
            if key.startswith("on") and "OWNED" in value or leads.scheme == "javascript" or leads.hostname not in (None, SITE) and "OWNED" in value \
                    or key in ("style", "srcdoc", "srcset") and "OWNED" in value or tag in self.ACTIVE and "OWNED" in value:
                self.acts.append((tag, key, value[:200]))
        if tag in ("details", "svg") and any("OWNED" in (value or "") for _, value in attributes):
            self.acts.append((tag, attributes))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("script", "style", "iframe") and "OWNED" in data:
            self.acts.append((self.inside, data[:200]))
        self.said.append(data)


def plain(text):
    """A text as Sphinx and we may both write it: without quotes, dashes and dots, which Sphinx makes typographic, on one line."""
    return re.sub(r"\s+", " ", re.sub("[-\u2013\u2014.\u2026'\"\u2018\u2019\u201c\u201d]", "", text.replace("\u00a0", " "))).strip()


def left(asked):
    """What was asked of others than the site; Chromium's own services aside, which no page of ours names."""
    own = re.compile(r"(\.|^)(google|googleapis|gvt1|gstatic|googleusercontent|chromium)\.(com|org)(:|$)")
    return [url for url in asked if urlsplit(url).hostname != SITE and not own.search(urlsplit(url).netloc)]


# --- what is seen ----------------------------------------------------------------------------------
def test_the_build_took_nothing_in(site):
    folder, said = site
    assert not list(folder.rglob("OWNED*"))                       # which a program in a record's words would have made
    for path in (folder / "_build/html").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes() and "secret" not in path.name, path
    warned = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]
    assert not warned, "\n".join(warned[:20])


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_page_of_hostile_records(page, site, browse):
    """No script ran, no request left, nothing of it is more than text; and each text was there."""
    folder, _ = site
    dom, asked = browse(folder / "_build/html", f"{page}.html")
    found = Document(dom)
    assert not found.acts
    assert "OWNED" not in re.search(r"<title>(.*?)</title>", dom, re.S)[1]
    assert not left(asked) and any(url.endswith(f"/{page}.html") for url in asked)
    assert not [url for url in asked if "OWNED" in url]
    shown = plain(" ".join(found.said))
    every = texts()
    for name, text in zip(TEXTS, every):
        if page != "nbs/hostile" or printable(text) == text:      # a notebook's plain outputs come as they are
            assert plain(printable(text, 90).removesuffix("...")) in shown, name
    assert shown.count("OWNED") >= 2 * len(every)


@pytest.mark.parametrize("name", ["no quotes", "svg", "img", "link", "script", "details"])
def test_searching_for_it(name, site, browse):
    """The search page shows a heading that is about as long as the question, and Sphinx inserts it as HTML."""
    folder, _ = site
    for words in {TEXTS[name], re.sub(r"[^A-Za-z0-9 _.,:;+=()/@%'-]", "?", TEXTS[name]), "OWNED"}:
        dom, asked = browse(folder / "_build/html", f"search.html?{urlencode({'q': words})}")
        assert not Document(dom).acts and not left(asked)
        assert "<title>OWNED" not in dom and "matching the search query" in dom


def test_the_same_texts_would_act(tmp_path, browse):
    """Without escapes: Sphinx reads the file and runs the program, the browser runs scripts and asks others."""
    folder = tmp_path / "book"
    project(folder, ["book/intro"])
    config = (folder / "_config.yml").read_text("utf-8")
    (folder / "_config.yml").write_text(config.replace("linkify]", "linkify, substitution]"), "utf-8")
    named = ("include", "raw", "image", "svg", "substitution", "formula")
    raw = "\n\n".join(text for name, text in zip(TEXTS, texts()) if name in named)
    (folder / "book/intro.md").write_text(f"# A page\n\n{raw}\n")
    assert build(folder).returncode == 0
    built = folder / "_build/html/book/intro.html"
    assert SECRET in built.read_text("utf-8") and list(folder.rglob("OWNED"))
    dom, asked = browse(folder / "_build/html", "book/intro.html")
    assert "<title>OWNED</title>" in dom and Document(dom).acts and left(asked)


@pytest.mark.parametrize("name", ["script", "svg", "img", "no quotes", "iframe", "attribute", "style", "meta", "details", "comment"])
def test_each_text_of_html_would_act(name, tmp_path, browse):
    (tmp_path / "x.html").write_text(f'<html><title>fine</title><body><p title="">{PAYLOADS[name]}</p></body></html>')
    dom, asked = browse(tmp_path, "x.html")
    assert "<title>OWNED</title>" in dom or left(asked)


def test_forms_were_not_asked(site):
    """The records of this book have no form: it is the pages that are quiet, not the checks."""
    (record,) = benchmarks("bench", ["<script>"], KEEP["bench"])
    assert len([p for p in forms.misfits(record, forms.FORMS["bench"])]) > 10
    assert get_task("cifar10").name == "cifar10"
