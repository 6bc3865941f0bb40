"""SGD beside torch.optim.SGD, and what bad input gets (Adam has tests/test_adam.py)."""
import copy
import inspect
import io
import math
import pickle

import pytest
import torch

from nbutils.momentum import SGD, momentum
from nbutils.optimizer import (REQUIRED, NonFiniteError, Optimizer, check_same_path, l2, optimizer, sgd_step,
                               stepper, weight_decay)

Decayed = optimizer("Decayed", weight_decay, sgd_step, weight_decay=0.1)  # at module level, so that pickle finds it


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values or (1.0, -2.0, 3.0), dtype=torch.float64))


def with_gradient(*values):
    p = parameter(*values)
    p.grad = torch.full_like(p, 0.5)
    return p


# ---- equal to torch -------------------------------------------------------------------------

@pytest.mark.parametrize("ours, theirs", [
    ({}, {}),
    ({"l2": 0.1}, {"weight_decay": 0.1}),
    ({"weight_decay": 0.1}, {"weight_decay": 0.1}),  # the same only without momentum
    ({"momentum": 0.9}, {"momentum": 0.9}),
    ({"momentum": 0.9, "l2": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}),
    ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    ({"momentum": 0.9, "nesterov": True, "l2": 0.1}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
])
def test_sgd_takes_torchs_path(ours, theirs, capsys):
    check_same_path(lambda groups: SGD(groups, **ours), lambda groups: torch.optim.SGD(groups, **theirs))
    assert "one path for 100 steps (tolerance 1e-12)" in capsys.readouterr().out


@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_decay_takes_the_path_of_decay_by_hand(nesterov):
    class ByHand(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - group["lr"] * 0.1)
            super().step()

    check_same_path(lambda groups: SGD(groups, momentum=0.9, nesterov=nesterov, weight_decay=0.1),
                    lambda groups: ByHand(groups, momentum=0.9, nesterov=nesterov))


@pytest.mark.parametrize("other", [{"momentum": 0.8}, {"momentum": 0.9, "dampening": 0.1}, {}])
def test_check_same_path_fails_where_the_memory_differs(other):
    with pytest.raises(AssertionError, match="part at step 2, group 0, parameter 0: .* apart, tolerance 1e-12"):
        check_same_path(lambda groups: SGD(groups, momentum=0.9), lambda groups: torch.optim.SGD(groups, **other))


def test_l2_and_decay_part_under_momentum():
    with pytest.raises(AssertionError, match="part at step 2"):
        check_same_path(lambda groups: SGD(groups, momentum=0.9, weight_decay=0.1),
                        lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1))


