"""The Learner against plain loops, its hooks, bars on a real terminal, and that nothing waits for the device."""
import copy
import io
import json
import os
import pty
import re
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from children import Child
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nbutils.amsgrad import Adam, AdamW
from nbutils.core import seed_everything
from nbutils.data import Batches, Images, pad_crop_flip
from nbutils.learner import HOOKS, Callback, Learner, NonFiniteLoss, accuracy, best_precision, tta
from nbutils.momentum import SGD
from nbutils.optimizer import NonFiniteError
from nbutils.schedule import one_cycle


def net(norm=True, seed=0):
    seed_everything(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 3))


def pairs(sizes=(8, 8, 8, 4), seed=0):
    """A list of batches (x [b, 6], y [b])."""
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=random), torch.randint(3, (n,), generator=random)) for n in sizes]


def learner(model=None, train=None, valid=None, make=lambda p: SGD(p, lr=0.1, momentum=0.9), **options):
    model = model or net()
    return Learner(model, train or pairs(), valid, make(model.parameters()), device="cpu", **{"progress": "silent"} | options)


def equal(a, b):
    """Whether two state dicts, lists, tensors are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# --- the loop against a plain one ----------------------------------------------------------------
def plain_loop(model, optimizer, train, epochs, clip=None, half=None, scaler=None, schedule=None):
    """What the Learner does, as anybody would write it; returns the loss of each step."""
    losses = []
    for epoch in range(epochs):
        model.train()
        for i, (x, y) in enumerate(train):
            if schedule:
                for group in optimizer.param_groups:
                    group["lr"] = schedule((epoch * len(train) + i) / (epochs * len(train)))
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                out = model(x)
            loss = F.cross_entropy(out.float(), y)
            (scaler.scale(loss) if scaler else loss).backward()
            if clip:
                if scaler:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, l2=1e-2),
    "Adam": lambda p: Adam(p, lr=1e-2, l2=1e-2),
    "AdamW": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "torch's AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("precision, half", [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_same_weights_as_a_plain_loop(make, precision, half, clip):
    ours, theirs = net(), net()
    run = learner(ours, make=OPTIMIZERS[make], precision=precision, clip_norm=clip, schedules={"lr": one_cycle(0.1)["lr"]})
    history = run.fit(3)
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    losses = plain_loop(theirs, OPTIMIZERS[make](theirs.parameters()), pairs(), 3, clip, half, scaler, one_cycle(0.1)["lr"])
    assert equal(ours.state_dict(), theirs.state_dict())
    assert run.trace["loss"] == losses
    assert [row["loss"] for row in history] == [sum(losses[i:i + 4]) / 4 for i in (0, 4, 8)]
    assert not equal(ours.state_dict(), net().state_dict())


def test_compiled_forward_shares_the_weights(monkeypatch):
    """Only the forward pass is compiled: state, evaluation and optimizer see one and the same model."""
    asked = []

    def compile_(model, **options):
        asked.append(options)
        return lambda x: model(x)

    monkeypatch.setattr(torch, "compile", compile_)
    plain, compiled, tuned = learner(), learner(compile=True), learner(compile="max-autotune")
    replayed = learner(compile={"mode": "reduce-overhead", "dynamic": False})
    assert asked == [{}, {"mode": "max-autotune"}, {"mode": "reduce-overhead", "dynamic": False}]
    for run in (plain, compiled, tuned, replayed):
        run.fit(1)
    assert equal(plain.state_dict()["model"], compiled.state_dict()["model"])


def test_predictions_survive_a_model_that_reuses_its_memory(monkeypatch):
    """What a compiled model gives back may be overwritten by its next call."""
    expected = learner().predict(pairs())[0]
    memory = torch.empty_like(expected)
    monkeypatch.setattr(torch, "compile", lambda model: lambda x: memory[:len(x)].copy_(model(x)))
    found = learner(compile=True).predict(pairs())[0]
    torch.testing.assert_close(found, expected)
    assert len(pairs()) > 1 and len(found.unique()) > found.shape[1]


def test_channels_last():
    seed_everything(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    twin, seen = copy.deepcopy(model), []
    model[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    run = learner(model, [(x, y)], channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    run.fit(3)
    learner(twin, [(x, y)]).fit(3)
    assert seen == [True] * 3
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- half precision ------------------------------------------------------------------------------
class Gradients(Callback):
    """Keep the gradient norm that before_step sees."""

    def __init__(self):
        self.norms = []

    def before_step(self, learner):
        self.norms.append(torch.stack([p.grad.norm() for p in learner.model.parameters()]).norm().item())


def test_before_step_sees_true_gradients_in_fp16():
    """Scaled by 65,536 inside, unscaled and clipped in the hook."""
    full, half, clipped = Gradients(), Gradients(), Gradients()
    learner(callbacks=[full]).fit(1)
    learner(callbacks=[half], precision="fp16").fit(1)
    learner(callbacks=[clipped], precision="fp16", clip_norm=0.1).fit(1)
    assert half.norms == pytest.approx(full.norms, rel=0.05)
    assert max(clipped.norms) <= 0.1 + 1e-6


def test_fp16_skips_a_step_whose_gradients_overflow():
    run = learner(precision="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)              # surely too much for fp16's backward pass
    before, scale = copy.deepcopy(run.model.state_dict()), run.scaler.get_scale()
    loss = run.train_step(*run.train[0])
    assert torch.isfinite(loss)
    assert run.scaler.get_scale() == scale / 2
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]), "the step was not skipped"
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_outputs_are_float32_and_weights_stay(precision):
    run = learner(precision=precision)
    run.fit(1)
    assert run.predict_batch(pairs()[0][0]).dtype == torch.float32
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {b.dtype for s in run.optimizer.state.values() for b in s.values() if torch.is_tensor(b)} == {torch.float32}


def test_auto_on_an_old_card_scales_its_loss(monkeypatch):
    """A T4 has no bf16: "auto" is fp16 there, with the scaler that fp16 needs."""
    monkeypatch.setattr("nbutils.learner.best_precision", lambda device=None: "fp16")
    run = learner(precision="auto")
    assert (run.precision, run.scaler.is_enabled()) == ("fp16", True)


def test_best_precision_is_one_of_ours():
    assert best_precision("cpu") in ("fp32", "bf16")
    assert learner(precision="auto").precision == best_precision("cpu")


# --- evaluation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(10,), (4, 4, 2), (9, 1), (1,) * 10])
def test_each_sample_counts_once(sizes, precision):
    """However the ten are cut into batches: the mean over samples, not over batches."""
    run = learner(precision=precision)
    run.fit(1)
    x, y = pairs((10,), seed=5)[0]
    cut = list(zip(x.split(list(sizes)), y.split(list(sizes))))
    found = run.evaluate(cut)
    out = run.predict(cut)[0]
    assert found["loss"] == pytest.approx(F.cross_entropy(out.double(), y).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((out.argmax(1) == y).double().mean().item(), rel=1e-7)


def test_evaluation_changes_nothing():
    run = learner(valid=pairs((5, 3), seed=3))
    run.fit(1)
    before = copy.deepcopy(run.state_dict())
    assert run.evaluate() == run.evaluate()
    run.predict(run.valid)
    assert equal(run.state_dict(), before)
    assert all(p.grad is None for p in run.model.parameters())


def test_metrics_of_ones_own():
    run = learner(valid=pairs((5, 3)), metrics={"error": lambda out, y: 1 - accuracy(out, y), "top": lambda out, y: out.max()})
    row = run.fit(1)[0]
    assert list(row) == ["epoch", "loss", "valid_loss", "error", "top", "lr", "momentum", "seconds", "valid_seconds"]
    assert row["error"] == pytest.approx(1 - accuracy(*run.predict(run.valid)).item())


def test_no_metrics():
    """A regression has no accuracy: metrics={} asks for the loss alone."""
    model, x = nn.Linear(2, 1), torch.randn(6, 2)
    run = learner(model, [(x, x.sum(1, keepdim=True))], [(x, x.sum(1, keepdim=True))], loss_fn=F.mse_loss, metrics={})
    assert "accuracy" not in run.fit(1)[0]


def test_an_evaluation_amid_an_epoch_leaves_training_mode():
    """A hook that looks at the validation set must not switch dropout and batch norm off for the rest of the epoch."""
    modes = []

    class Peek(Callback):
        def after_step(self, learner):
            learner.evaluate()
            modes.append(learner.model.training)

    learner(valid=pairs((4,)), callbacks=[Peek()]).fit(1)
    assert modes == [True] * 4


def test_predict_keeps_the_order():
    run = learner()
    out, y = run.predict(pairs())
    assert torch.equal(y, torch.cat([y for _, y in pairs()]))
    assert out.shape == (28, 3) and not out.requires_grad


# --- hooks ---------------------------------------------------------------------------------------
def test_hooks_come_in_order_with_the_learner():
    class Diary(Callback):
        def __init__(self):
            self.lines = []

    for name in HOOKS:
        setattr(Diary, name, lambda self, learner, name=name: self.lines.append((name, learner.epoch, learner.step)))
    diary = Diary()
    run = learner(train=pairs((4, 4)), callbacks=[diary])
    run.fit(2)
    step = ["before_batch", "before_step", "after_step"]
    assert [name for name, *_ in diary.lines] == ["before_fit", *["before_epoch", *step, *step, "after_epoch"] * 2, "after_fit"]
    assert [(e, s) for name, e, s in diary.lines if name == "before_batch"] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [(e, s) for name, e, s in diary.lines if name == "after_epoch"] == [(1, 2), (2, 4)]


@pytest.mark.parametrize("name, nearest", [
    ("before_bacth", "before_batch"), ("after_steps", "after_step"), ("before_epochs", "before_epoch"), ("on_epoch_end", None),
    ("after_backward", None), ("befor_batch", "before_batch"), ("afterstep", "after_step"), ("before_Step", "before_step"),
    ("beforeepoch", "before_epoch")])
def test_misspelt_hooks_are_refused(name, nearest):
    with pytest.raises(TypeError) as caught:
        type("Mine", (Callback,), {name: lambda self, learner: None})
    text = str(caught.value)
    assert text.startswith(f"Mine: unknown hook {name!r}.")
    assert nearest is None or f"Did you mean {nearest}" in text
    assert all(hook in text for hook in HOOKS)


def test_misspelt_hook_of_a_grandchild_is_refused():
    class Good(Callback):
        def before_fit(self, learner):
            self.seen = self.helper()

        def helper(self):
            return 1

        def batches_so_far(self):
            return 2

    with pytest.raises(TypeError, match="Worse: unknown hook 'before_fits'"):
        class Worse(Good):
            def before_fits(self, learner):
                pass


def test_an_error_in_a_hook_is_not_swallowed():
    class Broken(Callback):
        def after_step(self, learner):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        learner(callbacks=[Broken()]).fit(1)


# --- schedules -----------------------------------------------------------------------------------
def two_groups(cls, **options):
    model = net()
    return model, cls([{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}], lr=0.1, **options)


class Hypers(Callback):
    def __init__(self, *names):
        self.names, self.seen = names, []

    def before_step(self, learner):
        self.seen.append([[group[name] for name in self.names] for group in learner.optimizer.param_groups])


def test_schedules_reach_every_group():
    model, optimizer = two_groups(AdamW)
    hypers = Hypers("lr", "betas", "weight_decay")
    schedules = {"lr": lambda t: 1 - t, "momentum": lambda t: 0.9 - t / 10, "weight_decay": lambda t: t}
    run = Learner(model, pairs((4, 4)), None, optimizer, schedules=schedules, callbacks=[hypers], device="cpu", progress="silent")
    run.fit(2)
    assert hypers.seen == [[[1 - t, (0.9 - t / 10, 0.999), t]] * 2 for t in (0, 0.25, 0.5, 0.75)]
    assert run.trace["lr"] == [1, 0.75, 0.5, 0.25]
    assert run.trace["momentum"] == [0.9 - t / 10 for t in (0, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize("cls", [SGD, AdamW, torch.optim.SGD, torch.optim.AdamW])
def test_lr_scale_of_a_group_multiplies_the_scheduled_rate(cls):
    """And nothing else: not the momentum, nor a rate that no schedule sets."""
    model, optimizer = two_groups(cls, weight_decay=0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr_scale": 0.0})
    optimizer.param_groups[1]["lr_scale"] = 0.25
    hypers = Hypers("lr", "weight_decay", "momentum" if cls in (SGD, torch.optim.SGD) else "betas")
    options = {"callbacks": [hypers], "device": "cpu", "progress": "silent"}
    before = [group[hypers.names[2]] for group in optimizer.param_groups]
    schedules = {"lr": lambda t: 1 - t, "weight_decay": lambda t: t}
    run = Learner(model, pairs((4, 4)), None, optimizer, schedules=schedules, **options)
    run.fit(2)
    assert hypers.seen == [[[scale * (1 - t), t, m] for scale, m in zip((1, 0.25, 0), before)] for t in (0, 0.25, 0.5, 0.75)]
    assert run.trace["lr"] == [1, 0.75, 0.5, 0.25]
    Learner(model, pairs((4, 4)), None, optimizer, schedules={"weight_decay": lambda t: t}, **options).fit(1)
    assert [group[0] for group in hypers.seen[-1]] == [0.25, 0.0625, 0.0]                  # as they were left


def test_a_scheduled_value_keeps_its_kind():
    """A flag stays a flag: only the rate is multiplied, and only where a group says so."""
    model, optimizer = two_groups(SGD, momentum=0.9)
    run = Learner(model, pairs(), None, optimizer, schedules={"nesterov": lambda t: t > 0, "lr": lambda t: 1}, device="cpu")
    run.set_hypers(0.5)
    assert all(group["nesterov"] is True and type(group["lr"]) is int for group in optimizer.param_groups)


def test_momentum_of_sgd_is_scheduled_too():
    model, optimizer = two_groups(SGD, momentum=0.9)
    run = Learner(model, pairs((4, 4)), None, optimizer, schedules=one_cycle(1.0, momentum=(0.9, 0.8), tail=0.2, steps=10),
                  device="cpu", progress="silent")
    run.fit(5)
    assert run.trace["momentum"][:5] == pytest.approx([0.9, 0.875, 0.85, 0.825, 0.8])
    assert run.trace["lr"][:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])


@pytest.mark.parametrize("name, nearest", [("learning_rate", None), ("momentun", "momentum"), ("weight_decy", "weight_decay")])
def test_unknown_schedule_is_refused_at_once(name, nearest):
    with pytest.raises(KeyError) as caught:
        learner(make=lambda p: AdamW(p), schedules={name: lambda t: 1.0})
    text = caught.value.args[0]
    assert f"unknown hyper-parameter {name!r}" in text and "lr" in text and "params" not in text
    assert nearest is None or f"Did you mean {nearest}" in text


def test_group_without_the_hyper_parameter_is_named():
    model, optimizer = two_groups(SGD)
    del optimizer.param_groups[1]["momentum"]
    with pytest.raises(KeyError, match="unknown hyper-parameter 'momentum'.*param group 1"):
        Learner(model, pairs(), None, optimizer, schedules={"momentum": lambda t: 0.9}, device="cpu")


# --- what is kept --------------------------------------------------------------------------------
def test_history_and_trace():
    run = learner(valid=pairs((4,)))
    assert run.fit(2) is run.history
    assert [list(row) for row in run.history] == [
        ["epoch", "loss", "valid_loss", "accuracy", "lr", "momentum", "seconds", "valid_seconds"]] * 2
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert all(row["seconds"] > 0 and row["valid_seconds"] > 0 for row in run.history)
    assert {name: len(values) for name, values in run.trace.items()} == {"lr": 8, "momentum": 8, "loss": 8}
    assert json.loads(json.dumps(run.history)) == run.history                 # plain numbers
    assert all(type(v) is float for values in run.trace.values() for v in values)


def test_without_validation():
    run = learner()
    assert list(run.fit(1)[0]) == ["epoch", "loss", "lr", "momentum", "seconds", "valid_seconds"]


def test_fit_goes_on_where_it_stopped():
    one, two = learner(), learner()
    one.fit(2)
    assert len(one.fit(4)) == 4 and one.step == 16
    two.fit(4)
    assert equal(one.state_dict()["model"], two.state_dict()["model"])
    assert len(one.fit(3)) == 4                                               # nothing is left to do


def test_fit_again_after_an_interrupt():
    """Ctrl-C amid an epoch, then fit once more, as one does in a notebook: the epoch is done again, and the run ends."""
    class Interrupt(Callback):
        def after_step(self, learner):
            if learner.step == 6:
                learner.callbacks.clear()
                raise KeyboardInterrupt

    run = learner(callbacks=[Interrupt()], schedules=one_cycle(0.1, steps=12))
    with pytest.raises(KeyboardInterrupt):
        run.fit(3)
    assert len(run.history) == 1
    history = run.fit(3)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert run.step == 12 and {len(values) for values in run.trace.values()} == {12}


# --- a loss that is not finite -------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("epoch, batch", [(1, 0), (1, 2), (2, 3)])
def test_nonfinite_loss_at_the_right_step(epoch, batch, value):
    def loss_fn(out, y):
        bad = run.model.training and run.step == 4 * epoch + batch
        return F.cross_entropy(out, y) + (value if bad else 0.0)

    run = learner(valid=pairs((4,)), loss_fn=loss_fn, schedules={"lr": lambda t: 0.1 + t / 100})
    text = rf"the loss is {value} at step {4 * epoch + batch} \(epoch {epoch + 1}, batch {batch}\), lr 0\.1"
    with pytest.raises(NonFiniteLoss, match=text) as caught:
        run.fit(3)
    assert f"lr {0.1 + (4 * epoch + batch) / 1200:g}:" in str(caught.value)
    assert [row["epoch"] for row in run.history] == list(range(1, epoch + 1))
    assert len(run.trace["loss"]) == len(run.trace["lr"]) == 4 * (epoch + 1)


def test_bad_image_is_found():
    """One pixel that is NaN: the step after which nothing is finite any more is the one with that batch."""
    train = pairs()
    train[2][0][3, 1] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"at step 2 \(epoch 1, batch 2\)"):
        learner(train=train).fit(1)


class Spoil(Callback):
    """Makes one gradient infinite or NaN at one step, and looks for that when told to."""

    def __init__(self, step, value=float("nan"), look=False):
        self.step, self.value, self.look = step, value, look

    def before_step(self, learner):
        if learner.step == self.step:
            learner.model[3].weight.grad[0, 0] = self.value
        if self.look:
            learner.optimizer.check_finite()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: AdamW(p, lr=0.1, engine="fast")], ids=["SGD", "AdamW"])
def test_gradient_that_breaks_with_the_last_batch(make, value):
    """All losses are finite, and there is no valid set: the weights tell, at the epoch's end."""
    run = learner(make=make, callbacks=[Spoil(7, value)])
    with pytest.raises(NonFiniteError, match=r"after step 7 \(epoch 2\), lr 0.1, 1 of 6 parameters are not finite, "
                                             r"3.weight the first: a gradient was NaN or infinite; lower .*clip_norm"):
        run.fit(3)
    assert [row["epoch"] for row in run.history] == [1] and len(run.trace["loss"]) == 8
    assert all(abs(loss) < float("inf") for loss in run.trace["loss"])


