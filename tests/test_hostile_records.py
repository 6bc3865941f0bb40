"""Records that were written to do harm: each is refused, in a message that names the field and is safe to print; no page or
chapter reads one; and any text at all, escaped, is shown on a page of the book as it is and does nothing."""
import ast
import base64
import copy
import io
import json
import math
import re
import sys
import types
from pathlib import Path

import pytest
from docutils import nodes
from docutils.core import publish_doctree
from hostile import PAYLOADS, RUNS, SCRIPT, hostile_run
from myst_parser.parsers.docutils_ import Parser
from PIL import Image
from sound_records import sound, write

import nbutils.records
from nbutils.checks import check_record
from nbutils.command import main
from nbutils.experiment import get_task
from nbutils.records import Cell, Markdown, Table, describe_device, escape_markdown, misfits, printable, read_json, read_record

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "bench")]

import cache  # noqa: E402  (bench/cache.py)
import decode  # noqa: E402
import epochs  # noqa: E402
import forms  # noqa: E402
import markup  # noqa: E402  (tools/markup.py)
import qrnn  # noqa: E402
import readme_tables  # noqa: E402
import records_page  # noqa: E402
import samples  # noqa: E402
import speed_page  # noqa: E402
import status_page  # noqa: E402
import steps  # noqa: E402
import survey  # noqa: E402

TRUE = {kind: paths[0] for kind in forms.FORMS if (paths := sorted((ROOT / "book/records" / kind).glob("*.json")))}


def is_quiet(text):
    """Whether a terminal shows the text and does nothing else."""
    return all(line.isprintable() for line in text.splitlines()) and len(text) < 10_000


# --- records of runs -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_hostile_run(name, tmp_path, capsys):
    said, place = RUNS[name][1], tmp_path / "cifar10/full/adamw-30/7.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(hostile_run(name)))
    verdict = check_record(place)
    assert not verdict.counts and any(said in problem for problem in verdict.problems), verdict.problems
    assert is_quiet(str(verdict)) and "OWNED" * 30 not in str(verdict)
    assert main(["check", str(place)]) == 1
    written = capsys.readouterr()
    assert said in written.out and is_quiet(written.out + written.err)
    if name != "a figure out of range":                          # has its form; only the book's tasks bound their figures
        with pytest.raises(ValueError, match=r"adamw-30/7\.json is not a record \(") as caught:
            read_record(place)
        assert said in str(caught.value) and is_quiet(str(caught.value))


def test_there_are_enough():
    assert len(RUNS) >= 60 and len(PAYLOADS) >= 50 and sum("OWNED" in text for text in PAYLOADS.values()) >= len(PAYLOADS) - 3


def test_a_file_of_a_hostile_name(tmp_path, capsys):
    for name in ("\x1b]0;OWNED\x07.json", "\u202e7.json", "a\nb.json"):
        path = write(tmp_path, sound(seed=7), name=name)
        assert main(["check", str(path)]) == 0 and is_quiet(capsys.readouterr().out)
        path.write_text("{")
        assert main(["check", str(path)]) == 1 and is_quiet(capsys.readouterr().out)
        with pytest.raises(ValueError) as caught:
            read_record(path)
        assert is_quiet(str(caught.value))


@pytest.mark.parametrize("content, said", [
    (b'{"a": 1, "a": 2}', "a name stands twice"), (b"[" * 100_000, "it is not JSON"), (b"1" * 5000, "it is not JSON"), (b'"\xff"', "it is not JSON"),
    (b" " * 1_000_001, "it has 1,000,001 bytes, and 1,000,000 are allowed"), (b'{"\x1b[2J": 1', "it is not JSON")])
def test_a_file_that_is_read_by_nobody(content, said, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "x.json")
    assert said in str(caught.value) and is_quiet(str(caught.value))


def test_what_is_no_file_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="not a plain file"):
        read_json(tmp_path)
    if Path("/dev/zero").exists():
        with pytest.raises(ValueError, match="not a plain file"):
            read_json("/dev/zero")
        assert "not a plain file" in str(check_record("/dev/zero"))


