"""The survey of other libraries' optimizers: its record is whole, its tables tell all of it, it runs."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbutils.conformance import SCENARIOS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import survey  # noqa: E402  (bench/survey.py)

RECORDS = sorted(survey.RECORDS.glob("*.json"))
LIBRARIES = {"torch", "nbutils", "timm", "pytorch_optimizer", "optax", "keras", "fastai"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_survey_records_are_whole(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["format"] == 1 and record["name"] == path.stem
    assert {e["library"] for e in record["entries"]} == LIBRARIES
    for entry in record["entries"]:
        where = f"{entry['library']} {entry.get('name', '')} {entry.get('arguments', '')}"
        if entry.get("not_run"):
            assert "convention" not in entry, where
            continue
        assert entry["version"] == record["versions"].get(entry["library"], entry["version"]), where
        families = {"sgd", "momentum", "nesterov", "adam", "nadam"} | ({"unknown"} if entry["note"] else set())
        assert entry["convention"]["family"] in families, f"{where}: no convention, and no note that says why"
        assert set(entry["left_out"]) | set(entry["failures"]) <= set(SCENARIOS), where
        assert all(entry["left_out"].values()) and all(entry["failures"].values()), f"{where}: say why"
        assert entry["passed"] == (None if entry["expected"] is None else not entry["failures"]), where
    assert {"python", "torch", "numpy"} <= set(record["versions"]) and len(record["commit"].rstrip("+")) == 40
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|https?:|site-packages", text), "a path or an address"


def test_survey_tables_tell_every_entry():
    assert RECORDS, "make survey writes one"
    record = survey.newest()
    table, failed = survey.rows(record), survey.failures(record)
    assert sum(len(row) == len(survey.COLUMNS) + 4 for row in table) == len(table)
    assert {row[0].split()[0] for row in table} == LIBRARIES
    assert {row[0] for row in failed} == {f"{e['library']} {e['version']}" for e in record["entries"]
                                          if e.get("failures")}
    assert all(row[-1] for row in failed), "each failure has a note: somebody has read the source"
    lost = {"entries": [{"library": "optax", "version": None, "backend": None, "not_run": "it is not installed"}]}
    assert survey.rows(lost)[0][:2] == ["optax", "not run: it is not installed"] and survey.failures(lost) == []


def run_survey(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "bench/survey.py"), *arguments], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_survey_runs(tmp_path):
    done = run_survey("--only", "torch,timm", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "torch  SGD {'momentum': 0.9, 'nesterov': True" in done.stdout and "passes" in done.stdout
    if importlib.util.find_spec("timm") is None:
        assert "timm : not run: it is not installed" in done.stdout
    assert list(tmp_path.iterdir()) == [], "only a survey of everything leaves a record"


def test_the_survey_refuses_what_it_does_not_know():
    done = run_survey("--only", "tensorflow")
    assert done.returncode == 2 and "unknown library 'tensorflow'; there are: torch, nbutils" in done.stderr


def test_survey_entries_can_be_stored():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        entry = survey.survey("nbutils", *next(survey.entries("nbutils")))
    finally:
        torch.set_default_dtype(before)
    entry = json.loads(json.dumps(survey.plain(entry)))
    assert entry["passed"] and entry["convention"]["decay"] == "L2" and entry["backend"] is None
    assert entry["defaults"] == {"momentum": 0.0, "l2": 0.0, "weight_decay": 0.0} and entry["note"] is None
    assert survey.plain({"x": (math.inf, "\x1b[1mred\x1b[0m")}) == {"x": ["inf", "red"]}
