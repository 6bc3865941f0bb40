"""Adam and AdamW against torch's own, and what bad input gets."""
import copy
import inspect
import io
import math
import pickle

import pytest
import torch

from nbutils.adam import adam_step, decay_weights_, moments
from nbutils.amsgrad import Adam, AdamW
from nbutils.optimizer import check_same_path, optimizer, stepper

ADAM = [{}, {"l2": 0.1}, {"eps": 0.1}, {"betas": (0.0, 0.0)}, {"betas": (0.95, 0.9), "l2": 1e-2, "eps": 1e-3}]
ADAMW = [{}, {"weight_decay": 0.3}, {"weight_decay": 0.0}, {"betas": (0.5, 0.7), "eps": 1e-2}]


def torch_adam(params, l2=0.0, **hypers):
    return torch.optim.Adam(params, weight_decay=l2, **hypers)


@pytest.mark.parametrize("hypers", ADAM, ids=str)
def test_adam_is_torchs(hypers):
    check_same_path(lambda p: Adam(p, **hypers), lambda p: torch_adam(p, **hypers))


@pytest.mark.parametrize("hypers", ADAMW, ids=str)
def test_adamw_is_torchs(hypers):
    check_same_path(lambda p: AdamW(p, **hypers), lambda p: torch.optim.AdamW(p, **hypers))


def test_adam_with_decay_is_adamw():
    check_same_path(lambda p: Adam(p, weight_decay=0.3), lambda p: torch.optim.AdamW(p, weight_decay=0.3))


def test_l2_is_not_decay():
    with pytest.raises(AssertionError, match="part at step"):
        check_same_path(lambda p: Adam(p, l2=0.1), lambda p: Adam(p, weight_decay=0.1))


