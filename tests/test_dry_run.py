"""What `nbutils run --dry-run` says of work, memory and time, held against known answers; it starts nothing."""
import dataclasses
import itertools
import re

import pytest
import torch
from sound_records import sound, write
from torch import nn

from nbutils import command, experiment
from nbutils.command import estimate, main
from nbutils.experiment import TASKS, Config, Task, Work, get_task


# --- work and memory with a known answer ------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(Config):
    task: str = "linear"
    epochs: int = 3
    n: int = 1000                                # batch, inputs; the one layer has half as many outputs
    precision: str = "fp32"


def linear_work(config):
    n = config.n
    return Work(key=(n, config.epochs), model=lambda: nn.Linear(n, n // 2, bias=False), batch=lambda: (torch.zeros(n, n), torch.zeros(n, n // 2)),
                loss_fn=lambda outputs, y: outputs.sum(), steps=7, evaluated=2.5, stages=((config.epochs, lambda model: None),), data=1e6)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(command, "_COUNTED", {})
    task = Task(name="linear", build=None, score=None, columns={"error": ("error, %", 100, 1)}, work=linear_work,
                configs=(LinearConfig(size="smoke", row="a"), LinearConfig(size="smoke", row="b", n=2000), LinearConfig(size="smoke", row="half", precision="bf16")))
    monkeypatch.setitem(experiment._REGISTERED, "linear", task)
    return task


@pytest.mark.parametrize("row, n", [("a", 1000), ("b", 2000), ("half", 1000)])
def test_one_layer(linear, row, n):
    """n x n by n x n/2 forward, and the same for the weight's gradient: the input needs none."""
    flops, memory = estimate(linear.config(row, "smoke"))
    product = 2 * n * n * n // 2
    assert flops == 3 * (7 * 2 * product + 2.5 * product)
    weight, batch, target = 4 * n * n // 2, 4 * n * n, 4 * n * n // 2
    least = weight + batch + target + 2 * weight + 12 * n * n // 2 + 1e6          # with outputs, gradient, optimizer, data
    assert least * 0.9 < memory < least * 1.6


def test_frozen_weights_cost_less(linear, monkeypatch):
    whole = linear_work(linear.config("a", "smoke"))
    net = dataclasses.replace(whole, key=("frozen",), model=lambda: nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 500)),
                              stages=((1, lambda m: m[0].requires_grad_(False)), (1, lambda m: None)))
    monkeypatch.setitem(experiment._REGISTERED, "linear", dataclasses.replace(linear, work=lambda config: net))
    flops, _ = estimate(linear.config("a", "smoke"))
    first, last = 2 * 1000**3, 2 * 1000**2 * 500
    assert flops == 7 * (first + 2 * last) + 7 * (2 * first + 3 * last) + 2 * 2.5 * (first + last)


@pytest.mark.parametrize("row, petaflop", [("cifar10 adamw-30", 12.5), ("cars crops-adamw", 12), ("wikitext2 lstm-adam", 36.5), ("wikitext2 qrnn-adamw", 36.3)])
def test_full_rows_against_figures_from_elsewhere(row, petaflop):
    """The training's work, by hand: 0.415, 0.20 (after the head's third) and 0.405 PFLOP an epoch."""
    name, row = row.split()
    flops, memory = estimate(get_task(name).config(row, "full"))
    assert 0.95 * petaflop < flops / 1e15 < 1.15 * petaflop and 0.5e9 < memory < 14e9


