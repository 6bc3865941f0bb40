"""What the kernel engine must do: run by test_kernel.py, on a GPU or by Triton's interpreter on the CPU."""
import math

import pytest
import torch
from test_engines import IDS, RULES, Odd, Third, conv, layouts, params, walk

from nbutils import engines, kernel
from nbutils.amsgrad import Adam, AdamW
from nbutils.momentum import SGD
from nbutils.optimizer import check_same_path, optimizer, sgd_step, stepper, weight_decay

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def on_device(dtype=torch.float64, n=4, size=7):
    made = []
    for p in params(n, dtype, size):
        made.append(torch.nn.Parameter(p.detach().to(DEVICE)))
        made[-1].grad = p.grad.to(DEVICE)
    return made


@pytest.mark.parametrize("ours, hypers, theirs, twin", RULES, ids=IDS)
def test_float64_path_is_torchs(ours, hypers, theirs, twin):
    if GPU:
        ends = [walk(make(on_device())) for make in (lambda p: ours(p, lr=0.1, engine="kernel", **hypers),
                                                     lambda p: theirs(p, lr=0.1, foreach=False, **twin))]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    else:                                              # moving rates, groups, missing gradients, a restart
        check_same_path(lambda p: ours(p, engine="kernel", **hypers), lambda p: theirs(p, **twin))


@pytest.mark.parametrize("ours, hypers, theirs, twin", RULES, ids=IDS)
def test_float32_path_is_the_loops(ours, hypers, theirs, twin):
    """Tensors shorter and longer than a block, and one that ends with a block."""
    ends = []
    for engine in ("loop", "kernel"):
        mine = on_device(torch.float32, 2) + on_device(torch.float32, 2, 1023)
        ends.append(walk(ours(mine, lr=0.1, engine=engine, **hypers), 10))
    assert (ends[0] - walk(SGD(on_device(torch.float32, 2) + on_device(torch.float32, 2, 1023), lr=0.1), 0)).abs().max() > 0.3
    torch.testing.assert_close(*ends, rtol=0, atol=5e-6)


def test_bfloat16():
    """Within the roundings of a few steps. Triton's interpreter cuts off where a GPU rounds, hence its tolerance."""
    truth, ours = (walk(AdamW(mine, lr=0.1, engine=engine), 10) for mine, engine in (
        ([grown(p) for p in on_device(torch.bfloat16)], "loop"), (on_device(torch.bfloat16), "kernel")))
    torch.testing.assert_close(ours, truth, rtol=0, atol=0.05 if GPU else 0.2)


def grown(p):
    q = torch.nn.Parameter(p.detach().double())
    q.grad = p.grad.double()
    return q


def test_all_operations_that_it_writes():
    """Each operation of the table, against the same stepper by the loop."""
    @stepper(state=("s",))
    def every(p, g, state, *, lr):
        s = state["s"]
        s.lerp_(g, 0.5).sub_(g, alpha=0.25).add_(g.abs(), alpha=2.0).mul_(0.5)
        a = (1 - g.sign() * s).addcmul(g, s, value=0.5).addcmul(g, s)
        b = (s.abs() + 1).sqrt().reciprocal().clamp_min(0.3).clamp_max(2.0).maximum(-g).minimum(g + 3)
        p.addcdiv_(a, b.add_(4.0), value=-lr).sub_((a / b - 2.0).addcdiv(g, b) * lr)
        return p * 0.01 + g.neg()

    assert {name for name, *_ in kernel._TRITON.items()} <= {
        "add", "add alpha", "sub", "sub alpha", "mul", "div", "neg", "reciprocal", "sqrt", "abs", "sign", "lerp",
        "addcmul", "addcmul value", "addcdiv", "addcdiv value", "maximum", "clamp_min", "minimum", "clamp_max"}
    Every = optimizer("Every", every, sgd_step)
    probe = Every(params(1), lr=0.1)
    active, names = engines._plan(probe, probe.param_groups[0])
    used = {name for _, name, *_ in engines._probe(active, names, 1)[0]}
    assert used == set(kernel._TRITON)
    ends = [walk(Every(on_device(), lr=0.1, engine=e), 5) for e in ("loop", "kernel")]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", layouts())
def test_layouts(kind):
    def path(engine):
        draw = torch.Generator().manual_seed(0)
        w, g = (torch.randn(4, 3, 5, 5, generator=draw, dtype=torch.float64).to(DEVICE) for _ in range(2))
        p = torch.nn.Parameter(w.to(memory_format=layouts()[kind][0]))
        p.grad = g.to(memory_format=layouts()[kind][1])
        return walk(AdamW([p], lr=0.1, engine=engine), 3)

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


