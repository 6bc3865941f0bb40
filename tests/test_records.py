"""Records: never overwritten, never half read, never in another's place; intervals against scipy; tables that mix nothing."""
import dataclasses
import html.parser
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from children import Child

from nbutils import records
from nbutils.records import (Cell, Interval, Record, Table, code_state, config_hash, describe_device, mean_interval, read_record,
                             read_records, table, versions, write_record)


def record(row="adamw-30", seed=0, task="cifar10", size="smoke", error=0.0566, **changes):
    config = {"task": task, "size": size, "row": row, "lr": 3e-3, "momentum": [0.95, 0.85], "amsgrad": False, "tail": None}
    return dataclasses.replace(Record(
        task=task, size=size, row=row, seed=seed, config=config, config_hash=config_hash(config), recipe=1,
        history=[{"epoch": 1, "loss": 2.302585092994046, "lr": 1e-4, "seconds": 0.1}], curve={"step": [0], "loss": [2.3]},
        metrics={"error": error, "loss": 0.1 + 0.2}, seconds=1.5, device="a processor, 2 threads", precision="fp32",
        versions={"torch": "2.15.0"}, commit="abc+", code_hash="0" * 16, started="2026-11-23T12:00:00+00:00"), **changes)


# --- writing and reading -------------------------------------------------------------------------
def test_round_trip(tmp_path):
    before = record()
    path = write_record(before, tmp_path)
    assert path == tmp_path / "cifar10/smoke/adamw-30/0.json" == tmp_path / before.path
    assert read_record(path) == before
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["0.json"]
    assert path.read_text().endswith("}\n")


def test_every_float_comes_back(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16, 3.5907930e-6]
    path = write_record(record(curve={"lr": values}), tmp_path)
    assert [v.hex() for v in read_record(path).curve["lr"]] == [v.hex() for v in values]


def test_never_overwritten(tmp_path):
    path = write_record(record(), tmp_path)
    text = path.read_bytes()
    with pytest.raises(FileExistsError, match="0.json exists: a record is never overwritten; move it away"):
        write_record(record(error=0.01), tmp_path)
    assert path.read_bytes() == text
    assert os.listdir(path.parent) == ["0.json"]


def write_at_once(folder, go, error):
    while not os.path.exists(go):
        pass
    write_record(record(error=error), folder)


def test_two_processes_write_at_once(tmp_path):
    """One record comes, whole, and the other process is told."""
    for trial in range(4):
        folder, go = tmp_path / str(trial), tmp_path / f"go{trial}"
        with Child(write_at_once, str(folder), str(go), 0.1) as one, Child(write_at_once, str(folder), str(go), 0.2) as two:
            go.touch()
            codes = [one.wait(), two.wait()]
            assert sorted(codes) == [0, 1], one.err + two.err
            assert "FileExistsError" in (one if codes[0] else two).err
        winner = 0.1 if codes[0] == 0 else 0.2
        assert [r.metrics["error"] for r in read_records(folder)] == [winner]
        assert os.listdir(folder / "cifar10/smoke/adamw-30") == ["0.json"]


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="0.json cannot be written: metrics.error is tensor.*, not a finite number"):
        write_record(record(metrics={"error": torch.ones(1)}), tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_reader_never_sees_half(tmp_path, monkeypatch):
    """At each step of writing, what the folder gives is nothing or the whole."""
    seen = []
    for name in ("fdopen", "fsync", "chmod", "link", "unlink"):
        true = getattr(os, name)

        def look(*args, true=true, **kwargs):
            result = true(*args, **kwargs)
            seen.append(len(read_records(tmp_path)))
            return result

        monkeypatch.setattr(os, name, look)
    write_record(record(), tmp_path)
    assert seen == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999])
def test_truncated_is_refused_by_name(keep, tmp_path):
    path = write_record(record(), tmp_path)
    text = path.read_text().rstrip()
    path.write_text(text[:int(keep * len(text)) if keep < 1 else 1])
    with pytest.raises(ValueError, match=r"smoke/adamw-30/0\.json is not a record .*: delete it, or restore it from the repository"):
        read_record(path)
    with pytest.raises(ValueError, match="is not a record"):
        read_records(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]", b"null", b"3", b'"text"', b"{}", b'{"task": "cifar10"}'])
def test_other_content_is_refused_by_name(content, tmp_path):
    path = tmp_path / "cifar10/smoke/adamw-30/0.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.json is not a record"):
        read_record(path)