def test_a_device_of_any_name_can_be_recorded(monkeypatch):
    """A processor or card with odd characters in its name must not cost a run its record."""
    monkeypatch.setattr(nbutils.records.torch.cuda, "get_device_name", lambda device: named)
    for named in [*PAYLOADS.values(), "Intel(R) Xeon(R) CPU @ 2.20GHz", "AMD Radeon\u2122 <PRO> [W7900]", "", "\u00e9"]:
        assert not list(misfits(describe_device("cuda"), nbutils.records.LINE, "device"))
    assert describe_device("cuda") == "unknown"
    named = "Intel(R) Xeon(R) CPU @ 2.20GHz"
    assert describe_device("cuda") == named


# --- records of benchmarks -----------------------------------------------------------------------
def picture(side=(8, 8), kind="JPEG", behind=b""):
    out = io.BytesIO()
    Image.new("RGB", side).save(out, kind)
    return base64.b64encode(out.getvalue() + behind).decode()


def at(*where, to):
    def change(record):
        *path, last = where
        for key in path:
            record = record[key]
        record[last] = to
    return change


DEEP = json.loads("[" * 30 + "1" + "]" * 30)
BENCHMARKS = {  # name: (kind, what is done to a record of it, what the answer names)
    **{f"{kind}: started": (kind, at("started", to=SCRIPT), "started is ") for kind in TRUE},
    **{f"{kind}: a version": (kind, at("versions", "torch", to=PAYLOADS["title"]), "versions.torch is ") for kind in TRUE},
    **{f"{kind}: a field": (kind, at(SCRIPT, to=1), "the field <script>") for kind in TRUE},
    "the processor": ("bench", at("machine", "cpu", to=SCRIPT), "machine.cpu"),
    "the card": ("steps", at("machine", "gpu", to=PAYLOADS["img"]), "machine.gpu"),
    "the cores": ("bench", at("machine", "cores", to=SCRIPT), "machine.cores"),
    "the averages": ("bench", at("load", "before", "averages", to=[SCRIPT]), "load.before.averages[0]"),
    "the busy cores": ("bench", at("load", "before", "busy_cores", to=SCRIPT), "load.before.busy_cores"),
    "the data": ("bench", at("data", to=PAYLOADS["include"]), "data is"),
    "the net": ("bench", at("sets", 0, "net", to=SCRIPT), "sets[0].net"),
    "the reason": ("bench", at("sets", 0, "not_run", to=PAYLOADS["title"]), "sets[0].not_run"),
    "a trial's name": ("bench", at("sets", 0, "loader_trial", SCRIPT, to=1.0), "sets[0].loader_trial.<script>"),
    "a rule": ("steps", at("cases", 0, "rule", to=SCRIPT), "cases[0].rule"),
    "a contender": ("steps", at("cases", 0, "contenders", 0, "name", to=SCRIPT), "cases[0].contenders[0].name"),
    "a time that is none": ("steps", at("cases", 0, "contenders", 0, "step", 0, to=math.inf), "cases[0].contenders[0].step[0]"),
    "the pictures": ("decode", at("cases", 0, "pictures", to=SCRIPT), "cases[0].pictures"),
    "a case too deep": ("epochs", at("cases", 0, "runs", to=DEEP), "cases[0].runs"),
    "cases beyond number": ("qrnn", at("cases", to=[{"device": "cpu", "not_run": "no time"}] * 1001), "1001 entries"),
    "a file too large": ("cache", at("cases", 0, "device_name", to="x" * 1_000_000), "bytes"),
    "another file's name": ("cache", at("name", to="../../index"), "name is "),
    "a commit": ("decode", at("commit", to=f"`{SCRIPT}"), "commit is"),
    "an optimizer": ("conformance", at("entries", 0, "name", to=SCRIPT), "entries[0].name"),
    "an optimizer's library": ("conformance", at("entries", 0, "library", to=SCRIPT), "entries[0].library"),
    "an argument": ("conformance", at("entries", 0, "arguments", SCRIPT, to=True), "entries[0].arguments.<script>"),
    "a failure": ("conformance", at("entries", 0, "failures", "bfloat16", to=PAYLOADS["title"]), "entries[0].failures.bfloat16"),
    "a note": ("conformance", at("entries", 0, "note", to="x\n\n# OWNED"), "entries[0].note"),
    "a variant": ("counterexamples", at("runs", 0, "variant", to=SCRIPT), "runs[0].variant"),
    "a path that is none": ("counterexamples", at("runs", 0, "x", 0, to=math.nan), "runs[0].x[0]"),
    "a text with escapes": ("samples", at("samples", 0, "text", to=PAYLOADS["clear"]), "samples[0].text holds"),
    "a text from right to left": ("samples", at("samples", 0, "text", to=PAYLOADS["right to left"]), "samples[0].text holds"),
    "a text of a megabyte": ("samples", at("samples", 0, "text", to="x" * 900_000), "samples[0].text is not a text of 5,000"),
    "a prompt": ("samples", at("samples", 0, "prompt", to=7), "samples[0].prompt"),
    "a setting": ("samples", at("config", "model", to=SCRIPT), "config.model"),
    "a class": ("cases", at("cases", 0, "truth", to=SCRIPT), "cases[0].truth"),
    "a view": ("cases", at("cases", 0, "views", 0, to=[SCRIPT, 0.5]), "cases[0].views[0][0]"),
    "no base64": ("cases", at("cases", 0, "jpeg", to='"><script>'), "cases[0].jpeg is no picture"),
    "a picture of text": ("cases", at("cases", 0, "jpeg", to=base64.b64encode(b"<svg onload='alert(1)'/>").decode()), "cases[0].jpeg is no picture"),
    "a picture of another kind": ("cases", at("cases", 0, "jpeg", to=picture(kind="PNG")), "cases[0].jpeg is no picture"),
    "a picture too large": ("cases", at("cases", 0, "jpeg", to=picture((2000, 8))), "of 2000 x 8 pixels, and 1024 a side are allowed"),
    "half a picture": ("cases", at("cases", 0, "jpeg", to=base64.b64encode(base64.b64decode(picture((64, 64)))[:-300]).decode()), "cases[0].jpeg is no picture"),
    "a page behind a picture": ("cases", at("cases", 0, "jpeg", to=picture(behind=b"<script>")), "something behind its end"),
    "a picture of a megabyte": ("cases", at("cases", 0, "jpeg", to="A" * 900_000), "not a text of 100,000 characters"),
    "a picture that is a number": ("cases", at("cases", 0, "jpeg", to=7), "cases[0].jpeg is no picture"),
}