def spoil(run, values):
    """Let the gradient of a weight, before anybody clips it, hold a value at some steps; no loss of that step knows of it."""
    def hook(gradient):
        return gradient.clone().fill_(values[run.step]) if run.step in values else None

    run.model[3].weight.register_hook(hook)
    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_an_explosion_under_clipping_names_the_norms(step, value):
    """The loss breaks a step later than the gradient; of the epoch before nothing is said."""
    run = spoil(learner(clip_norm=0.5, schedules={"lr": lambda t: 0.1 + t / 100}), {step: value})
    with pytest.raises(NonFiniteLoss) as caught:
        run.fit(3)
    at = step + 1
    assert str(caught.value) == (
        f"the loss is nan at step {at} (epoch {at // 4 + 1}, batch {at % 4}), lr {0.1 + at / 1200:g}, gradient norm nan before "
        f"clipping (first not finite at step {step}): lower lr, set or lower clip_norm, look at that batch")


@pytest.mark.parametrize("value, broken", [("nan", "6 of 6"), ("inf", "1 of 6")])       # clipping multiplies by 1/nan or 1/inf
def test_weights_that_break_with_the_last_batch_name_the_norm(value, broken):
    with pytest.raises(NonFiniteError, match=rf"after step 7 \(epoch 2\), lr 0.1, gradient norm {value} before clipping "
                                             rf"\(first not finite at step 7\), {broken} parameters are not finite"):
        spoil(learner(clip_norm=0.5), {7: float(value)}).fit(3)