def test_check_same_path_fails_for_a_state_that_is_not_saved():
    class Forgets(SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict({**state_dict, "state": {}})

    with pytest.raises(AssertionError, match="part at step 51"):
        check_same_path(lambda groups: Forgets(groups, momentum=0.9),
                        lambda groups: torch.optim.SGD(groups, momentum=0.9))


def test_check_same_path_fails_for_nan():
    with pytest.raises(AssertionError, match="part at step 1, .*nan apart"):
        check_same_path(lambda groups: SGD([{**g, "lr": torch.tensor(0.1)} for g in groups]),
                        lambda groups: torch.optim.SGD([{**g, "lr": math.nan} for g in groups]))


def test_learning_rate_as_a_tensor():
    p, q = with_gradient(), with_gradient()
    SGD([p], lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9, weight_decay=0.1).step()
    SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.allclose(p, q, rtol=0, atol=1e-15)


def test_loads_a_state_that_torch_saved():
    p, q = with_gradient(), with_gradient()
    theirs, ours = torch.optim.SGD([p], lr=0.1, momentum=0.9), SGD([q], lr=0.1, momentum=0.9)
    theirs.step()
    with torch.no_grad():
        q.copy_(p)
    saved = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict({"state": saved["state"], "param_groups": ours.state_dict()["param_groups"]})
    theirs.step(), ours.step()
    assert torch.equal(p, q)


# ---- a torch.optim.Optimizer in every way ---------------------------------------------------

def test_signature():
    assert str(inspect.signature(SGD)) == \
        "(params, lr, momentum=0.0, nesterov=False, l2=0.0, weight_decay=0.0, *, engine='auto')"
    assert list(SGD.hypers) == ["lr", "momentum", "nesterov", "l2", "weight_decay"]
    assert SGD.hypers["lr"] is REQUIRED and issubclass(SGD, Optimizer) and "lr : float" in SGD.__doc__
    p = parameter()
    assert SGD([p], 0.1, 0.9, True).param_groups[0]["nesterov"] is True


def test_steppers_stay_functions():
    p, g = torch.tensor(2.0), torch.tensor(3.0)
    assert l2(p, g, {}, l2=0.5).item() == 4 and weight_decay(p, g, {}, lr=0.125, weight_decay=0.5) is g
    assert p.item() == 1.875 and momentum.state_names == ("momentum_buffer",)
    assert weight_decay.hypers == {"lr": REQUIRED, "weight_decay": 0.0} and l2.skip_at_zero == "l2"


def test_gradient_is_left_alone():
    p = with_gradient()
    opt = SGD([p], lr=0.1, momentum=0.9, nesterov=True, l2=0.1, weight_decay=0.1)
    opt.step(), opt.step()
    assert torch.equal(p.grad, torch.full_like(p, 0.5))


def test_state_is_made_when_needed_only():
    p, q = with_gradient(), parameter()
    opt = SGD([p, q], lr=0.1)
    opt.step()
    assert opt.state[p] == {"step": 1} and q not in opt.state
    opt.param_groups[0]["momentum"] = 0.9
    opt.step()
    assert opt.state[p]["step"] == 2 and type(opt.state[p]["step"]) is int
    assert torch.equal(opt.state[p]["momentum_buffer"], p.grad)


def make(kind):
    p = with_gradient()
    opt = kind([p], lr=0.1, **({"momentum": 0.9} if kind is SGD else {}))
    opt.step()
    return opt


@pytest.mark.parametrize("kind", [SGD, Decayed])
@pytest.mark.parametrize("copied", [lambda opt: pickle.loads(pickle.dumps(opt)), copy.deepcopy])
def test_copies_go_on_by_themselves(kind, copied):
    opt = make(kind)
    twin = copied(opt)
    p, q = opt.param_groups[0]["params"][0], twin.param_groups[0]["params"][0]
    q.grad = p.grad.clone()
    opt.step(), twin.step()
    assert type(twin) is kind and p is not q and torch.equal(p, q)


def test_state_dict_is_plain_data():
    opt = make(SGD)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert set(loaded["state"][0]) == {"step", "momentum_buffer"}
    assert set(loaded["param_groups"][0]) == {"params", *SGD.hypers}


def test_closure_and_zero_grad():
    p = parameter()
    opt = SGD([p], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == pytest.approx(14)
    assert torch.allclose(p.detach(), 0.8 * parameter().detach()) and opt.step() is None


def test_torchs_schedulers_move_lr_and_momentum():
    opt = SGD([{"params": [with_gradient()]}, {"params": [with_gradient()], "lr": 0.2}], lr=0.4, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=4)
    for _ in range(2):
        opt.step(), schedule.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.2, 0.1])
    opt = SGD([with_gradient()], lr=0.1, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=10)
    begin = opt.param_groups[0]["momentum"]
    opt.step(), cycle.step()
    assert opt.param_groups[0]["momentum"] < begin == 0.95
    opt.load_state_dict(opt.state_dict())  # the scheduler's keys pass the door


def test_add_param_group_and_named_parameters():
    model = torch.nn.Linear(2, 1)
    opt = SGD(model.named_parameters(), lr=0.1)
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    opt = SGD([model.weight], lr=0.1)
    opt.add_param_group({"params": [model.bias], "lr": 0.2, "initial_lr": 0.2, "name": "bias"})
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2]


