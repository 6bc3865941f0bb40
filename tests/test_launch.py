"""The copies for Colab and Kaggle: plain, whole, and run in Colab's packages outside of the checkout."""
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book" / "_ext")]

import launch  # noqa: E402
import nb  # noqa: E402
import try_launch  # noqa: E402
import weighing  # noqa: E402

SITE, RELEASE = "https://example.org/book", "https://example.org/releases/v0"
CITED = {"a2020": "[Ada, 2020](https://doi.org/1)", "b2021": "Bell and Cole, 2021"}
CHAPTERS = nb.notebooks()
UV = Path(sys.executable).with_name("uv")
every = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def copies():
    cited = launch.sources(SITE)
    return {path: launch.launch_copy(path, RELEASE, SITE, cited) for path in CHAPTERS}


# --- text ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, becomes", [
    ("said {cite}`a2020`.", "said ([Ada, 2020](https://doi.org/1))."),
    ("said {cite:p}`a2020, b2021`.", "said ([Ada, 2020](https://doi.org/1); Bell and Cole, 2021)."),
    ("```{admonition} Beware\n:class: note\nof *it*\n\nand that\n```", "> **Beware.**\n>\n> of *it*\n>\n> and that"),
    ("[c](03-adam.ipynb#why) [d](../book/runs.md)", f"[c]({SITE}/nbs/03-adam.html#why) [d]({SITE}/book/runs.html)"),
    ("[e](https://e.org/a.md) [f](#here)", "[e](https://e.org/a.md) [f](#here)"),
    ("```python\nf'{x}`'\n```", "```python\nf'{x}`'\n```"),
])
def test_plain(text, becomes):
    assert launch.plain(text, CITED, SITE) == becomes


@pytest.mark.parametrize("text", ["a {ref}`b`", "```{note}\nx\n```", ":::{tip}\nx\n:::", "(label)=\n## A"])
def test_what_is_not_plain_is_refused(text):
    with pytest.raises(ValueError, match="not plain Markdown.*teach tools/launch.py"):
        launch.plain(text, CITED, SITE)


def test_a_source_that_is_not_there():
    with pytest.raises(KeyError, match="nobody1999"):
        launch.plain("{cite}`nobody1999`", CITED, SITE)


def test_sources_name_authors_and_lead_somewhere(tmp_path):
    found = launch.sources(SITE)
    assert found["loshchilov2019"].startswith("[Loshchilov and Hutter, 2019](http")
    assert found["student1908"] == "[Student, 1908](https://doi.org/10.1093/biomet/6.1.1)"
    assert not any(SITE in text for text in found.values())
    (tmp_path / "one.bib").write_text("@misc{old, author = {Nobody, Ann}, title = {T}, year = {1899}}", "utf-8")
    assert launch.sources(SITE, tmp_path / "one.bib") == {"old": f"[Nobody, 1899]({SITE}/book/bibliography.html)"}
    assert all(re.fullmatch(r"\[[^\[\]{}\\]+, \d{4}\]\(https?://\S+\)", text) for text in found.values()), found


# --- copies --------------------------------------------------------------------------------------
@every
def test_copy(path, copies):
    copy = copies[path]
    nbformat.validate(copy)
    text = "\n".join(c.source for c in copy.cells if c.cell_type == "markdown")
    assert not re.search(r"\]\((?!https?://|#)", text), "a link that leads nowhere outside of the book"
    assert f"{SITE}/nbs/{path.stem}.html" in copy.cells[0].source
    assert copy.cells[0].source.startswith(f"# {weighing.number_of(f'nbs/{path.stem}')} · ")
    assert copy.cells[1].id == "install" and RELEASE in copy.cells[1].source
    assert not any(c.get("outputs") for c in copy.cells)


@every
def test_a_copy_has_all_code_of_its_chapter(path, copies):
    """In order, without nbdev's directives; what the page folds is marked for Colab and for Kaggle."""
    theirs = [c for c in copies[path].cells if c.cell_type == "code" and c.id not in ("install", "gpu")]
    ours = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    lines = [line for c in ours for line in c.source.split("\n") if line.strip() and not line.startswith("#|")]
    copied = [line for c in theirs for line in c.source.split("\n") if line.strip() and not line.startswith("#@title")]
    assert copied == lines
    folded = {c.id for c in ours if "hide-input" in c.metadata.get("tags", []) or c.source.startswith("#| hide")}
    assert {c.id for c in theirs if c.metadata.get("cellView") == "form" and c.metadata["_kg_hide-input"]} == folded


def test_three_copies_end_with_a_row_for_the_gpu(copies):
    ends = {path.stem: copy.cells[-1].source for path, copy in copies.items() if copy.cells[-1].id == "gpu"}
    assert ends.keys() == launch.GPU_ROWS.keys()
    from nbutils.experiment import get_task
    for name, (task, row, small) in launch.GPU_ROWS.items():
        assert get_task(task).config(row, "colab").size == "colab" and get_task(task).config(small, "smoke").size == "smoke"
        assert f"!CUDA_VISIBLE_DEVICES=0 nbutils run {task} {row} --size colab" in ends[name]
        assert ends[name].startswith(f"# without a GPU, in seconds: !nbutils run {task} {small} --size smoke\n")


# --- the first cell ------------------------------------------------------------------------------
def install(release):
    return launch.INSTALL.format(version=launch.VERSION, release=release, least=launch.least(), files=launch.FILES)


def test_least_is_what_the_wheel_asks_for():
    assert dict(launch.least()) == {"torch": [2, 11], "torchvision": [0, 26]}


