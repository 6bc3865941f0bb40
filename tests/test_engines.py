"""One rule by every engine: the same path, the same state, and clear words where an engine cannot."""
import copy
import io
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch

from nbutils.amsgrad import Adam, AdamW
from nbutils.engines import TensorList
from nbutils.momentum import SGD
from nbutils.optimizer import ENGINES, check_same_path, optimizer, sgd_step, stepper, weight_decay

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import steps  # noqa: E402  (bench/steps.py)

# torch 2.11 warns of its own use of torch.jit when it compiles
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
FAST = ("lists", "fused", "fast")
RULES = [
    (AdamW, {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
    (AdamW, {"weight_decay": 0.1, "amsgrad": True}, torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    (AdamW, {"weight_decay": 0.0}, torch.optim.AdamW, {"weight_decay": 0.0}),
    (Adam, {"l2": 0.1, "eps": 1e-3}, torch.optim.Adam, {"weight_decay": 0.1, "eps": 1e-3}),
    (Adam, {"l2": 0.1, "amsgrad": True}, torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    (SGD, {"l2": 0.1}, torch.optim.SGD, {"weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "l2": 0.1}, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
]
IDS = [f"{ours.__name__} {hypers}" for ours, hypers, _, _ in RULES]


def params(n=4, dtype=torch.float64, size=7):
    draw = torch.Generator().manual_seed(0)
    made = []
    for k in range(n):
        values = torch.randn(2, size + k, generator=draw, dtype=torch.float64).to(dtype)
        made.append(torch.nn.Parameter(values[0].clone()))
        made[-1].grad = values[1].clone()
    return made


def walk(opt, steps=30):
    """The parameters after steps with moving rates."""
    for t in range(steps):
        phase = math.sin(t) ** 2
        for group in opt.param_groups:
            group["lr"] = 0.01 + 0.05 * phase
            if "betas" in group:
                group["betas"] = (0.95 - 0.1 * phase, 0.99)
        opt.step()
    return torch.cat([p.detach().double().flatten() for group in opt.param_groups for p in group["params"]])


# --- the same path -------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("ours, hypers, theirs, twin", RULES, ids=IDS)
def test_float64_path_is_torchs(engine, ours, hypers, theirs, twin):
    """Moving lr and betas, three groups, missing gradients, 0-d parameters, a restart: within 1e-12."""
    check_same_path(lambda p: ours(p, engine=engine, **hypers), lambda p: theirs(p, **twin))


@pytest.mark.parametrize("ours, hypers", [(AdamW, {"amsgrad": True}), (Adam, {"l2": 0.1}),
                                          (SGD, {"momentum": 0.9, "nesterov": True, "l2": 0.1})], ids=str)
def test_compiled_path_is_the_loops(ours, hypers):
    options = {"lr": 0.1, **hypers}
    ends = [walk(ours(params(), engine=engine, **options)) for engine in ("loop", "compiled")]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_compiled_path_with_missing_gradients():
    def path(engine):
        mine = params(3)
        opt, kept = AdamW(mine, lr=0.1, engine=engine), mine[1].grad
        for t in range(4):
            mine[1].grad = kept if t % 2 else None
            opt.step()
        return torch.cat([p.detach() for p in mine]), [opt.state[p].get("step") for p in mine]

    (ours, counts), (loops, same) = path("compiled"), path("loop")
    torch.testing.assert_close(ours, loops, rtol=0, atol=1e-12)
    assert counts == same == [4, 2, 4]


@pytest.mark.parametrize("engine", [*FAST, "compiled"])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.bfloat16, 0.1)], ids=str)
def test_lower_precisions(engine, dtype, atol):
    """30 steps of at most 0.06 on weights of size 3: float32 within a few roundings. bfloat16 holds steps of 1/64 only."""
    truth = walk(AdamW([torch.nn.Parameter(p.detach().double()) for p in with_grads(dtype)], engine="loop"), 0)
    ours = walk(AdamW(with_grads(dtype), lr=0.1, engine=engine))
    loop = walk(AdamW(with_grads(dtype), lr=0.1, engine="loop"))
    torchs = walk(torch.optim.AdamW(with_grads(dtype), lr=0.1, foreach=False))
    assert (loop - truth).abs().max() > 0.5                      # it moved
    torch.testing.assert_close(ours, loop, rtol=0, atol=atol)
    torch.testing.assert_close(loop, torchs, rtol=0, atol=atol)


def with_grads(dtype):
    return params(3, dtype)


@stepper(state=("seen",))
def odd_operations(p, g, state, *, lr, power=2.0):
    """What no optimizer of the book uses: numbers before lists, powers, clamps, quotients."""
    state["seen"].add_(g.abs() ** power)
    bounded = (1 - g / (1 + state["seen"].sqrt())).clamp_min(0.1)
    p.sub_((lr / bounded).addcdiv(g, bounded + 2, value=-lr) * 0.5)
    return -g


Odd = optimizer("Odd", odd_operations, lr=0.1)


def test_any_arithmetic_runs_by_lists_and_compiled():
    for engine in ("lists", "compiled"):
        ends = [walk(Odd(params(2), engine=e), 5) for e in ("loop", engine)]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_l2_and_decay_together_run_over_lists_and_compiled():
    for engine in ("lists", "compiled", "fast"):
        ends = [walk(Adam(params(2), lr=0.1, l2=0.1, weight_decay=0.2, engine=e)) for e in ("loop", engine)]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_numbers_may_be_tensors():
    for engine in ("loop", *FAST):
        ends = [AdamW(params(2), lr=lr, engine=engine) for lr in (0.1, torch.tensor(0.1, dtype=torch.float64))]
        for opt in ends:
            opt.step()
        a, b = (torch.cat([p.detach() for p in opt.param_groups[0]["params"]]) for opt in ends)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", FAST)
def test_several_dtypes_in_one_group(engine):
    mixed = params(1, torch.float64) + params(1, torch.float32)
    twins = params(1, torch.float64) + params(1, torch.float32)
    walk(AdamW(mixed, lr=0.1, engine=engine), 5), walk(AdamW(twins, lr=0.1, engine="loop"), 5)
    for p, q in zip(mixed, twins):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", [*FAST, "compiled"])
def test_no_gradient_no_step(engine):
    mine = params(2)
    for p in mine:
        p.grad = None
    opt = AdamW(mine, lr=0.1, engine=engine)
    before = [p.detach().clone() for p in mine]
    opt.step()
    assert not opt.state and all(map(torch.equal, mine, before))


@pytest.mark.parametrize("engine", ["loop", *FAST])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_nan_is_not_hidden(engine, amsgrad):
    mine = params(2)
    mine[0].grad[1] = math.nan
    opt = AdamW(mine, lr=0.1, amsgrad=amsgrad, engine=engine)
    opt.step()
    assert mine[0][1].isnan() and mine[0].isnan().sum() == 1 and mine[1].isfinite().all()
    with pytest.raises(FloatingPointError, match="the gradient of parameter 0 of group 0 is not finite"):
        opt.check_finite()


# --- nothing is compiled twice ---------------------------------------------------------------------
def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_rates_that_move_compile_nothing():
    opt, before = AdamW(params(3), lr=0.1, amsgrad=True, engine="compiled"), graphs()
    walk(opt, 1)
    first = graphs()
    walk(opt, 40)
    assert (first - before, graphs() - first) == (1, 0)


def test_a_rate_that_is_a_constant_would_be_compiled_again():
    """The count is not blind: a plainly compiled function with a float rate makes a second graph."""
    @torch.compile(dynamic=False)
    def plain(p, lr):
        return p.mul(1 - lr)

    before = graphs()
    for lr in (0.1, 0.2):
        plain(torch.ones(3), lr)
    assert graphs() - before == 2


@stepper
def every_third(p, g, state, *, lr):
    return g * 2 if state["step"] % 3 == 0 else g.sign() * max(lr, 0.02)


Third = optimizer("Third", every_third, sgd_step)


@pytest.mark.parametrize("engine", ["lists", "compiled"])
def test_rules_that_need_the_values_of_numbers(engine):
    ends = [walk(Third(params(2), lr=0.1, engine=e), 7) for e in ("loop", engine)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


# --- what a stepper may say --------------------------------------------------------------------------
def custom(name, function, **defaults):
    return optimizer(name, function, sgd_step, lr=0.1, **defaults)


@stepper(state=("v",))
def augmented(p, g, state, *, lr, beta=0.9):
    v = state["v"]
    v *= beta
    v += (1 - beta) * g
    p -= lr * v
    v /= 1.5
    v -= 0.1 * g
    return v


@pytest.mark.parametrize("engine", ["lists", "compiled"])
def test_augmented_assignment_changes_in_place(engine):
    """As it does for a tensor; otherwise the state would never be written."""
    ends = [walk(custom("Augmented", augmented)(params(2), engine=e), 5) for e in ("loop", engine)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@stepper(state=("v",))
def replaced(p, g, state, *, beta=0.9):
    state["v"] = state["v"] * beta + g
    return state["v"]


@stepper
def counting(p, g, state):
    state["seen"] = state.get("seen", 0) + 1
    return g * (1 / state["seen"])


@pytest.mark.parametrize("engine", ["lists", "compiled"])
@pytest.mark.parametrize("function", [replaced, counting])
def test_new_things_in_the_state_are_refused(function, engine):
    """By lists they would be lost without a word."""
    opt = custom("New", function)(params(2), engine=engine)
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    with pytest.raises(TypeError, match=f"stepper {function.__name__} puts something new into its state: .*engine='loop'"):
        opt.step()
    assert all(map(torch.equal, before, opt.param_groups[0]["params"]))
    walk(custom("New", function)(params(2), engine="loop"), 2)


QUESTIONS = {"ndim": lambda p, g: g if p.ndim == 1 else g * 2, "dtype": lambda p, g: g if g.dtype is torch.float64 else g * 2,
             "is_sparse": lambda p, g: g * 2 if g.is_sparse else g, "shape": lambda p, g: g * p.shape[0],
             "equal": lambda p, g: g + (g == 0) * 1.0, "not equal": lambda p, g: g * (g != 0)}


@pytest.mark.parametrize("engine", ["lists", "compiled"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_that_many_tensors_cannot_answer(question, engine):
    @stepper
    def asking(p, g, state):
        return QUESTIONS[question](p, g)

    with pytest.raises((AttributeError, TypeError), match="runs with engine='loop' only"):
        custom("Asking", asking)(params(2), engine=engine).step()
    custom("Asking", asking)(params(2), engine="loop").step()


@pytest.mark.parametrize("engine", ["loop", "lists", "compiled", "fused"])
def test_a_step_that_fails_is_not_counted(engine):
    @stepper(state=("v",))
    def failing(p, g, state):
        raise ArithmeticError("on purpose")

    mine = params(2)
    opt = AdamW(mine, lr=0.1, engine=engine) if engine == "fused" else custom("Failing", failing)(mine, engine=engine)
    if engine == "fused":
        opt.state[mine[0]]["exp_avg"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises((ArithmeticError, RuntimeError)):
        opt.step()
    assert not any("step" in state for state in opt.state.values())


@pytest.mark.parametrize("engine", ["loop", "lists", "fused"])
def test_amsgrad_switched_off_and_on_again(engine):
    """As torch: the maximum rests, and is taken up again."""
    def path(opt):
        for on in (True, False, False, True):
            opt.param_groups[0]["amsgrad"] = on
            for p in opt.param_groups[0]["params"]:
                p.grad.mul_(0.3)
            opt.step()
        return torch.cat([p.detach() for p in opt.param_groups[0]["params"]])

    ours, theirs = path(AdamW(params(2), lr=0.1, engine=engine)), path(torch.optim.AdamW(params(2), lr=0.1, amsgrad=True, foreach=False))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["loop", "lists", "fused", "fast", "compiled"])
def test_state_of_another_model_is_refused(engine):
    """A smaller tensor under a larger parameter: torch's fused functions would write behind its end."""
    small, large = params(1, size=4), params(1, size=4096)
    opt, later = (AdamW(mine, lr=0.1, engine=engine) for mine in (small, large))
    opt.step()
    later.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError):
        later.step()


def test_number_that_is_a_tensor_of_zero_switches_off():
    opt = Adam(params(1), lr=0.1, l2=torch.tensor(0.0), weight_decay=0.1, engine="fused")
    twin = Adam(params(1), lr=0.1, weight_decay=0.1, engine="loop")
    opt.step(), twin.step()
    torch.testing.assert_close(opt.param_groups[0]["params"][0], twin.param_groups[0]["params"][0], rtol=0, atol=1e-12)


# --- layouts -----------------------------------------------------------------------------------------
def layouts():
    contiguous = torch.contiguous_format
    return {"same": (contiguous, contiguous), "p channels_last": (torch.channels_last, contiguous),
            "g channels_last": (contiguous, torch.channels_last), "both": (torch.channels_last, torch.channels_last)}


def conv(kind, engine, steps=3, first=None):
    draw = torch.Generator().manual_seed(0)
    w, g = (torch.randn(4, 3, 5, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    p = torch.nn.Parameter(w.to(memory_format=layouts()[kind][0]))
    p.grad = g.to(memory_format=layouts()[kind][1])
    opt = AdamW([p], lr=0.1, engine=engine)
    for _ in range(steps):
        opt.step()
    return p.detach()


@pytest.mark.parametrize("engine", [*FAST, "compiled"])
@pytest.mark.parametrize("kind", layouts())
def test_gradients_of_another_layout(engine, kind):
    torch.testing.assert_close(conv(kind, engine), conv(kind, "loop"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", FAST)
def test_state_of_another_layout(engine):
    """A checkpoint of a contiguous model, taken up for a channels_last one."""
    def path(engine):
        draw = torch.Generator().manual_seed(0)
        w, g = (torch.randn(4, 3, 5, 5, generator=draw, dtype=torch.float64) for _ in range(2))
        p = torch.nn.Parameter(w.clone())
        p.grad = g
        opt = AdamW([p], lr=0.1, amsgrad=True, engine=engine)
        opt.step()
        q = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
        q.grad = g.flip(0).to(memory_format=torch.channels_last)
        later = AdamW([q], lr=0.1, amsgrad=True, engine=engine)
        later.load_state_dict(opt.state_dict())
        assert later.state[q]["exp_avg"].stride() != q.stride()   # torch leaves it so
        later.step()
        return q.detach()

    torch.testing.assert_close(path(engine), path("loop"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", FAST)
def test_parameter_with_gaps(engine):
    def path(engine):
        p = torch.nn.Parameter(torch.arange(12.0, dtype=torch.float64).view(3, 4)[:, ::2])
        p.grad = torch.arange(6.0, dtype=torch.float64).view(3, 2).sin()
        walk(AdamW([p], engine=engine), 3)
        return p.detach()

    torch.testing.assert_close(path(engine), path("loop"), rtol=0, atol=1e-12)


# --- state, copies, torch's tools -----------------------------------------------------------------
def test_engines_may_change_in_the_middle():
    def path(*engines):
        mine = params(3)
        opt = AdamW(mine, lr=0.1, amsgrad=True, engine=engines[0])
        for engine in engines:
            opt.engine = engine
            walk(opt, 3)
        return torch.cat([p.detach() for p in mine]), opt

    ours, opt = path("fused", "lists", "compiled", "loop")
    torch.testing.assert_close(ours, path(*["loop"] * 4)[0], rtol=0, atol=1e-12)
    assert {type(s["step"]) for s in opt.state.values()} == {int} and opt.state_dict()["state"][0]["step"] == 12


@pytest.mark.parametrize("copier", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("engine", ["lists", "fast", "compiled"])
def test_copies_keep_their_engine(copier, engine):
    opt = AdamW(params(2), lr=0.1, engine=engine)
    opt.step()
    twin = copier(opt)
    assert twin.engine == engine
    opt.step()
    for p in twin.param_groups[0]["params"]:
        p.grad = params(2)[0].grad if p.numel() == 7 else params(2)[1].grad
    twin.step()
    for p, q in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"]):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_checkpoint_passes_between_engines():
    mine = params(2)
    opt = AdamW(mine, lr=0.1, engine="fast")
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = AdamW(mine, lr=0.1, engine="loop")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state[mine[0]]["step"] == 1 and other.engine == "loop"


@pytest.mark.parametrize("engine", FAST)
def test_gradient_scaler_skips_infinity(engine):
    p = torch.nn.Parameter(torch.ones(1))
    opt, scaler = SGD([p], lr=0.1, engine=engine), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((3 * p).sum()).backward()
    scaler.step(opt), scaler.update()
    assert p.item() == pytest.approx(0.7)
    p.grad.fill_(math.inf)
    scaler.step(opt), scaler.update()
    assert p.item() == pytest.approx(0.7)


def test_the_engines():
    AdamW(params(), engine="lists")                              # the first use of another engine brings all
    assert set(ENGINES) >= {"auto", "loop", "lists", "compiled", "fused", "fast"}


def test_auto_is_the_loop_on_the_cpu():
    a, b = AdamW(params(), lr=0.1), AdamW(params(), lr=0.1, engine="loop")
    assert a.engine == "auto" and torch.equal(walk(a), walk(b))


# --- what an engine cannot do -----------------------------------------------------------------------
@pytest.mark.parametrize("name", ["fats", "", None])
def test_unknown_engine(name):
    with pytest.raises(ValueError, match=f"unknown engine {name!r}.*There are: .*loop"):
        AdamW(params(), lr=0.1, engine=name)
    opt = AdamW(params(), lr=0.1)
    with pytest.raises(ValueError, match="unknown engine"):
        opt.engine = name
    assert opt.engine == "auto"


@stepper
def norm_clip(p, g, state):
    return g.sign() if g.norm() > 1 else g


@stepper
def running_sum(p, g, state):
    return g.cumsum(0)


@stepper
def silent(p, g, state):
    g * 2


Clipped = optimizer("Clipped", weight_decay, norm_clip, sgd_step, weight_decay=0.1)
Summed = optimizer("Summed", running_sum, sgd_step)
Silent = optimizer("Silent", silent, sgd_step)


def test_fused_refuses_other_rules_and_nothing_moves():
    mine = params(2)
    before = [p.detach().clone() for p in mine]
    opt = Clipped(mine, lr=0.1, engine="fused")
    with pytest.raises(ValueError, match="Clipped: torch has no fused function for the steppers weight_decay, "
                                         "norm_clip, sgd_step; use engine='compiled', 'lists' or 'loop'"):
        opt.step()
    assert all(map(torch.equal, mine, before)) and not any("step" in s for s in opt.state.values())


@pytest.mark.parametrize("engine", ["lists", "compiled"])
def test_steppers_that_branch_on_values(engine):
    with pytest.raises((TypeError, AttributeError), match="runs with engine='loop' only"):
        Clipped(params(2), lr=0.1, engine=engine).step()
    Clipped(params(2), lr=0.1, engine="loop").step()


def test_operations_without_lists():
    opt = Summed(params(2), lr=0.1, engine="lists")
    with pytest.raises(AttributeError, match="no foreach function for 'cumsum': .*engine='loop' only"):
        opt.step()
    assert not any("step" in s for s in opt.state.values())      # a step that failed is not counted


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_without_a_compiler():
    from torch._inductor import config

    mine = params(1, size=13)
    before, opt = mine[0].detach().clone(), AdamW(mine, lr=0.1, engine="compiled")
    with config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        with pytest.raises(RuntimeError, match="AdamW: the step could not be compiled .*/nowhere/g.*engine='lists'"):
            opt.step()
    assert torch.equal(mine[0], before) and "step" not in opt.state[mine[0]]
    opt.step()                                                   # with a compiler it goes on
    assert opt.state[mine[0]]["step"] == 1


@pytest.mark.parametrize("engine", ["loop", "lists", "compiled"])
def test_a_stepper_must_return_the_direction(engine):
    with pytest.raises(TypeError, match="stepper silent must return the direction g"):
        Silent(params(2), lr=0.1, engine=engine).step()


@pytest.mark.parametrize("engine", FAST)
def test_sparse_gradients_are_refused_before_anything_moves(engine):
    table, p = torch.nn.Embedding(4, 2, sparse=True), params(1)[0]
    table(torch.tensor([1])).sum().backward()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="AdamW, group 1: a sparse gradient; use .*sparse=False"):
        AdamW([{"params": [p]}, {"params": table.parameters()}], lr=0.1, engine=engine).step()
    assert torch.equal(p, before)


# --- lists as numbers -------------------------------------------------------------------------------
def test_lists_calculate_like_tensors():
    x, y = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(6.0)]
    cases = [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a, b: -a,
             lambda a, b: 2 - a, lambda a, b: 1 / a, lambda a, b: a**2, lambda a, b: 3 * a + 2 * b,
             lambda a, b: a + 2 * b, lambda a, b: 2 * a + b, lambda a, b: (2 * a).sqrt(), lambda a, b: 2 * (3 * a),
             lambda a, b: a.lerp(b, 0.25), lambda a, b: a.addcmul(a, b, value=0.5), lambda a, b: a.clamp_min(b)]
    for case in cases:
        expected = [case(p, q) for p, q in zip(x, y)]
        found = case(TensorList(x), TensorList(y)).tensors
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_product_stays_what_it_was():
    a = TensorList([torch.tensor([1.0])])
    doubled = 2 * a
    a.mul_(10)
    assert (doubled.add_(1).tensors[0].item(), doubled.tensors[0].item(), a.tensors[0].item()) == (3, 3, 10)


def test_a_list_is_no_python_list():
    a = TensorList([torch.ones(2)])
    assert not isinstance(a, list) and len((a + a).tensors) == 1
    with pytest.raises(TypeError, match="branches on the values of a tensor"):
        bool(a)


# --- the benchmark of steps --------------------------------------------------------------------------
def test_bench_counts_parameters():
    totals = {name: sum(math.prod(s) for s in steps.shapes(name)) for name in steps.SETS}
    assert totals == {"wide-resnet-22": 9_658_458, "resnet-50": 25_557_032, "awd-lstm": 33_556_479}


def test_bench_runs_a_case(capsys):
    chosen = steps.arguments(["--quick", "--contenders", "torch fused,nbutils loop,nbutils fast", "--no-trials"])
    small = {"wide-resnet-22": [(3, 4), (5,)]}
    whole, steps.shapes = steps.shapes, small.__getitem__
    try:
        case = steps.measure("cpu", "wide-resnet-22", "adamw", chosen)
    finally:
        steps.shapes = whole
    assert [c["name"] for c in case["contenders"]] == ["torch fused", "nbutils loop", "nbutils fast", "copy", "in place"]
    assert all(len(c["step"]) == 2 and min(c["step"]) > 0 for c in case["contenders"])
    assert case["elements"] == 17 and case["largest_difference"] < 1e-5
    assert steps.floor_milliseconds(case) > 0 and "nbutils fast" in steps.report(case)


def test_bench_refuses_what_it_does_not_know():
    with pytest.raises(SystemExit):
        steps.arguments(["--sets", "wide-resnet-23"])
    with pytest.raises(SystemExit):
        steps.arguments(["--rounds", "0"])


RECORDS = sorted(steps.RECORDS.glob("*.json"))


def test_there_is_a_record():
    assert RECORDS, "make bench-steps writes one"


@pytest.mark.parametrize("record", steps.load_records(steps.RECORDS), ids=lambda r: r["name"])
def test_records_are_whole(record):
    measured = [case for case in record["cases"] if not case["not_run"]]
    assert measured and not record["load"]["anyway"]
    for case in measured:
        assert case["largest_difference"] < 1e-3 and case["steps"] * case["rounds"] >= 200
        assert {len(c["step"]) for c in case["contenders"]} == {case["rounds"]}
        lacking = set(steps.CONTENDERS) - {c["name"] for c in case["contenders"]}
        assert lacking <= ({"nbutils compiled"} if case["device"] == "cuda" else set())
        assert steps.milliseconds(case, "nbutils fast") > 0.5 * steps.floor_milliseconds(case)


# --- on a GPU ----------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("engine", [*FAST, "compiled", "auto"])
@pytest.mark.parametrize("ours, hypers, theirs, twin", RULES, ids=IDS)
def test_path_on_a_gpu(engine, ours, hypers, theirs, twin):
    def path(make):
        mine = [torch.nn.Parameter(p.detach().cuda()) for p in params()]
        for p, q in zip(mine, params()):
            p.grad = q.grad.cuda()
        return walk(make(mine))

    torch.testing.assert_close(path(lambda p: ours(p, lr=0.1, engine=engine, **hypers)),
                               path(lambda p: theirs(p, lr=0.1, foreach=False, **twin)), rtol=0, atol=1e-12)