@pytest.mark.parametrize("step", [1, 3, None], ids=["amid", "last", "validation"])
def test_the_norm_is_that_step_s_before_clipping(step):
    """A loss that breaks by itself, so that all gradients are finite: no step is named at which they broke."""
    norms = []

    class Look(Callback):
        def before_step(self, learner):
            norms.append(learner._norm.item())

    def loss_fn(out, y):
        bad = run.step == step if run.model.training else step is None
        return F.cross_entropy(out, y) + (float("inf") if bad else 0.0)

    run = learner(valid=pairs((4,)), loss_fn=loss_fn, clip_norm=1e-3, callbacks=[Look()])
    with pytest.raises(NonFiniteLoss) as caught:
        run.fit(1)
    first, (x, y) = net(), pairs()[0]
    F.cross_entropy(first(x), y).backward()
    true = torch.cat([p.grad.flatten() for p in first.parameters()]).norm().item()
    assert norms[0] == pytest.approx(true, rel=1e-5) and len({f"{norm:g}" for norm in norms}) == 4 and min(norms) > 1e-2
    place = "after it" if step is None else f"batch {step}"
    step = 3 if step is None else step
    assert (f"at step {step} (epoch 1, {place}), lr 0.1, gradient norm {norms[step]:g} before clipping: lower lr"
            in str(caught.value))


