"""The notebooks as stored: run in order, laid out alike, linked to pages that exist."""
import ast
import functools
import re
from pathlib import Path

import nb  # tools/nb.py, which conftest.py puts on the path
import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"book/runs.md", "book/speed.md", "book/status.md"}  # by `make book`
NOTEBOOKS = nb.notebooks()
NUMBERED = [p for p in NOTEBOOKS if p.name[0].isdigit()]
PAGES = sorted((ROOT / "book").rglob("*.md")) + [ROOT / "README.md"]
ENDING = ("Exercises", "What to remember", "Further reading")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^()\s]+)\)")
EXPORT = re.compile(r"^#\|\s*exporti?\b", re.M)


@functools.cache
def read(path):
    """A notebook, parsed once; tests do not change it."""
    return nb.read(path)


every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)


def markdown(book):
    return "\n\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


def without_code(text):
    """Markdown less its fenced and inline code."""
    text = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def test_there_are_notebooks():
    assert NOTEBOOKS


@every
def test_stored_outputs(path):
    found = nb.problems(read(path))
    if found:
        pytest.fail(f"{path.name}: " + "; ".join(found), pytrace=False)


@every
def test_metadata_is_clean(path):
    stored, clean = nb.nbformat.writes(read(path)), nb.nbformat.writes(nb.normalise(nb.read(path)))
    if stored != clean:
        pytest.fail(f"run: python tools/nb.py clean nbs/{path.name}", pytrace=False)


@every
def test_first_cells(path):
    book = read(path)
    first = book.cells[0]
    assert first.cell_type == "markdown"
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert re.match(r"# \S", lines[0]), "the first line is the title"
    assert re.match(r"> \S.*[.?!]$", lines[1]), "then `> `, one sentence: what the module holds"
    assert re.match(r"\*[^*].*\?\*$", lines[2]), "then the opening question, in italics"
    code = nb.code_cells(book)
    if any(EXPORT.search(cell.source) for cell in code):
        assert re.fullmatch(r"#\| default_exp \w+", code[0].source), \
            "the first code cell holds `#| default_exp module` and nothing else"


@numbered
def test_ending(path):
    text = markdown(read(path))
    headings = re.findall(r"^## (.+?)\s*$", text, re.M)
    assert tuple(h for h in headings if h in ENDING) == ENDING, f"the chapter ends with {ENDING}"
    exercises = text.split("## Exercises")[1].split("## What to remember")[0]
    number = len(re.findall(r"^\*\*Exercise \d+", exercises, re.M))
    assert number >= 2, "a chapter has two exercises at least"
    assert exercises.count("<details>") >= number, "each exercise has its folded solution"
    assert exercises.count("<details>") == exercises.count("</details>")
    assert re.search(r"\{cite[:a-z]*\}`", text.split("## Further reading")[1]), "and cites"


@every
def test_no_star_imports(path):
    for cell in nb.code_cells(read(path)):
        assert not re.search(r"^\s*from \S+ import \*", cell.source, re.M), cell.source


@every
def test_code_is_python(path):
    for cell in nb.code_cells(read(path)):
        code = "\n".join(line for line in cell.source.splitlines() if line[:1] not in "%!")
        ast.parse(code)


@every
def test_no_progress_bars(path):
    for cell in nb.code_cells(read(path)):
        streams = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        pages = "".join(o.data.get("text/html", "") for o in cell.outputs if "data" in o)
        assert not {"\r", "\b", "█"}.intersection(streams), f"cell {cell.id} stores a progress bar"
        assert "<progress" not in pages, f"cell {cell.id} stores a progress bar"


@every
def test_pictures_have_alt_text(path):
    for cell in nb.code_cells(read(path)):
        for output in cell.outputs:
            data = output.get("data", {})
            bare = [kind for kind in data if kind.startswith("image/")]
            assert not bare, f"cell {cell.id} stores {bare}: end it with show(fig, alt=...)"
            for image in re.findall(r"<img[^>]*>", data.get("text/html", "")):
                alt = re.search(r'alt="([^"]*)"', image)
                assert alt and len(alt.group(1)) > 20, f"cell {cell.id}: say what is to be seen"


def targets(path):
    """The local files that a page links to."""
    text = markdown(read(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")
    for target in LINK.findall(without_code(text)):
        if not re.match(r"[a-z][a-z0-9+.-]*:|#", target):
            yield target.split("#")[0]


@pytest.mark.parametrize("path", NOTEBOOKS + PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in targets(path):
        place = (path.parent / target).resolve()
        if place.is_relative_to(ROOT) and place.relative_to(ROOT).as_posix() in GENERATED:
            continue
        assert place.exists(), f"{path.name} links to {target}, which does not exist"


def test_citations_are_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "book/references.bib").read_text("utf-8"), re.M))
    for path in NOTEBOOKS + PAGES:
        text = markdown(read(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")
        cited = {k.strip() for group in re.findall(r"\{cite[:a-z]*\}`([^`]+)`", text)
                 for k in group.split(",")}
        assert cited <= keys, f"{path.name} cites {sorted(cited - keys)}"


def test_every_page_is_in_the_contents():
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    listed = re.findall(r"(?:file|root):\s*(\S+)", contents)
    assert len(listed) == len(set(listed)), "_toc.yml names a page twice"
    for name in listed:
        there = any((ROOT / f"{name}{end}").exists() for end in (".md", ".ipynb"))
        assert there or f"{name}.md" in GENERATED, f"_toc.yml names {name}, which does not exist"
    pages = [p for p in NOTEBOOKS + PAGES if p.name != "README.md"]
    left_out = {p.relative_to(ROOT).with_suffix("").as_posix() for p in pages} - set(listed)
    assert not left_out, f"_toc.yml lacks {sorted(left_out)}"


def test_every_module_has_its_api_page():
    modules = {p.stem for p in (ROOT / "nbutils").glob("*.py") if not p.stem.startswith("_")}
    pages = {p.stem for p in (ROOT / "book/api").glob("*.md")} - {"index"}
    assert modules <= pages, f"book/api lacks {sorted(modules - pages)}"
