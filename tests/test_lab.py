"""The optimizer lab: its paths are nbutils', in a bare JavaScript engine and in a browser.

The engine (V8, of the package mini-racer) comes with `make install`, so the numbers are always
checked. A browser is used where one is found; NBUTILS_BROWSER names one, or says `required`.

Settings under which Adam never comes to rest are left out: with a short beta2 and a constant rate
its steps near the valley's floor are chaotic, and the last digit decides where they lead.
"""
import functools
import html
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from py_mini_racer import MiniRacer

from nbutils.amsgrad import Adam, AdamW, counterexample
from nbutils.core import COLORS
from nbutils.momentum import SGD
from nbutils.schedule import constant, cosine, one_cycle, values

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "book" / "_static" / "lab"
PAGE = ROOT / "book" / "lab.md"
TOLERANCE = 1e-9
LINES = ("sgd", "sgdw", "adam", "adam2", "adamw", "amsgrad", "amsgradw")
SCHEDULES = ("constant", "1cycle", "cosine", "root")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


# ---------------------------------------------------------------- what is compared

def settings(on, **changes):
    """A full set of the lab's settings, with nothing at zero."""
    usual = {"valley": {"lr": 0.05, "lrSgd": 0.1, "l2": 0.01, "wd": 0.1},
             "line": {"lr": 0.02, "lrSgd": 1e-4, "l2": 5.0, "wd": 0.05},
             "scales": {"lr": 0.002, "lrSgd": 0.01, "l2": 0.003, "wd": 0.3}}[on]
    return {"on": on, "steps": 404, "schedule": "constant", "beta1": 0.9, "beta2": 0.999,
            "second": 0.99, "eps": 1e-8, "tilt": 20} | usual | changes


CASES = [settings(on, schedule=kind) for on in ("valley", "line", "scales") for kind in SCHEDULES]
CASES += [settings("valley", eps=0.1, schedule="1cycle"), settings("valley", l2=0, wd=0),
          settings("valley", beta1=0, beta2=0.99), settings("valley", tilt=0, lr=0.2, lrSgd=0.3),
          settings("valley", tilt=45, beta1=0.98, schedule="cosine"),
          settings("line", l2=0, wd=0, beta2=0.99, second=0.9999, eps=0), settings("line", eps=100.0),
          settings("line", beta1=0, lr=0.5, schedule="root"),
          settings("scales", l2=0.3, beta1=0.5), settings("scales", eps=0.1, beta1=0)]
NAMES = [" ".join(f"{key}={case[key]}" for key in ("on", "schedule", "eps", "beta1", "l2"))
         for case in CASES]
RUNS = [{"line": line, "settings": case} for case in CASES for line in LINES]

# Prints as many JSON texts as are asked for; numbers in them are exact.
COMPUTE = """JSON.stringify(%s.map(function (run) {
  var found = WeighingLab.run(run.line, run.settings);
  return {path: Array.from(found.path), weights: Array.from(found.weights)};
}))"""


# ---------------------------------------------------------------- nbutils' side

