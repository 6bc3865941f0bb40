"""The counter-examples: the loop against torch's optimizers, chapter 4's formulas, the record."""
import importlib.util
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from nbutils.amsgrad import Adam, AdamW, counterexample
from nbutils.optimizer import check_same_path
from nbutils.records import mean_interval

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "book" / "records" / "counterexamples"
RECORDS = sorted((json.loads(p.read_text("utf-8")) for p in FOLDER.glob("*.json")), key=lambda r: r["started"])
VARIANTS = ("adam", "paper", "torch", "optax")


def gradients(steps, seed):
    """The online example's gradients, or the stochastic one's, drawn as `counterexample` says."""
    if seed is None:
        return [1010.0 if t % 101 == 1 else -10.0 for t in range(1, steps + 1)]
    draw = random.Random(seed).random
    return [1010.0 if draw() < 0.01 else -10.0 for _ in range(steps)]


# --- Adam and AdamW with amsgrad -----------------------------------------------------------------
@pytest.mark.parametrize("hypers", [{}, {"eps": 0.1}, {"betas": (0.0, 0.5)}, {"betas": (0.95, 0.9), "eps": 1e-3}], ids=str)
def test_amsgrad_is_torchs(hypers):
    check_same_path(lambda p: Adam(p, l2=0.1, amsgrad=True, **hypers),
                    lambda p: torch.optim.Adam(p, weight_decay=0.1, amsgrad=True, **hypers))
    check_same_path(lambda p: AdamW(p, weight_decay=0.3, amsgrad=True, **hypers),
                    lambda p: torch.optim.AdamW(p, weight_decay=0.3, amsgrad=True, **hypers))


def test_amsgrad_is_another_path():
    with pytest.raises(AssertionError, match="part at step"):
        check_same_path(lambda p: Adam(p, amsgrad=True), lambda p: Adam(p))


def test_without_amsgrad_no_maximum_is_kept():
    for on in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = Adam([p], amsgrad=on)
        opt.step()
        assert ("max_exp_avg_sq" in opt.state[p]) is on


# --- what counterexample refuses, and what it returns ----------------------------------------------
@pytest.mark.parametrize("wrong, message", [
    ({"variant": "amsgrd"}, "counterexample: unknown variant 'amsgrd'.*adam, paper, torch, optax"),
    ({"variant": "kears"}, "unknown variant 'kears'"),
    ({"steps": 0}, "steps=0 must be a whole number, 1 or more"),
    ({"steps": -5}, "steps=-5 must be"), ({"steps": 1e3}, "steps=1000.0 must be"), ({"steps": "9"}, "steps='9' must be"),
    ({"at": [0]}, "at holds 0, which is no step from 1 to 50"), ({"at": [1, 51]}, "at holds 51"),
    ({"at": [2.5]}, "at holds 2.5"),
    ({"at": 3}, "at=3 must be a list of steps, or None"), ({"at": []}, r"at=\[\] must be"), pytest.param({"at": iter([1])}, "must be a list", id="at-an-iterator"),
    ({"start": "0"}, "start='0' must lie in"),
    ({"start": 1.5}, r"start=1.5 must lie in \[-1, 1\]"), ({"start": -2}, "start=-2 must lie"),
    ({"start": math.nan}, "start=nan must lie"),
    ({"lr": -0.1}, "lr=-0.1 must be a number"), ({"lr": math.inf}, "lr=inf must be"), ({"lr": math.nan}, "lr=nan must be"),
    ({"lr": "fast"}, "lr='fast' must be"), ({"lr": None}, "lr=None must be"),
    ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be a pair"), ({"betas": (-0.1, 0.9)}, "must be a pair"),
    ({"betas": (0.9,)}, "must be a pair"), ({"betas": 0.9}, "must be a pair"), ({"betas": (0.9, math.nan)}, "must be a pair"),
], ids=str)
def test_counterexample_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        counterexample(**{"steps": 50} | wrong)


