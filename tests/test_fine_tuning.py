"""Groups, frozen norms, rates, fresh states and schedules of fine-tuning, each against the recipe of 2018 or a loop by hand."""
import copy
import dataclasses
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbutils.amsgrad import AdamW
from nbutils.core import seed_everything
from nbutils.data import Batches, Images
from nbutils.experiment import Reseed
from nbutils.fine_tuning import FineTuneNet, Stage, Stages, fine_tune, pooled_head, resnet_groups, stage_schedules
from nbutils.fine_tuning import _check_groups
from nbutils.learner import Callback, Learner
from nbutils.pictures import load_folder
from nbutils.schedule import one_cycle

SIX = [Stage(3, 1e-2, frozen=2), Stage(3, 3e-3)]
DIVIDE = (9, 3, 1)


def body(widths=(4, 6)):
    """Two groups, each with a norm and with a module that only a frozen group's eval mode switches off."""
    groups, channels = [], 3
    for width in widths:
        groups.append(nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1)))
        channels = width
    return groups


def small_net(seed=0, classes=3):
    seed_everything(seed)
    net = FineTuneNet(*body(), pooled_head(6, classes, hidden=5))
    for m in net.modules():                          # statistics that a pretrained norm might have
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-1, 1)
            m.running_var.uniform_(0.5, 2)
    return net