def planted(kind, change, folder):
    """A copy of a true record, in the folder of its kind below ``folder``, after a change."""
    path = folder / kind / TRUE[kind].name
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(TRUE[kind].read_text("utf-8"))
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_hostile_benchmark(name, tmp_path):
    kind, change, said = BENCHMARKS[name]
    path = planted(kind, change, tmp_path)
    found = list(forms.problems(path))
    assert any(said in problem for problem in found) and all(is_quiet(problem) for problem in found), found
    with pytest.raises(ValueError, match=r"\.json is not a record \(.*take it away, or restore it") as caught:
        forms.read(path)
    assert is_quiet(str(caught.value))


def test_every_record_has_its_form(tmp_path):
    assert len(TRUE) >= 10
    for kind in TRUE:
        for path in (ROOT / "book/records" / kind).glob("*.json"):
            assert not list(forms.problems(path))
            assert forms.read(path) == json.loads(path.read_text("utf-8"))
        assert not list(forms.problems(planted(kind, lambda record: None, tmp_path)))
    assert "is no kind of record" in next(forms.problems(tmp_path / "gossip/x.json"))
    assert not list(forms.jpeg(picture(), "it"))


# --- whoever reads a record, reads one that was checked --------------------------------------------
def cell_of(notebook, name):
    cells = json.loads((ROOT / "nbs" / notebook).read_text("utf-8"))["cells"]
    return "".join(next(cell for cell in cells if cell["id"] == name)["source"])


def run_cell(notebook, name, folder, **given):
    space = {"records_folder": lambda: folder, "sys": types.SimpleNamespace(path=[]), **given}
    exec(cell_of(notebook, name), space)
    return space