@pytest.mark.parametrize("name, old", [("torch", "2.9.0+cu126"), ("torchvision", "0.24.0")])
def test_an_old_torch_is_refused_and_stays(name, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: old if n == name else real(n))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("nothing may be installed"))
    with pytest.raises(RuntimeError, match=rf"needs {name} [\d.]+ or newer; this runtime has {re.escape(old)}. Choose its newest"):
        exec(install("file:///nowhere"), {})
    assert list(tmp_path.iterdir()) == []


def test_a_jupyter_without_torch_gets_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [importlib.metadata.distribution("numpy")])
    monkeypatch.setattr(subprocess, "run", lambda words, **k: asked.append(words) or subprocess.CompletedProcess(words, 1, "", "stop here"))
    with pytest.raises(RuntimeError, match="stop here"):
        exec(install("file:///nowhere"), {})
    assert asked[0][-1].startswith("nbutils[data] @ file:///nowhere/nbutils-")
    assert (tmp_path / "stays.txt").read_text() == f"numpy=={importlib.metadata.version('numpy')}"


@pytest.mark.parametrize("version, pinned", [("2.9.0+cu126", True), ("1.1.10.post3", True), ("2.0.0b6", True), ("1.11.0a0", True),
                                             ("2.2.2.240909", True), ("0.1.36ubuntu1", False), ("1.0-beta", False)])
def test_every_version_that_pip_can_read_stays(version, pinned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: version if n == "numpy" else real(n))
    monkeypatch.setattr(subprocess, "run", lambda words, **k: subprocess.CompletedProcess(words, 1, "", "stop here"))
    with pytest.raises(RuntimeError, match="stop here"):
        exec(install("file:///nowhere"), {})
    assert (f"numpy=={version}" in (tmp_path / "stays.txt").read_text().split("\n")) == pinned


def test_a_wheel_that_cannot_be_had_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "ERROR: no such wheel"))
    with pytest.raises(RuntimeError, match="could not be installed beside what is here:\nERROR: no such wheel"):
        exec(install("file:///nowhere"), {})
    pins = (tmp_path / "stays.txt").read_text().split("\n")
    assert f"torch=={importlib.metadata.version('torch')}" in pins and len(pins) > 50


@pytest.mark.parametrize("option", ["release", "site"])
def test_addresses_are_checked(option, tmp_path):
    words = {"release": RELEASE, "site": SITE, option: "dist"}
    done = subprocess.run([sys.executable, ROOT / "tools/launch.py", "--out", tmp_path, *(w for k, v in words.items() for w in (f"--{k}", v))],
                          capture_output=True, text=True)
    assert done.returncode == 2 and f"--{option} is 'dist', which is no address" in done.stderr
    assert not (tmp_path / "launch").exists()


# --- as a reader on Colab ------------------------------------------------------------------------
@pytest.mark.skipif(sys.version_info[:2] not in ((3, 11), (3, 12)), reason="Colab's packages are for Python 3.11 and 3.12")
def test_copies_run_beside_colabs_packages(tmp_path, monkeypatch):
    """The built wheel, an environment that the install cell must not change, a chapter with records and a row."""
    dist = tmp_path / "dist"
    subprocess.run([UV, "build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", dist, ROOT], check=True)
    launch.write(dist.as_uri(), SITE, dist)
    python = try_launch.make(tmp_path / "env", f"{UV} pip install --quiet --python {{python}}")
    before = try_launch.packages(python)
    assert "torch==2.11.0" in before and not any(p.startswith("nbutils") for p in before)
    _, said = try_launch.launch(python, dist / "launch/11-cifar10.ipynb")
    assert re.search(rf"nbutils {re.escape(launch.VERSION)} beside torch 2\.11\.0\n.*cifar10 adamw-30 \(smoke\), seed 0: error 0\.\d+", said, re.S), said
    assert try_launch.packages(python) - before == {f"nbutils=={launch.VERSION}"} and before <= try_launch.packages(python)
    place = subprocess.run([python, "-c", "import nbutils; print(nbutils.__file__)"], cwd=tmp_path, env=try_launch.clean(),
                           capture_output=True, text=True, check=True).stdout
    assert Path(place.strip()).is_relative_to(tmp_path / "env")
    broken = dist / "launch/11-cifar10.ipynb"
    broken.write_text(broken.read_text().replace("from nbutils.records import", "from nbutils.records import not_there,", 1))
    with pytest.raises(RuntimeError, match="not_there"):
        try_launch.launch(python, broken)


# --- links from the pages ------------------------------------------------------------------------
def test_links_below_the_title():
    line = weighing.launch_links("https://github.com/o/n", "0.1.0", "01-sgd.ipynb")
    assert line == ("> Run a copy: [Colab](https://colab.research.google.com/github/o/n/blob/launch/v0.1.0/01-sgd.ipynb) or "
                    "[Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/o/n/blob/launch/v0.1.0/01-sgd.ipynb).")
    assert weighing.below_the_title("# A\n\n> b\n\nc", line) == f"# A\n\n> b\n>\n{line}\n\nc"
    assert weighing.launch_links("", "0.1.0", "01-sgd.ipynb") == ""
    with pytest.raises(ValueError, match="WEIGHING_REPOSITORY is 'o/n'"):
        weighing.launch_links("o/n", "0.1.0", "01-sgd.ipynb")
    assert weighing.VERSION == launch.VERSION == importlib.metadata.version("nbutils")
