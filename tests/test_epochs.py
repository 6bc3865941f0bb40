"""The benchmark of the language models' epochs (bench/epochs.py): its figures, a run, the records, the page."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import epochs  # noqa: E402  (bench/epochs.py)
import speed_page  # noqa: E402  (tools/speed_page.py)

RECORDS = sorted(epochs.RECORDS.glob("*.json"))


def case_of(**changes):
    runs = [{"seconds": [2.0, 4.0, 3.0], "valid": [1.0] * 3, "tokens": [20, 20, 60], "began": 100.0, "ended": 110.0, "peak_mb": 5.0},
            {"seconds": [3.0, 6.0, 1.0], "valid": [1.0] * 3, "tokens": [20, 20, 60], "began": 105.0, "ended": 120.0, "peak_mb": 7.0}]
    return {"device": "cuda", "model": "lstm", "size": "full", "at_once": 2, "not_run": None, "device_name": "NVIDIA H200",
            "threads": 1, "rounds": 3, "warmup": 1, "precision": "bf16", "parameters": 9, "goals": epochs.GOALS["lstm"],
            "runs": runs} | changes


def test_figures():
    case = case_of()
    assert epochs.epoch_seconds(case) == (3.0, 1.0, 6.0, 6)
    assert epochs.tokens_per_second(case) == statistics_median([10, 5, 20, 20 / 3, 20 / 6, 60])
    assert epochs.joint_tokens_per_second(case) == 200 / 20 and epochs.peak_mb(case) == 7.0


def statistics_median(values):
    values = sorted(values)
    return (values[2] + values[3]) / 2


@pytest.mark.parametrize("changes, said", [
    ({"at_once": 1}, "3 s: met"), ({"at_once": 2}, "–"), ({"at_once": 1, "size": "colab"}, "–"),
    ({"at_once": 1, "device_name": "Tesla T4"}, "45 s: met"), ({"at_once": 1, "device_name": "NVIDIA T400"}, "–"),
    ({"at_once": 1, "goals": epochs.GOALS["qrnn"]}, "1.8 s: missed"),
    ({"at_once": 1, "goals": epochs.GOALS["qrnn"], "device_name": "Tesla T4"}, "30 s: met"),
])
def test_a_goal_is_for_its_card_at_full_size(changes, said):
    assert epochs.verdict(case_of(**changes)) == said


def test_work_is_the_tasks_own(monkeypatch):
    """Two timed epochs after a warm-up: as many as told, of the row's tokens, with the wait between them outside all times."""
    import time

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    said, waited = [], []

    def hear():
        waited.append(time.monotonic())
        time.sleep(0.5)

    epochs.work({"device": "cpu", "model": "qrnn", "size": "smoke", "rounds": 2, "warmup": 1, "threads": 1}, said.append, hear)
    ready, facts = said
    assert ready == {"ready": True} and len(waited) == 1 and facts["began"] >= waited[0] + 0.5
    assert len(facts["seconds"]) == len(facts["valid"]) == len(facts["tokens"]) == 2
    assert facts["ended"] - facts["began"] == pytest.approx(sum(facts["seconds"] + facts["valid"]), abs=0.3)
    from nbutils.wikitext2 import Streams, corpus_of, task

    config = task.config("qrnn-adam", "smoke")
    train = Streams(corpus_of(config).train, config.streams, config.steps)
    for epoch, tokens in zip((1, 2), facts["tokens"]):
        train.set_epoch(epoch)
        assert tokens == sum(x.numel() for x, _ in train)
    assert facts["precision"] == "fp32" and facts["peak_mb"] > 100