def uniform(seed):
    """mulberry32, in Python's whole numbers."""
    while True:
        seed = (seed + 0x6D2B79F5) & 0xFFFFFFFF
        t = (seed ^ seed >> 15) * (1 | seed) & 0xFFFFFFFF
        t = (t + ((t ^ t >> 7) * (61 | t) & 0xFFFFFFFF) & 0xFFFFFFFF) ^ t
        yield (t ^ t >> 14) / 2**32


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def on_valley(case):
    """Start, and a function of p and t that leaves the gradient in p: here of d'Hd / 2."""
    angle = math.radians(case["tilt"])
    turn = double([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    hessian, best = turn.T @ torch.diag(double([0.02, 1.0])) @ turn, double([1.5, 0.5])

    def fill(p, t):
        p.grad = hessian @ (p.detach() - best)
    return double([-2.0, 1.5]), fill


def on_line(case):
    large, small = double([1010.0]), double([-10.0])

    def fill(p, t):
        p.grad = large if t % 101 == 1 else small
    return double([0.0]), fill


@functools.cache
def noise(steps):
    """What every line's gradients are, in all cases: [steps, 200]."""
    draws = uniform(0)
    drawn = double([[(2 * next(draws) - 1) * math.sqrt(3) for _ in range(100)]
                    for _ in range(steps)])
    return torch.cat([drawn, 0.01 * drawn], dim=1)


def on_scales(case):
    gradients = noise(case["steps"])

    def fill(p, t):
        p.grad = gradients[t - 1]
    return double([1.0] * 200), fill


ON = {"valley": on_valley, "line": on_line, "scales": on_scales}


def maker(line, case):
    """The optimizer of nbutils that a line stands for."""
    adam = {"eps": case["eps"], "amsgrad": line.startswith("amsgrad")}
    beta2 = case["second" if line == "adam2" else "beta2"]
    lr, betas, l2, wd = case["lr"], (case["beta1"], beta2), case["l2"], case["wd"]
    if line.startswith("sgd"):
        decay = {"l2": l2} if line == "sgd" else {"weight_decay": wd}
        return lambda params: SGD(params, case["lrSgd"], momentum=case["beta1"], **decay)
    if line in ("adamw", "amsgradw"):
        return lambda params: AdamW(params, lr, betas, weight_decay=wd, **adam)
    return lambda params: Adam(params, lr, betas, l2=l2, **adam)


def plan(case, lr):
    """The rate and beta1 of every step, from nbutils.schedule."""
    steps, momenta = case["steps"], constant(case["beta1"])
    if case["schedule"] == "root":
        return [lr / math.sqrt(t) for t in range(1, steps + 1)], values(momenta, steps)
    if case["schedule"] == "1cycle":
        both = one_cycle(lr)
        return values(both["lr"], steps), values(both["momentum"], steps)
    rates = {"constant": constant, "cosine": cosine}[case["schedule"]](lr)
    return values(rates, steps), values(momenta, steps)


def expected(line, case):
    """The path of the lab's coordinates and the last weights, by nbutils' optimizers."""
    start, fill = ON[case["on"]](case)
    p = torch.nn.Parameter(start)
    opt = maker(line, case)([p])
    group, path = opt.param_groups[0], [p.detach().clone()]
    for t, (lr, beta1) in enumerate(zip(*plan(case, group["lr"])), 1):
        group["lr"] = lr
        group.update({"momentum": beta1} if "momentum" in group
                     else {"betas": (beta1, group["betas"][1])})
        fill(p, t)
        opt.step()
        if case["on"] == "line":
            p.data.clamp_(-1, 1)
        path.append(p.detach().clone())
    path = torch.stack(path)
    if case["on"] == "scales":
        path = path.reshape(-1, 2, 100).mean(2)
    return path, p.detach()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def by_nbutils():
    return [expected(run["line"], run["settings"]) for run in RUNS]


def check(found, by_nbutils, case):
    """Hold all lines of a case against nbutils'; name the line that is farthest off."""
    apart = {}
    for run, ours, (path, weights) in zip(RUNS, found, by_nbutils, strict=True):
        if run["settings"] is case:
            far = [(double(ours["path"]) - path.flatten()).abs().max().item(),
                   (double(ours["weights"]) - weights).abs().max().item()]
            apart[run["line"]] = max(far) if all(map(math.isfinite, far)) else math.inf
            assert path.diff(dim=0).abs().max() > 1e-4, "a path that stands still shows nothing"
    worst = max(apart, key=apart.get)
    assert apart[worst] <= TOLERANCE, f"{worst} is {apart[worst]:.3g} from nbutils': {apart}"


# ---------------------------------------------------------------- the engine that is always there

@pytest.fixture(scope="module")
def engine():
    engine = MiniRacer()
    engine.eval((LAB / "lab.js").read_text("utf-8"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def by_engine(engine):
    return json.loads(engine.eval(COMPUTE % json.dumps(RUNS)))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_paths_in_a_javascript_engine(by_engine, by_nbutils, case):
    check(by_engine, by_nbutils, case)
