"""What CONTRIBUTING.md tells a reader to type can be typed: here at the size smoke, from an empty folder."""
import re
import shlex
from pathlib import Path

import pytest

from nbutils import command

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
LINES = [line.split(" #")[0].strip() for block in re.findall(r"^ *```sh\n(.*?)^ *```", TEXT, re.M | re.S) for line in block.splitlines()]
OURS = [line for line in LINES if line.startswith("nbutils ")]


def test_links():
    for target in re.findall(r"\]\(([^)#\s]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    assert "](CONTRIBUTING.md)" in (ROOT / "README.md").read_text("utf-8")


def test_targets_tools_and_notebooks():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line in LINES:
        for target in re.findall(r"\bmake ([a-z-]+)", line):
            assert re.search(rf"^{target}:.*## ", makefile, re.M), line
        for path in re.findall(r"\b(?:tools|tests|nbs)/[\w.-]+", line):
            assert (ROOT / path).exists(), line


@pytest.mark.parametrize("line", OURS)
def test_each_command_is_understood(line, monkeypatch):
    for name in ("_run", "_todo", "_data", "_check"):
        monkeypatch.setattr(command, name, lambda args: 0)
    assert command.main(shlex.split(line)[1:]) == 0


def test_one_seed_to_its_record(tmp_path, monkeypatch, capsys):
    """Steps 2 to 4 in a checkout that has no records yet, at the size smoke: the last line says that it counts."""
    for name in ("RECORDS", "RUNS", "DATA"):
        monkeypatch.delenv(f"NBUTILS_{name}", raising=False)
    (tmp_path / "book/records").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    steps = [line for line in OURS if re.match(r"nbutils (todo|run|check)", line) and "--shard" not in line]
    assert [line.split()[1] for line in steps] == ["todo", "run", "run", "check"] and "--dry-run" in steps[1]
    for line in steps:
        words = shlex.split(line.replace("--size full", "--size smoke").replace("/full/", "/smoke/").replace("adamw-30", "adamw-18"))
        assert command.main([*words[1:], *(["--device", "cpu"] if words[1] == "run" else [])]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "book/records/cifar10/smoke/adamw-18/7.json: this record counts for cifar10 adamw-18 (smoke), seed 7"
    assert re.search(r"cifar10 +smoke +adamw-30 +lacks seeds 0$", out[0])