def test_runs_at_once_are_processes(monkeypatch):
    """They talk by lines; one that runs out of memory leaves no figures, and one that fails no record."""
    chosen = epochs.arguments(["--quick", "--threads", "1"])
    heard = {"seconds": [1.0], "valid": [1.0], "tokens": [1], "began": 0.0, "ended": 1.0, "peak_mb": 1.0}
    script = ["import sys, json", "print('{\"ready\": true}', flush=True)", "assert sys.stdin.readline() == 'go\\n'",
              f"print(json.dumps({heard | {'precision': 'fp32', 'parameters': 3}!r}), flush=True)"]

    def run_as(*lines):
        true = epochs.subprocess.Popen
        monkeypatch.setattr(epochs.subprocess, "Popen", lambda command, **o: true([sys.executable, "-c", "\n".join(lines)], **o))
        try:
            return epochs.measure("cpu", "lstm", 2, chosen)
        finally:
            monkeypatch.setattr(epochs.subprocess, "Popen", true)

    case = run_as(*script)
    assert case["runs"] == [heard] * 2 and case["parameters"] == 3 and case["size"] == "smoke" and case["at_once"] == 2
    assert "2 at once: 1 s an epoch" in epochs.report(case)
    case = run_as("print('{\"failed\": \"out of memory\"}')")
    assert case["not_run"] == "out of memory" and epochs.report(case) == "cpu, smoke, lstm: not run: out of memory"
    with pytest.raises(SystemExit, match="a run failed.*\\n(.*\\n)*.*no such thing"):
        run_as("raise ValueError('no such thing')")


def test_refuses_what_it_does_not_know(capsys):
    for wrong, message in ((["--models", "gru"], "unknown model 'gru'; there are: lstm, qrnn"), (["--rounds", "0"], "--rounds must"),
                           (["--at-once", "1,x"], "--at-once must hold whole numbers"), (["--size", "tiny"], "invalid choice")):
        with pytest.raises(SystemExit):
            epochs.arguments(wrong)
        assert message in capsys.readouterr().err


def record_of(*cases, anyway=False, gpu="NVIDIA H200"):
    return {"name": "r", "started": "2026-01-01T00:00:00", "seconds": 60.0, "machine": {"cpu": "x", "gpu": gpu, "cores": 2, "memory_gb": 4},
            "load": {"before": {"busy_cores": 0.0, "averages": [0.0]}, "after": {"busy_cores": 0.0}, "steal": None, "anyway": anyway},
            "versions": {}, "commit": "c" * 40, "cases": list(cases)}


def test_the_page_says_what_was_run_and_what_not():
    text = "\n\n".join(speed_page.epochs_section([]))
    assert "*not run*" in text and "H200 3 s" in text and "T4 30 s" in text
    found = record_of(case_of(at_once=1), case_of(model="qrnn", goals=epochs.GOALS["qrnn"]),
                      {"device": "cuda", "model": "qrnn", "size": "full", "at_once": 4, "not_run": "out of memory"})
    text = "\n\n".join(speed_page.epochs_section([found]))
    assert "| AWD-LSTM | cuda, full | 1 | 3 (1–6) | 6 | " in text and "3 s: met" in text
    assert "| QRNN | cuda, full | 4 | not run: out of memory |" in text
    assert "T4: *not run*" in text and "H200: *not run*" not in text
    text = "\n\n".join(speed_page.epochs_section([record_of(case_of(device="cpu", size="laptop", device_name="x"), anyway=True, gpu=None)]))
    assert "not quiet" in text and "H200: *not run*" in text and "met" not in text


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_records_are_whole(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["format"] == 1 and record["name"] == path.stem and len(record["commit"].rstrip("+")) == 40
    for case in record["cases"]:
        if case["not_run"]:
            continue
        assert case["goals"] == epochs.GOALS[case["model"]] and len(case["runs"]) == case["at_once"]
        for one in case["runs"]:
            assert len(one["seconds"]) == len(one["tokens"]) == case["rounds"] and one["ended"] > one["began"] and one["peak_mb"] > 0
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|https?:|site-packages", text), "a path or an address"

def test_there_is_a_record():
    assert RECORDS, "make bench-epochs writes one"
