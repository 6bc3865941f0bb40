"""The nbutils command as a newcomer uses it: from an empty folder, with slips of the hand, with Ctrl-C."""
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from importlib import metadata
from pathlib import Path

import pytest
import torch
from children import Child

from nbutils import cifar10, data, experiment, records
from nbutils.command import main, missing, parse_seeds
from nbutils.experiment import get_task
from nbutils.records import config_hash, write_record

ROWS = list(cifar10.ROWS)
CLEAN = {"NBUTILS_NO_BAR": None}                      # the test run has no bars; a newcomer's terminal has none of this


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder with records and runs in it, here and for children."""
    for name in ("RECORDS", "RUNS", "DATA"):
        monkeypatch.setenv(f"NBUTILS_{name}", str(tmp_path / name.lower()))
    return tmp_path


def environment(home):
    return {f"NBUTILS_{name}": home / name.lower() for name in ("RECORDS", "RUNS", "DATA")} | CLEAN


def call_entry_point(*words, room=None):
    """What the installed script does, in a process that has torch already."""
    torch.set_num_threads(1)
    if room:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    script, = metadata.entry_points(group="console_scripts", name="nbutils")
    sys.argv = ["nbutils", *words]
    sys.exit(script.load()())


def nbutils(home, *words):
    """Start the command; return the child."""
    return Child(call_entry_point, *words, env=environment(home))


def make_record(row="adamw-30", size="smoke", seed=0, error=0.0571, **changes):
    task = get_task("cifar10")
    config = json.loads(json.dumps(dataclasses.asdict(task.config(row, size))))
    fields = dict(
        task="cifar10", size=size, row=row, seed=seed, config=config, config_hash=config_hash(config), recipe=task.recipe, history=[],
        curve={}, metrics={"error": error, "loss": 0.1}, seconds=1.0, device="d", precision=task.precision(task.config(row, size)), versions={}, commit="c",
        code_hash="0" * 16, started="2026-11-23T12:00:00+00:00")
    return records.Record(**fields | changes)


def plain_failure(text, *, starts="nbutils: "):
    """One sentence or two for a person, and no traceback."""
    assert text.startswith(starts), text
    assert "Traceback" not in text and 'File "' not in text
    return text


# --- the real script -----------------------------------------------------------------------------
def test_script_from_an_empty_folder(tmp_path):
    """Installed script, fresh process, pipe: run, and the record where the help says."""
    script = Path(sys.executable).with_name("nbutils")
    assert script.exists(), "install the package: pip install -e ."
    env = {k: v for k, v in os.environ.items() if not k.startswith("NBUTILS_")} | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([script, "run", "cifar10", "adamw-18", "--size", "smoke", "--seeds", "5"], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"cifar10 adamw-18 \(smoke\), seed 5: error 0\.\d{4}, loss \d\.\d{4}, error_tta 0\.\d{4}; \d+ s, .+, 1 threads\n",
                        done.stdout), done.stdout
    record = records.read_record(tmp_path / "records/cifar10/smoke/adamw-18/5.json")
    assert get_task("cifar10").counts(record) and record.versions["nbutils"] == metadata.version("nbutils")
    assert [p.name for p in tmp_path.glob("runs/*/*/*/*")] == ["5.lock"]


def test_module_is_the_script(tmp_path):
    done = subprocess.run([sys.executable, "-m", "nbutils.command", "table", "cifar10", "--size", "smok"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "smok" in plain_failure(done.stderr)


def test_jobs(home):
    """Two cells at once in processes of their own, one of which cannot be written: the other comes, and the exit status says so."""
    (home / "runs/cifar10/smoke").mkdir(parents=True)
    (home / "runs/cifar10/smoke/sgd-30").write_text("in the way")
    with nbutils(home, "run", "cifar10", "sgd-30", "adamw-18", "--size", "smoke", "--seeds", "2", "--jobs", "2") as child:
        assert child.wait() == 1
        assert "nbutils: cannot write in" in child.err and "1 of 2 runs did not end well; the others have their records" in child.err
        assert "Traceback" not in child.err
        assert "adamw-18 (smoke), seed 2: error" in child.out
    assert [(r.row, r.seed) for r in get_task("cifar10").records("smoke")] == [("adamw-18", 2)]


# --- a run, and what the other commands say of it ------------------------------------------------
def test_newcomers_first_quarter_of_an_hour(home, capsys):
    assert main(["status"]) == 0
    assert "cifar10 smoke: 0 records, 0 of 9 rows begun" in capsys.readouterr().out
    assert main(["table", "cifar10", "--size", "smoke"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cifar10, size smoke\n")
    assert [line.split()[:3] for line in out.splitlines()[3:]] == [[row, "not", "run"] for row in ROWS]

    with nbutils(home, "run", "cifar10", "adamw-18", "--size", "smoke", "--seeds", "0") as child:
        assert (child.wait(), child.err) == (0, "")
        first = child.out
    assert first.count("\n") == 1 and "\r" not in first and "adamw-18 (smoke), seed 0: error" in first
    assert main(["run", "cifar10", "adamw-18", "--size", "smoke"]) == 0               # again: not run again, the same figures
    assert capsys.readouterr().out == first

    assert main(["table", "cifar10", "--size", "smoke"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("adamw-18 "))
    error, tta = re.search(r"error (0\.\d+).*error_tta (0\.\d+)", first).groups()
    assert line.split()[:3] == ["adamw-18", f"{100 * float(error):.2f}", f"{100 * float(tta):.2f}"] and line.split()[-1] == "1"
    assert main(["todo", "cifar10", "--size", "smoke"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[2] for line in out.splitlines()] == [row for row in ROWS if row != "adamw-18"]
    assert all(line.endswith("lacks seeds 0") for line in out.splitlines())
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "cifar10 smoke: 1 records, 1 of 9 rows begun" in out and "running" not in out and "stopped" not in out
    assert str(home / "records") in out and str(home / "runs") in out


def test_status_of_a_run_that_goes_on_stops_and_goes_on(home, capsys):
    """Frozen amid its epochs by SIGSTOP, so that status can look; then killed; then started again."""
    cell = home / "runs/cifar10/smoke/adamw-30"
    with nbutils(home, "run", "cifar10", "adamw-30", "--size", "smoke") as child:
        child.until(lambda: (cell / "0.pt").exists())
        os.kill(child.pid, signal.SIGSTOP)
        assert main(["status"]) == 0
        out = capsys.readouterr().out
        assert f"cifar10 smoke adamw-30 0: running, process {child.pid} on " in out and "stopped" not in out
        assert main(["run", "cifar10", "adamw-30", "--size", "smoke"]) == 1
        said = capsys.readouterr()
        assert said.out == "" and f"process {child.pid} on" in plain_failure(said.err)
        assert "is being run already" in said.err and "this run was not started" in said.err
        assert child.kill() == -signal.SIGKILL
    assert main(["status"]) == 0
    assert "cifar10 smoke adamw-30 0: stopped; the same run command goes on from its last whole epoch" in capsys.readouterr().out
    assert main(["todo", "cifar10", "--size", "smoke"]) == 0
    assert "adamw-30 " in capsys.readouterr().out
    with nbutils(home, "run", "cifar10", "adamw-30", "--size", "smoke") as child:
        assert (child.wait(), child.err) == (0, "")
        assert re.match(r"cifar10 adamw-30 \(smoke\), seed 0: going on after epoch \d+ of 10\n", child.out)
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "running" not in out and "stopped" not in out


def test_ctrl_c(home):
    cell = home / "runs/cifar10/smoke/adamw-30"
    with nbutils(home, "run", "cifar10", "adamw-30", "--size", "smoke", "--seeds", "0-3") as child:
        child.until(lambda: (cell / "0.pt").exists())
        os.kill(child.pid, signal.SIGINT)
        assert child.wait() == 1
        assert child.err == "nbutils: stopped; the same command goes on from the last whole epoch\n"
    assert not (home / "records/cifar10/smoke/adamw-30/0.json").exists()
    assert not (cell / "1.lock").exists(), "the next seed was begun"
    with nbutils(home, "run", "cifar10", "adamw-30", "--size", "smoke") as child:
        assert child.wait() == 0
        assert "going on after epoch" in child.out


def test_status_tells_records_that_no_longer_count(home, capsys):
    write_record(make_record(), home / "records")
    config = make_record().config | {"lr": 0.1}
    write_record(make_record(seed=1, config=config, config_hash=config_hash(config)), home / "records")
    write_record(make_record(seed=2, recipe=0), home / "records")
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "smoke: 1 records, 1 of 9 rows begun" in out and "2 records of other settings or recipes, which count in no table" in out
    assert main(["table", "cifar10", "--size", "smoke"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("adamw-30 "))
    assert (line.split()[1], line.split()[-1]) == ("5.71", "1")


# --- tables and lists ----------------------------------------------------------------------------
def test_tables_of_sizes_stay_apart(home, capsys):
    for seed, error in enumerate((0.05, 0.06, 0.07)):
        write_record(make_record(size="full", seed=seed, error=error), home / "records")
    write_record(make_record(size="laptop", error=0.2), home / "records")
    assert main(["table", "cifar10", "--size", "full"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("adamw-30 "))
    assert line.split()[:5] == ["adamw-30", "6.00", "±", "2.48", "5.66"] and line.split()[-1] == "3" and "published" in out
    assert main(["table", "cifar10"]) == 0                                           # laptop is the default
    out = capsys.readouterr().out
    assert out.startswith("cifar10, size laptop\n") and "20.00" in out and "published" not in out and "grid-" not in out
    assert "adamw-laptop-94" in out
    assert main(["table", "cifar10", "--grids"]) == 0
    assert capsys.readouterr().out.count("\ngrid-") == 6
    assert main(["table", "cifar10", "--size", "full", "--grids"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("grid-")]
    assert rows == [c.row for c in get_task("cifar10").configs if c.size == "full" and c.row.startswith("grid-")]


def test_missing_is_ordered_by_want(home):
    found = missing()
    assert [size for _, size, *_ in found] == sorted((s for _, s, *_ in found), key=["full", "colab", "laptop", "smoke"].index)
    assert found[0] == ("cifar10", "full", "adamw-30", [0, 1, 2, 3, 4])
    grids = [(size, seeds) for _, size, row, seeds in found if row.startswith("grid-")]
    assert grids == [("full", [0])] * 12 + [("laptop", [0])] * 6
    write_record(make_record(size="full", seed=0), home / "records")
    write_record(make_record(size="full", seed=3), home / "records")
    write_record(make_record(size="full", seed=77), home / "records")
    assert missing()[0] == ("cifar10", "full", "adamw-30", [1, 2, 4])
    for seed in (1, 2, 4):
        write_record(make_record(size="full", seed=seed), home / "records")
    assert missing()[0][2] == "adam-l2-30"


def test_todo(home, capsys):
    assert main(["todo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["cifar10", "full", "adamw-30", "lacks", "seeds", "0,1,2,3,4"]
    assert len(lines) == sum(len(get_task(name).configs) for name in experiment.TASKS)
    full = [line.split()[0] for line in lines if line.split()[1] == "full"]
    assert full == sorted(full, key=experiment.TASKS.index)
    assert main(["todo", "--size", "laptop"]) == 0
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == {"laptop"}


# --- seeds ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, seeds", [
    ("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0,2,5-7", [0, 2, 5, 6, 7]), ("2,1,2", [2, 1]), ("4-4", [4]), ("007", [7]),
    ("0-2,1-3", [0, 1, 2, 3])])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "3-1", "1,,2", "1-2-3", "1.5", "0 - 3", "1;2", "²", "٣-"])
def test_seeds_that_cannot_be_read(text, capsys):
    with pytest.raises(ArgumentTypeError, match="cannot read .*; write 0-4, 3 or 0,2,5-7"):
        parse_seeds(text)
    with pytest.raises(SystemExit) as caught:
        main(["run", "cifar10", "adamw-30", f"--seeds={text}"])
    assert caught.value.code == 2
    assert "write 0-4, 3 or 0,2,5-7" in capsys.readouterr().err


# --- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("words, text", [
    (["run", "cifar01", "adamw-30"], "unknown task 'cifar01'. Did you mean cifar10 or cars? There are: cifar10"),
    (["data", "cifar"], "unknown task 'cifar'. Did you mean cifar10"),
    (["table", "digits"], "unknown task 'digits'. Did you mean|unknown task 'digits'. There are: cifar10"),
    (["todo", "cifar-10"], "unknown task 'cifar-10'. Did you mean cifar10"),
    (["run", "cifar10", "adamw-03", "--size", "smoke"], "cifar10, size smoke: unknown row 'adamw-03'. Did you mean adamw-30"),
    (["run", "cifar10", "sgd-30", "adamw30", "--size", "smoke"], "unknown row 'adamw30'. Did you mean adamw-30"),
    (["run", "cifar10", "adamw-laptop-94", "--size", "full"], "cifar10, size full: unknown row 'adamw-laptop-94'"),
    (["run", "cifar10", "adamw-30", "--size", "labtop"], "cifar10: unknown size 'labtop'. Did you mean laptop"),
    (["table", "cifar10", "--size", "tiny"], "cifar10: unknown size 'tiny'"),
    (["run", "cifar10", "all", "--size", "labtop"], "unknown size 'labtop'. Did you mean laptop"),
    (["todo", "--size", "labtop"], "unknown size 'labtop'. Did you mean laptop"),
    (["todo", "cifar10", "--size", "labtop"], "unknown size 'labtop'. Did you mean laptop"),
    (["run", "cifar10", "adamw-30", "--size", "smoke", "--device", "gpu"], "gpu"),
    (["run", "cifar10", "adamw-30", "--size", "smoke", "--device", "xpu:7"], "xpu"),
    (["run", "cifar10", "adamw-30", "--size", "smoke", "--threads", "-1"], "threads"),
    (["run", "cifar10", "adamw-30", "--size", "smoke", "--jobs", "0"], "jobs"),
    (["run", "cifar10", "adamw-30", "--size", "smoke", "--jobs", "-2"], "jobs"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_slips_of_the_hand(words, text, home, capfd):
    """One line on stderr that names the thing and what exists; nothing runs. (argparse's own refusals end with 2, ours with 1.)"""
    try:
        code = main(words)
        starts = "nbutils: "
    except SystemExit as stop:
        code, starts = stop.code, "usage: nbutils"
    said = capfd.readouterr()
    assert code in (1, 2) and said.out == ""
    plain_failure(said.err, starts=starts)
    assert any(t in said.err for t in text.split("|")), said.err
    assert not list(home.glob("records/*/*/*/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_device_that_is_not_there(home):
    with nbutils(home, "run", "cifar10", "adamw-30", "--size", "smoke", "--device", "cuda") as child:
        assert child.wait() == 1
        assert "cuda" in plain_failure(child.err).lower()


@pytest.mark.parametrize("size", ["colab", "full"])
def test_sizes_for_a_gpu_are_refused_without_one(home, monkeypatch, capsys, size):
    """They would take days; who insists gives the device."""
    from nbutils import command

    started = []
    monkeypatch.setattr(command, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(command, "run", lambda config, seed, **how: started.append(how["device"]) or make_record())
    assert main(["run", "cifar10", "adamw-30", "--size", size]) == 1
    said = capsys.readouterr().err
    assert not started and f"size {size}" in said and "--device cpu" in said and "laptop" in said
    assert main(["run", "cifar10", "adamw-30", "--size", size, "--device", "cpu"]) == 0 and started == ["cpu"]
    monkeypatch.setattr(command, "default_device", lambda: torch.device("cuda"))
    assert main(["run", "cifar10", "adamw-30", "--size", size]) == 0 and started == ["cpu", None]


def test_unknown_command_and_no_command(capsys):
    for words, text in ((["rnu", "cifar10"], "'rnu'"), (["run"], "task"), (["run", "cifar10"], "row")):
        with pytest.raises(SystemExit) as caught:
            main(words)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and text in err and err.startswith("usage: nbutils")


def test_no_words_show_what_there_is(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nbutils"])
    for words in ([], None):
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capsys.readouterr()
        assert caught.value.code == 2 and not said.out
        assert all(f" {command} " in said.err for command in ("data", "run", "todo", "check", "table", "status"))


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out.strip() == f"nbutils {metadata.version('nbutils')}"


def test_a_table_without_records_says_where_it_looked(home, capsys):
    assert main(["table", "cifar10", "--size", "smoke"]) == 0
    said = capsys.readouterr()
    assert "not run" in said.out and f"no record of cifar10, size smoke, in {home / 'records'}" in said.err
    write_record(make_record(), home / "records")
    assert main(["table", "cifar10", "--size", "smoke"]) == 0 and capsys.readouterr().err == ""


def test_help(capsys):
    def shown(*words):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--help"])
        assert caught.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    top = shown()
    for command in ("data", "run", "todo", "check", "table", "status"):
        assert re.search(rf"\b{command}\b", top)
        assert shown(command).startswith(f"usage: nbutils {command}")
    text = shown("run")
    for word in ("--size", "smoke", "laptop", "colab", "full", "--seeds", "0,2,5-7", "--jobs", "--threads", "--device", "--progress"):
        assert word in text


@pytest.mark.parametrize("which", ["records", "runs"])
def test_folder_that_cannot_be_written(which, home, capsys):
    (home / which).write_text("in the way")
    assert main(["run", "cifar10", "adamw-30", "--size", "smoke"]) == 1
    text = plain_failure(capsys.readouterr().err)
    assert f"cannot write in {home / which}" in text and f"NBUTILS_{which.upper()}" in text


def test_damaged_record_is_named(home, capsys):
    path = write_record(make_record(), home / "records")
    path.write_text(path.read_text()[:300])
    for words in (["table", "cifar10", "--size", "smoke"], ["run", "cifar10", "adamw-30", "--size", "smoke"], ["status"], ["todo"]):
        assert main(words) == 1
        assert f"nbutils: {path} is not a record" in plain_failure(capsys.readouterr().err)


def test_damaged_checkpoint_is_no_traceback(home):
    cell = home / "runs/cifar10/smoke/adamw-18"
    cell.mkdir(parents=True)
    (cell / "0.pt").write_bytes(b"PK\3\4 cut short")
    with nbutils(home, "run", "cifar10", "adamw-18", "--size", "smoke") as child:
        assert child.wait() == 0, child.err
        assert "Traceback" not in child.err
    assert len(get_task("cifar10").records("smoke")) == 1


def test_disk_that_fills_up(home):
    """The system lets no file grow beyond 800 bytes: the checkpoint fails, in a sentence."""
    with Child(call_room, env=environment(home)) as child:
        assert child.wait() == 1
        assert "File too large" in plain_failure(child.err)


def call_room():
    call_entry_point("run", "cifar10", "adamw-18", "--size", "smoke", room=800)


def test_loss_that_is_not_finite(home, monkeypatch, capsys):
    task = get_task("cifar10")
    wild = tuple(dataclasses.replace(c, lr=1e30) if c.row == "sgd-30" else c for c in task.configs)
    monkeypatch.setitem(experiment._REGISTERED, "cifar10", dataclasses.replace(task, configs=wild))
    assert main(["run", "cifar10", "sgd-30", "--size", "smoke", "--seeds", "4", "--device", "cpu"]) == 1
    text = plain_failure(capsys.readouterr().err)
    assert re.search(r"cifar10 sgd-30 \(smoke\), seed 4: the loss is (nan|inf) at step \d+ .*, lr [\d.]+e\+28", text)
    assert "4.failed.json" in text and (home / "runs/cifar10/smoke/sgd-30/4.failed.json").exists()


def test_without_scikit_learn(home, monkeypatch, capsys):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert main(["run", "cifar10", "adamw-30", "--size", "smoke"]) == 1
    assert "pip install scikit-learn" in plain_failure(capsys.readouterr().err)


def test_data_without_a_network(home, monkeypatch, capsys):
    """Each mirror tried, and how to put the file there by hand."""
    monkeypatch.setattr(data, "CIFAR10_URLS", ("http://127.0.0.1:9/cifar-10-python.tar.gz", "http://127.0.0.1:1/b.tar.gz"))
    for words in (["data", "cifar10"], ["run", "cifar10", "adamw-30", "--size", "laptop", "--device", "cpu"]):
        assert main(words) == 1
        text = plain_failure(capsys.readouterr().err)
        assert "http://127.0.0.1:9/" in text and "http://127.0.0.1:1/" in text and "by hand" in text


def test_data_that_is_damaged(home, capsys):
    (home / "data").mkdir()
    (home / "data/cifar-10-python.tar.gz").write_bytes(b"not the archive")
    assert main(["data", "cifar10"]) == 1
    text = plain_failure(capsys.readouterr().err)
    assert "cifar-10-python.tar.gz" in text and "expected" in text and "found" in text


@pytest.mark.parametrize("kind", ["lines", "silent"])
def test_progress_is_the_runs(kind, home, capsys):
    assert main(["run", "cifar10", "adamw-18", "--size", "smoke", "--progress", kind, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("\n") == {"lines": 7, "silent": 1}[kind]