def test_views_of_one_place_are_not_copied():
    """A 1x1 convolution's weight: other strides, the same order of its elements."""
    p = torch.nn.Parameter(torch.randn(8, 4, 1, 1, device=DEVICE).to(memory_format=torch.channels_last))
    p.grad = torch.randn(8, 4, device=DEVICE)[:, :, None, None].as_strided((8, 4, 1, 1), (4, 1, 1, 1))
    opt = SGD([p], lr=0.1, momentum=0.9, engine="kernel")
    opt.step(), opt.step()
    launches = [x for x in opt._launches.values() if isinstance(x, kernel.Launch)]
    assert len(launches) == 1
    assert launches[0].follow([[p], [p.grad], [opt.state[p]["momentum_buffer"]]])


def test_parameter_with_gaps():
    def path(engine):
        p = torch.nn.Parameter(torch.arange(12.0, dtype=torch.float64, device=DEVICE).view(3, 4)[:, ::2])
        p.grad = torch.arange(6.0, dtype=torch.float64, device=DEVICE).view(3, 2).sin()
        return walk(AdamW([p], engine=engine), 3)

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


def test_parts_of_one_buffer():
    """Parameters at addresses that 16 does not divide."""
    def path(engine):
        flat = torch.arange(40.0, dtype=torch.float32, device=DEVICE)
        mine = [torch.nn.Parameter(flat[1:6]), torch.nn.Parameter(flat[6:39])]
        for p in mine:
            p.grad = p.detach().sin()
        return walk(AdamW(mine, engine=engine), 3)

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=1e-6, atol=1e-6)


def test_empty_and_single_elements():
    mine = [torch.nn.Parameter(torch.ones(n, dtype=torch.float64, device=DEVICE)) for n in (0, 1, 3)]
    for p in mine:
        p.grad = torch.ones_like(p)
    walk(SGD(mine, lr=0.1, engine="kernel"), 2)
    assert mine[1].item() == mine[2][2].item() < 1


def test_new_gradients_each_step():
    """As a training makes them; the old ones' places may be taken by others."""
    def path(engine):
        mine = on_device(n=3)
        opt, draw = AdamW(mine, lr=0.1, engine=engine), torch.Generator().manual_seed(1)
        for _ in range(6):
            for p in mine:
                p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype).to(DEVICE)
            opt.step()
            opt.zero_grad()
        return torch.cat([p.detach() for p in mine])

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("guards", [True, False], ids=["torch's guards", "our own"])
def test_moved_gradients_cost_a_table_and_known_ones_nothing(guards, monkeypatch):
    """Placed once, although gradients move at every step; as many tables as there are new sets of places."""
    if not guards:
        monkeypatch.setattr(kernel, "_Guards", None)
    placed, sent, place, pinned = [], [], kernel.Launch.place, kernel._pinned
    monkeypatch.setattr(kernel.Launch, "place", lambda self, *a: placed.append(1) or place(self, *a))
    monkeypatch.setattr(kernel, "_pinned", lambda *a: sent.append(1) or pinned(*a))

    def path(engine, visits):
        draw, mine = torch.Generator().manual_seed(1), on_device(n=3)
        sets = [[torch.randn(p.shape, generator=draw, dtype=p.dtype).to(DEVICE) for p in mine] for _ in range(12)]
        opt = AdamW(mine, lr=0.1, engine=engine)
        for i in visits:
            for p, g in zip(mine, sets[i]):
                p.grad = g
            opt.step()
        return torch.cat([p.detach() for p in mine])

    few = [0, 1, 2, 0, 1, 2, 2, 1, 0, 0]                 # three sets of places
    many = [*range(12), *range(12), 11, 4, 4, 11, 5]     # more than are kept: rows are written anew; 4 to 11 are known at the end
    for visits, tables in ((few, 3), (many, 24)):
        placed.clear(), sent.clear()
        torch.testing.assert_close(path("kernel", visits), path("loop", visits), rtol=0, atol=1e-12)
        assert (len(placed), len(sent)) == (1, tables)