def test_counterexample_refuses_misspelt_settings():
    with pytest.raises(TypeError, match="beta2"):
        counterexample("adam", 50, beta2=0.9)


def test_counterexample_tells_of_the_steps_asked_for():
    found = counterexample("adam", 300, at=[300, 7, 7, 101])
    assert found["steps"] == [7, 101, 300]
    assert len(found["x"]) == len(found["regret"]) == 3
    whole = counterexample("adam", 300, at=range(1, 301))
    assert [whole["x"][t - 1] for t in (7, 101, 300)] == found["x"]


@pytest.mark.parametrize("steps", [1, 100, 101, 1000, 12_345])
def test_counterexample_looks_at_ends_of_periods(steps):
    at = counterexample("adam", steps)["steps"]
    assert at == sorted(set(at)) and at[0] == 1 and at[-1] == steps
    assert all(t % 101 == 0 for t in at if 101 <= t < steps)


def test_stochastic_runs_are_those_of_their_seed():
    runs = [counterexample("adam", 2000, seed=seed, at=[2000])["x"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


# --- against torch's optimizers, and against the definitions -----------------------------------------
@pytest.mark.parametrize("seed", [None, 0, 3], ids=lambda s: "online" if s is None else f"seed {s}")
@pytest.mark.parametrize("lr, falling, start", [(0.5, True, 0.0), (1e-2, False, 0.3), (0.5, False, 1.0)])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["adam", "amsgrad"])
def test_counterexample_is_torchs(amsgrad, lr, falling, start, seed):
    steps, betas = 350, (0.9, 0.99)
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    opt = torch.optim.Adam([x], lr=lr, betas=betas, eps=0.0, amsgrad=amsgrad)
    path, paid = [], 0.0
    for t, g in enumerate(gradients(steps, seed), 1):
        paid += (g if seed is None else 0.2) * (x.item() + 1)
        opt.param_groups[0]["lr"] = lr / math.sqrt(t) if falling else lr
        x.grad = torch.tensor(g, dtype=torch.float64)
        opt.step()
        x.data.clamp_(-1, 1)
        path.append((x.item(), paid / t))
    found = counterexample("torch" if amsgrad else "adam", steps, lr=lr, falling=falling, betas=betas, start=start,
                           seed=seed, at=range(1, steps + 1))
    assert found["x"] == pytest.approx([x for x, _ in path], abs=1e-12)
    assert found["regret"] == pytest.approx([paid for _, paid in path], abs=1e-10)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_counterexample_is_its_definition(variant, seed):
    """Each step written as sums over all gradients so far, without any running state."""
    b1, b2, lr, x, vs, path, seen = 0.8, 0.95, 0.05, 0.1, [], [], []
    for t, g in enumerate(gradients(250, seed), 1):
        seen.append(g)
        m = sum((1 - b1) * b1 ** (t - i) * g for i, g in enumerate(seen, 1))
        vs.append(sum((1 - b2) * b2 ** (t - i) * g * g for i, g in enumerate(seen, 1)))
        corrected = [v / (1 - b2**s) for s, v in enumerate(vs, 1)]
        divided = {"adam": corrected[-1], "paper": max(vs), "torch": max(vs) / (1 - b2**t), "optax": max(corrected)}
        x -= lr / math.sqrt(t) * m / (1 if variant == "paper" else 1 - b1**t) / math.sqrt(divided[variant])
        x = min(1.0, max(-1.0, x))
        path.append(x)
    found = counterexample(variant, 250, lr=lr, betas=(b1, b2), start=0.1, seed=seed, at=range(1, 251))
    assert found["x"] == pytest.approx(path, abs=1e-11)


def test_standing_at_the_wrong_end_costs_the_limits():
    assert counterexample("adam", 2020, lr=0.0, start=1.0)["regret"][-1] == pytest.approx(20 / 101, abs=1e-12)
    assert counterexample("adam", 2020, lr=0.0, start=1.0, seed=0)["regret"][-1] == pytest.approx(0.4, abs=1e-12)
    assert counterexample("adam", 2020, lr=0.0, start=-1.0)["regret"][-1] == 0


# --- the chapter's formulas --------------------------------------------------------------------------
def averages(b1, b2):
    """m and v over a period, once the periods repeat: found by running them, not by a formula."""
    m = v = 0.0
    period = gradients(101, None)
    for _ in range(60 + int(0.4 / (1 - b2))):
        path = []
        for g in period:
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            path.append((m, v))
    return path


def by_formula(b1, b2):
    return [(-10 + 1020 * (1 - b1) * b1**k / (1 - b1**101),
             100 + (1010**2 - 100) * (1 - b2) * b2**k / (1 - b2**101)) for k in range(101)]


def drift(b1, b2):
    return -sum(m / math.sqrt(v) for m, v in by_formula(b1, b2))


@pytest.mark.parametrize("b1, b2", [(0.9, 0.99), (0.5, 0.9), (0.0, 0.999), (0.95, 0.99)])
def test_averages_of_a_period(b1, b2):
    for (m, v), (m_run, v_run) in zip(by_formula(b1, b2), averages(b1, b2)):
        assert m == pytest.approx(m_run, abs=1e-8) and v == pytest.approx(v_run, rel=1e-8)
    assert sum(m for m, _ in by_formula(b1, b2)) == pytest.approx(10, abs=1e-9)


@pytest.mark.parametrize("variant, b2, expected", [
    ("adam", 0.99, drift(0.9, 0.99)), ("adam", 0.98, drift(0.9, 0.98)),
    ("torch", 0.99, -10 / math.sqrt(by_formula(0.9, 0.99)[0][1])),
    ("paper", 0.99, -10 / math.sqrt(by_formula(0.9, 0.99)[0][1])), ("optax", 0.99, -10 / 1010)])
def test_the_loop_drifts_as_the_formula_says(variant, b2, expected):
    a, b = 40 * 101, 60 * 101
    run = counterexample(variant, b, lr=1e-4, falling=False, betas=(0.9, b2), at=[a, b])
    assert (run["x"][1] - run["x"][0]) / 1e-4 / 20 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("b1, memory", [(0.0, 2517), (0.9, 2066), (0.95, 1591)])
def test_a_long_memory_mends_adam(b1, memory):
    assert drift(b1, 1 - 1 / (memory - 1)) > 0 > drift(b1, 1 - 1 / (memory + 1))
    assert memory == pytest.approx(1020 / 20 * (50 - b1 / (1 - b1)), rel=0.02)


def needed_memory(values, shares):
    first, second, third = (sum(p * g**k for g, p in zip(values, shares)) for k in (1, 2, 3))
    return (third - first * second) / (2 * first * second)


def mean_step(memory, b1=0.9, share=0.01):
    """E[m / sqrt(v)] of the stochastic example, without the chapter's approximation.

    1 / sqrt(v) is 2 / sqrt(pi) times the integral of exp(-s² v) over s > 0, and the mean of that exponential is a
    product over the independent gradients of the past.
    """
    s2 = torch.logspace(-13, 1, 500, dtype=torch.float64)

    def parts(ages):
        """What the large and the small gradients of these ages give to the mean of exp(-s² v)."""
        weight = s2 / memory * (1 - 1 / memory) ** ages[:, None]
        return share * torch.exp(-weight * 1010**2), (1 - share) * torch.exp(-weight * 100)

    near, width = torch.arange(250, dtype=torch.float64), 20     # m forgets what is older; v is smooth there
    far = torch.arange(250 + (width - 1) / 2, 16 * memory, width, dtype=torch.float64)
    large, small = parts(near)
    in_m = ((1 - b1) * b1 ** near[:, None] * (1010 * large - 10 * small) / (large + small)).sum(0)
    log_product = (large + small).log().sum(0) + width * sum(parts(far)).log().sum(0)
    s = s2.sqrt()
    return torch.trapezoid(2 / math.pi**0.5 * in_m * log_product.exp() * s, s.log()).item()


def test_the_memory_that_random_gradients_need():
    assert needed_memory((1010, -10), (0.01, 0.99)) == pytest.approx(2500, abs=0.05)
    # a batch of ten: the third moment falls like 1 / B², the second like 1 / B
    means = [(1010 * k - 10 * (10 - k)) / 10 for k in range(11)]
    shares = [math.comb(10, k) * 0.01**k * 0.99 ** (10 - k) for k in range(11)]
    assert needed_memory(means, shares) == pytest.approx(251, abs=0.5)


def test_the_first_order_is_near_the_truth():
    """The sign of the exact mean step changes at 2,491 steps, half a per cent below 2,500."""
    assert mean_step(2489) < 0 < mean_step(2493)
    V, N = 10_300, 2500
    for memory, near in ((10_000, 0.01), (1000, 0.01), (100, 0.3)):      # 100: the first order is 20 % short
        assert mean_step(memory) == pytest.approx(0.2 * (1 - N / memory) / V**0.5, rel=near)


@pytest.mark.parametrize("steps", [2, 500])
def test_torchs_order_keeps_the_wish_where_the_rate_falls(steps):
    """t / (1 - beta2^t) grows with t, whatever beta2."""
    for b2 in (0.0, 0.5, 0.99, 0.999):
        values = [t / (1 - b2**t) for t in range(1, steps + 1)]
        assert all(a < b for a, b in zip(values, values[1:]))


# --- the record --------------------------------------------------------------------------------------
def runs(record, variant, lr, falling, beta2=0.99, start=0.0):
    wanted = {"variant": variant, "lr": lr, "falling": falling, "betas": [0.9, beta2], "start": start}
    found = [r for r in record["runs"] if all(r[k] == v for k, v in wanted.items())]
    return [r for r in found if r["seed"] is None], [r for r in found if r["seed"] is not None]


def test_there_is_a_record():
    assert RECORDS, "make counterexamples writes one"


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r["name"])
def test_records_are_whole(record):
    assert (FOLDER / f"{record['name']}.json").exists() and record["steps"] == 6_000_000
    assert len(record["runs"]) == len({json.dumps({k: v for k, v in r.items() if k not in ("steps", "x", "regret")})
                                       for r in record["runs"]})
    for run in record["runs"]:
        assert len(run["steps"]) == len(run["x"]) == len(run["regret"]) and run["steps"][-1] == record["steps"]
        assert all(-1 <= x <= 1 for x in run["x"]) and all(map(math.isfinite, run["regret"]))