@pytest.mark.parametrize("options", [{}, {"callbacks": [Gradients()]}], ids=["plain", "hook"])
def test_without_clipping_no_norm_is_named(options):
    with pytest.raises(NonFiniteLoss, match="lr 0.1: lower lr, set or lower clip_norm") as caught:
        spoil(learner(**options), {1: float("nan")}).fit(1)
    assert "norm nan" not in str(caught.value) and "before clipping" not in str(caught.value)


def test_an_infinite_norm_is_no_news_in_fp16():
    """The scaler skips the step of a gradient that overflowed, so it is not where a bad loss began."""
    def loss_fn(out, y):
        return F.cross_entropy(out, y) + (float("nan") if run.step == 3 else 0.0)

    run = spoil(learner(precision="fp16", clip_norm=0.5, loss_fn=loss_fn), {1: float("inf")})
    with pytest.raises(NonFiniteLoss, match=r"at step 3 \(epoch 1, batch 3\), lr 0.1, gradient norm \S+ before clipping: lower"):
        run.fit(1)


def test_gradients_are_looked_at_when_asked_for():
    run = learner(callbacks=[Spoil(2, look=True)])
    with pytest.raises(NonFiniteError, match="SGD: the gradient of parameter 4 of group 0 is not finite"):
        run.fit(1)
    assert run.step == 2