def test_other_gradients_in_between_are_noticed():
    """What is followed is found again after a step whose gradients could not be: missing, or of another layout."""
    def path(engine):
        draw = torch.Generator().manual_seed(2)
        w, g, h = (torch.randn(4, 6, generator=draw, dtype=torch.float64).to(DEVICE) for _ in range(3))
        mine = [torch.nn.Parameter(w), torch.nn.Parameter(w + 1)]
        opt = AdamW(mine, lr=0.1, engine=engine)
        for grads in ((g, h), (h, g), (g, None), (g, h), (g.t().contiguous().t(), h), (h, g), (g, h), (None, h), (h, h + 0)):
            mine[0].grad, mine[1].grad = grads
            opt.step()
        return torch.cat([p.detach().flatten() for p in mine])

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


def test_new_gradients_of_another_layout_each_step():
    """Each is copied for the kernel; a copy's place may be the next gradient's."""
    def path(engine):
        draw = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(16, 16, 3, 3, generator=draw, dtype=torch.float64).to(DEVICE)
                               .to(memory_format=torch.channels_last))
        opt = AdamW([p], lr=0.1, engine=engine)
        for _ in range(12):
            p.grad = torch.randn(16, 16, 3, 3, generator=draw, dtype=torch.float64).to(DEVICE)
            opt.step()
            opt.zero_grad()
        return p.detach()

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.nn.Parameter(torch.ones(1)), "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype():
    """They are read as what they are, also where only some are; the loop has no operation for both."""
    def path(dtype, engine):
        mine = on_device(torch.float32, 2)
        g, mine[1].grad = mine[1].grad, None
        mine[1].grad_dtype = dtype
        mine[1].grad = g.to(dtype)
        return walk(AdamW(mine, lr=0.1, engine=engine), 3)

    torch.testing.assert_close(path(torch.float64, "kernel"), path(torch.float32, "loop"), rtol=0, atol=5e-6)


def test_states_may_have_any_name():
    """Also those of variables in the kernel."""
    for name in ("p", "g", "n0", "x1", "left", "at", "which", "begin", "at_p", "s_v", "tl"):
        @stepper(state=(name,))
        def averaging(p, g, state, *, beta=0.9):
            return state[name].lerp_(g, 1 - beta).add(g.abs(), alpha=0.5)

        Averaging = optimizer("Averaging", averaging, sgd_step)
        ends = [walk(Averaging(on_device(n=2), lr=0.1, engine=e), 3) for e in ("loop", "kernel")]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_nothing_moves_before_all_can_be_run():
    """Two lists, of which the second cannot be written: fast takes another way for both, from the start."""
    @stepper
    def late(p, g, state):
        return g.tanh() if state["step"] > 2 else g

    def path(engine):
        mine = on_device(n=2)
        opt, kept = optimizer("Late", late, sgd_step)(mine, lr=0.1, engine=engine), mine[1].grad
        for t in range(4):
            mine[1].grad = kept if t == 3 else None          # at t == 3 the one makes its fourth step, the other its first
            try:
                opt.step()
            except ValueError:
                assert engine == "kernel" and t >= 2
        return torch.cat([p.detach() for p in mine]), [opt.state[p].get("step", 0) for p in mine]

    (ours, counts), (loops, same) = path("fast"), path("loop")
    torch.testing.assert_close(ours, loops, rtol=0, atol=1e-12)
    assert counts == same == [4, 1]
    assert path("kernel")[1] == [2, 0]


def test_launches_are_not_kept_without_end():
    mine, draw = on_device(n=9), torch.Generator().manual_seed(0)
    opt, kept = SGD(mine, lr=0.1, momentum=0.9, engine="kernel"), [p.grad for p in mine]
    for _ in range(150):
        for p, g, here in zip(mine, kept, torch.rand(9, generator=draw) < 0.5):
            p.grad = g if here else None
        opt.step()
    assert len(opt._launches) < 300


def test_formulas_give_what_the_steppers_calculate():
    """For our rules they are written; what they cannot say is asked for at each step."""
    for kind, hypers in ((AdamW, {"amsgrad": True}), (Adam, {"l2": 0.1}), (SGD, {"momentum": 0.9, "nesterov": True})):
        opt = kind(params(1), lr=0.3, **hypers)
        active, names = engines._plan(opt, opt.param_groups[0])
        assert kernel.write_formulas(active, names, 5) is not None
        for step in (1, 2, 1000):
            written, asked = kernel._read(active, names, step), engines._probe(active, names, step)
            assert written[0] == asked[0] and list(written[1]) == asked[1]


