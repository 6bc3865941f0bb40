"""`nbutils run --jobs`: workers that live for more than one run, die alone, and end with their parent."""
import os
import re
import signal
import time
from pathlib import Path

import pytest
from children import Child

from nbutils.experiment import get_task
from nbutils.records import read_records
from test_command import call_entry_point, environment


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NBUTILS_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("NBUTILS_RUNS", str(tmp_path / "runs"))
    return tmp_path


def start(home, *words):
    return Child(call_entry_point, "run", "cifar10", *words, "--size", "smoke", "--jobs", "2", "--device", "cpu", env=environment(home))


def owners(home):
    """Process numbers by cell, as the locks keep them."""
    return {(p.parent.name, int(p.stem)): int(re.match(r"process (\d+)", p.read_text())[1])
            for p in (home / "runs").rglob("*.lock") if p.read_text()}


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pids, patience=30):
    end = time.monotonic() + patience
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_two_workers_run_six_cells(home):
    with start(home, "adamw-30", "sgd-30", "--seeds", "0-2", "--progress", "bar") as child:
        assert (child.wait(), child.err) == (0, "")
        lines = child.out.splitlines()
    assert len(set(owners(home).values())) == 2 and len(owners(home)) == 6
    assert len(get_task("cifar10").records("smoke")) == 6
    assert sum(": error" in line for line in lines) == 6 and all(line.startswith("cifar10 ") for line in lines)
    assert any(re.match(r"cifar10 sgd-30 \(smoke\), seed 1: epoch 3/10: loss", line) for line in lines), "a bar becomes lines that name their run"
    assert gone(owners(home).values())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
def test_a_worker_that_is_killed_takes_no_other_run_with_it(home):
    with start(home, "adamw-30", "--seeds", "0-3") as child:
        child.until(lambda: owners(home))
        victim = next(iter(owners(home).values()))
        os.kill(victim, signal.SIGKILL)
        assert child.wait() == 1
        assert "1 of 4 runs did not end well; the others have their records" in child.err
    assert len(read_records(home / "records")) == 3
    assert len(set(owners(home).values())) == 3, "a new worker took the place of the killed one"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_workers_end_with_their_parent(name, home):
    with start(home, "adamw-30", "--seeds", "0-9") as child:
        child.until(lambda: len(owners(home)) >= 2)
        workers = set(owners(home).values())
        os.kill(child.pid, getattr(signal, name))
        assert child.wait() == 1
        assert child.err == "nbutils: stopped; the same command goes on from the last whole epoch\n"
    assert gone(workers) and len(read_records(home / "records")) < 10
    with start(home, "adamw-30", "--seeds", "0-1") as child:                        # and the cells are free
        assert child.wait() == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
def test_workers_end_when_their_parent_is_killed(home):
    """No handler runs then: a worker finishes its run, finds its input closed, and ends."""
    with start(home, "adamw-30", "--seeds", "0-9") as child:
        child.until(lambda: len(owners(home)) >= 2)
        workers = set(owners(home).values())
        child.kill()
    assert gone(workers, patience=120) and len(read_records(home / "records")) <= 2


def test_bad_rows_stop_before_any_worker(home):
    with start(home, "adamw-30", "adamw30") as child:
        assert child.wait() == 1
        assert "unknown row 'adamw30'" in child.err
    assert not (home / "runs").exists()