# --- bad input -----------------------------------------------------------------------------------
def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown precision 'fp8'. Did you mean .*There are: .*bf16.*auto"):
        learner(precision="fp8")
    for clip in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_norm is .*: give a positive norm, or None"):
            learner(clip_norm=clip)
    with pytest.raises(ValueError, match="no training batches"):
        Learner(net(), [], None, SGD(net().parameters(), lr=1), device="cpu")
    with pytest.raises(ValueError, match="unknown kind of progress 'bra'. Did you mean bar"):
        learner(progress="bra")
    with pytest.raises(TypeError, match="clipnorm"):
        learner(clipnorm=1)


def test_evaluate_without_a_set():
    with pytest.raises((TypeError, ValueError), match="valid"):
        learner().evaluate()


# --- state ---------------------------------------------------------------------------------------
def batches(n=28, seed=0, **options):
    random = torch.Generator().manual_seed(3)
    images = Images(torch.randint(256, (n, 1, 8, 8), generator=random, dtype=torch.uint8),
                    torch.randint(3, (n,), generator=random), tuple("abc"), "noise")
    return Batches(images, 8, **{"mean": (0.5,), "std": (0.3,), "shuffle": True, "augment": pad_crop_flip, "seed": seed} | options)


def conv_net():
    seed_everything(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_state_goes_through_a_file(make, precision):
    """Two epochs, saved, loaded by a fresh process' Learner, three more: the same bits as five."""
    def fresh():
        return learner(conv_net(), batches(), batches(12, shuffle=False, augment=None), make=OPTIMIZERS[make], precision=precision,
                       schedules=one_cycle(0.05))

    def numbers(run):
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in run.history]

    whole, first, second = fresh(), fresh(), fresh()
    whole.fit(5)

    class Stop(Callback):
        def after_epoch(self, learner):
            if learner.epoch == 2:
                raise StopIteration

    first.callbacks.append(Stop())
    with pytest.raises(StopIteration):
        first.fit(5)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    second.fit(5)
    assert numbers(second) == numbers(whole) and second.trace == whole.trace
    for name in ("model", "optimizer", "scaler"):
        assert equal(second.state_dict()[name], whole.state_dict()[name]), name