def pictures(n=40, classes=3, side=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randint(256, (n, 3, side, side), generator=g)
    x[torch.arange(n), y] = (x[torch.arange(n), y] + 255) // 2
    return Images(x.to(torch.uint8), y, tuple("abc"[:classes]), "drawn")


def batches(n=40, size=10, seed=0):
    return Batches(pictures(n), size, shuffle=True, seed=seed, mean=(0.5,) * 3, std=(0.3,) * 3)


def make_learner(stages=SIX, seed=0, callbacks=(), train=None, **options):
    net, train = small_net(seed), train or batches()
    optimizer = AdamW(net.param_groups(DIVIDE), lr=1.0, betas=(0.95, 0.99), weight_decay=0.1)
    return Learner(net, train, train, optimizer, schedules=stage_schedules(stages, len(train), tail=0.1), device="cpu",
                   callbacks=[Reseed(5), Stages(stages), *callbacks], progress="silent", **options)


def bits(module):
    """A copy of all parameters and buffers."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(before, module):
    return [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=0, msg=lambda text, k=k: f"{k}: {text}")


# --- groups of a ResNet --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def resnet():
    return pytest.importorskip("torchvision.models.resnet")


def test_groups_of_resnet_50_are_the_recipes(resnet):
    with torch.device("meta"):
        whole = resnet.resnet50()
        net = resnet_groups(whole, 196)
    names = {id(p): name for name, p in whole.named_parameters()}
    first, second, head = ([names.get(id(p)) for p in g.parameters()] for g in net.groups)
    assert {name.split(".")[0] for name in first} == {"conv1", "bn1", "layer1", "layer2"}
    assert {name.split(".")[0] for name in second} == {"layer3", "layer4"}
    assert set(head) == {None}, "the head is new"
    assert {n for n in names.values() if not n.startswith("fc.")} == {*first, *second}
    assert len(set(first)) == len(first) and len(set(second)) == len(second)
    counts = [sum(p.numel() for p in g.parameters()) for g in net.groups]
    assert counts == [1_444_928, 22_063_104, 2_207_428]
    assert sum(counts[:2]) == 25_557_032 - (2048 * 1000 + 1000), "torchvision's count, less its last layer"
    assert [len(g["params"]) for g in net.param_groups(DIVIDE)] == [len(first), len(second), len(head)] == [72, 87, 8]


def test_a_cut_resnet_computes_what_the_whole_did(resnet):
    seed_everything(0)
    whole = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]).eval()
    net = resnet_groups(whole, 5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = net.groups[1](net.groups[0](x))
        torch.testing.assert_close(whole.fc(features.mean((2, 3))), whole(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(net(x), net.groups[2](features), rtol=0, atol=0)
    assert net(x).shape == (2, 5)


class Lookalike(nn.Module):
    def __init__(self, leave_out, fc):
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            if name not in leave_out:
                setattr(self, name, nn.Identity())
        self.fc = fc


@pytest.mark.parametrize("net, message", [
    (nn.Sequential(nn.Linear(2, 2)), "Sequential has no conv1, bn1, .*cut it by hand into FineTuneNet"),
    (Lookalike(["layer3"], nn.Linear(4, 2)), "Lookalike has no layer3: it is no ResNet"),
    (Lookalike([], nn.Identity()), "fc is a Identity, not its linear layer"),
], ids=["no ResNet", "a part lacks", "no fc"])
def test_a_net_that_is_no_resnet_is_refused(net, message):
    with pytest.raises(TypeError, match=message):
        resnet_groups(net, 3)


# --- the head ------------------------------------------------------------------------------------
def test_layers_of_the_head_are_the_recipes():
    seed_everything(0)
    head = pooled_head(2048, 196)
    _, bn1, drop1, linear1, relu, bn2, drop2, linear2 = head
    assert [type(m) for m in head[1:]] == [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert (bn1.num_features, bn2.num_features) == (4096, 512)
    assert (drop1.p, drop2.p) == (0.25, 0.5)
    assert (linear1.in_features, linear1.out_features, linear2.in_features, linear2.out_features) == (4096, 512, 512, 196)
    for linear in (linear1, linear2):
        assert not linear.bias.any()
        scaled = linear.weight.detach() * (linear.in_features / 2) ** 0.5      # kaiming: N(0, 2 / fan_in)
        assert abs(scaled.std() - 1) < 0.02 and abs(scaled.mean()) < 0.02
        assert 2.5 < (scaled**4).mean() < 3.5, "normal: the fourth moment of a uniform one is 1.8"
    for bn in (bn1, bn2):
        assert bool((bn.weight == 1).all()) and not bn.bias.any()
    assert head(torch.randn(2, 2048, 3, 2)).shape == (2, 196)


def test_the_largest_value_comes_first_then_the_mean():
    x = torch.randn(3, 4, 5, 2)
    by_hand = torch.cat([F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)], 1).flatten(1)
    torch.testing.assert_close(pooled_head(4, 2)[0](x), by_hand)
    assert bool((by_hand[:, :4] > by_hand[:, 4:]).all())


@pytest.mark.parametrize("uniform", [False, True])
def test_the_heads_draws_come_in_one_order(uniform):
    """Runs of the past are compared by seed: torch's own draws of both layers, then ours from the first layer to the last."""
    seed_everything(3)
    head = pooled_head(4, 3, hidden=5, uniform_gain=uniform)
    seed_everything(3)
    first, second = nn.Linear(8, 5), nn.Linear(5, 3)
    gains = torch.ones(8), torch.ones(5)
    with torch.no_grad():
        for gain, layer in zip(gains, (first, second)):
            if uniform:
                gain.uniform_()
            layer.weight.normal_(0, (2 / layer.in_features) ** 0.5)
    assert torch.equal(head[1].weight, gains[0]) and torch.equal(head[5].weight, gains[1])
    assert torch.equal(head[3].weight, first.weight) and torch.equal(head[7].weight, second.weight)


def test_gains_of_2018_are_uniform():
    seed_everything(0)
    gains = pooled_head(2048, 9, uniform_gain=True)[1].weight
    assert 0 <= gains.min() and gains.max() <= 1 and abs(gains.mean() - 0.5) < 0.02 and abs(gains.var() - 1 / 12) < 0.01


# --- frozen groups -------------------------------------------------------------------------------
def steps(net, n=3, optimizer=None, stream=None):
    optimizer = optimizer or AdamW(net.param_groups(DIVIDE), lr=0.1, weight_decay=0.5)
    stream = iter(stream or batches())
    for _ in range(n):
        x, y = next(stream)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_groups_have_no_gradient_and_do_not_move(frozen):
    net = small_net()
    net.freeze(frozen)
    net.train()
    before = [bits(g) for g in net.groups]
    x, y = next(iter(batches()))
    F.cross_entropy(net(x), y).backward()
    for i, g in enumerate(net.groups):
        assert all(p.requires_grad is (i >= frozen) and (p.grad is None) is (i < frozen) for p in g.parameters())
    steps(net)
    for i, (g, old) in enumerate(zip(net.groups, before)):
        here = moved(old, g)
        assert here == [] if i < frozen else set(here) == set(old), "weights, running statistics, counts of batches"


def test_thawed_later_they_move():
    net = small_net()
    net.train()
    net.freeze(2)
    optimizer = steps(net)
    before = bits(net.groups[0])
    net.freeze(1)
    middle = bits(net.groups[1])
    steps(net, optimizer=optimizer)
    assert moved(before, net.groups[0]) == [] and set(moved(middle, net.groups[1])) == set(middle)
    net.freeze(0)
    steps(net, optimizer=optimizer)
    assert set(moved(before, net.groups[0])) == set(before)
    assert all(m.training for m in net.modules())


def test_frozen_again_they_stand_still():
    """With gradients, momentum and decay at hand when they are frozen."""
    net = small_net()
    net.train()
    optimizer = steps(net)
    x, y = next(iter(batches()))
    F.cross_entropy(net(x), y).backward()
    net.freeze(2)
    before = bits(net)
    optimizer.step()
    steps(net, optimizer=optimizer)
    assert moved(before, net) and all(k.startswith("groups.2.") for k in moved(before, net))


@pytest.mark.parametrize("call", ["train", "eval", "train(False)", "train after eval", "apply"])
def test_modes_set_from_outside_leave_the_frozen_in_eval_mode(call):
    net = small_net()
    net.train()
    net.freeze(1)
    outer = nn.Sequential(net)                           # a wrapper sets the mode of its parts by train()
    mode = {"train": lambda: net.train(), "eval": lambda: net.eval(), "train(False)": lambda: net.train(False),
            "train after eval": lambda: outer.eval().train(), "apply": lambda: outer.train()}[call]
    mode()
    trains = call not in ("eval", "train(False)")
    assert not any(m.training for m in net.groups[0].modules())
    assert all(m.training is trains for g in net.groups[1:] for m in g.modules()) and net.training is trains
    assert net.train() is net and net.eval() is net


def test_freezing_keeps_the_mode_of_the_rest():
    net = small_net().eval()
    net.freeze(1)
    assert not any(m.training for m in net.modules())
    net.train()
    net.freeze(2)
    assert [g.training for g in net.groups] == [False, False, True]
    net.freeze(0)
    assert [g.training for g in net.groups] == [True, True, True]


def test_a_frozen_body_sees_each_picture_by_itself():
    net = small_net()
    net.train()
    net.freeze(2)
    x = torch.randn(6, 3, 12, 12)
    alone = torch.cat([net.groups[1](net.groups[0](one[None])) for one in x])
    torch.testing.assert_close(net.groups[1](net.groups[0](x)), alone)


class Watch(Callback):
    """What a fit did, epoch by epoch: modes, states of the optimizer and rates at each step, weights after each epoch."""

    def __init__(self):
        self.epochs, self.counts, self.rates, self.betas, self.firsts = [], [], [], [], []

    def before_step(self, learner):
        assert [g.training for g in learner.model.groups] == [i >= learner.model.frozen for i in range(3)]
        self.rates.append([g["lr"] for g in learner.optimizer.param_groups])
        self.betas.append([g["betas"] for g in learner.optimizer.param_groups])
        self.grads = {k: p.grad.clone() for k, p in learner.model.named_parameters() if p.grad is not None}

    def after_step(self, learner):
        state = learner.optimizer.state
        named = dict(learner.model.named_parameters())
        self.counts.append({k: int(state[p]["step"]) for k, p in named.items() if p in state})
        if set(self.counts[-1].values()) == {1}:
            self.firsts.append({k: (state[p]["exp_avg"].clone(), self.grads[k]) for k, p in named.items() if p in state})

    def after_epoch(self, learner):
        self.epochs.append(bits(learner.model))


@pytest.fixture(scope="module")
def watched():
    watch = Watch()
    learner = make_learner(callbacks=[watch])
    before = bits(learner.model)
    learner.fit(6)
    return watch, before, learner


def test_a_fit_leaves_the_body_alone_until_it_is_thawed(watched):
    """Each epoch ends with an evaluation, which puts the net into eval mode and back."""
    watch, before, _ = watched
    for epoch, after in enumerate(watch.epochs, 1):
        ours = {k for k in before if k.startswith(("groups.0.", "groups.1."))}
        still = {k for k in ours if torch.equal(after[k], before[k])}
        assert still == (ours if epoch <= 3 else set()), f"epoch {epoch}"
        assert not any(torch.equal(after[k], before[k]) for k in before if k.startswith("groups.2."))


# --- rates ---------------------------------------------------------------------------------------
def test_each_groups_rate_is_the_scheduled_one_divided(watched):
    watch, _, _ = watched
    cycles = [one_cycle(s.lr, steps=s.epochs * 4, tail=0.1) for s in SIX]
    lrs = [c["lr"](k / 12) for c in cycles for k in range(12)]
    betas = [c["momentum"](k / 12) for c in cycles for k in range(12)]
    assert len(watch.rates) == 24
    for step, (lr, beta) in enumerate(zip(lrs, betas)):
        assert watch.rates[step] == pytest.approx([lr / 9, lr / 3, lr], rel=1e-14), step
        assert watch.betas[step] == [(beta, 0.99)] * 3, step


def test_a_first_step_of_adam_is_as_long_as_the_rate():
    """Without decay each weight moves by the rate of its group, whatever its gradient."""
    net = small_net().double()
    net.eval()                                           # no dropout
    before = copy.deepcopy(net)
    optimizer = AdamW(net.param_groups((9, 3, 1)), lr=1.0, weight_decay=0.0, eps=1e-30)
    for group in optimizer.param_groups:
        group["lr"] = 0.09 * group["lr_scale"]
    steps(net, 1, optimizer, [(torch.randn(9, 3, 12, 12).double(), torch.arange(9) % 3)])
    for old, new, lr in zip(before.groups, net.groups, (0.01, 0.03, 0.09)):
        lengths = torch.cat([(p - q).abs().flatten() for p, q in zip(new.parameters(), old.parameters())])
        lengths = lengths[lengths > 0]                   # a dead ReLU has no gradient
        torch.testing.assert_close(lengths, torch.full_like(lengths, lr), rtol=1e-9, atol=0)


def test_a_group_without_parameters_is_left_out():
    net = FineTuneNet(nn.ReLU(), nn.Linear(2, 2))
    groups = net.param_groups((2, 1))
    assert [(len(g["params"]), g["lr_scale"]) for g in groups] == [(2, 1.0)]


@pytest.mark.parametrize("divide", [(1,), (9, 3), (9, 3, 1, 1), (9, 0, 1), (9, -3, 1), (9, math.nan, 1), ()])
def test_wrong_divisors_are_refused(divide):
    with pytest.raises(ValueError, match=r"divide is .*: the net has 3 groups, each needs one positive number"):
        small_net().param_groups(divide)


def test_a_parameter_in_two_groups_is_refused():
    shared = nn.Linear(3, 3)
    net = FineTuneNet(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"the groups repeat 2 of 4 parameters: groups.0.0.weight, groups.0.0.bias"):
        net.param_groups((3, 1))
    tied = FineTuneNet(nn.Linear(3, 3), nn.Linear(3, 3))
    tied.groups[1].weight = tied.groups[0].weight
    with pytest.raises(ValueError, match=r"repeat 1 of 3 parameters: groups.0.weight"):
        tied.param_groups((3, 1))


def test_a_parameter_that_is_used_twice_in_one_group_is_fine():
    layer = nn.Linear(3, 3)
    net = FineTuneNet(nn.Sequential(layer, nn.ReLU(), layer), nn.Linear(3, 2))
    assert [len(g["params"]) for g in net.param_groups((3, 1))] == [2, 2]


def test_a_parameter_in_no_group_is_refused():
    net = small_net()
    net.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"the groups miss 1 of 15 parameters: scale$"):
        net.param_groups(DIVIDE)
    net.more = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"miss 5 of 19 parameters: scale, more.0.weight, more.0.bias, …"):
        net.param_groups(DIVIDE)


