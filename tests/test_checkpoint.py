"""Checkpoints that travel: between devices, with NumPy's numbers, with the callbacks' state, and never into each other's files."""
import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn

from nbutils import experiment, learner as learner_module
from nbutils.amsgrad import AdamW
from nbutils.core import _plain
from nbutils.data import Batches, load_digits
from nbutils.experiment import Checkpoint, Config, Task, register, run
from nbutils.learner import Callback, Learner
from nbutils.records import read_record, read_records, table

BATCHES = [(torch.linspace(-1, 1, 12).view(4, 3), torch.tensor([0, 1, 0, 1]))] * 3


def small(callbacks=(), lr=0.1, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return Learner(model, BATCHES, BATCHES, AdamW(model.parameters(), lr=lr, **options), callbacks=callbacks, device="cpu")


class Score(Callback):
    def __init__(self, value):
        self.value = value

    def after_epoch(self, learner):
        learner.history[-1]["f1"] = self.value


class Average(Callback):
    """A running average of the weights, as an example of state that must survive."""

    def __init__(self):
        self.weights, self.steps = None, np.int64(0)

    def after_step(self, learner):
        now = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
        self.weights = now if self.weights is None else self.weights.lerp(now, 0.1)
        self.steps += 1

    def state_dict(self):
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state):
        self.weights, self.steps = state["weights"], state["steps"]


# --- numbers of NumPy -------------------------------------------------------------------------------
NUMBERS = {"float64": np.float64(0.1), "float32": np.float32(0.125), "an element of logspace": np.logspace(-3, -1, 3)[1], "0-d": np.array(0.1)}


CASES = [(kind, place) for kind in NUMBERS for place in ("lr", "weight_decay", "history", "mark", "a callback")
         if (kind, place) not in (("0-d", "lr"), ("0-d", "weight_decay"))]         # the optimizer refuses an array