def test_two_learners_share_no_history():
    first, second = learner(), learner()
    first.fit(1)
    second.load_state_dict(first.state_dict())
    second.fit(2)
    assert (len(first.history), len(first.trace["loss"])) == (1, 4)
    assert (len(second.history), len(second.trace["loss"])) == (2, 8)


# --- loaders -------------------------------------------------------------------------------------
def test_plain_data_loader():
    x, y = (torch.cat(parts) for parts in zip(*pairs()))
    make = torch.utils.data.DataLoader
    data = torch.utils.data.TensorDataset(x, y)
    run = learner(train=make(data, batch_size=8, shuffle=True), valid=make(data, batch_size=10))
    history = run.fit(3)
    assert run.step == 12 and len(history) == 3
    assert history[-1]["accuracy"] == pytest.approx(accuracy(run.predict([(x, y)])[0], y).item())


def test_epochs_are_told_to_the_batches():
    told = []

    class Told(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    run = learner(train=Told(pairs()))
    run.fit(2)
    run.fit(3)
    assert told == [0, 1, 2]


# --- nothing waits for the device ----------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Refuse, while it is on, each operation that a graphics processor would have to be waited for."""

    WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2", "is_nonzero", "allclose"}

    def __init__(self, monkeypatch):
        super().__init__()
        self.on, self.steps = False, 0
        for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            self.forbid(monkeypatch, name, getattr(torch.Tensor, name))

    def forbid(self, monkeypatch, name, true):
        def waits(tensor, *args, **kwargs):
            assert not self.on, f"Tensor.{name} in a batch"
            return true(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, waits)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not (self.on and name in self.WAITS), f"{function} in a batch"
        self.steps += self.on and name in ("convolution", "addmm")
        return function(*args, **kwargs or {})


class Watched:
    """Batches that switch the watch on from the first batch until the loop has asked for one more than the last."""

    def __init__(self, inner, watch):
        self.inner, self.watch = inner, watch

    def __len__(self):
        return len(self.inner)

    def set_epoch(self, epoch):
        self.inner.set_epoch(epoch)

    def __iter__(self):
        self.watch.on = True
        yield from self.inner
        self.watch.on = False


@pytest.mark.parametrize("make", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"precision": "bf16", "channels_last": True}], ids=str)
def test_nothing_waits_in_an_epoch(make, options, monkeypatch):
    watch = Watch(monkeypatch)
    train, valid = Watched(batches(), watch), Watched(batches(12, shuffle=False), watch)
    run = learner(conv_net(), train, valid, make=OPTIMIZERS[make], schedules=one_cycle(0.1), callbacks=[Callback()], **options)
    with watch:
        run.fit(2)
        run.predict(valid)
    assert not watch.on and watch.steps >= 2 * (4 + 2) * 2, "the watch saw no training"