@pytest.mark.parametrize("change", [{"task": 5}, {"row": None}, {"config": None}, {"config": {}}, {"note": "unknown field"}])
def test_wrong_fields_are_refused_by_name(change, tmp_path):
    path = write_record(record(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"adamw-30/0\.json"):
        read_record(path)


def test_edited_settings_are_refused(tmp_path):
    path = write_record(record(), tmp_path)
    edited = path.read_text().replace('"lr": 0.003', '"lr": 0.001')
    assert edited != path.read_text()
    path.write_text(edited)
    with pytest.raises(ValueError, match=rf"0\.json is not a record \(config_hash is {record().config_hash}, but the settings hash to"):
        read_record(path)


@pytest.mark.parametrize("place", ["cifar10/smoke/adamw-30/1.json", "cifar10/smoke/adamw-18/0.json", "cifar10/full/adamw-30/0.json",
                                   "cars/smoke/adamw-30/0.json"])
def test_misplaced_is_refused(place, tmp_path):
    path = write_record(record(), tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    path.rename(tmp_path / place)
    with pytest.raises(ValueError, match=f"{place} says that it is cifar10/smoke/adamw-30/0.json: a record must lie in its own"):
        read_record(tmp_path / place)


def test_read_records_filters_and_sorts(tmp_path):
    made = [record(row, seed, size=size) for size in ("full", "smoke") for row in ("a", "b") for seed in (0, 2, 10)]
    for r in reversed(made):
        write_record(r, tmp_path)
    assert read_records(tmp_path) == made                       # seeds as numbers: 2 before 10
    assert read_records(tmp_path, "cifar10", "smoke", "b") == made[-3:]
    assert read_records(tmp_path, "cars") == [] == read_records(tmp_path / "nowhere")


def test_set_aside_and_leftovers_are_not_read(tmp_path):
    path = write_record(record(), tmp_path)
    for name in ("0.recipe1-0123456789abcdef.json", ".0.json.x1y2.part", "notes.txt", ".DS_Store", "old.json"):
        (path.parent / name).write_text("not a record")
    assert read_records(tmp_path) == [record()]


def test_config_hash():
    @dataclasses.dataclass(frozen=True)
    class C:
        lr: float = 3e-3
        momentum: tuple = (0.95, 0.85)

    assert config_hash(C()) == config_hash({"momentum": [0.95, 0.85], "lr": 0.003})
    assert config_hash(C()) == "5caadc3493bd78f6"                           # of the committed records: it may never change
    assert len({config_hash(C(lr=lr)) for lr in (3e-3, 3.0000000000000005e-3, 3, 0)}) == 4


def test_what_a_record_is_made_of():
    assert describe_device("cpu").endswith(f", {torch.get_num_threads()} threads")
    assert versions()["torch"] == torch.__version__.partition("+")[0] or versions()["torch"] == torch.__version__
    assert all(isinstance(v, str) and v for v in versions().values())
    commit, digest = code_state()
    assert commit and len(digest) == 16
    assert code_state()[1] == digest


def test_commit_of_a_package_that_no_checkout_tracks(tmp_path, monkeypatch):
    """An environment inside somebody's own repository: their commit is not nbutils'."""
    package = tmp_path / "project/.venv/site-packages/nbutils"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "project/.gitignore").write_text(".venv\n")
    git = ["git", "-C", str(tmp_path / "project"), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", ".gitignore"], ["commit", "-q", "-m", "theirs", "--no-verify"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    monkeypatch.setattr(records.nbutils, "__file__", str(package / "__init__.py"))
    monkeypatch.delenv("NBUTILS_COMMIT", raising=False)
    assert code_state()[0] == "unknown"


def test_commit_that_the_environment_names(monkeypatch):
    """It comes before git: a copy of a checkout may have a git that tells of another state."""
    monkeypatch.setenv("NBUTILS_COMMIT", "f00")
    assert code_state()[0] == "f00"


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("NBUTILS_COMMIT", "f00")
    assert code_state()[0] == "f00"
    monkeypatch.delenv("NBUTILS_COMMIT")
    assert code_state()[0] == "unknown"


# --- intervals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("n", range(2, 41))
def test_interval_is_scipys(n):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).tolist()
    ours = mean_interval(values)
    mean = sum(values) / n
    low, high = stats.t.interval(0.95, n - 1, loc=mean, scale=stats.sem(values))
    assert (ours.mean, ours.n) == (pytest.approx(mean, rel=1e-12, abs=1e-15), n)
    if n <= 30:
        assert ours.half == pytest.approx((high - low) / 2, rel=3e-5)                # the table has four decimals
    else:                                                      # said to be a little too wide
        assert 1 <= ours.half / ((high - low) / 2) < 1.02


def test_intervals_at_the_edges():
    one = mean_interval([0.25])
    assert (one.mean, one.n) == (0.25, 1) and math.isnan(one.half) and one.format() == "0.25"
    assert mean_interval([2, 2, 2]) == Interval(2.0, 0.0, 3)
    assert mean_interval(iter([1, 3])).format(1) == "2.0 ± 12.7"
    with pytest.raises(ValueError, match="a mean needs one run at least"):
        mean_interval([])


def test_interval_of_close_values():
    """No digits are lost to the size of the mean."""
    ours = mean_interval([1e9 + 1e-3, 1e9 - 1e-3])
    assert ours.half == pytest.approx(12.7062 * 1e-3, rel=1e-3)


# --- tables --------------------------------------------------------------------------------------
COLUMNS = {"error": ("error, %", 100, 2), "error_tta": ("with TTA, %", 100, 2)}


def test_table_never_mixes():
    for other in (record(size="full"), record(task="cars"), record(precision="bf16")):
        with pytest.raises(ValueError, match="never mixes tasks, sizes or precisions, .*smoke.*filter them first"):
            table([record(), other], ["adamw-30"], COLUMNS)


def texts(t):
    return [[c.text for c in row] for row in t.rows]


def test_table_cells():
    made = [record("a", s, error=e) for s, e in enumerate((0.05, 0.06))] + [record("b", metrics={"error": 0.1, "error_tta": 0.09})]
    t = table(made, ["b", "a", "c"], COLUMNS, published={"a": {"error": "5.66"}})
    assert table(made, ["b", "c"], COLUMNS, published={"a": {"error": "5.66"}}).header == ["row", "error, %", "with TTA, %", "n"]
    assert [h for h in t.header if h != "with TTA, %, published"] == ["row", "error, %", "error, %, published", "with TTA, %", "n"]
    cells = [dict(zip(t.header, row)) for row in t.rows]
    assert [c["row"].text for c in cells] == ["b", "a", "c"] and [c["n"].text for c in cells] == ["1", "2", "0"]
    assert [c["error, %"].text for c in cells] == ["10.00", "5.50 ± 6.35", "not run"]
    assert [c["with TTA, %"].text for c in cells] == ["9.00", "–", "not run"]
    assert [c["error, %, published"].text for c in cells] == ["–", "5.66", "–"]
    assert [c["error, %"].link for c in cells] == ["../book/runs.html#cifar10-smoke-b", "../book/runs.html#cifar10-smoke-a", ""]
    assert cells[1]["with TTA, %"].link == cells[1]["error, %, published"].link == ""


def test_table_of_nothing_says_not_run():
    t = table([], ["a"], COLUMNS)
    assert texts(t) == [["a", "not run", "not run", "0"]]
    assert "not run" in str(t) and "nan" not in str(t)


def test_rows_that_were_not_asked_for_do_not_count():
    assert texts(table([record("a"), record("b")], ["a"], COLUMNS)) == [["a", "5.66", "–", "1"]]


def test_table_of_seeds_that_lack_a_metric():
    """n is that of the figures in the cell, or the cell says its own."""
    made = [record("a", 0, metrics={"error": 0.1, "error_tta": 0.1}), record("a", 1, metrics={"error": 0.1})]
    assert texts(table(made, ["a"], {"error": ("error", 100, 2)}))[0] == ["a", "10.00 ± 0.00", "2"]


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.data = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name == "href"]
        assert set(dict(attributes)) <= {"href", "class", "scope"}, attributes

    def handle_data(self, data):
        self.data.append(data)