def test_a_strangers_parameter_is_refused():
    net = small_net()
    with pytest.raises(ValueError, match=r"a parameter of shape \[7\] is not the net's"):
        _check_groups(net, [list(net.parameters()), [nn.Parameter(torch.ones(7))]])


@pytest.mark.parametrize("groups", [-1, 3, 4])
def test_freezing_too_much_is_refused(groups):
    net = small_net()
    net.freeze(1)
    with pytest.raises(ValueError, match=f"cannot freeze {groups} of 3 groups: give a number from 0 to 2"):
        net.freeze(groups)
    assert net.frozen == 1 and [all(p.requires_grad for p in g.parameters()) for g in net.groups] == [False, True, True]


# --- stages --------------------------------------------------------------------------------------
def test_the_state_starts_afresh_with_each_stage(watched):
    """Counted by the optimizer itself, and by what the first averages hold."""
    watch, _, _ = watched
    for step, counts in enumerate(watch.counts):
        assert set(counts.values()) == {step % 12 + 1}, f"step {step}"
        assert len(counts) == (8 if step < 12 else 14), "the head, then all"
    assert [len(first) for first in watch.firsts] == [8, 14]
    for first in watch.firsts:
        for average, gradient in first.values():
            torch.testing.assert_close(average, 0.05 * gradient)


