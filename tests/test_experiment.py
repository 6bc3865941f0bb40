"""Runs that are killed, doubled, starved of disk or blown up; in real processes, with a real SIGKILL."""
import contextlib
import ctypes
import dataclasses
import errno
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from children import Child
from torch import nn

from nbutils import cifar10, experiment
from nbutils.amsgrad import AdamW
from nbutils.core import seed_everything
from nbutils.experiment import (SIZES, CellBusy, Checkpoint, Config, Task, get_task, records_folder, register, run, runs_folder,
                                thin)
from nbutils.learner import Callback, Learner, NonFiniteLoss
from nbutils.optimizer import NonFiniteError
from nbutils.momentum import SGD
from nbutils.records import config_hash, read_record, read_records, write_record
from nbutils.schedule import one_cycle


# --- a task of milliseconds ----------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    task: str = "toy"
    epochs: int = 4
    lr: float = 0.02
    blow_up: float = 2.0                         # from this progress on, lr is 1e38
    adam: bool = True


class Hold(Callback):
    """Wait before epoch 2 while the file named by TOY_HOLD exists."""

    def before_epoch(self, learner):
        place = os.environ.get("TOY_HOLD")
        while place and learner.epoch == 2 and os.path.exists(place):
            time.sleep(0.005)


def toy_build(config, seed, device):
    data = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=data), torch.randint(3, (40,), generator=data)
    pairs = torch.utils.data.TensorDataset(x, y)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
    schedules = one_cycle(config.lr)
    if config.blow_up < 1:
        schedules = {"lr": lambda progress: config.lr if progress < config.blow_up else 1e38}
    make = AdamW if config.adam else SGD
    train = torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True)     # draws its order from torch's generator
    return Learner(model, train, [(x, y)], make(model.parameters(), lr=config.lr), schedules=schedules, callbacks=[Hold()],
                   device=device, progress="silent")


def toy_score(learner, config):
    return {"error": 1 - learner.evaluate()["accuracy"]}


TOY = Task(name="toy", build=toy_build, score=toy_score, columns={"error": ("error, %", 100, 1)}, configs=(
    ToyConfig(size="smoke", row="steady"),
    ToyConfig(size="smoke", row="long", epochs=60, adam=False),
    ToyConfig(size="smoke", row="wild", adam=False, blow_up=0.6),
    ToyConfig(size="smoke", row="late", adam=False, blow_up=0.93),
    ToyConfig(size="laptop", row="steady", epochs=5),
))


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(experiment._REGISTERED, "toy", TOY)


class Place:
    """A folder of records and one of runs, and the toy's files in them."""

    def __init__(self, folder):
        self.records, self.runs = folder / "records", folder / "runs"

    def run(self, row="steady", task=TOY, size="smoke", seed=0, **options):
        return run(task.config(row, size), seed, device="cpu", records=self.records, runs=self.runs, progress="silent", **options)

    def child(self, row="steady", task="toy", kill=None, env=None):
        return Child(child_run, task, row, str(self.records), str(self.runs), kill, env=env)

    def file(self, suffix, row="steady", task="toy", seed=0):
        root = self.records if suffix == "json" else self.runs
        return root / task / "smoke" / row / f"{seed}.{suffix}"

    def leftovers(self):
        return sorted(str(p.relative_to(p.parents[3])) for root in (self.records, self.runs) for p in root.glob("*/*/*/*")
                      if p.suffix != ".lock" and not (root == self.records and p.suffix == ".json"))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def child_run(task, row, records, runs, kill):
    register(TOY)
    torch.set_num_threads(1)
    if kill:
        POINTS[kill]()
    run(get_task(task).config(row, "smoke"), 0, device="cpu", records=records, runs=runs, progress="silent")