@pytest.mark.parametrize("variant, lr, falling, beta2, x, regret", [
    ("adam", 0.5, True, 0.99, 1.0, 0.2103), ("paper", 0.5, True, 0.99, -0.9990, 0.0137),
    ("torch", 0.5, True, 0.99, -0.9990, None), ("optax", 0.5, True, 0.99, -0.9999, None),
    ("adam", 1e-3, False, 0.99, 1.0, None), ("paper", 1e-3, False, 0.99, -0.9950, None),
    ("torch", 1e-3, False, 0.99, -0.9950, None), ("optax", 1e-3, False, 0.99, -0.5903, None),
    ("adam", 1e-3, False, 0.9999, -0.9938, None), ("torch", 0.1, True, 0.99, -0.6192, None),
    ("torch", 0.5, False, 0.99, 1.0, None)])
def test_the_record_has_the_known_figures(variant, lr, falling, beta2, x, regret):
    (run,), _ = runs(RECORDS[-1], variant, lr, falling, beta2)
    assert run["x"][-1] == pytest.approx(x, abs=5.1e-5)
    if regret is not None:
        assert run["regret"][-1] == pytest.approx(regret, abs=5.1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [None, 2])
def test_the_record_can_be_run_again(variant, seed):
    online, drawn = runs(RECORDS[-1], variant, 0.5, True)
    recorded = next(r for r in online + drawn if r["seed"] == seed)
    at = [t for t in recorded["steps"] if t <= 20_000]
    found = counterexample(variant, at[-1], seed=seed, at=at)
    for name in ("x", "regret"):
        assert found[name] == pytest.approx(recorded[name][:len(at)], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("variant, lr, falling", [
    ("torch", 0.5, True), ("paper", 0.5, True), ("optax", 0.5, True), ("torch", 1e-3, False), ("torch", 0.5, False),
    ("optax", 0.5, False)])
def test_what_is_left_to_the_wall_is_a_saw_tooth(variant, lr, falling):
    """x waits at -1 while m is positive, then climbs until the next large gradient."""
    record = RECORDS[-1]
    (run,), _ = runs(record, variant, lr, falling)
    rate = lr / math.sqrt(record["steps"]) if falling else lr
    divisor = 1010 if variant == "optax" else math.sqrt(by_formula(0.9, 0.99)[0][1])
    passed = (record["steps"] - 1) % 101 + 1
    climb = sum(max(0.0, -m) for m, _ in by_formula(0.9, 0.99)[:passed]) / divisor * rate
    assert run["x"][-1] == pytest.approx(min(1.0, -1 + climb), abs=2e-5)


@pytest.mark.parametrize("beta2, wall", [(0.999, 1), (0.9999, -1)])
def test_mean_distances_from_the_wall(beta2, wall):
    """The random walk's forecast lies in the interval of the record's seeds."""
    _, drawn = runs(RECORDS[-1], "adam", 1e-3, False, beta2)
    found = []
    for run in drawn:
        i = next(i for i, t in enumerate(run["steps"]) if t > 1_000_000)
        t, last = run["steps"][i], run["steps"][-1]
        paid = (last * run["regret"][-1] - t * run["regret"][i]) / (last - t)
        found.append(abs(paid / 0.2 - 1 - wall))
    seen = mean_interval(found)
    forecast = 1e-3 * math.sqrt(10_300) / (0.4 * abs(1 - 2500 * (1 - beta2)))
    assert seen.n >= 5 and abs(seen.mean - forecast) <= seen.half
    assert statistics.mean(run["x"][-1] for run in drawn) * wall > 0


# --- the command -------------------------------------------------------------------------------------
@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("counterexamples", ROOT / "bench" / "counterexamples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_quickly(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "QUICK_STEPS", 300)
    before = sorted(FOLDER.iterdir())
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "no record" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and sorted(FOLDER.iterdir()) == before


def test_the_command_writes_where_it_is_told(command, tmp_path, capsys):
    before = sorted(FOLDER.iterdir())
    for _ in range(2):                                          # a record is never overwritten
        assert command.main(["--steps", "202", "--seeds", "1", "--out", str(tmp_path)]) == 0
    first, second = sorted(tmp_path.glob("*.json"), key=lambda p: len(p.name))
    found = json.loads(first.read_text("utf-8"))
    assert found["name"] == first.stem and second.stem == f"{first.stem}-2" and found["steps"] == 202
    assert set(found) == set(RECORDS[-1])
    known = {(r["variant"], r["lr"], r["falling"], r["betas"][1], r["start"], r["seed"]) for r in RECORDS[-1]["runs"]}
    mine = {(r["variant"], r["lr"], r["falling"], r["betas"][1], r["start"], r["seed"]) for r in found["runs"]}
    assert mine <= known and len(mine) == len(found["runs"])
    assert sorted(FOLDER.iterdir()) == before and "record:" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--seeds", "0"], ["--steps", "many"], ["--out", __file__], ["x"]])
def test_the_command_refuses(command, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(wrong)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err
