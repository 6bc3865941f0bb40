"""A grid over machines: shares are disjoint, complete and even; two processes at once leave each record once."""
import sys
from argparse import ArgumentTypeError

import pytest
from children import Child
from sound_records import sound, write

from nbutils.checks import check_record
from nbutils.command import main, missing, parse_shard, share
from nbutils.experiment import get_task


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder with records and runs in it, here and for children."""
    for name in ("RECORDS", "RUNS", "DATA"):
        monkeypatch.setenv(f"NBUTILS_{name}", str(tmp_path / name.lower()))
    return tmp_path


def call(*words):
    import torch

    torch.set_num_threads(1)
    sys.exit(main(words))


def start(home, *words):
    env = {f"NBUTILS_{name}": home / name.lower() for name in ("RECORDS", "RUNS", "DATA")}
    return Child(call, *words, env=env)


@pytest.mark.parametrize("text, shard", [("1/1", (1, 1)), ("2/4", (2, 4)), ("10/10", (10, 10)), ("01/4", (1, 4))])
def test_shards(text, shard):
    assert parse_shard(text) == shard


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "", "1", "/", "1/", "/4", "-1/4", "1/4/2", "1.0/4", "a/b", "²/4", "1 /4", "/$N"])
def test_shards_that_do_not_exist(text, capsys):
    with pytest.raises(ArgumentTypeError, match="write 1/4 to 4/4"):
        parse_shard(text)
    for words in (["todo"], ["run", "cifar10", "all", "--size", "smoke"]):
        with pytest.raises(SystemExit) as caught:
            main([*words, f"--shard={text}"])
        assert caught.value.code == 2
        assert "write 1/4 to 4/4 for the shares of four machines" in capsys.readouterr().err


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_shares(n, home):
    """Of all that is missing now: each cell once, in the same order on every machine, even to one."""
    write(home / "records", sound(seed=0))
    write(home / "records", sound(seed=3))

    def cells(**options):
        return [(*row, seed) for *row, seeds in missing(**options) for seed in seeds]

    whole = cells()
    assert ("cifar10", "full", "adamw-30", 1) in whole and ("cifar10", "full", "adamw-30", 0) not in whole
    shares = [cells(shard=(i, n)) for i in range(1, n + 1)]
    assert sorted(c for part in shares for c in part) == sorted(whole) and len(set(whole)) == len(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == [cells(shard=(i, n)) for i in range(1, n + 1)]
    assert shares[0][0] == whole[0]                                                    # the most wanted first
    assert all(part == [cell for cell in whole if cell in part] for part in shares)


def test_shares_of_a_run_do_not_move(home, capsys):
    """A share is of the cells that are named, whatever has been run: a machine that comes late has the same."""
    words = ["run", "cifar10", "all", "--size", "full", "--seeds", "0-4"]
    cells = [(c.row, seed) for seed in range(5) for c in get_task("cifar10").configs if c.size == "full"]
    mine = share(cells, (2, 20))
    for row, seed in mine:
        write(home / "records", sound(row=row, seed=seed))
    assert main([*words, "--shard", "2/20", "--device", "cpu"]) == 0                   # nothing is left to do: no data is asked for
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()] == [f"cifar10 {row} (full), seed {seed}" for row, seed in mine]


def test_todo_lines_that_a_shell_can_run(home, capsys):
    assert main(["todo", "cifar10", "--size", "full", "--commands"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "nbutils run cifar10 adamw-30 --size full --seeds 0,1,2,3,4"
    assert main(["todo", "cifar10", "--size", "full", "--commands", "--shard", "2/3"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nbutils run cifar10 adamw-30 --size full --seeds 1,4"
    assert main(["todo", "cifar10", "--size", "full", "--shard", "3/3"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "2"


ROWS = ("adamw-18", "adam-l2-18")


def test_two_processes_at_once(home):
    """Shares of one grid in one folder: all records are there, each made by one process only, and each is sound."""
    words = ["run", "cifar10", *ROWS, "--size", "smoke", "--seeds", "0-1", "--device", "cpu"]
    with start(home, *words, "--shard", "1/2") as one, start(home, *words, "--shard", "2/2") as two:
        assert (one.wait(), one.err) == (0, "") and (two.wait(), two.err) == (0, "")
        first, second = ([line.split(":")[0] for line in child.out.splitlines()] for child in (one, two))
    cells = [f"cifar10 {row} (smoke), seed {seed}" for seed in (0, 1) for row in ROWS]
    assert len(first) == len(second) == 2 and first == cells[::2] and second == cells[1::2]
    paths = sorted((home / "records").rglob("*"))
    files = [p.relative_to(home / "records").as_posix() for p in paths if p.is_file()]
    assert files == sorted(f"cifar10/smoke/{row}/{seed}.json" for row in ROWS for seed in (0, 1))
    for path in files:
        verdict = check_record(home / "records" / path, home / "records")
        assert verdict.counts, verdict
    before = {p: p.stat().st_mtime_ns for p in paths if p.is_file()}
    with start(home, *words, "--shard", "1/1") as again:                               # another division: nothing is run twice
        assert again.wait() == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_two_shells_that_share_todo(home, capsys):
    """What `todo --commands` prints, run at once as it stands there."""
    for row in ("adamw-30", "adam-l2-30", "adamw-30-amsgrad", "adam-l2-30-amsgrad", "wd0-30", "wd0-30-amsgrad", "sgd-30"):
        write(home / "records", sound(row=row, size="smoke"))
    lists = []
    for i in (1, 2):
        assert main(["todo", "cifar10", "--size", "smoke", "--commands", "--shard", f"{i}/2"]) == 0
        lists.append(capsys.readouterr().out)
    assert lists == [f"nbutils run cifar10 {row} --size smoke --seeds 0\n" for row in ("adamw-18", "adam-l2-18")]
    with start(home, *lists[0].split()[1:]) as one, start(home, *lists[1].split()[1:]) as two:
        assert (one.wait(), two.wait()) == (0, 0)
    assert not missing(["cifar10"], ["smoke"])