@pytest.mark.parametrize("call", [lambda x: x.item(), float, bool, lambda x: x.tolist(), lambda x: x.nonzero(),
                                  lambda x: print(f"{x:.2f}"), lambda x: [1, 2][x.long()], lambda x: x.numpy(), int])
def test_the_watch_sees(call, monkeypatch):
    watch = Watch(monkeypatch)

    def loss_fn(out, y):
        loss = F.cross_entropy(out, y)
        call(loss.detach() * 0)
        return loss

    run = learner(conv_net(), Watched(batches(), watch), loss_fn=loss_fn)
    with watch, pytest.raises(AssertionError, match="in a batch"):
        run.fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which can tell by itself")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_waits_on_a_graphics_processor(precision):
    class Strict:
        on = property(None, lambda self, on: torch.cuda.set_sync_debug_mode("error" if on else "default"))

    images = batches().images.to("cuda")
    train = Batches(images, 8, mean=(0.5,), std=(0.3,), shuffle=True, augment=pad_crop_flip)
    model = conv_net()
    run = Learner(model, Watched(train, Strict()), Watched(train, Strict()), AdamW(model.to("cuda").parameters()), device="cuda",
                  precision=precision, clip_norm=1.0, progress="silent")
    try:
        run.fit(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- progress ------------------------------------------------------------------------------------
def fit_here(kind, told):
    torch.set_num_threads(1)
    learner(valid=pairs((4,)), progress=kind).fit(2)
    sys.stdout.flush()
    with open(told, "w") as f:
        f.write("fastprogress" if any(n.startswith("fastprogress") for n in sys.modules) else "nothing")


@pytest.fixture
def terminal():
    """A pseudo-terminal's name, and a function that gives what was printed there so far."""
    master, slave = pty.openpty()
    text = []

    def read():
        try:
            while part := os.read(master, 4096):
                text.append(part)
        except OSError:                                                       # nobody has it open any more
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def close():
        nonlocal slave
        if slave is not None:
            os.close(slave)
            slave = None
            reader.join(10)
            os.close(master)
        return b"".join(text).decode()

    yield os.ttyname(slave), close
    close()


@pytest.mark.parametrize("kind, quiet, shows", [(None, None, "bar"), (None, "1", ""), ("bar", "1", "bar"), ("lines", None, "lines"),
                                                ("silent", None, "")])
def test_progress_on_a_terminal(kind, quiet, shows, terminal, tmp_path):
    name, close = terminal
    told = tmp_path / "told"
    with Child(fit_here, kind, str(told), env={"NBUTILS_NO_BAR": quiet, "TERM": "xterm", "COLUMNS": "100"}, tty=name) as child:
        code = child.wait()
    text = close()
    assert code == 0, text
    assert told.read_text() == ("fastprogress" if shows == "bar" else "nothing")
    if shows == "bar":
        assert "\r" in text.replace("\r\n", "") and "100.00%" in text and "8/8" in text, repr(text)
        assert "epoch 1/2: loss " in text, repr(text)
    elif shows == "lines":
        assert text.count("\n") == 2 and "epoch 2/2: loss " in text and "accuracy" in text
    else:
        assert text == ""


def fit_and_print():
    learner(valid=pairs((4,)), progress="bar").fit(2)
    print("what comes next")


def test_bar_at_its_end(terminal):
    """It shows the last epoch's figures, and what is printed next stands on a line of its own."""
    name, close = terminal
    with Child(fit_and_print, env={"TERM": "xterm", "COLUMNS": "100"}, tty=name) as child:
        code = child.wait()
    text = close()
    assert code == 0, text
    assert text.endswith("\nwhat comes next\r\n"), repr(text[-200:])
    assert "epoch 2/2: loss " in text, repr(text)


@pytest.mark.parametrize("kind, lines", [(None, 0), ("silent", 0), ("lines", 2)])
def test_progress_into_a_pipe(kind, lines, tmp_path):
    told = tmp_path / "told"
    with Child(fit_here, kind, str(told), env={"NBUTILS_NO_BAR": None}) as child:
        assert child.wait() == 0, child.err
        assert len(child.out.splitlines()) == lines
        assert "\r" not in child.out and child.err == ""
    assert told.read_text() == "nothing"


def fit_without_output():
    true, sys.stdout = sys.stdout, None
    learner(progress=None).fit(1)
    sys.stdout = true


def test_progress_without_an_output():
    """Under pythonw and some servers sys.stdout is None."""
    with Child(fit_without_output, env={"NBUTILS_NO_BAR": None}) as child:
        assert child.wait() == 0, child.err


def test_resumed_bar_starts_where_it_was(terminal, tmp_path):
    name, close = terminal
    with Child(resume_here, env={"NBUTILS_NO_BAR": None, "TERM": "xterm", "COLUMNS": "100"}, tty=name) as child:
        code = child.wait()
    text = close()
    assert code == 0, text
    assert "100.00%" in text and "8/8" in text


def resume_here():
    first, second = learner(progress="silent"), learner(progress="bar")
    first.fit(1)
    second.load_state_dict(first.state_dict())
    second.fit(2)
    second.fit(2)                                                             # nothing to do: no second bar


# --- test-time augmentation ----------------------------------------------------------------------
def test_tta_is_the_mean_of_the_probabilities():
    run = learner(conv_net(), batches())
    run.fit(1)
    plain, augmented = batches(20, shuffle=False, augment=None), batches(20, shuffle=False, seed=9)
    found, targets = tta(run, plain, augmented, views=4)
    run.model.eval()
    with torch.no_grad():
        x = torch.cat([x for x, _ in plain])
        total = F.softmax(run.model(x), 1)
        views = []
        for epoch in range(4):
            augmented.set_epoch(epoch)
            views.append(torch.cat([x for x, _ in augmented]))
            total = total + F.softmax(run.model(views[-1]), 1)
    torch.testing.assert_close(found, total / 5, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.sum(1), torch.ones(20))
    assert torch.equal(targets, plain.images.y)
    assert all(not torch.equal(a, b) for i, a in enumerate([x, *views]) for b in views[i:])
    assert torch.equal(tta(run, plain, augmented, views=4)[0], found)                     # the same again


def test_tta_of_no_views_is_the_plain_prediction():
    run = learner(conv_net(), batches())
    plain, augmented = batches(20, shuffle=False, augment=None), batches(20, shuffle=False)
    assert torch.equal(tta(run, plain, augmented, views=0)[0], run.predict(plain)[0].softmax(1))


def test_tta_refuses_what_does_not_fit():
    run = learner(conv_net(), batches())
    plain = batches(20, shuffle=False, augment=None)
    for other in (batches(20), batches(12, shuffle=False)):
        with pytest.raises(ValueError, match="plain and augmented batches differ in their targets"):
            tta(run, plain, other)
    with pytest.raises(ValueError, match="views is -1"):
        tta(run, plain, plain, views=-1)


# --- slips of a first program --------------------------------------------------------------------
def test_the_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="SGD holds no parameter of this model: make it from model.parameters"):
        Learner(net(), pairs(), None, SGD(net().parameters(), lr=0.1), device="cpu")
    model = net()
    Learner(model, pairs(), None, SGD(model[0].parameters(), lr=0.1), device="cpu")   # a part of it is enough