def test_gradient_scaler():
    p = parameter(1.0)
    opt, scaler = SGD([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((3 * p).sum()).backward()
    assert p.grad.item() == 12
    scaler.step(opt), scaler.update()
    assert p.item() == pytest.approx(0.7)
    p.grad.fill_(math.inf)
    scaler.step(opt), scaler.update()
    assert p.item() == pytest.approx(0.7) and scaler.get_scale() == 2.0  # skipped, and scaled down


def test_order_in_the_list_is_the_difference():
    Late = optimizer("Late", momentum, l2, sgd_step, momentum=0.9)
    check_same_path(lambda groups: Late(groups, l2=0.1),
                    lambda groups: SGD(groups, momentum=0.9, weight_decay=0.1))


# ---- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, error, words", [
    ({"lr": 0.1, "momentun": 0.9}, TypeError, ["SGD: unknown", "'momentun'", "Did you mean momentum?", "nesterov"]),
    ({}, TypeError, ["SGD, group 0: lr is missing", "give it to the optimizer"]),
    ({"lr": -0.1}, ValueError, ["SGD, group 0: lr=-0.1", "a number in [0, inf)"]),
    ({"lr": math.nan}, ValueError, ["lr=nan"]),
    ({"lr": math.inf}, ValueError, ["lr=inf"]),
    ({"lr": "fast"}, ValueError, ["lr='fast' must be a number"]),
    ({"lr": None}, ValueError, ["lr=None must be a number"]),
    ({"lr": torch.ones(2)}, ValueError, ["lr=tensor([1., 1.]) must be a number"]),
    ({"lr": torch.tensor(-1.0)}, ValueError, ["lr=tensor(-1.)"]),
    ({"lr": 0.1, "l2": -1}, ValueError, ["l2=-1"]),
    ({"lr": 0.1, "weight_decay": -1}, ValueError, ["weight_decay=-1"]),
    ({"lr": 0.1, "momentum": 1.0}, ValueError, ["momentum=1.0", "a number in [0, 1)"]),
    ({"lr": 0.1, "momentum": -0.1}, ValueError, ["momentum=-0.1"]),
    ({"lr": 0.1, "nesterov": True}, ValueError, ["nesterov=True does nothing while momentum=0", "set momentum"]),
])
def test_bad_hyper_parameters(arguments, error, words):
    with pytest.raises(error) as caught:
        SGD([parameter()], **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("group, error, words", [
    ({"lrr": 1}, TypeError, ["SGD, group 1: unknown", "'lrr'", "Did you mean lr?"]),
    ({"lr": -1}, ValueError, ["SGD, group 1: lr=-1"]),
    ({"momentum": 2}, ValueError, ["SGD, group 1: momentum=2"]),
    ({"nesterov": True}, ValueError, ["SGD, group 1: nesterov=True"]),
    *[({"lr_scale": bad}, ValueError, [f"SGD, group 1: lr_scale={bad!r} must be a number in [0, inf)"])
      for bad in (-0.5, float("nan"), float("inf"), None, "0.5", (1.0, 2.0), torch.ones(2))],
])
@pytest.mark.parametrize("later", [False, True])
def test_bad_groups(group, error, words, later):
    first, second = {"params": [parameter()]}, {"params": [parameter()], **group}
    with pytest.raises(error) as caught:
        if later:
            SGD([first], lr=0.1).add_param_group(second)
        else:
            SGD([first, second], lr=0.1)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("scale", [0, 0.0, 0.5, 3, torch.tensor(0.5)])
def test_a_group_may_hold_a_scale_of_its_rate(scale):
    """It is kept, goes through a checkpoint, and by itself changes no step: who schedules the rate applies it."""
    plain, scaled = [SGD([{"params": [torch.nn.Parameter(torch.ones(2))], **more}], lr=0.1) for more in ({}, {"lr_scale": scale})]
    for opt in (plain, scaled):
        p = opt.param_groups[0]["params"][0]
        p.grad = torch.ones(2)
        opt.step()
    assert torch.equal(plain.param_groups[0]["params"][0], p) and "lr_scale" not in plain.param_groups[0]
    plain.load_state_dict(scaled.state_dict())
    assert plain.param_groups[0]["lr_scale"] == scale
    with pytest.raises(TypeError, match="lr_scale"):
        SGD([parameter()], lr=0.1, lr_scale=0.5)                      # of a group, not a hyper-parameter of all


def test_lr_may_stand_in_each_group_or_must_not_miss():
    SGD([{"params": [parameter()], "lr": 0.1}])
    with pytest.raises(TypeError, match="group 1: lr is missing"):
        SGD([{"params": [parameter()], "lr": 0.1}, {"params": [parameter()]}])


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), ("a", 0.9), (0.9, 0.99, 0.999), None])
def test_bad_betas(betas):
    @stepper
    def average(p, g, state, *, betas=(0.9, 0.99)):
        return g

    Average = optimizer("Average", average, sgd_step)
    Average([parameter()], lr=0.1, betas=[0.9, 0.999])
    with pytest.raises(ValueError, match=r"group 0: betas=.* must be a pair of numbers in \[0, 1\)"):
        Average([parameter()], lr=0.1, betas=betas)


