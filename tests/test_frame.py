"""The frame of the benchmarks (bench/frame.py): a machine that others use, what is recorded, and what is not."""
import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import frame  # noqa: E402  (bench/frame.py)

KEYS = ["format", "name", "started", "seconds", "machine", "load", "versions", "commit", "code_hash", "bench_hash", "cases"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a benchmark of one case a device, on a machine that is as busy as told; returns status and record."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))

    def run(*options, busy=0.0):
        ran = []
        monkeypatch.setattr(frame, "load", lambda: ({"averages": [0.1], "busy_cores": busy}, ["a process: 50%"]))
        parser = argparse.ArgumentParser()
        frame.add_options(parser, "one case", tmp_path)
        chosen = parser.parse_args(["--device", "cpu", "--threads", "1", *options])

        def cases_on(device):
            ran.append(device)
            yield {"device": device, "not_run": None, "device_name": "a processor"}

        status = frame.run(__file__, chosen, cases_on, lambda case: f"{case['device']}: {case['not_run']}")
        found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
        return status, ran, found

    return run


def test_a_busy_machine_is_left_alone(bench, capsys):
    assert bench(busy=0.3) == (2, [], [])
    assert "Others are using this machine" in (out := capsys.readouterr().out) and "a process: 50%" in out


def test_a_record_says_that_the_machine_was_busy(bench):
    status, ran, [record] = bench("--anyway", busy=0.3)
    assert status == 0 and ran == ["cpu"] and record["load"]["anyway"] is True and list(record) == KEYS


def test_a_record_of_a_quiet_machine(bench):
    status, ran, [record] = bench("--anyway", "--device", "all", busy=0.2)
    assert record["load"]["anyway"] is False and record["machine"]["gpu"] is None and record["seconds"] >= 0
    assert [case["not_run"] for case in record["cases"]] == [None, "no GPU in this machine"] and ran == ["cpu"]
    assert record["cases"][0]["device_name"] == "a processor" and record["name"].startswith(record["started"][:10])


@pytest.mark.parametrize("options, words", [(["--quick"], "--quick measures nothing"), (["--device", "cuda"], "nothing was run")])
def test_no_record(bench, options, words, capsys):
    assert bench(*options, busy=0.3 if "--quick" in options else 0)[::2] == (0, [])
    assert words in capsys.readouterr().out


def test_the_hash_is_of_the_script_and_of_the_frame(tmp_path, monkeypatch):
    script, own = tmp_path / "script.py", tmp_path / "frame.py"
    monkeypatch.setattr(frame, "__file__", str(own))
    hashes = set()
    for texts in (("a", "b"), ("c", "b"), ("a", "d")):
        script.write_text(texts[0]), own.write_text(texts[1])
        hashes.add(frame.head(script, [], "")["bench_hash"])
    assert len(hashes) == 3


def test_steal_is_a_share():
    assert frame.stolen((0, 10, 100), (0, 15, 200)) == 0.05 and frame.stolen(None, None) is None


def test_the_newest_of_each_machine_counts(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    whole = json.loads((ROOT / "book/records/steps/2026-11-26-nvidia-h200.json").read_text("utf-8"))

    def put(name, year, cpu, gpu=None):
        record = whole | {"name": name, "started": f"{year}-01-01T00:00:00+00:00", "machine": whole["machine"] | {"cpu": cpu, "gpu": gpu}}
        (folder / f"{name}.json").write_text(json.dumps(record))

    put("old", "2020", "x"), put("new", "2022", "x"), put("card", "2021", "x", "y")
    assert [record["name"] for record in frame.newest(folder)] == ["new", "card"]