@pytest.mark.parametrize("kind, place", CASES)
def test_numbers_of_numpy_are_loaded_as_pythons(kind, place, tmp_path):
    value, options, mark, callbacks = NUMBERS[kind], {}, {"row": "a"}, []
    if place in ("lr", "weight_decay"):
        options = {place: value}
    elif place == "mark":
        mark = {"lr": value}
    else:
        callbacks = [Score(value)] if place == "history" else [Average()]
    first = small([*callbacks, Checkpoint(tmp_path / "c.pt", mark)], **options)
    first.fit(2)
    later = small([Average()] if place == "a callback" else [], **options)
    assert Checkpoint(tmp_path / "c.pt", mark).load(later) and later.epoch == 2
    assert later.fit(4)[:2] == _plain(first.history) and [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    if place == "history":
        assert type(later.history[0]["f1"]) is float and later.history[0]["f1"] == pytest.approx(float(value))


PLAIN = [(np.float64(0.5), 0.5, float), (np.float16(0.5), 0.5, float), (np.int8(3), 3, int), (np.bool_(True), True, bool),
         (np.str_("a"), "a", str), (np.complex64(1j), 1j, complex), (np.array(2), 2, int), (True, True, bool), (None, None, type(None))]


@pytest.mark.parametrize("given, wanted, kind", PLAIN, ids=lambda v: getattr(type(v), "__name__", "") if not isinstance(v, type) else v.__name__)
def test_plain(given, wanted, kind):
    made = _plain({"values": [(given,)]} | ({} if isinstance(given, np.ndarray) else {"keys": {given: 1}}))
    found = [made["values"][0][0], *made.get("keys", ())]
    assert all(value == wanted and type(value) is kind for value in found)
    whole = io.BytesIO()
    torch.save(made, whole)
    assert torch.load(io.BytesIO(whole.getvalue()), weights_only=True) == made


@pytest.mark.parametrize("odd", [np.zeros(3), object(), {1, 2}, Learner, lambda: 0], ids=["array", "object", "set", "class", "function"])
def test_what_could_not_be_read_back_is_refused_before_the_first_step(odd, tmp_path):
    class Odd(Average):
        def state_dict(self):
            return {"thing": [odd]}

    for callbacks, mark, name in (([Odd()], {}, r"state\['callbacks'\]"), ([], {"odd": odd}, r"mark\['odd'\]")):
        learner = small([*callbacks, Checkpoint(tmp_path / "c.pt", mark)])
        with pytest.raises(TypeError, match=rf"{name}.* is a .*: only numbers, strings"):
            learner.fit(1)
        assert learner.step == 0 and list(tmp_path.iterdir()) == []


# --- devices ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("tag", ["cuda:0", "cuda:9", "mps"])
def test_a_checkpoint_of_a_device_that_is_not_here(tag, tmp_path, monkeypatch):
    first = small([Average(), Checkpoint(tmp_path / "c.pt", {})])
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: tag)
        first.fit(2)
    later = small([Average()])
    assert Checkpoint(tmp_path / "c.pt", {}).load(later) and later.epoch == 2
    tensors = [*later.model.parameters(), later.callbacks[0].weights]
    tensors += [t for state in later.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert {t.device.type for t in tensors} == {"cpu"}
    assert len(later.fit(4)) == 4


# --- the callbacks' state ---------------------------------------------------------------------------
def test_state_of_callbacks_survives(tmp_path):
    whole, first, later = (small([Average(), Average()]) for _ in range(3))
    whole.fit(4)
    first.callbacks.append(Checkpoint(tmp_path / "c.pt", {}))
    first.fit(2)
    assert Checkpoint(tmp_path / "c.pt", {}).load(later)
    later.fit(4)
    for a, b in zip(whole.callbacks, later.callbacks):
        assert torch.equal(a.weights, b.weights) and a.steps == b.steps == 12


@pytest.mark.parametrize("callbacks", [[], [Average(), Average()], [Score(1.0)]], ids=["none", "two", "another"])
def test_state_of_other_callbacks_is_refused(callbacks):
    state = small([Average()]).state_dict()
    with pytest.raises(ValueError, match=r"holds that of the callbacks \['Average'\], and this Learner has"):
        small(callbacks).load_state_dict(state)


def test_a_state_from_before_callbacks_had_one():
    state = small().state_dict()
    del state["callbacks"]
    small().load_state_dict(state)
    with pytest.raises(ValueError, match="this Learner has .'Average'"):
        small([Average()]).load_state_dict(state)


# --- places -----------------------------------------------------------------------------------------
def test_no_two_checkpoints_share_a_file(tmp_path, monkeypatch):
    names, used = ["lr0.1", "lr0.2", "lr0", "lr", "a.pt", "a.json"], []
    true = experiment.os.replace
    monkeypatch.setattr(experiment.os, "replace", lambda a, b: (used.append(a.name), true(a, b)))
    for name in names:
        small([Checkpoint(tmp_path / name, {})]).fit(1)
    assert len(set(used)) == len(names) and not set(used) & set(names)
    for name in names:
        (tmp_path / name).write_bytes(b"damaged")
        assert not Checkpoint(tmp_path / name, {}).load(small())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.damaged" for name in names)


def test_the_folder_is_made(tmp_path):
    small([Checkpoint(tmp_path / "runs" / "deep" / "c.pt", {})]).fit(1)
    assert [p.name for p in (tmp_path / "runs" / "deep").iterdir()] == ["c.pt"]


def test_no_folder_is_said_before_the_first_step(tmp_path):
    (tmp_path / "runs").write_text("a file")
    learner = small([Checkpoint(tmp_path / "runs" / "c.pt", {})])
    with pytest.raises(OSError, match="runs"):
        learner.fit(1)
    assert learner.step == 0


# --- one precision per cell -------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoConfig(Config):
    task: str = "auto"
    epochs: int = 1
    precision: str = "auto"


def auto_build(config, seed, device):
    train, valid = (Batches(images, 400, mean=(0.3,), std=(0.4,)) for images in load_digits())
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Learner(model, train, valid, AdamW(model.parameters()), device=device, precision=config.precision, progress="silent")


AUTO = Task(name="auto", build=auto_build, columns={"error": ("error, %", 100, 1)},
            score=lambda learner, config: {"error": np.float32(1 - learner.evaluate()["accuracy"])},
            configs=(AutoConfig(size="laptop", row="a"), AutoConfig(size="colab", row="a"), AutoConfig(size="smoke", row="a", precision="fp32")),
            precisions={"laptop": "bf16", "colab": "fp16"})


@pytest.fixture
def auto(tmp_path, monkeypatch):
    monkeypatch.setitem(experiment._REGISTERED, "auto", AUTO)

    def go(native, size="laptop", seed=0, task=AUTO, **options):
        monkeypatch.setattr(experiment, "native_precisions", lambda device: native)
        register(task)
        return run(task.config("a", size), seed, device="cpu", records=tmp_path / "records", runs=tmp_path / "runs", **options)

    go.files = lambda size="laptop": sorted(p.name for p in (tmp_path / "records" / "auto" / size / "a").iterdir())
    go.records = tmp_path / "records"
    return go


def test_a_run_is_in_the_precision_of_its_row(auto, capfd):
    record = auto(("bf16", "fp32"))
    assert record.precision == "bf16" and AUTO.counts(record) and record.config["precision"] == "auto"
    assert auto(("fp32", "bf16"), seed=1).precision == "bf16"           # not the device's fastest
    assert auto(("bf16", "fp32"), "smoke").precision == "fp32"
    assert capfd.readouterr().out == "" and auto.files() == ["0.json", "1.json"]
    assert type(record.metrics["error"]) is float                       # numpy's number from score


def test_what_the_device_lacks_is_said_and_kept_apart(auto, capfd):
    record = auto(("fp32",))
    assert record.precision == "fp32" and not AUTO.counts(record)
    assert "cpu does not run bf16 in hardware, so this run is in fp32; its record is kept, and counts in no table" in capfd.readouterr().out
    assert AUTO.why_not(record) == "it was trained in fp32, and its row counts in bf16"
    assert auto(("fp32",)) == record and auto.files() == ["0.fp32.json"]  # the second call trains nothing
    assert AUTO.records("laptop", auto.records) == []
    counted = auto(("bf16", "fp32"))                                    # seed 0 is still free for the table
    assert auto.files() == ["0.fp32.json", "0.json"] and AUTO.records("laptop", auto.records) == [counted]
    assert read_record(auto.records / "auto/laptop/a/0.fp32.json") == record


def test_a_precision_that_is_asked_for(auto):
    assert auto(("bf16", "fp32"), precision="fp32").precision == "fp32"
    assert auto(("fp32",), seed=1, precision="bf16").precision == "bf16"  # slower there, and counts
    assert auto.files() == ["0.fp32.json", "1.json"]
    with pytest.raises(ValueError, match="precision is 'bf16', and the settings of auto a .smoke., seed 0 fix fp32"):
        auto(("fp32",), "smoke", precision="bf16")
    with pytest.raises(ValueError, match="unknown precision 'half'"):
        auto(("fp32",), precision="half")


def test_a_record_of_another_precision_makes_room(auto):
    """As those that were written when "auto" still meant the device's best."""
    old = auto(("bf16", "fp32"))
    path = auto.records / old.path
    path.write_text(path.read_text().replace('"precision": "bf16"', '"precision": "fp32"'))
    assert AUTO.records("laptop", auto.records) == []
    new = auto(("bf16", "fp32"))
    assert auto.files() == ["0.fp32.json", "0.json"] and AUTO.records("laptop", auto.records) == [new]


def test_a_checkpoint_of_another_precision_is_not_continued(auto, monkeypatch):
    true = learner_module.Learner._call
    long = dataclasses.replace(AUTO, configs=(AutoConfig(size="laptop", row="a", epochs=2),))

    def interrupted(self, hook):
        true(self, hook)
        if hook == "after_epoch" and self.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(learner_module.Learner, "_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        auto(("bf16", "fp32"), task=long)
    monkeypatch.setattr(learner_module.Learner, "_call", true)
    other = auto(("fp32",), task=long)
    assert other.precision == "fp32" and len(other.history) == 2
    assert auto(("bf16", "fp32"), task=long).precision == "bf16"


def test_a_table_never_mixes_precisions(auto):
    records = [auto(("bf16", "fp32")), auto(("fp32",), seed=1)]
    with pytest.raises(ValueError, match="never mixes .*precisions.*bf16.*fp32"):
        table(records, ["a"], AUTO.columns)
    assert "not run" not in str(AUTO.table("laptop", folder=auto.records))
    assert read_records(auto.records) == records[:1]


def test_every_auto_row_of_the_book_says_in_which_precision_it_counts():
    for name in experiment.TASKS:
        task = experiment.get_task(name)
        for config in task.configs:
            assert config.precision != "auto" or config.size in task.precisions, (name, config.size)