def test_no_parameters():
    model = torch.nn.Linear(2, 1)
    parameters = model.parameters()
    SGD(parameters, lr=0.1)
    for nothing in ([], parameters):
        with pytest.raises(ValueError, match="SGD: there are no parameters; a generator"):
            SGD(nothing, lr=0.1)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        SGD(model.weight, lr=0.1)


def test_too_many_or_twice():
    with pytest.raises(TypeError, match="too many positional"):
        SGD([parameter()], 0.1, 0.9, False, 0.0, 0.0, 1.0)
    with pytest.raises(TypeError, match="multiple values for argument 'lr'"):
        SGD([parameter()], 0.1, lr=0.1)


def test_sparse_gradient_is_refused_before_anything_moves():
    table, p = torch.nn.Embedding(4, 2, sparse=True), with_gradient()
    table(torch.tensor([1])).sum().backward()
    opt = SGD([{"params": [p]}, {"params": table.parameters()}], lr=0.1)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="SGD, group 1: a sparse gradient; use .*sparse=False"):
        opt.step()
    assert torch.equal(p, before)


def test_complex_parameter_is_refused():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="SGD, group 0: a complex parameter; .*view_as_real"):
        SGD([p], lr=0.1).step()


def test_state_of_another_optimizer():
    p = parameter()
    saved = torch.optim.SGD([p], lr=0.1).state_dict()
    with pytest.raises(ValueError, match="SGD: the state_dict has no l2; it is another optimizer's"):
        SGD([p], lr=0.1).load_state_dict(saved)


def test_not_finite():
    p, q = with_gradient(), with_gradient()
    opt = SGD([{"params": [p]}, {"params": [parameter(), q]}], lr=0.1)
    opt.check_finite()
    q.grad[0] = math.nan
    with pytest.raises(NonFiniteError, match="SGD: the gradient of parameter 1 of group 1 is not finite; lower lr"):
        opt.check_finite()
    q.grad = None
    with torch.no_grad():
        p[1] = math.inf
    with pytest.raises(FloatingPointError, match="SGD: parameter 0 of group 0 is not finite"):
        opt.check_finite()


def test_steppers_and_lists_that_are_none():
    with pytest.raises(TypeError, match=r"bad\(p, g, state, lr\) is no stepper"):
        @stepper
        def bad(p, g, state, lr):
            return g

    with pytest.raises(TypeError, match="worse: unknown hyper-parameter 'momentun'. Did you mean momentum?"):
        @stepper(skip_at_zero="momentun")
        def worse(p, g, state, *, momentum=0.0):
            return g

    @stepper
    def silent(p, g, state):
        g * 2

    with pytest.raises(TypeError, match="stepper silent must return the direction g"):
        optimizer("Silent", silent, sgd_step)([with_gradient()], lr=0.1).step()
    with pytest.raises(TypeError, match="Odd: unknown hyper-parameter 'momentun'"):
        optimizer("Odd", momentum, sgd_step, momentun=0.9)
    with pytest.raises(ValueError, match="Twice: momentum and momentum both keep a state named momentum_buffer"):
        optimizer("Twice", momentum, momentum, sgd_step)


# ---- slips of a first program -----------------------------------------------------------------

def test_a_module_for_its_parameters_is_refused_with_the_remedy():
    model = torch.nn.Linear(2, 1)
    for params, name in ((model, "Linear"), (torch.nn.Sequential(model), "Sequential"), (model.parameters, "parameters")):
        with pytest.raises(TypeError, match=f"SGD: params is {name}; write model.parameters"):
            SGD(params, lr=0.1)


def test_l2_under_adamw_names_who_takes_it():
    from nbutils.amsgrad import AdamW

    with pytest.raises(TypeError, match="AdamW: unknown hyper-parameter 'l2'.*l2 is taken by Adam and SGD"):
        AdamW([parameter()], lr=0.1, l2=1e-4)


def test_engine_is_among_the_names_that_exist():
    with pytest.raises(TypeError, match="unknown hyper-parameter 'fused'. There are: .*engine"):
        SGD([parameter()], lr=0.1, fused=True)
