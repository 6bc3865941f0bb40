"""Schedules: the runs of 2018 to the batch, bad input, and a range test that leaves no trace."""
import itertools
import math
import pickle
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nbutils.amsgrad import AdamW
from nbutils.data import Batches, load_digits
from nbutils.learner import Learner
from nbutils.momentum import SGD
from nbutils.schedule import (RangeTest, constant, cosine, lr_range_test, one_cycle,
                              one_cycle_held, phases, plot_schedules, step_decay, values)

# What the library of 2018 gave: batches, schedules, phase lengths, sum of lr, last lr.
RUNS = {
    "cifar10-30": (30 * 391, lambda n: one_cycle(3e-3, steps=n),
                   [5426, 5425, 879], "18.0389", 3.590793e-6),
    "cifar10-18": (18 * 391, lambda n: one_cycle(3e-3, steps=n),
                   [3256, 3255, 527], "10.8246", 4.040921e-6),
    "cars-head": (20 * 64, lambda n: one_cycle(1e-2, tail=0.1, steps=n),
                  [576, 576, 128], "6.4011", 1.773437e-5),
    "cars-whole": (40 * 64, lambda n: one_cycle(3e-3, tail=0.1, steps=n),
                   [1152, 1152, 256], "3.8405", 4.160156e-6),
    "language-models": (90 * 297, lambda n: one_cycle_held(5e-3, steps=n),
                        [2228, 11137, 11138, 2227], "92.9986", 5.5944e-10),
}
each_run = pytest.mark.parametrize("name", RUNS)


def by_the_batch(parts, steps):
    """The rule of 2018 as a loop over batches, written apart from `Phases`."""
    found, phase, k, end_of_phase = [], 0, 0, parts[0][0] * steps
    for batch in range(steps):
        while batch >= end_of_phase - 1e-6:
            phase, k = phase + 1, 0
            end_of_phase += parts[phase][0] * steps
        fraction, start, end, shape = parts[phase]
        share = k / (fraction * steps)
        share = (1 - math.cos(math.pi * share)) / 2 if shape == "cosine" else share
        found.append(start + share * (end - start))
        k += 1
    return found


@each_run
def test_a_run_of_2018_is_met_to_the_digit(name):
    steps, make, lengths, total, last = RUNS[name]
    cycle = make(steps)
    rates = values(cycle["lr"], steps)
    assert cycle["lr"].lengths == cycle["momentum"].lengths == lengths
    assert f"{math.fsum(rates):.4f}" == total
    assert rates[-1] == pytest.approx(last, rel=1e-5 if last < 1e-8 else 5e-7)
    for schedule in cycle.values():
        assert values(schedule, steps) == pytest.approx(by_the_batch(schedule.parts, steps),
                                                        rel=1e-9)


@each_run
def test_the_pieces_are_monotonic_and_meet_their_corners(name):
    steps, make, lengths, *_ = RUNS[name]
    corners = [0, *itertools.accumulate(lengths)]
    for schedule in make(steps).values():
        found = values(schedule, steps)
        for (_, start, end, _), a, b in zip(schedule.parts, corners, corners[1:]):
            piece = found[a:b]
            assert piece[0] == start, "a phase begins exactly at its start value"
            assert sorted(piece, reverse=end < start) == piece
            assert min(start, end) <= min(piece) and max(piece) <= max(start, end)
    cycle = make(steps)
    assert max(values(cycle["lr"], steps)) == cycle["lr"].parts[0][2]


@each_run
def test_whole_batches_are_less_than_one_batch_late(name):
    steps, make, *_ = RUNS[name]
    for stepped, smooth in zip(make(steps).values(), make(None).values()):
        slope = max(abs(end - start) / fraction for fraction, start, end, _ in smooth.parts)
        slope *= math.pi / 2 / steps                      # the steepest of a cosine, a batch
        assert values(stepped, steps) == pytest.approx(values(smooth, steps), abs=slope)