def numbers(record):
    """What must not depend on the clock, as text: equal texts are equal bits."""
    history = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in record.history]
    return json.dumps([history, record.curve, record.metrics], indent=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of runs that nobody disturbed, and how long each took: (task, row) -> (record, seconds)."""
    found = {}

    def get(task, row):
        if (task, row) not in found:
            here = Place(tmp_path_factory.mktemp("undisturbed"))
            start = time.monotonic()
            with here.child(row, task) as child:
                assert child.wait() == 0, child.err
            found[task, row] = read_record(here.file("json", row, task)), time.monotonic() - start
        return found[task, row]

    return get


# --- points at which a process kills itself ------------------------------------------------------
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, before=True):
    """Replace ``owner.name``: SIGKILL just before, or just after, its call ``number`` (from 1)."""
    true, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if before and len(calls) == number:
            die()
        result = true(*args, **kwargs)
        if len(calls) == number:
            die()
        return result

    setattr(owner, name, counted)


def in_half_a_checkpoint():
    true, calls = torch.save, []

    def save(thing, f):
        calls.append(f)
        if len(calls) < 2:
            return true(thing, f)
        whole = io.BytesIO()
        true(thing, whole)
        f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        f.flush()
        die()

    torch.save = save


def in_half_a_record():
    true = os.fdopen

    def fdopen(handle, mode="r", *args, **kwargs):
        f = true(handle, mode, *args, **kwargs)
        if mode == "w":
            write = f.write
            f.write = lambda text: (write(text[:len(text) // 2]), f.flush(), die())
        return f

    os.fdopen = fdopen


POINTS = {
    "at the first step": lambda: at_call(Learner, "train_step", 1),
    "amid the third epoch": lambda: at_call(Learner, "train_step", 13),
    "while a checkpoint is written": in_half_a_checkpoint,
    "before a checkpoint is on the disk": lambda: at_call(os, "fsync", 3),
    "before a checkpoint gets its name": lambda: at_call(os, "replace", 2),
    "after a checkpoint got its name": lambda: at_call(os, "replace", 4, before=False),
    "while the run is scored": lambda: at_call(Learner, "evaluate", 5),
    "while the record is written": in_half_a_record,
    "before the record is on the disk": lambda: at_call(os, "fsync", 5),
    "before the record gets its name": lambda: at_call(os, "link", 1),
    "after the record got its name": lambda: at_call(os, "link", 1, before=False),
    "before the checkpoint is deleted": lambda: at_call(Path, "unlink", 5),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point, place, undisturbed):
    whole, _ = undisturbed("toy", "steady")
    with place.child(kill=point) as child:
        assert child.wait() == -signal.SIGKILL, child.err
    before = [numbers(r) for r in read_records(place.records)]         # none, or the whole one
    assert before == ([numbers(whole)] if point in list(POINTS)[-2:] else []), "a partial record can be read"
    with place.child() as child:
        assert child.wait() == 0, child.err
    assert numbers(read_record(place.file("json"))) == numbers(whole)
    assert len(read_records(place.records)) == 1
    assert not place.file("pt").exists(), "a finished cell keeps a checkpoint, and `nbutils status` calls it stopped"


def test_the_kill_of_unlink_is_where_it_says(place):
    """Path.unlink is called by four probes of folders, then by the checkpoint's deletion."""
    with place.child(kill="before the checkpoint is deleted") as child:
        child.wait()
    assert place.file("json").exists() and place.file("pt").exists()


@pytest.mark.parametrize("task, row, lives", [("toy", "long", 6), ("cifar10", "adamw-18", 2)])
def test_killed_at_random_moments(task, row, lives, place, undisturbed):
    whole, seconds = undisturbed(task, row)
    moments, ends = [], []
    for _ in range(lives):
        moments.append(random.SystemRandom().uniform(0, seconds))
        with place.child(row, task) as child:
            child.process.join(moments[-1])
            ends.append(child.kill())
            told = child.err
        assert ends[-1] in (0, -signal.SIGKILL), (moments, told)
        for record in read_records(place.records):
            assert numbers(record) == numbers(whole), f"killed after {moments} s"
    with place.child(row, task) as child:
        assert child.wait() == 0, (moments, child.err)
    assert numbers(read_record(place.file("json", row, task))) == numbers(whole), f"killed after {moments} s: {ends}"


def test_goes_on_and_says_so(place):
    with place.child(kill="amid the third epoch") as child:
        assert child.wait() == -signal.SIGKILL
        assert child.out == ""
    with place.child() as child:
        assert child.wait() == 0
        assert child.out == "toy steady (smoke), seed 0: going on after epoch 2 of 4\n"
        assert child.err == ""
    with place.child() as child:                                       # now it is finished
        assert child.wait() == 0
        assert child.out == ""


def test_leftovers_are_harmless(place, undisturbed):
    """What killed processes leave behind changes nothing, and goes, or lies beside what is read."""
    whole, _ = undisturbed("toy", "steady")
    for name in ("0.part", "0.damaged", ".probe-1"):
        place.file("x").parent.mkdir(parents=True, exist_ok=True)
        (place.file("x").parent / name).write_bytes(b"half")
    place.file("json").parent.mkdir(parents=True)
    (place.file("json").parent / ".0.json.abc123.part").write_text('{"task": "to')
    assert read_records(place.records) == []
    assert numbers(place.run()) == numbers(whole)
    assert len(read_records(place.records)) == 1


def test_parent_and_child_agree(place, undisturbed):
    """The same bits in a fresh process and in this one, whatever was drawn here before."""
    seed_everything(12345)
    torch.rand(7)
    assert numbers(place.run()) == numbers(undisturbed("toy", "steady")[0])


def test_seeds_differ(place):
    assert numbers(place.run(seed=0)) != numbers(place.run(seed=1))


# --- damaged checkpoints -------------------------------------------------------------------------
DAMAGE = {
    "truncated": lambda raw: raw[:len(raw) // 2],
    "empty": lambda raw: b"",
    "other bytes": lambda raw: b"\0" * len(raw),
    "a flipped bit": lambda raw: raw[:len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1:],
    "text": lambda raw: b"not a checkpoint\n",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a checkpoint after two epochs."""
    here = Place(tmp_path_factory.mktemp("checkpoint"))
    with here.child(kill="amid the third epoch") as child:
        assert child.wait() == -signal.SIGKILL
    return here.file("pt").read_bytes()


MARK = {"config": config_hash(TOY.config("steady", "smoke")), "recipe": TOY.recipe, "seed": 0, "precision": "fp32"}


def kept(path):
    """What is in a checkpoint of the toy, as a Learner that has loaded it."""
    learner = toy_build(TOY.config("steady", "smoke"), 0, "cpu")
    taken = Checkpoint(path, MARK).load(learner)
    return learner if taken else None


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(damage, checkpoint, place, undisturbed):
    """It costs the epochs that it held, and nothing else: the run starts from the beginning."""
    place.file("pt").parent.mkdir(parents=True)
    place.file("pt").write_bytes(DAMAGE[damage](checkpoint))
    assert numbers(place.run()) == numbers(undisturbed("toy", "steady")[0])


class StopAt(Callback):
    """Ctrl-C in the third epoch."""

    def after_step(self, learner):
        if learner.step == 13:
            raise KeyboardInterrupt


def other_net(config, seed, device):
    learner = toy_build(config, seed, device)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 4))
    return Learner(model, learner.train, learner.valid, AdamW(model.parameters(), lr=0.1), device=device)


def other_optimizer(config, seed, device):
    learner = toy_build(config, seed, device)
    make = SGD(learner.model.parameters(), lr=0.1, momentum=0.9)
    return Learner(learner.model, learner.train, learner.valid, make, device=device)


@pytest.mark.parametrize("other", [other_net, other_optimizer])
def test_checkpoint_of_other_code(other, place, undisturbed, monkeypatch):
    """A state that no longer fits, under settings that are the same: never half of it is taken up, the run starts from the beginning."""
    def build(*args):
        learner = other(*args)
        learner.callbacks.append(StopAt())
        return learner

    monkeypatch.setitem(experiment._REGISTERED, "toy", dataclasses.replace(TOY, build=build))
    with pytest.raises(KeyboardInterrupt):
        place.run()
    assert place.file("pt").exists()
    monkeypatch.setitem(experiment._REGISTERED, "toy", TOY)
    assert numbers(place.run()) == numbers(undisturbed("toy", "steady")[0])


def test_checkpoints_that_would_come_too_soon_are_left_out(tmp_path):
    learner = toy_build(TOY.config("steady", "smoke"), 0, "cpu")
    rare, each = Checkpoint(tmp_path / "rare.pt", {}, seconds=3600), Checkpoint(tmp_path / "each.pt", {})
    rare.after_epoch(learner), each.after_epoch(learner)
    assert each.path.exists() and not rare.path.exists()
    rare.last -= 3600
    rare.after_epoch(learner)
    first = rare.path.stat().st_mtime_ns
    rare.after_epoch(learner)
    assert rare.path.stat().st_mtime_ns == first and rare.load(learner)


@pytest.mark.parametrize("other", [{"config": "0" * 16}, {"recipe": 7}, {"seed": 3}, {"precision": "bf16"}])
def test_checkpoint_of_other_settings(other, place, undisturbed, checkpoint, capfd):
    place.file("pt").parent.mkdir(parents=True)
    place.file("pt").write_bytes(checkpoint)
    learner = kept(place.file("pt"))
    assert (learner.epoch, learner.step) == (2, 10)
    Checkpoint(place.file("pt"), MARK | other).after_epoch(learner)
    assert kept(place.file("pt")) is None
    assert numbers(place.run()) == numbers(undisturbed("toy", "steady")[0])
    assert "going on" not in capfd.readouterr().out


# --- two at once ---------------------------------------------------------------------------------
def test_second_run_of_a_cell_is_refused(place, tmp_path, undisturbed):
    hold = tmp_path / "hold"
    hold.touch()
    with place.child(env={"TOY_HOLD": hold}) as first:
        first.until(lambda: place.file("pt").exists())
        with place.child() as second:
            assert second.wait() == 1
            assert "CellBusy: toy steady (smoke), seed 0 is being run already" in second.err
            assert f"process {first.pid} on {os.uname().nodename} since 20" in second.err
        with pytest.raises(CellBusy, match=f"process {first.pid} on"):        # the second has not wiped the first's name
            place.run()
        other = place.run(seed=1)                                             # another cell is free
        hold.unlink()
        assert first.wait() == 0, first.err
    assert numbers(read_record(place.file("json"))) == numbers(undisturbed("toy", "steady")[0])
    assert other.seed == 1


def test_sigkill_frees_the_cell(place, tmp_path, undisturbed, capfd):
    hold = tmp_path / "hold"
    hold.touch()
    with place.child(env={"TOY_HOLD": hold}) as first:
        first.until(lambda: place.file("pt").exists())
        first.kill()
        assert str(first.pid) in place.file("lock").read_text()
    assert numbers(place.run()) == numbers(undisturbed("toy", "steady")[0])
    assert "going on after epoch" in capfd.readouterr().out


def test_cell_is_free_after_an_error(place):
    for _ in range(2):
        with pytest.raises(NonFiniteLoss):
            place.run("wild")


# --- records of other settings -------------------------------------------------------------------
def texts(place):
    """Everything that lies in the cell's folder of records."""
    return sorted(p.read_text() for p in place.file("json").parent.iterdir())


def outdate(place, monkeypatch, **changes):
    """Let the row have other settings from now on; return the task."""
    rows = tuple(dataclasses.replace(c, **changes) if c.row == "steady" else c for c in TOY.configs)
    task = dataclasses.replace(TOY, configs=rows)
    monkeypatch.setitem(experiment._REGISTERED, "toy", task)
    return task


def test_record_of_other_settings_is_set_aside(place, monkeypatch):
    old = place.run()
    old_text = place.file("json").read_text()
    task = outdate(place, monkeypatch, lr=0.05)
    assert not task.counts(old) and task.records("smoke", place.records) == []
    new = place.run(task=task)
    assert new.config["lr"] == 0.05 and numbers(new) != numbers(old)
    assert task.records("smoke", place.records) == [new]
    assert old_text in texts(place) and len(texts(place)) == 2


def test_record_of_another_recipe_is_set_aside(place, monkeypatch):
    old = place.run()
    task = dataclasses.replace(TOY, recipe=2)
    monkeypatch.setitem(experiment._REGISTERED, "toy", task)
    assert not task.counts(old) and task.records("smoke", place.records) == []
    new = place.run(task=task)
    assert (new.recipe, numbers(new)) == (2, numbers(old))
    assert task.records("smoke", place.records) == [new]
    assert len(texts(place)) == 2


def test_setting_aside_loses_no_record(place, monkeypatch):
    """Settings that go to and fro: each record made on the way is still somewhere."""
    made = []
    for lr in (0.02, 0.05, 0.02, 0.05):
        task = outdate(place, monkeypatch, lr=lr)
        place.run(task=task)
        made.append(place.file("json").read_text())
        record = json.loads(made[-1])
        if not record["started"].startswith("2026-11-26T10:00:"):                               # tells apart what is made within a second
            made[-1] = json.dumps(record | {"started": f"2026-11-26T10:00:{len(made):02}+00:00"})
            place.file("json").write_text(made[-1])
    assert set(made) <= set(texts(place))


def test_own_settings_do_not_displace_the_rows_record(place):
    """A reader tries another lr under the row's name: the row's record stays where it counts, whatever the reader gets."""
    official = place.run()
    with contextlib.suppress(ValueError):
        run(dataclasses.replace(TOY.config("steady", "smoke"), lr=0.3), 0, device="cpu", records=place.records, runs=place.runs)
    assert TOY.records("smoke", place.records) == [official]


def test_same_settings_and_other_code_count(place):
    """The code's hash is information: GPU time is dear."""
    record = place.run()
    assert TOY.counts(dataclasses.replace(record, code_hash="0" * 16, commit="elsewhere"))
    assert not TOY.counts(dataclasses.replace(record, row="gone"))
    assert not TOY.counts(dataclasses.replace(record, size="colab"))
    place.file("json").write_text(json.dumps(dataclasses.asdict(record) | {"code_hash": "0" * 16}))
    assert place.run().code_hash == "0" * 16                                   # not run again


def test_finished_cell_is_not_run_again(place, monkeypatch):
    record = place.run()
    monkeypatch.setattr(Learner, "fit", die)
    again = place.run()
    assert dataclasses.asdict(again) == dataclasses.asdict(record)


def test_damaged_record_stops_the_run(place):
    place.run()
    whole = place.file("json").read_text()
    place.file("json").write_text(whole[:500])
    with pytest.raises(ValueError, match=r"0\.json is not a record .* delete it, or restore it"):
        place.run()
    assert place.file("json").read_text() == whole[:500]


# --- folders and disks ---------------------------------------------------------------------------
@pytest.fixture
def untrained(monkeypatch):
    """Training must not begin."""
    monkeypatch.setattr(Learner, "fit", lambda *_: pytest.fail("the training began"))


@pytest.mark.parametrize("which", ["records", "runs"])
@pytest.mark.parametrize("above", [0, 2])
def test_file_in_place_of_a_folder(which, above, place, untrained):
    path = getattr(place, which) if above == 0 else place.file("json" if which == "records" else "pt").parents[above - 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(OSError, match="cannot write in .*NBUTILS_RECORDS and NBUTILS_RUNS.*nothing was started") as caught:
        place.run()
    assert str(path) in str(caught.value)
    assert path.read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write in any folder")
@pytest.mark.parametrize("which", ["records", "runs"])
def test_folder_without_permission(which, place, untrained):
    getattr(place, which).mkdir()
    getattr(place, which).chmod(0o500)
    with pytest.raises(OSError, match="Permission denied.*nothing was started"):
        place.run()


@pytest.mark.parametrize("which", ["records", "runs"])
def test_nearly_full_disk_is_said_before_training(which, place, untrained, monkeypatch):
    usage = shutil.disk_usage

    def nearly_full(path):
        full = Path(path).is_relative_to(getattr(place, which))
        return usage(path)._replace(free=700_000) if full else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(OSError, match=r"has 1 MB free, and the run needs \d+ MB.*nothing was started") as caught:
        place.run()
    assert str(getattr(place, which)) in str(caught.value)


def test_room_is_asked_for_by_the_size_of_the_net(place, untrained, monkeypatch):
    """12 MB are enough to begin with, and too little for the checkpoints of a net of a million weights."""
    net = nn.Linear(1000, 1000)
    task = dataclasses.replace(TOY, build=lambda *_: Learner(net, [1], None, SGD([net.bias], lr=1), device="cpu"))
    monkeypatch.setitem(experiment._REGISTERED, "toy", task)
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=12_000_000))
    with pytest.raises(OSError, match="has 12 MB free, and the run needs 50 MB"):
        place.run()


def child_with_little_room(records, runs, when):
    """The system refuses to write more than 800 bytes in one file, from the third checkpoint or from the score on."""
    room = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(owner, name, now):
        true = getattr(owner, name)

        def then(*args):
            if now(*args):
                resource.setrlimit(resource.RLIMIT_FSIZE, (800, room[1]))
            return true(*args)

        return then

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    Checkpoint.after_epoch = limited(Checkpoint, "after_epoch", lambda self, learner: when == "checkpoint" and learner.epoch == 3)
    score = limited(TOY, "score", lambda learner, config: when == "record")
    register(dataclasses.replace(TOY, score=score))
    try:
        run(TOY.config("steady", "smoke"), 0, device="cpu", records=records, runs=runs, progress="silent")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)                 # for the traceback


@pytest.mark.parametrize("when, kept", [("checkpoint", 2), ("record", 4)])
def test_no_room_later(when, kept, place, undisturbed):
    """A checkpoint, or the record, cannot be written whole: an OSError, no partial file, and what was there is good."""
    with Child(child_with_little_room, str(place.records), str(place.runs), when) as child:
        assert child.wait() == 1
        assert child.err.splitlines()[-1].startswith("OSError: [Errno 27] File too large"), child.err
    assert read_records(place.records) == []
    with place.child() as child:
        assert child.wait() == 0, child.err
        assert f"going on after epoch {kept} of 4" in child.out
    assert numbers(read_record(place.file("json"))) == numbers(undisturbed("toy", "steady")[0])
    assert place.leftovers() == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "umount2") or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=24m") != 0:
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), 2)