def parameters(kind):
    """Five float64 parameters with awkward memory, the same at each call."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    tensors = {
        "transposed": [draw(4, 3).t(), draw(5, 2).t(), draw(1), draw(2, 2), draw(3)],
        "channels_last": [draw(2, 3, 4, 4).to(memory_format=torch.channels_last), draw(3), draw(1), draw(2), draw(4, 4)],
        "strided": [draw(12)[::3], draw(6, 6)[1:5, ::2], draw(()), draw(0), draw(2, 3, 4).permute(2, 0, 1)],
    }[kind]
    return [torch.nn.Parameter(t) for t in tensors]


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "strided"])
@pytest.mark.parametrize("ours, theirs", [
    (lambda p: Adam(p, l2=0.1), lambda p: torch.optim.Adam(p, weight_decay=0.1)),
    (lambda p: AdamW(p, weight_decay=0.3), lambda p: torch.optim.AdamW(p, weight_decay=0.3)),
], ids=["Adam", "AdamW"])
def test_awkward_memory_and_closures(kind, ours, theirs):
    """Non-contiguous parameters; a closure that calls backward twice; groups; everything moves."""
    random = torch.Generator().manual_seed(2)
    runs = []
    for make in (ours, theirs):
        p = parameters(kind)
        runs.append((p, make([{"params": p[:2], "lr": 0.03}, {"params": p[2:4]}, {"params": p[4:], "betas": (0.8, 0.95)}])))
    assert any(not q.is_contiguous() for q in runs[0][0])
    rates = [group["lr"] for group in runs[0][1].param_groups]
    for t in range(100):
        noise = [torch.randn(q.shape, generator=random, dtype=torch.float64) for q in runs[0][0]]
        losses = []
        for p, opt in runs:
            for i, group in enumerate(opt.param_groups):
                group["lr"] = rates[i] * (1 + 0.5 * math.sin(t + i))
                group["betas"] = (0.9 - 0.05 * math.sin(0.3 * t), group["betas"][1])

            def closure():
                assert torch.is_grad_enabled()
                opt.zero_grad(set_to_none=t % 2 == 0)
                used = [(q, n) for i, (q, n) in enumerate(zip(p, noise)) if i != 2 or t % 3 == 0]
                first = sum((q * q).sum() for q, _ in used)
                first.backward()                       # the gradients add up ...
                second = sum((q * n).sum() for q, n in used)
                second.backward()                      # ... over two backward passes
                return (first + second).detach()

            losses.append(opt.step(closure))
        assert abs(losses[0] - losses[1]) <= 1e-9
        for a, b in zip(runs[0][0], runs[1][0]):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_torchs_schedulers_move_lr_and_beta1():
    paths = []
    for make in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        opt = make([p], lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=31)
        seen = set()
        for _ in range(30):
            opt.zero_grad()
            (p**2 + p).sum().backward()
            opt.step()
            schedule.step()
            seen.add(opt.param_groups[0]["betas"][0])
        paths.append(p)
        assert len(seen) > 10
    torch.testing.assert_close(*paths, atol=1e-12, rtol=0)


def test_rates_and_betas_may_be_tensors():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, same = AdamW([p], lr=torch.tensor(0.01)), AdamW([q], lr=0.01)
    for _ in range(3):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        ours.step(), same.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_torchs_to_the_bit(dtype):
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 7).to(dtype)) for _ in range(2))
    ours, theirs = AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1, foreach=False, fused=False)
    for t in range(20):
        p.grad = q.grad = torch.cos(torch.arange(7) * (t + 1.0)).to(dtype)
        ours.step(), theirs.step()
    assert torch.equal(p, q)


def test_the_gradient_is_left_alone():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, -2.0, 3.0])
    Adam([p], l2=0.5, weight_decay=0.5).step()
    assert torch.equal(p.grad, torch.tensor([1.0, -2.0, 3.0]))


def test_a_parameter_without_gradient_stays_and_has_no_state():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = AdamW([p, q], weight_decay=0.5)
    p.grad = torch.ones(2)
    opt.step()
    assert torch.equal(q, torch.ones(2)) and q not in opt.state and not torch.equal(p, torch.ones(2))


# --- the decay by hand ------------------------------------------------------------------------

def train(make, decay=None, give=lambda opt: opt, steps=50):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    unused = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    x, y = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
    opt = make([{"params": net[0].parameters(), "lr": 1e-3},
                {"params": [*net[2].parameters(), unused], "lr": 1e-2}])
    for t in range(steps):
        for group in opt.param_groups:
            group["lr"] *= 1.01
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        if decay is not None:
            decay_weights_(give(opt), decay)
        opt.step()
    assert torch.equal(unused, torch.ones(4, dtype=torch.float64))
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("give", [lambda opt: opt, lambda opt: opt.param_groups, lambda opt: iter(opt.param_groups)],
                         ids=["optimizer", "param_groups", "iterator"])
def test_decay_by_hand_is_adamw_to_the_bit(give):
    assert torch.equal(train(Adam, 0.3, give), train(lambda p: AdamW(p, weight_decay=0.3)))


def test_decay_by_hand_works_under_torchs_adam():
    by_hand = train(torch.optim.Adam, 0.3)
    for theirs in (lambda p: torch.optim.AdamW(p, weight_decay=0.3),
                   lambda p: torch.optim.AdamW(p, weight_decay=0.3, foreach=True)):
        torch.testing.assert_close(by_hand, train(theirs), atol=1e-15, rtol=0)


def test_decay_works_with_any_optimizer_and_tensor_rates():
    p = torch.nn.Parameter(torch.full((2,), 2.0))
    p.grad = torch.zeros(2)
    decay_weights_(torch.optim.SGD([p], lr=0.5), 0.5)
    assert p.tolist() == [1.5, 1.5] and p.requires_grad
    decay_weights_(torch.optim.Adam([p], lr=torch.tensor(0.5)), 0.5)
    assert p.tolist() == [1.125, 1.125]


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_decay_is_refused(value):
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="weight_decay"):
        decay_weights_(Adam([p]), value)


@pytest.mark.parametrize("make, name", [
    (lambda p: torch.optim.AdamW(p), "weight_decay=0.01"),
    (lambda p: torch.optim.Adam(p, weight_decay=1e-4), "weight_decay=0.0001"),
    (lambda p: Adam(p, l2=1e-4), "l2=0.0001"),
    (lambda p: AdamW(p), "weight_decay=0.01"),
])
def test_two_regularizers_are_refused_before_anything_is_touched(make, name):
    p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    p.grad = q.grad = torch.ones(1)
    opt = make([{"params": [q]}, {"params": [p]}])
    opt.param_groups[0].update({key: 0 for key in ("l2", "weight_decay") if key in opt.param_groups[0]})
    with pytest.raises(ValueError, match=f"group 1.*{name}.*set it to 0"):
        decay_weights_(opt, 0.3)
    assert p.item() == q.item() == 1


@pytest.mark.parametrize("what", [[torch.nn.Parameter(torch.ones(1))], [{"params": []}]], ids=["parameters", "no lr"])
def test_decay_wants_an_optimizer_or_groups(what):
    with pytest.raises(TypeError, match="takes an optimizer or its param_groups; item 0"):
        decay_weights_(what, 0.3)


# --- bad input ---------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("hypers, message", [
    ({"betas": (1.0, 0.999)}, r"group 0: betas=\(1.0, 0.999\)"),
    ({"betas": (0.9, -0.1)}, r"group 0: betas=\(0.9, -0.1\)"),
    ({"betas": (0.9,)}, r"group 0: betas=\(0.9,\).*pair"),
    ({"betas": 0.9}, "group 0: betas=0.9.*pair"),
    ({"betas": (math.nan, 0.9)}, "group 0: betas="),
    ({"eps": -1e-8}, "group 0: eps=-1e-08"),
    ({"lr": -1.0}, "group 0: lr=-1.0"),
    ({"lr": math.nan}, "group 0: lr=nan"),
    ({"weight_decay": -0.1}, "group 0: weight_decay=-0.1"),
])
def test_values_out_of_range(make, hypers, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.ones(1))], **hypers)


@pytest.mark.parametrize("name, nearest", [("weight_deacy", "weight_decay"), ("epsilon", "eps"), ("beta", "betas")])
def test_misspelt_names(name, nearest):
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=f"AdamW.*{name}.*mean {nearest}"):
        AdamW([p], **{name: 0.5})
    with pytest.raises(TypeError, match=f"AdamW.*{name}.*mean {nearest}"):
        AdamW([{"params": [p], name: 0.5}])


def test_adamw_has_no_l2_and_the_second_group_is_named():
    p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(TypeError, match="l2"):
        AdamW([p], l2=0.1)
    with pytest.raises(ValueError, match="group 1: betas"):
        Adam([{"params": [p]}, {"params": [q], "betas": (2.0, 0.9)}])
    with pytest.raises(ValueError, match="no parameters"):
        Adam([])


# --- being a class like others ------------------------------------------------------------------

def test_signatures():
    assert str(inspect.signature(Adam)) == \
        "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, l2=0.0, weight_decay=0.0, amsgrad=False, *, engine='auto')"
    assert str(inspect.signature(AdamW)) == \
        "(params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, *, engine='auto')"
    p = torch.nn.Parameter(torch.ones(1))
    assert Adam([p], 0.1, (0.5, 0.6), 1e-3, 0.1, 0.2).defaults == dict(
        lr=0.1, betas=(0.5, 0.6), eps=1e-3, l2=0.1, weight_decay=0.2, amsgrad=False)


@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("copier", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_go_on_alike(make, copier):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = make([p], lr=0.1)
    p.grad = torch.arange(3.0, dtype=torch.float64)
    opt.step()
    twin = copier(opt)
    q = twin.param_groups[0]["params"][0]
    for _ in range(3):
        p.grad = q.grad = torch.arange(3.0, dtype=torch.float64)
        opt.step(), twin.step()
    assert type(twin) is make and q is not p and torch.equal(p, q)


def test_classes_and_state_survive_files():
    assert pickle.loads(pickle.dumps(Adam)) is Adam and Adam.__module__ == "nbutils.amsgrad"
    p = torch.nn.Parameter(torch.ones(2))
    opt = AdamW([p])
    p.grad = torch.ones(2)
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = AdamW([torch.nn.Parameter(p.detach().clone())])
    again.load_state_dict(torch.load(file, weights_only=True))
    state = again.state[again.param_groups[0]["params"][0]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and int(state["step"]) == 1
    with pytest.raises(ValueError, match="l2"):
        Adam([torch.nn.Parameter(torch.ones(2))]).load_state_dict(opt.state_dict())