@pytest.mark.parametrize("name", TASKS)
def test_the_shapes_are_those_of_the_run(name):
    """Shapes, steps and loss of each smoke row's Work, against the Learner that is really built."""
    task = get_task(name)
    for config in task.configs:
        if config.size == "smoke":
            work, learner = task.work(config), task.build(config, 0, torch.device("cpu"))
            (x, y), (x_, y_) = next(iter(learner.train)), work.batch()
            slack = 25 if name == "wikitext2" else 0                              # its pieces vary in length; the first is the longest
            assert (x.shape[1:], x.dtype, y.dtype) == (x_.shape[1:], x_.dtype, y_.dtype) and 0 <= len(x) - len(x_) <= slack
            assert work.steps == len(learner.train) and sum(epochs for epochs, _ in work.stages) == config.epochs
            assert sum(p.numel() for p in work.model().parameters()) == sum(p.numel() for p in learner.model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_equal_keys_mean_equal_work(name):
    """Rows that share a key differ in their optimizer's settings, the weights' start or the penalties alone."""
    free = {"row", "size", "optimizer", "lr", "head_lr", "l2", "weight_decay", "amsgrad", "momentum", "beta2", "div", "tail", "views", "weights",
            "pictures", "alpha", "beta", "on", "precision", "dropout", "divide", "share", "every", "clip_norm"}
    task, kinds = get_task(name), {}
    for config in task.configs:
        shape = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
        kinds.setdefault((config.size, task.work(config).key), []).append(shape)
    assert all(a == b for group in kinds.values() for a, b in itertools.pairwise(group))


# --- the command -----------------------------------------------------------------------------------
@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("records", "runs", "data"):
        monkeypatch.setenv(f"NBUTILS_{name.upper()}", str(tmp_path / name))
    monkeypatch.setattr(command, "describe_device", lambda device: "a card")
    monkeypatch.setattr(command, "native_precisions", lambda device: ("bf16", "fp32"))
    monkeypatch.setattr(command, "_rate", lambda device, precision: 1e12)
    monkeypatch.setattr(command, "_free_memory", lambda device: 8e9)
    monkeypatch.setattr(command, "run", lambda *a, **k: pytest.fail("a dry run trained"))
    return tmp_path


def dry(capsys, words):
    capsys.readouterr()
    assert main([*words.split(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    return out, {line.split()[0]: re.split(r"  +", line)[1:] for line in out.splitlines() if line.startswith(("adam", "sgd", "lstm", "crops", "a "))}


def test_it_needs_no_data_and_leaves_nothing(home, capsys):
    out, rows = dry(capsys, "run cifar10 adamw-30 sgd-30 --size full --seeds 0-2")
    assert rows["adamw-30"] == ["3 of 3", "bf16", "13,302", "0.9", "7.4 to 30 h"]   # at 1/2 and at 1/8 of 1 TFLOP/s
    assert "To train: 6 runs, one after another, 1.8 to 7.4 days in all." in out
    assert "Times: 1/8 to 1/2 of the 1 TFLOP/s of a matrix product here." in out
    assert "of the 8.0 GB free: it fits." in out and out.endswith("Nothing was started.\n")
    assert list(home.iterdir()) == []


def test_times_come_from_records_of_the_same_device(home, capsys):
    write(home / "records", sound(row="adamw-30", size="full", seed=0, seconds=50.0))
    write(home / "records", sound(row="adamw-30", size="full", seed=1, seconds=70.0))
    write(home / "records", sound(row="adam-l2-30", size="full", seed=0, seconds=9.0, device="another card"))
    out, rows = dry(capsys, "run cifar10 adamw-30 adamw-18 --size full --seeds 0-2")
    assert rows["adamw-30"][0] == "1 of 3" and rows["adamw-30"][-1] == "60 s"       # the median of two
    assert rows["adamw-18"][0] == "3 of 3" and rows["adamw-18"][-1] == "36 s"       # 18 epochs of 30
    assert "To train: 4 runs, one after another, 2.8 min in all." in out
    assert "Times: records of the same rows on this device; records of other rows on this device." in out


def test_what_does_not_fit_is_said(home, capsys, monkeypatch):
    out, _ = dry(capsys, "run wikitext2 lstm-adam --size full --seeds 0-3 --jobs 3")
    assert re.search(r"about 1\d\.\d GB of the 8.0 GB free: it does not fit.\nTake a smaller size, fewer --jobs", out)
    monkeypatch.setattr(command, "_free_memory", lambda device: None)
    assert "how much is free here cannot be read" in dry(capsys, "run wikitext2 lstm-adam --size full")[0]


def test_a_card_without_the_rows_precision(home, capsys, monkeypatch):
    monkeypatch.setattr(command, "native_precisions", lambda device: ("fp16", "fp32"))
    out, rows = dry(capsys, "run wikitext2 lstm-adam --size full")
    assert rows["lstm-adam"][1] == "fp16" and "In fp16 these runs count in no table" in out
    out, rows = dry(capsys, "run wikitext2 lstm-adam --size colab")
    assert rows["lstm-adam"][1] == "fp16" and "count in no table" not in out


def test_all_is_recorded(home, capsys):
    write(home / "records", sound(row="adamw-30", size="full", seed=0, seconds=50.0))
    out, rows = dry(capsys, "run cifar10 adamw-30 --size full")
    assert rows["adamw-30"][0] == "0 of 1" and "To train" not in out and "Memory" not in out


def test_a_task_without_work(home, capsys, linear, monkeypatch):
    monkeypatch.setitem(experiment._REGISTERED, "linear", dataclasses.replace(linear, work=None))
    out, rows = dry(capsys, "run linear a --size smoke")
    assert rows["a"] == ["1 of 1", "fp32", "unknown", "unknown", "unknown"]


def test_lines_fit_a_terminal(home, capsys):
    for words in ("run cifar10 all --size full --seeds 0-99", "run cars all --size laptop", "run wikitext2 all --size colab --jobs 4"):
        assert max(map(len, dry(capsys, words)[0].splitlines())) <= 80


@pytest.mark.parametrize("least, most, text", [
    (0.4, 0.4, "0.4 s"), (40, 40, "40 s"), (119, 119, "119 s"), (120, 120, "2 min"), (300, 1200, "5 to 20 min"), (100, 8000, "0.028 to 2.2 h"),
    (86400 * 3, 86400 * 120, "3 to 120 days")])
def test_spans(least, most, text):
    assert command._span(least, most) == text


def test_the_rate_of_this_machine_and_its_memory():
    assert 1e8 < command._rate(torch.device("cpu"), "fp32") < 1e15
    assert 1e8 < command._free_memory(torch.device("cpu")) < 1e14