READERS = {  # kind: everything that shows its records, each as a function of the folder of all records
    "bench": [lambda folder: speed_page.main(), lambda folder: readme_tables.loops()],
    "steps": [lambda folder: speed_page.main(), lambda folder: steps.newest(folder / "steps")],
    "decode": [lambda folder: speed_page.main(), lambda folder: decode.newest(folder / "decode")],
    "epochs": [lambda folder: speed_page.main(), lambda folder: epochs.newest(folder / "epochs")],
    "qrnn": [lambda folder: qrnn.newest(folder / "qrnn")],
    "cache": [lambda folder: cache.newest(folder / "cache")],
    "samples": [lambda folder: samples.load_samples(folder / "samples")],
    "conformance": [lambda folder: survey.newest(folder / "conformance")],
    "cases": [lambda folder: run_cell("12-cars.ipynb", "cases", folder)],
    "counterexamples": [lambda folder: run_cell("04-amsgrad.ipynb", "record", folder, Table=Table, Cell=Cell)],
    "cifar10": [lambda folder: records_page.all_records(folder), lambda folder: status_page.runs(folder),
                lambda folder: readme_tables.table("cifar10", "full"), lambda folder: readme_tables.cells()],
}


@pytest.mark.parametrize("kind", READERS)
def test_nothing_that_was_not_checked_is_shown(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "RECORDS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["page", "--records", str(tmp_path / "bench"), "--page", str(tmp_path / "page.md")])
    for other in TRUE:
        planted(other, lambda record: None, tmp_path)
    write(tmp_path, sound())

    for reader in READERS[kind]:
        reader(tmp_path)                                              # true records can be read
    if kind == "cifar10":
        write(tmp_path, sound(device=SCRIPT))
    else:
        planted(kind, at("started", to="2026-11-26" + SCRIPT), tmp_path)
    for reader in READERS[kind]:
        with pytest.raises(ValueError, match=r"\.json is not a record \("):
            reader(tmp_path)


PARSES = {  # who parses JSON without a form: (file, function), and what it is
    ("bench/bench.py", "hear"): "what a benchmark's own processes say",
    ("bench/epochs.py", "hear"): "likewise",
    ("bench/epochs.py", "arguments"): "its own command line",
    ("bench/peers.py", "main"): "likewise",
    ("bench/samples.py", "measure"): "settings that it has just written",
    ("bench/survey.py", "ask"): "what its own processes say",
    ("tools/drift.py", "read"): "written by conftest.py",
    ("tools/verify_records.py", "read"): "after check_record",
    ("tools/verify_records.py", "check_notebook"): "a notebook",
    ("tools/verify_records.py", "counts"): "settings that it has just written",
}


def parsers(source):
    """The functions of a module that call json.load or json.loads, or hand them on."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "loads") and getattr(node.value, "id", "") == "json":
            around = [f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.lineno <= node.lineno <= f.end_lineno]
            yield around[-1] if around else "module"


def test_no_other_way_to_read_a_record():
    """A script of the pages or of the benchmarks that parses JSON by itself would read what nobody has checked."""
    found = {(path.relative_to(ROOT).as_posix(), function) for folder in ("tools", "bench") for path in (ROOT / folder).glob("*.py")
             for function in parsers(path.read_text("utf-8"))}
    assert not found - PARSES.keys(), "read records by forms.read, read_record or read_records"
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "records_folder()" in source and "#| export" not in source:
                assert not re.search(r"json\.loads?\b|read_text|\bopen\(", source), f"{path.name}, cell {cell['id']}"


# --- the escaping function -------------------------------------------------------------------------
EXTENSIONS = re.search(r"myst_enable_extensions: \[(.*)\]", (ROOT / "_config.yml").read_text("utf-8"))[1].split(", ")
CONTEXTS = {"paragraph": "{}", "sentence": "Before {} after.", "heading": "# {}", "item": "- {}", "numbered": "1. {}", "quotation": "> {}",
            "cell": "| a | b |\n| --- | --- |\n| {} | c |", "header": "| {} | b |\n| --- | --- |\n| a | c |", "strong": "**a** {} **b**",
            "after a link": "[a](b.md){} c", "two": "{} {}"}
QUIET = (nodes.document, nodes.paragraph, nodes.section, nodes.title, nodes.bullet_list, nodes.enumerated_list, nodes.list_item, nodes.block_quote,
         nodes.table, nodes.tgroup, nodes.colspec, nodes.thead, nodes.tbody, nodes.row, nodes.entry, nodes.Text)


def tree(text, extensions=EXTENSIONS):
    return publish_doctree(text, parser=Parser(), settings_overrides={
        "myst_enable_extensions": [*extensions, "substitution", "html_admonition", "attrs_inline", "fieldlist", "tasklist", "strikethrough"],
        "report_level": 5, "halt_level": 6, "doctitle_xform": False})


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.filterwarnings("ignore")                             # docutils' own, of what it is asked for here
def test_escaped_text_is_text(name, tmp_path, monkeypatch):
    """As the book's own parser sees it, with more extensions than the book has: text, and what stood around it."""
    monkeypatch.chdir(tmp_path)
    text = PAYLOADS[name]
    escaped = escape_markdown(text)
    assert isinstance(escaped, Markdown) and escape_markdown(escaped) is escaped and escaped.isprintable() and len(escaped) < 3000
    for context, around in CONTEXTS.items():
        found = tree(around.replace("{}", escaped))
        expected = tree(around.replace("{}", "plain"))
        allowed = {type(node) for node in expected.findall()}
        kinds = [type(node) for node in found.findall()]
        assert set(kinds) <= allowed and kinds.count(nodes.Text) == [type(n) for n in expected.findall()].count(nodes.Text), (context, found.pformat())
        shown = " ".join(printable(text, 1000).split(" ")).strip(" ")
        assert " ".join(shown.split()) in " ".join(found.astext().split()), (context, found.pformat())
    assert not (tmp_path / "OWNED").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_payloads_would_act(tmp_path, monkeypatch):
    """What the test above finds quiet is not quiet by itself; most of these texts are more than text, and one is a program."""
    monkeypatch.chdir(tmp_path)
    acts = [name for name, text in PAYLOADS.items() if {type(n) for n in tree(text).findall()} - {nodes.document, nodes.paragraph, nodes.Text}]
    assert len(acts) >= 30, acts
    assert (tmp_path / "OWNED").exists()


def test_what_needs_no_escape_stays():
    for text in ("5.74 ± 0.16", "-0.38 ± 0.33 points", "adamw-30-amsgrad", "2.15.0+cu130", "Intel(R) Xeon(R) Processor, 2 threads", "error, %", "–", "not run"):
        assert escape_markdown(text) == text
    assert escape_markdown("x86_64") == r"x86\_64" and escape_markdown(7) == "7" and escape_markdown("") == ""
    assert escape_markdown("5.74\u00a0%") == "5.74\u00a0%"


def test_printable():
    assert printable("a\x1b[31mb\nc\u202e") == r"a\x1b[31mb\nc\u202e" and printable("x" * 300) == "x" * 197 + "..."
    assert printable("héllo – ±") == "héllo – ±" and printable(b"\xff") == r"b'\xff'" and printable("\udcff") == r"\udcff"


@pytest.mark.parametrize("name", PAYLOADS)
def test_tables_show_texts(name):
    text = PAYLOADS[name]
    table = Table([text], [[text], [Cell(text, f"x.html#{text}")], [Cell("a", f"javascript:{text}")], [Cell("a", f" java\tscript:{text}")]], caption=text)
    shown = table._repr_html_()
    assert len(re.findall("<a ", shown)) == 1 and not re.search(r"<(?!/?(table|caption|thead|tbody|tr|th|td|a)\b)", shown)
    assert is_quiet(re.sub(r"x+", "x", str(table))) and len(table.to_markdown().splitlines()) == 6


@pytest.mark.parametrize("name", PAYLOADS)
def test_links_and_code(name):
    """Addresses are quoted; code is code only where nothing can end it."""
    text = PAYLOADS[name]
    if name != "half a pair":                                     # which no address can hold
        link = markup.record_link(f"bench/{text}.json", text)
        assert re.fullmatch(r'<a href="\.\./records/bench/[^"<>\s]*\.json">.*</a>', link) and link.count("<a ") == 1
    assert markup.code(text) == escape_markdown(text)
    assert markup.code("0123abc+") == "`0123abc+`"
    assert not re.search(r"(?<!\\)[<>&`{}\[\]|*$]", markup.heading(text)) and not set("<>&`{}[]|*$\"") & set(markup.heading(text))
    assert markup.heading("Intel(R) Xeon(R) Processor, 2 threads") == "Intel(R) Xeon(R) Processor, 2 threads"


def test_settings_of_the_book_have_their_form():
    """Whoever adds a setting with another kind of value learns it here, not after a run."""
    for name in ("cifar10", "cars", "wikitext2"):
        for config in get_task(name).configs:
            fields = sound(name, config.row, config.size)
            assert not list(nbutils.records.record_problems(fields))
            assert not list(nbutils.records.record_problems(copy.deepcopy(fields)))