def test_a_regression_has_no_accuracy():
    data = [(x, x[:, :3]) for x, _ in pairs()]
    run = learner(train=data, valid=data, loss_fn=F.mse_loss)
    run.fit(1)
    assert run.history[0].keys() >= {"loss", "valid_loss"} and "accuracy" not in run.history[0]
    assert "accuracy" in learner(valid=pairs()).evaluate()
    shares = learner(train=data, valid=data, loss_fn=F.mse_loss, metrics={"error": F.l1_loss})
    assert "error" in shares.evaluate()


# --- what a first program gives -------------------------------------------------------------------
@pytest.mark.parametrize("epochs", [1.5, "1", -1, None, float("nan")])
def test_epochs_are_counted(epochs):
    net = nn.Linear(2, 2)
    learner = Learner(net, [(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))], None, torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")
    with pytest.raises(ValueError, match=rf"epochs is {re.escape(repr(epochs))}: give a whole number, 0 or more"):
        learner.fit(epochs)
    assert learner.epoch == 0 and learner.history == []


@pytest.mark.parametrize("schedules, text", [({"lr": 1e-3}, "schedules: 'lr' is 0.001: give a function of progress"),
                                             ([0.1], r"schedules is \[0.1\]: give a dict of a name to a function of progress")])
def test_schedules_are_functions(schedules, text):
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=text):
        Learner(net, [(torch.ones(1, 2), torch.zeros(1))], None, torch.optim.SGD(net.parameters(), lr=0.1), schedules=schedules)