def fill(folder, leave=0):
    """Write until the disk is full; return the file that fills it."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(b"\0" * 4096)
    if leave:
        os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


@pytest.mark.parametrize("leave", [0, 5_000_000])
@pytest.mark.parametrize("which", ["records", "runs"])
def test_full_disk_before(which, leave, small_disk, place, untrained):
    if (which, leave) == ("records", 5_000_000):
        pytest.skip("5 MB are enough for a record")
    setattr(place, which, small_disk / which)
    fill(small_disk, leave)
    with pytest.raises(OSError, match="nothing was started"):
        place.run()
    assert not [p for p in small_disk.rglob("*") if p.is_file() and p.name != "ballast"], "leftovers on a full disk"


def test_disk_that_fills_up_amid_a_run(small_disk, place, tmp_path, undisturbed):
    place.runs, hold = small_disk / "runs", tmp_path / "hold"
    hold.touch()
    with place.child(env={"TOY_HOLD": hold}) as child:
        child.until(lambda: place.file("pt").exists() and kept(place.file("pt")).epoch == 2)
        ballast = fill(small_disk)
        hold.unlink()
        assert child.wait() == 1
        assert child.err.splitlines()[-1].startswith("OSError") and os.strerror(errno.ENOSPC) in child.err, child.err
    ballast.unlink()
    with place.child() as child:
        assert child.wait() == 0, child.err
        assert "going on after epoch 2" in child.out
    assert numbers(read_record(place.file("json"))) == numbers(undisturbed("toy", "steady")[0])


def test_read_only_file_system(small_disk, place, untrained):
    libc = ctypes.CDLL(None)
    assert libc.mount(b"none", os.fsencode(small_disk), None, 32 | 1, None) == 0           # MS_REMOUNT | MS_RDONLY
    place.runs = small_disk / "runs"
    with pytest.raises(OSError, match=rf"cannot write in {place.runs}.*Read-only file system.*nothing was started"):
        place.run()


def test_file_system_without_hard_links(place, monkeypatch):
    """Mounted drives of notebook services have none: either it is said before training, or the record comes all the same."""
    def no_link(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    began = []
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(Hold, "before_fit", lambda *_: began.append(True), raising=False)
    try:
        record = place.run()
    except OSError as error:
        assert not began, f"said after training: {error}"
    else:
        assert read_record(place.file("json")) == record


# --- a loss that is not finite -------------------------------------------------------------------
def test_nonfinite_loss_names_everything_and_keeps_what_it_had(place):
    with pytest.raises(NonFiniteLoss) as caught:
        place.run("wild")
    failed = json.loads(place.file("failed.json", "wild").read_text())
    losses, lrs = failed["curve"]["loss"], failed["curve"]["lr"]
    step = next(i for i, loss in enumerate(losses) if not abs(loss) < float("inf"))
    assert lrs[step - 1] == 1e38 and lrs[step - 2] == 0.02               # the step after the one that blew up
    text = str(caught.value)
    assert text.startswith("toy wild (smoke), seed 0: the loss is ")
    assert f"at step {step} (epoch 3, batch {step - 10}), lr 1e+38" in text
    assert str(place.file("failed.json", "wild")) in text
    assert [row["epoch"] for row in failed["history"]] == [1, 2]
    assert failed["config"]["row"] == "wild" and failed["error"] in text
    assert not place.file("json", "wild").exists()
    with pytest.raises(NonFiniteLoss, match=f"at step {step} "):         # again, from the last good epoch: the same
        place.run("wild")


def test_weights_that_blow_up_at_the_last_step(place):
    """Every training loss is finite, and the net that comes out is not: that is no record."""
    with pytest.raises(NonFiniteError, match="toy late .smoke., seed 0"):
        place.run("late")
    assert read_records(place.records) == []


# --- names, folders, small parts -----------------------------------------------------------------
def test_unknown_names_list_those_that_exist_nearest_first():
    with pytest.raises(KeyError) as caught:
        get_task("cifar01")
    assert caught.value.args[0].startswith("unknown task 'cifar01'. Did you mean cifar10 or cars? There are: cifar10")
    task = get_task("cifar10")
    with pytest.raises(KeyError) as caught:
        task.config("adam-30", "laptop")
    text = caught.value.args[0]
    assert text.startswith("cifar10, size laptop: unknown row 'adam-30'. Did you mean ")
    assert "adamw-laptop-94" in text
    near = text.partition("Did you mean ")[2].partition("?")[0]
    assert "adamw-30" in near
    assert text.partition("There are: ")[2].startswith(near.replace(" or ", ", "))
    with pytest.raises(KeyError, match="cifar10: unknown size 'labtop'. Did you mean laptop.* smoke"):
        task.config("adamw-30", "labtop")
    with pytest.raises(KeyError, match="unknown size 'colab'.*There are: smoke, laptop"):
        TOY.config("steady", "colab")
    with pytest.raises(ValueError, match="unknown size 'big'. There are: smoke, laptop, colab, full"):
        ToyConfig(size="big", row="steady")


def test_unknown_task_of_a_config_is_refused(place):
    config = dataclasses.replace(TOY.config("steady", "smoke"), task="toi")
    with pytest.raises(KeyError, match="unknown task 'toi'. Did you mean toy"):
        run(config, 0, records=place.records, runs=place.runs)
    assert not place.records.exists() and not place.runs.exists()


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_odd_seeds_are_refused(seed, place):
    """Their records would never be read back: read_records looks for digits."""
    with pytest.raises((TypeError, ValueError), match="seed"):
        place.run(seed=seed)


def test_every_seed_that_is_taken_counts(place):
    assert TOY.records("smoke", place.records) == []
    records = [place.run(seed=seed) for seed in (0, 3, 12345678901)]
    assert TOY.records("smoke", place.records) == records


def test_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("NBUTILS_RECORDS", raising=False)
    monkeypatch.delenv("NBUTILS_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert (records_folder(), runs_folder()) == (tmp_path / "records", tmp_path / "runs")
    (tmp_path / "book/records").mkdir(parents=True)
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert (records_folder(), runs_folder()) == (tmp_path / "book/records", tmp_path / "runs")
    monkeypatch.setenv("NBUTILS_RECORDS", "/a")
    monkeypatch.setenv("NBUTILS_RUNS", "/b")
    assert (records_folder(), runs_folder()) == (Path("/a"), Path("/b"))


def test_record_says_what_it_is(place):
    record = place.run()
    assert (record.task, record.size, record.row, record.seed, record.recipe) == ("toy", "smoke", "steady", 0, 1)
    assert record.config == dataclasses.asdict(TOY.config("steady", "smoke")) and record.config_hash == config_hash(record.config)
    assert [row["epoch"] for row in record.history] == [1, 2, 3, 4]
    assert record.curve["step"] == list(range(20)) and len(record.curve["lr"]) == 20
    assert record.seconds >= sum(row["seconds"] for row in record.history) > 0
    assert record.precision == "fp32" and "torch" in record.versions
    assert read_record(place.file("json")) == record


def test_seconds_are_those_of_all_sessions(place):
    with place.child(kill="amid the third epoch") as child:
        child.wait()
    before = kept(place.file("pt")).history
    record = place.run()
    assert [row["seconds"] for row in record.history[:2]] == [row["seconds"] for row in before]
    assert record.seconds >= sum(row["seconds"] + row["valid_seconds"] for row in record.history)


@pytest.mark.parametrize("n", [0, 1, 199, 200, 201, 11730])
def test_thin(n):
    trace = {"lr": list(range(n)), "loss": [2.0 * i for i in range(n)]}
    thinned = thin(trace)
    assert len(thinned["step"]) <= 200 and thinned["step"][:1] == [0][:n]
    assert thinned["lr"] == thinned["step"] and thinned["loss"] == [2.0 * i for i in thinned["step"]]
    assert n > 200 or thinned["step"] == list(range(n))


def test_write_is_refused_where_a_record_came_meanwhile(place, monkeypatch):
    """Two machines on shared records, each with runs of its own: the second to end loses, and no record is overwritten."""
    first = place.run()
    text = place.file("json").read_text()
    with pytest.raises(FileExistsError, match="a record is never overwritten"):
        write_record(first, place.records)
    assert place.file("json").read_text() == text
    assert [p.name for p in place.file("json").parent.iterdir()] == ["0.json"]


def test_sizes_of_cifar10_are_known():
    assert {c.size for c in cifar10.task.configs} == set(SIZES)


def test_record_names_the_code_that_was_loaded(place, monkeypatch):
    """A branch that is switched during a run, or between two runs of one process, is not the code that runs."""
    before, after = "a" * 40, "b" * 40
    true = Learner.evaluate
    monkeypatch.setattr(Learner, "evaluate", lambda *args: (os.environ.update(NBUTILS_COMMIT=after), true(*args))[1])
    monkeypatch.setenv("NBUTILS_COMMIT", before)
    experiment._loaded_code.cache_clear()
    try:
        assert [place.run(seed=seed).commit for seed in (0, 1)] == [before, before]
    finally:
        experiment._loaded_code.cache_clear()