def test_a_used_optimizer_starts_afresh_too():
    watch = Watch()
    learner = make_learner(callbacks=[watch])
    steps(learner.model, optimizer=learner.optimizer)
    learner.fit(6)
    assert set(watch.counts[0].values()) == {1}


def by_hand(stages, divide=DIVIDE, seed=0):
    """The same training written out: for each stage an optimizer of its own, over what is not frozen."""
    net, train = small_net(seed), batches()
    epoch = 0
    for stage in stages:
        for i, group in enumerate(net.groups):
            group.requires_grad_(i >= stage.frozen)
        live = list(zip(net.groups, divide))[stage.frozen:]
        optimizer = AdamW([{"params": list(g.parameters())} for g, _ in live], lr=1.0, betas=(0.95, 0.99), weight_decay=0.1)
        cycle, step = one_cycle(stage.lr, steps=stage.epochs * len(train), tail=0.1), 0
        for _ in range(stage.epochs):
            seed_everything((1 + 5) * 1_000_003 + epoch)
            train.set_epoch(epoch)
            for x, y in train:
                for i, group in enumerate(net.groups):
                    nn.Module.train(group, i >= stage.frozen)
                done = step / (stage.epochs * len(train))
                for group, (_, d) in zip(optimizer.param_groups, live):
                    group["lr"], group["betas"] = cycle["lr"](done) * (1 / d), (cycle["momentum"](done), 0.99)
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
            epoch += 1
    return bits(net)