UNWRITABLE = {
    "a number or nothing": ({"k": None}, lambda g, k, lr: g if k is None else g * k),
    "flags in a tuple": ({"k": (True, False)}, lambda g, k, lr: g * 2 if k[0] else g),
    "as many as there are": ({"k": (0.5, 0.25)}, lambda g, k, lr: g * k[0] * k[-1] * len(k)),
    "a text": ({"k": "b"}, lambda g, k, lr: g * {"a": 0.5, "b": 2.0}[k]), "what kind": ({"k": 3}, lambda g, k, lr: g * 0.5 if isinstance(k, int) else g),
    "a count": ({"k": 3}, lambda g, k, lr: g * sum(0.5 for _ in range(k))), "an attribute": ({"k": 1}, lambda g, k, lr: g * lr.real),
    "infinity": ({"k": 1}, lambda g, k, lr: g.clamp_max(math.inf)), "math": ({"k": 0.5}, lambda g, k, lr: g * math.exp(-k)),
    "a tensor": ({"k": 1.0}, lambda g, k, lr: g * torch.tensor(0.5, dtype=torch.float64)), "a choice": ({"k": 0.0}, lambda g, k, lr: g * (k or 0.5)),
    "an attempt": ({"k": 1.0}, lambda g, k, lr: g * attempt(lr)), "a dict": ({"k": {"a": 2.0}}, lambda g, k, lr: g * k["a"]),
}


def attempt(lr):
    try:
        return 0.5 if lr < 0.2 else 2.0
    except TypeError:
        return 7.0


@pytest.mark.parametrize("case", UNWRITABLE)
def test_rules_that_formulas_may_not_freeze(case):
    hypers, rule = UNWRITABLE[case]

    @stepper
    def odd(p, g, state, *, lr, k):
        return rule(g, k, lr)

    Odd = optimizer("Odd", odd, sgd_step)
    ends = [walk(Odd(on_device(n=2), lr=0.1, engine=e, **hypers), 4) for e in ("loop", "kernel")]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_another_value_of_what_is_no_number_is_another_rule():
    @stepper
    def by_flag(p, g, state, *, k):
        return g * 2 if k[0] else g

    def path(engine):
        opt = optimizer("Flagged", by_flag, sgd_step)(on_device(n=2), lr=0.1, k=(True,), engine=engine)
        for k in ((True,), (False,), (True,), (False, 1)):
            opt.param_groups[0]["k"] = k
            opt.step()
        return torch.cat([p.detach() for p in opt.param_groups[0]["params"]])

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


def changes():
    """What may happen between two steps, each as a function of the optimizer and its parameters."""
    def forget(opt, mine):
        opt.state[mine[0]] = {}

    def empty_in_place(opt, mine):
        for state in opt.state.values():
            state.clear()

    def drop_one_tensor(opt, mine):
        del opt.state[mine[1]]["exp_avg_sq"]

    def clear(opt, mine):
        opt.state.clear()

    def swap_state(opt, mine):
        opt.state[mine[0]]["exp_avg"] = torch.ones_like(mine[0])

    def move_state(opt, mine):
        opt.state[mine[0]]["exp_avg"].data = torch.ones_like(mine[0])

    def move(opt, mine):
        mine[0].data = mine[0].detach().clone() + 1

    def lay_out_anew(opt, mine):
        mine[0].data = mine[0].detach().t().contiguous().t()

    def turn_in_place(opt, mine):
        square = mine[3]
        square.data = square.data.t()

    def turn_state_in_place(opt, mine):
        state = opt.state[mine[3]]
        state["exp_avg"].data = state["exp_avg"].data.t()

    def shorten_in_place(opt, mine):
        mine[1].data, mine[1].grad = mine[1].data[:2], None
        mine[1].grad = torch.ones(2, dtype=torch.float64, device=DEVICE)
        for name in ("exp_avg", "exp_avg_sq"):
            opt.state[mine[1]][name] = opt.state[mine[1]][name][:2]

    def tensor_as_step(opt, mine):
        opt.state[mine[0]]["step"] = torch.tensor(float(opt.state[mine[0]]["step"]))

    def transpose_gradient(opt, mine):
        g = mine[0].grad
        g.as_strided_(g.shape, (1, g.shape[0]))

    def silence(opt, mine):
        mine[1].grad = None

    def reload(opt, mine):
        opt.load_state_dict(opt.state_dict())

    def amsgrad_on(opt, mine):
        opt.param_groups[0]["amsgrad"] = True

    def stop_decay(opt, mine):
        opt.param_groups[0]["weight_decay"] = 0.0

    def another_engine(opt, mine):
        engine, opt.engine = opt.engine, "loop"
        opt.step()
        opt.engine = engine

    return {f.__name__: f for f in (forget, empty_in_place, drop_one_tensor, clear, swap_state, move_state, move, lay_out_anew, turn_in_place, turn_state_in_place,
                                    shorten_in_place, tensor_as_step, transpose_gradient, silence, reload,
                                    amsgrad_on, stop_decay, another_engine)}


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_nothing_that_changes_between_steps_is_missed(change):
    def path(engine):
        draw = torch.Generator().manual_seed(0)
        mine = []
        for shape in ((3, 5), (4,), (6, 2), (3, 3)):
            w, g = (torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE) for _ in range(2))
            mine.append(torch.nn.Parameter(w))
            mine[-1].grad = g
        opt = AdamW(mine, lr=0.1, engine=engine)
        for t in range(6):
            if t == 3:
                change(opt, mine)
            opt.step()
        return torch.cat([p.detach().flatten() for p in mine])

    torch.testing.assert_close(path("kernel"), path("loop"), rtol=0, atol=1e-12)