def test_the_continuous_cycle_hits_its_values():
    cycle = one_cycle(1.0)
    corners = {0.0: (0.1, 0.95), 0.4625: (1.0, 0.85), 0.925: (0.1, 0.95), 1.0: (0.001, 0.95)}
    for t, (lr, momentum) in corners.items():
        assert cycle["lr"](t) == pytest.approx(lr, rel=1e-9)
        assert cycle["momentum"](t) == pytest.approx(momentum)
    held = one_cycle_held(1.0)
    assert [held["lr"](t) for t in (0.2, 0.3, 0.49)] == [1.0, 1.0, 1.0]
    assert held["lr"](1.0) == 0.0 and held["momentum"](0.3) == 0.7


@pytest.mark.parametrize("steps", [3, 7, 13, 100, 1001, 26_731])
def test_no_batch_is_lost_to_rounding(steps):
    schedule = phases((1 / 3, 0.0, 1.0), (1 / 3, 1.0, 0.5, "cosine"), (1 / 3, 0.5, 0.0), steps=steps)
    assert sum(schedule.lengths) == steps
    assert values(schedule, steps) == pytest.approx(by_the_batch(schedule.parts, steps), abs=1e-9)
    assert 0.0 <= schedule(1.0) <= 1.0


def test_a_phase_may_be_left_out_or_get_no_batch():
    assert phases((0.5, 0, 1), (0, 5, 5), (0.5, 1, 0)).lengths == [0.5, 0.5]
    assert one_cycle(1.0, tail=0)["lr"](1.0) == pytest.approx(0.1)
    short = one_cycle(1.0, steps=5)["lr"]                 # 0.075 * 5 is less than a batch
    assert short.lengths == [3, 2, 0] and len(values(short, 5)) == 5 and short(1.0) == 0.1


def test_the_simple_schedules():
    assert values(constant(0.3), 4) == [0.3] * 4
    assert [cosine(2.0, end=1.0)(t) for t in (0, 0.5, 1)] == pytest.approx([2.0, 1.5, 1.0])
    steps = step_decay(1.0, at=(0.5, 0.75), factor=0.1)
    assert [steps(t) for t in (0, 0.49, 0.5, 0.74, 0.75, 1)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01])
    assert step_decay(1.0, at=(0.5,), steps=5).lengths == [3, 2]


def test_a_schedule_survives_pickling_and_says_what_it_is():
    schedule = one_cycle(3e-3, steps=100)["lr"]
    again = pickle.loads(pickle.dumps(schedule))
    assert values(again, 100) == values(schedule, 100)
    assert "0.4625" in repr(schedule) and "steps=100" in repr(schedule)


def test_torch_differs_by_its_way_of_counting_only():
    steps, lr = 1000, 1.0
    p = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.4625, three_phase=True,
        anneal_strategy="linear", div_factor=10, final_div_factor=100)
    rates, momenta = [], []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    cycle = one_cycle(lr, steps=steps)
    assert values(cycle["lr"], steps) == pytest.approx(rates, abs=5e-3)
    assert values(cycle["momentum"], steps) == pytest.approx(momenta, abs=1e-3)
    assert rates[-1] == pytest.approx(0.001) and values(cycle["lr"], steps)[-1] > 0.0015