def test_html_is_escaped():
    nasty = "<script>alert('&')</script>\""
    page = Links(Table([nasty, "n"], [[Cell(nasty, 'x" onclick="y'), "1"], ["a & b", "<b>"]], caption=nasty)._repr_html_())
    assert set(page.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td", "a"}
    assert page.links == ['x" onclick="y']
    assert page.data == [nasty, nasty, "n", nasty, "1", "a & b", "<b>"]


def test_html_links_every_figure():
    t = table([record("a")], ["a", "b"], COLUMNS, base="../book/runs.html")
    page = Links(t._repr_html_())
    assert page.links == ["../book/runs.html#cifar10-smoke-a"]
    assert page.tags.count("td") == 8 and page.tags.count("th") == 4


def test_text_and_markdown():
    t = Table(["row", "error, %"], [["adamw-30", "5.66 ± 0.10"], ["a", Cell("not run", "x")]], caption="A caption")
    assert str(t).splitlines() == ["A caption", "row       error, %", "--------  -----------", "adamw-30  5.66 ± 0.10", "a         not run"]
    assert t.to_markdown().splitlines() == ["| row | error, % |", "| --- | --- |", "| adamw-30 | 5.66 ± 0.10 |", "| a | not run |"]
    assert str(Table(["row"], [])) == "row\n---"


def test_markdown_keeps_its_columns():
    lines = Table(["a|b"], [["c|d"]]).to_markdown().splitlines()
    assert [line.replace(r"\|", "").count("|") for line in lines] == [2, 2, 2]


def test_committed_records_are_good():
    """Every record in the repository can be read, and holds numbers."""
    for r in read_records(Path(__file__).resolve().parent.parent / "book/records"):
        assert r.metrics and all(math.isfinite(v) for v in r.metrics.values()), r.path
        assert [row["epoch"] for row in r.history] == list(range(1, r.config["epochs"] + 1)), r.path
