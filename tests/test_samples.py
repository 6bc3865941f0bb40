"""What is kept of what language models say (bench/samples.py), and that it lies in nobody's way."""
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import samples  # noqa: E402  (bench/samples.py)
from nbutils.records import config_hash, read_records  # noqa: E402
from nbutils.wikitext2 import Vocabulary, task  # noqa: E402

RECORDS = samples.load_samples()


def test_a_record_is_made_once(tmp_path, monkeypatch, capsys):
    """By the task's own build, with the run's seeds; and never overwritten."""
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(samples, "TEMPERATURES", (0.7, 1.0))
    options = ["--size", "smoke", "--device", "cpu", "--tokens", "5", "--threads", "1", "--out", str(tmp_path)]
    assert samples.main(options) == 0
    [path] = tmp_path.iterdir()
    text = path.read_text()
    record = json.loads(text)
    assert path.name == "lstm-adam-smoke-0.json" and record["name"] == path.stem and record["format"] == 1
    assert record["config_hash"] == config_hash(task.config("lstm-adam", "smoke")) and record["precision"] == "fp32"
    assert [s["temperature"] for s in record["samples"]] == [0.7, 1.0]
    for s in record["samples"]:
        assert s["text"].startswith(s["prompt"]) and len(s["text"].replace("\n", " <eos> ").split()) >= len(s["prompt"].split())
    assert samples.main(options) == 2 and path.read_text() == text and "never overwritten" in capsys.readouterr().out


def test_prompts_are_of_known_words():
    vocabulary = Vocabulary(["<unk>", "the", "battle", "of"])
    assert samples.known(samples.PROMPTS, vocabulary) == ["the battle of"]
    assert samples.known(["Nobody knows"], vocabulary) == ["the"]


def test_refuses(capsys):
    for wrong in (["--tokens", "0"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            samples.arguments(wrong)
        assert "must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_whole(name):
    record = RECORDS[name]
    assert record["name"] == name == f"{record['row']}-{record['size']}-{record['seed']}"
    assert record["config_hash"] == config_hash(task.config(record["row"], record["size"])) and record["recipe"] == task.recipe
    assert len(record["samples"]) == len(samples.PROMPTS) * len(samples.TEMPERATURES)
    assert all(s["text"].startswith(s["prompt"]) for s in record["samples"]) and len(record["commit"].rstrip("+")) == 40
    assert not re.search(r"/(tmp|home|root|work|usr|Users)/|https?:|site-packages", json.dumps(record)), "a path or an address"


@pytest.mark.parametrize("name", RECORDS)
def test_it_was_the_model_of_the_run(name):
    """Trained anew with a run's seeds, on the same machine: the run's own perplexity, to the last digit."""
    record = RECORDS[name]
    twins = [r for r in task.records(record["size"]) if (r.row, r.seed) == (record["row"], record["seed"])]
    for twin in twins:
        same = twin.device == record["device"] and twin.versions["torch"] == record["versions"]["torch"]
        assert record["valid"] == pytest.approx(twin.metrics["valid"], rel=1e-12 if same else 0.05)


def test_records_of_runs_do_not_hold_them():
    assert RECORDS and not [r for r in read_records(ROOT / "book" / "records") if r.task == "samples"]