@pytest.mark.parametrize("slip, words", [
    (lambda: phases(), "0 phases sum to 0"),
    (lambda: phases((0.4, 0, 1), (0.5, 1, 0)), "sum to 0.9, not to 1"),
    (lambda: phases((1 + 1e-8, 0, 1)), "sum to 1.00000001"),
    (lambda: phases((1.5, 0, 1), (-0.5, 1, 0)), "fraction of phase 2 is -0.5"),
    (lambda: phases((1, 0)), r"phase 1 is \(1, 0\)"),
    (lambda: phases(1.0), "phase 1 is 1.0"),
    (lambda: phases((1, 0, 1, "cosin")), "Did you mean cosine"),
    (lambda: phases((1, 0, math.inf)), "the end of phase 1 is inf"),
    (lambda: phases((1, "a", 1)), "the start of phase 1 is 'a'"),
    (lambda: phases((0.5, 0, 1), (0.5, 1, 0), steps=1), "2 phases need"),
    (lambda: phases((1, 0, 1), steps=10.5), "steps is 10.5"),
    (lambda: phases((1, 0, 1), steps=0), "steps is 0"),
    (lambda: one_cycle(-3e-3), "lr is -0.003"),
    (lambda: one_cycle(math.nan), "lr is nan"),
    (lambda: one_cycle(1, momentum=(1.0, 0.85)), "momentum is 1.0"),
    (lambda: one_cycle(1, momentum=(0.9, -0.1)), "momentum is -0.1"),
    (lambda: one_cycle(1, momentum=(0.85, 0.95)), "the highest first"),
    (lambda: one_cycle(1, momentum=0.9), "give a pair"),
    (lambda: one_cycle(1, div=0), "div is 0"),
    (lambda: one_cycle(1, final_div=0), "final_div is 0"),
    (lambda: one_cycle(1, hold=0.95), "for the way down"),
    (lambda: one_cycle(1, warm=0.95), "for the way down"),
    (lambda: one_cycle(1, warm=0), "for the way down"),
    (lambda: one_cycle(1, tail=-0.1), "tail is -0.1"),
    (lambda: one_cycle(1, tail_shape="Linear"), "unknown shape 'Linear'"),
    (lambda: one_cycle(1, steps=2), "3 phases need"),
    (lambda: one_cycle_held(1, steps=3), "4 phases need"),
    (lambda: cosine(-1), "lr is -1"),
    (lambda: step_decay(1, at=(0.7, 0.5)), "must rise"),
    (lambda: step_decay(1, at=(0.5, 1.5)), "inside"),
    (lambda: constant(1)(1.01), "progress is 1.01"),
    (lambda: constant(1)(-0.01), "progress is -0.01"),
    (lambda: constant(1)(math.nan), "progress is nan"),
    (lambda: values(one_cycle(1, steps=100)["lr"], 115), "made for 100 steps, not 115"),
])
def test_slips_are_refused_by_name(slip, words):
    with pytest.raises(ValueError, match=words):
        slip()


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="divide"):
        one_cycle(1, divide=10)


# --- with a Learner ------------------------------------------------------------------------------

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(),
                         nn.Dropout(0.1), nn.Linear(16, 10))


def digits(**options):
    train, _ = load_digits()
    return Batches(train.take(200), 50, mean=(0.3,), std=(0.4,), shuffle=True, **options)


def learner(batches=None, optimizer=AdamW, lr=1e-3, **options):
    model = net()
    return Learner(model, batches or digits(), None, optimizer(model.parameters(), lr=lr),
                   device="cpu", progress="silent", **options)


def test_the_learner_gives_each_batch_its_value():
    fitted = learner(schedules=one_cycle(1e-2, steps=12))
    fitted.fit(3)
    expected = one_cycle(1e-2, steps=12)
    assert fitted.trace["lr"] == values(expected["lr"], 12)
    assert fitted.trace["momentum"] == values(expected["momentum"], 12)


def snapshot(of):
    weights = {name: t.clone() for name, t in of.model.state_dict().items()}
    state = of.optimizer.state_dict()
    moments = [t.clone() if torch.is_tensor(t) else t
               for one in state["state"].values() for t in one.values()]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    modes = [module.training for module in of.model.modules()]
    return weights, moments, groups, modes, of.history, of.trace, of.step, of.epoch


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_range_test_leaves_no_trace():
    tested = learner(schedules=one_cycle(1e-2))
    tested.fit(2)                                  # so that there is something to disturb
    tested.model[3].eval()
    torch.manual_seed(5)
    random.seed(5)
    before, epoch = snapshot(tested), tested.train.epoch
    before = tuple(x.copy() if isinstance(x, (dict, list)) else x for x in before)
    found = lr_range_test(tested, steps=20)
    assert same(snapshot(tested), before) and tested.train.epoch == epoch
    after = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert after == (torch.rand(1), random.random())
    assert len(found.lrs) == len(found.losses) == len(found.smooth) <= 20