def test_two_groups_and_a_late_gradient():
    def path(engine):
        mine = on_device(n=4)
        opt, late = AdamW([{"params": mine[:2], "lr": 0.1}, {"params": mine[2:], "weight_decay": 0.5}], engine=engine), mine[3].grad
        for t in range(5):
            mine[3].grad = late if t > 1 else None
            opt.step()
        return torch.cat([p.detach() for p in mine]), [opt.state[p]["step"] for p in mine]

    (ours, counts), (loops, same) = path("kernel"), path("loop")
    torch.testing.assert_close(ours, loops, rtol=0, atol=1e-12)
    assert counts == same == [5, 5, 5, 3]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_nan_is_not_hidden(amsgrad):
    mine = on_device(n=2)
    mine[0].grad[1] = math.nan
    AdamW(mine, lr=0.1, amsgrad=amsgrad, engine="kernel").step()
    assert mine[0][1].isnan() and mine[0].isnan().sum() == 1 and mine[1].isfinite().all()


def test_autograd_sees_that_weights_changed():
    """Weights changed between forward and backward: autograd must refuse, as after any optimizer of torch."""
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    opt = SGD([p], lr=0.1, engine="kernel")
    for _ in range(2):
        loss = (p * p).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        p.grad = torch.ones_like(p)


def test_rules_it_cannot_write():
    with pytest.raises(ValueError, match="Odd: a stepper uses 'pow', which nbutils.kernel cannot write in Triton; "
                                         "use engine='fast', 'compiled' or 'lists'"):
        Odd(on_device(), engine="kernel").step()


def test_a_rule_that_branches_on_the_step():
    ends = [walk(Third(on_device(), lr=0.1, engine=e), 7) for e in ("loop", "kernel")]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_a_stepper_of_ones_own():
    @stepper(state=("exp_avg",))
    def lion(p, g, state, *, betas=(0.9, 0.99)):
        direction = state["exp_avg"].lerp(g, 1 - betas[0]).sign()
        state["exp_avg"].lerp_(g, 1 - betas[1])
        return direction

    Lion = optimizer("Lion", weight_decay, lion, sgd_step, weight_decay=0.1)
    ends = [walk(Lion(on_device(), lr=0.1, engine=e), 5) for e in ("loop", "kernel")]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_fast_takes_the_kernel_and_else_what_there_is():
    opt = AdamW(on_device(), engine="fast")
    opt.step()
    assert any(isinstance(x, kernel.Launch) for x in opt._launches.values())
    mine, twins = on_device(), on_device()
    Adam(mine, l2=0.1, weight_decay=0.1, engine="fast").step(), Adam(twins, l2=0.1, weight_decay=0.1, engine="loop").step()
    for p, q in zip(mine, twins):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_one_kernel_serves_all_steps():
    """Rates and step counts move and nothing is written anew; another dtype or rule has another kernel."""
    kernel._load.cache_clear()
    for _ in range(2):
        walk(AdamW(on_device(torch.float32), engine="kernel"), 10)
    assert kernel._load.cache_info().misses == 1
    walk(AdamW(on_device(torch.float32), amsgrad=True, engine="kernel"), 2)
    walk(AdamW(on_device(torch.float64), engine="kernel"), 2)
    assert kernel._load.cache_info().misses == 3


def test_conv_helper_agrees():
    if not GPU:
        torch.testing.assert_close(conv("same", "kernel"), conv("same", "loop"), rtol=0, atol=1e-12)