@pytest.mark.parametrize("stages", [SIX, [Stage(2, 1e-2, 2), Stage(1, 5e-3, 1), Stage(2, 3e-3)], [Stage(2, 1e-2)],
                                    [Stage(2, 1e-2), Stage(2, 1e-2)]], ids=["2018", "three", "one", "restart"])
def test_stages_are_fits_one_after_the_other(stages):
    learner = make_learner(stages)
    learner.fit(sum(s.epochs for s in stages))
    same(bits(learner.model), by_hand(stages))


class Stop(Exception):
    pass


class StopAfter(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def after_epoch(self, learner):
        if learner.epoch == self.epoch:
            raise Stop


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_a_break_anywhere_changes_nothing(cut, watched):
    """Inside the first stage, at the border, inside the second, at the end: through a file, into a Learner of another seed."""
    _, _, whole = watched
    learner, file = make_learner(callbacks=[StopAfter(cut)]), io.BytesIO()
    with pytest.raises(Stop):
        learner.fit(6)
    torch.save(learner.state_dict(), file)
    file.seek(0)
    again = make_learner(seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.fit(6)
    same(bits(again.model), bits(whole.model))
    assert again.trace == whole.trace
    assert [r["valid_loss"] for r in again.history] == [r["valid_loss"] for r in whole.history]
    states = [[{k: v for k, v in lr.optimizer.state[p].items()} for p in lr.model.parameters()] for lr in (again, whole)]
    for a, b in zip(*states):
        assert int(a.pop("step")) == int(b.pop("step")) == 12
        same(a, b)
    assert again.model.frozen == 0 and again.model.training


def test_a_break_amid_an_epoch_repeats_it(watched):
    """Ctrl-C in the fifth epoch, then fit again in the same process from the last state."""
    _, _, whole = watched

    class Interrupt(Callback):
        def after_step(self, learner):
            if learner.step == 18:
                raise KeyboardInterrupt

    class Keep(Callback):
        def after_epoch(self, learner):
            self.state = copy.deepcopy(learner.state_dict())

    keep = Keep()
    learner = make_learner(callbacks=[keep, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        learner.fit(6)
    learner = make_learner()
    learner.load_state_dict(keep.state)
    learner.fit(6)
    same(bits(learner.model), bits(whole.model))


@pytest.mark.parametrize("epochs", [1, 5, 7, 12])
def test_another_number_of_epochs_is_refused(epochs):
    learner = make_learner()
    learner.schedules = {}                               # the schedules would be the first to notice
    before = bits(learner.model)
    with pytest.raises(ValueError, match=rf"the stages have 6 epochs in all, and this fit {epochs}: call fit\(6\)"):
        learner.fit(epochs)
    assert moved(before, learner.model) == []
    with pytest.raises(ValueError, match="24"):
        make_learner().fit(epochs)


@pytest.mark.parametrize("frozen", [3, -1])
def test_a_stage_that_freezes_too_much_is_refused_before_the_first_epoch(frozen):
    learner = make_learner([Stage(1, 1e-2, 2), Stage(1, 1e-3, frozen)])
    before = bits(learner.model)
    with pytest.raises(ValueError, match=f"cannot freeze {frozen} of 3 groups"):
        learner.fit(2)
    assert learner.step == 0 and moved(before, learner.model) == []


@pytest.mark.parametrize("settings", [(0, 1e-2), (-1, 1e-2), (1.5, 1e-2), (3, 0.0), (3, -1e-2), (3, math.nan)])
def test_a_stage_needs_an_epoch_and_a_rate(settings):
    with pytest.raises(ValueError, match="give one epoch or more and a positive rate"):
        Stage(*settings)
    assert dataclasses.astuple(Stage(2, 0.5)) == (2, 0.5, 0)


# --- schedules -----------------------------------------------------------------------------------
CARS = [Stage(20, 1e-2, frozen=2), Stage(40, 3e-3)]


@pytest.mark.parametrize("stage, lengths, total, last, begin, end", [
    (0, [576, 576, 128], 6.4011, 1.773437e-5, 0, 1280),
    (1, [1152, 1152, 256], 3.8405, 4.160156e-6, 1280, 3840)], ids=["head", "whole net"])
def test_schedules_are_those_of_2018(stage, lengths, total, last, begin, end):
    schedules = stage_schedules(CARS, 64, momentum=(0.95, 0.85), tail=0.1)
    assert schedules["lr"].steps == schedules["momentum"].steps == 3840
    lrs = [schedules["lr"](k / 3840) for k in range(begin, end)]
    betas = [schedules["momentum"](k / 3840) for k in range(begin, end)]
    assert sum(lrs) == pytest.approx(total, abs=5e-5)
    assert lrs[-1] == pytest.approx(last, abs=1e-11)
    peak, tail = lengths[0], lengths[0] + lengths[1]
    assert lrs.index(max(lrs)) == peak and lrs[peak] == pytest.approx(CARS[stage].lr)
    assert lrs[0] == pytest.approx(CARS[stage].lr / 10) == lrs[tail]
    assert (betas[0], betas[peak], betas[tail], betas[-1]) == pytest.approx((0.95, 0.85, 0.95, 0.95))
    assert schedules["lr"].parts[stage].lengths == schedules["momentum"].parts[stage].lengths == lengths


@pytest.mark.parametrize("stages, n", [(CARS, 64), ([Stage(1, 1.0), Stage(1, 2.0), Stage(1, 3.0)], 7),
                                       ([Stage(3, 1e-2), Stage(7, 1e-3)], 13),
                                       ([Stage(6, 1e-2), Stage(5, 1e-3)], 5)], ids=["2018", "three", "odd", "30 / 55 * 55 < 30"])
def test_each_step_is_its_own_stages(stages, n):
    """No step of a stage is missed, doubled or taken for another's, though progress * steps may fall short of a whole number."""
    schedules = stage_schedules(stages, n, tail=0.1)
    steps = sum(s.epochs for s in stages) * n
    for name, schedule in schedules.items():
        alone = [one_cycle(s.lr, steps=s.epochs * n, tail=0.1)[name] for s in stages]
        expected = [part(k / part.steps) for part in alone for k in range(part.steps)]
        assert [schedule(k / steps) for k in range(steps)] == expected


def test_the_joint():
    """The rate falls to the end of one cycle and starts anew at a tenth of the next peak; the momentum goes on."""
    schedules = stage_schedules(CARS, 64, tail=0.1)
    lr, beta = ([schedules[name](k / 3840) for k in (1279, 1280)] for name in ("lr", "momentum"))
    assert lr == pytest.approx([1.773437e-5, 3e-4]) and beta == pytest.approx([0.95, 0.95])
    for joint in (1280 - 1e-3, 1280 + 1e-3):              # between whole steps too
        assert schedules["momentum"](joint / 3840) == pytest.approx(0.95)
    assert schedules["lr"](1.0) == pytest.approx(3e-6) and schedules["lr"]((1280 - 1e-3) / 3840) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("progress", [-0.1, 1.1])
def test_no_progress_outside_of_the_run(progress):
    with pytest.raises(ValueError, match="progress"):
        stage_schedules(SIX, 4)["lr"](progress)


# --- a last batch of one -------------------------------------------------------------------------
def test_a_batch_of_one_picture_stops_a_plain_fit():
    """The head's norms need two pictures; a Learner with batches of one's own says so in torch's words."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make_learner(train=batches(41)).fit(6)


@pytest.mark.parametrize("n, expected", [(31, 3), (32, 4), (33, 4), (30, 3)])
def test_fine_tune_leaves_out_a_last_batch_of_one(n, expected):
    learner = fine_tune(small_net(), pictures(n), pictures(6), epochs=(1, 2), size=12, batch_size=10, progress="silent")
    assert len(learner.train) == expected
    assert len(learner.fit(3)) == 3
    assert sum(len(y) for _, y in learner.train) == (30 if n == 31 else n)


# --- fine_tune -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures in folders of three classes: a stripe that lies, stands, or leans, in noise."""
    from PIL import Image

    root, g = tmp_path_factory.mktemp("pictures") / "stripes", torch.Generator().manual_seed(0)
    row, col = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    for name, place in {"leans": row + col, "lies": row, "stands": col}.items():
        (root / name).mkdir(parents=True)
        for i in range(30):
            x = 128 + 70 * torch.sin(place * 0.8 + 6 * torch.rand(1, generator=g)) + 20 * torch.randn(28, 28, generator=g)
            pixels = x.clamp(0, 255).to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


def tuned(folder, callbacks=(), **options):
    train, valid = load_folder(folder, side=24)
    seed_everything(0)
    net = FineTuneNet(*body((8, 16)), pooled_head(16, len(train.classes), hidden=16))
    return fine_tune(net, train, valid, epochs=(2, 6), lr=(1e-2, 1e-2), size=20, batch_size=12, progress="silent",
                     callbacks=[Reseed(0), *callbacks], **options)


def test_fine_tune_end_to_end(folder):
    watch = Watch()
    learner = tuned(folder, [watch])
    assert len(learner.train) == 6 and learner.schedules["lr"].steps == 48
    history = learner.fit(8)
    assert len(history) == 8 and history[-1]["accuracy"] > 0.8 > history[1]["accuracy"]
    first = {k for k in watch.epochs[0] if torch.equal(watch.epochs[0][k], watch.epochs[1][k])}
    assert first == {k for k in watch.epochs[0] if not k.startswith("groups.2.")}
    assert watch.rates[0] == pytest.approx([1e-3 / 9, 1e-3 / 3, 1e-3])
    assert [set(c.values()) for c in watch.counts[11:13]] == [{12}, {1}]


def test_fine_tune_twice_gives_the_same(folder):
    a, b = tuned(folder), tuned(folder)
    a.fit(8)
    b.fit(8)
    same(bits(a.model), bits(b.model))


def test_fine_tune_takes_the_learners_options(folder):
    learner = tuned(folder, clip_norm=0.5, metrics={}, weight_decay=0.25, divide=(4, 2, 1))
    assert learner.clip_norm == 0.5 and learner.metrics == {}
    assert [g["lr_scale"] for g in learner.optimizer.param_groups] == [0.25, 0.5, 1.0]
    assert {g["weight_decay"] for g in learner.optimizer.param_groups} == {0.25}
    assert [s.frozen for s in next(c for c in learner.callbacks if isinstance(c, Stages)).stages] == [2, 0]


def test_fine_tune_is_the_recipe(folder):
    learner = tuned(folder, seed=4)
    train, valid = learner.train, learner.valid
    assert (train.batch_size, train.seed, train.shuffle) == (12, 4, True) and not valid.shuffle
    assert (train.augment.size, train.augment.train, valid.augment.size, valid.augment.train) == (20, True, 20, False)
    (stages,) = [c.stages for c in learner.callbacks if isinstance(c, Stages)]
    assert [dataclasses.astuple(s) for s in stages] == [(2, 1e-2, 2), (6, 1e-2, 0)]
    expected = stage_schedules(stages, 6, tail=0.1, momentum=(0.95, 0.85))
    for name, schedule in learner.schedules.items():
        assert [schedule(k / 48) for k in range(49)] == [expected[name](k / 48) for k in range(49)]
    x, y = pictures(8), pictures(4)
    other = fine_tune(small_net(), x, y, epochs=(1, 2), lr=(0.5, 0.25), batch_size=2)
    assert [(s.epochs, s.lr) for s in other.callbacks[0].stages] == [(1, 0.5), (2, 0.25)]


def test_fine_tune_cuts_a_resnet(folder, resnet):
    train, valid = load_folder(folder, side=24)
    seed_everything(0)
    learner = fine_tune(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), train, valid, epochs=(1, 1), size=20, batch_size=24,
                        progress="silent")
    assert [len(g["params"]) for g in learner.optimizer.param_groups] == [18, 18, 8]
    assert learner.model.groups[2][7].out_features == 3
    assert len(learner.fit(2)) == 2


# --- what a stranger gets wrong ----------------------------------------------------------------------
@pytest.mark.parametrize("wrong, error, said", [
    ({"epochs": 3}, ValueError, "epochs 3, .* give a pair of each for the two stages"),
    ({"epochs": (1, 2, 3)}, ValueError, "give a pair of each for the two stages"),
    ({"lr": 1e-2}, ValueError, "lr 0.01, .* give a pair of each"),
    ({"batch_size": 1}, ValueError, "batch_size 1: .* batches of 2 or more"),
    ({"batch_size": 0}, ValueError, "batch_size 0: .* batches of 2 or more"),
    ({"schedules": {}, "channels_last": True}, TypeError, "fine_tune sets channels_last and schedules itself")])
def test_wrong_calls_of_fine_tune_name_the_setting(wrong, error, said):
    train = pictures()
    with pytest.raises(error, match=said):
        fine_tune(small_net(), train, train, size=12, **wrong)


def test_stages_need_a_net_that_can_be_frozen():
    train, net = batches(), nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    net(next(iter(train))[0])
    learner = Learner(net, train, None, AdamW(net.parameters(), lr=1e-3), callbacks=[Stages([Stage(1, 1e-3)])],
                      device="cpu", progress="silent")
    with pytest.raises(TypeError, match=r"Stages cannot freeze a Sequential: cut it into FineTuneNet"):
        learner.fit(1)


def test_no_stage_and_no_group_are_refused():
    with pytest.raises(ValueError, match="there is no stage"):
        Stages([])
    with pytest.raises(ValueError, match="the net has no group"):
        FineTuneNet()