def test_a_tested_learner_trains_like_an_untested_one():
    def final(test_first):
        fitted = learner(schedules=one_cycle(1e-2))
        if test_first:
            lr_range_test(fitted)
        fitted.fit(2)
        return snapshot(fitted)[:2]

    assert same(final(True), final(False))


def test_a_loader_of_torch_will_do_and_is_passed_more_than_once():
    x, y = torch.randn(60, 1, 8, 8), torch.randint(10, (60,))
    loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)
    found = lr_range_test(learner(loader), start=1e-6, end=1e-2, steps=11)
    assert found.lrs == pytest.approx([1e-6 * 10 ** (0.4 * k) for k in range(11)])


def test_an_exploding_loss_ends_the_test():
    found = lr_range_test(learner(optimizer=SGD), start=1e-3, end=1e6, steps=100)
    assert len(found.lrs) < 100 and all(map(math.isfinite, found.losses))
    assert found.suggestion == found.minimum / 10 and found.minimum < found.lrs[-1]


def test_a_start_that_is_too_high_is_named_and_undone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weight = model[1].weight.detach().clone()
    tested = Learner(model, digits(), None, SGD(model.parameters(), lr=0.1), device="cpu",
                     progress="silent")
    with pytest.raises(FloatingPointError, match="begin below start=1e\\+20"):
        lr_range_test(tested, start=1e20, end=1e38)
    assert torch.equal(model[1].weight, weight) and tested.optimizer.param_groups[0]["lr"] == 0.1


def test_an_error_on_the_way_is_undone_too():
    tested = learner()
    before = snapshot(tested)
    steps, whole = itertools.count(), tested.train_step

    def broken(x, y):
        if next(steps) == 2:
            raise KeyboardInterrupt
        return whole(x, y)

    tested.train_step = broken
    with pytest.raises(KeyboardInterrupt):
        lr_range_test(tested)
    assert same(snapshot(tested), before)


def test_groups_keep_their_scale():
    tested = learner()
    tested.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    tested.optimizer.param_groups[1]["lr_scale"] = 0.5
    seen, whole = [], tested.train_step

    def watched(x, y):
        seen.append([group["lr"] for group in tested.optimizer.param_groups])
        return whole(x, y)

    tested.train_step = watched
    lr_range_test(tested, steps=5)
    assert all(half == pytest.approx(lr / 2) for lr, half in seen)


@pytest.mark.parametrize("options", [{"start": 0}, {"start": 1, "end": 0.1}, {"steps": 2},
                                     {"smoothing": 1.0}, {"stop_factor": 0.5}, {"end": math.inf}])
def test_a_range_test_refuses_senseless_numbers(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        lr_range_test(learner(), **options)


def test_the_marks_of_a_range_test():
    found = RangeTest([1.0, 2.0, 4.0, 8.0, 16.0], [0.0] * 5, [9.0, 8.0, 5.0, 4.0, 7.0])
    assert (found.minimum, found.steepest, found.suggestion) == (8.0, 2.0, 0.8)


def test_figures_are_drawn():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig = plot_schedules(one_cycle(1.0), steps=50)
    assert len(fig.axes) == 2 and len(fig.axes[0].lines[0].get_xdata()) == 51
    assert len(plot_schedules({"lr": cosine(1.0)}).axes) == 1
    marks = RangeTest([1e-3, 1e-2, 1e-1], [2.0, 1.0, 3.0], [2.0, 1.5, 2.0]).plot()
    assert {line.get_label() for line in marks.axes[0].lines[2:]} == {
        "suggestion 0.001", "steepest 0.01", "minimum 0.01"}
    plt.close("all")
