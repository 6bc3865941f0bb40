"""The conformance kit: it passes right optimizers, names planted faults, and finds conventions."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nbutils.amsgrad import Adam, AdamW
from nbutils.conformance import (FAULTS, SCENARIOS, ConformanceError, Convention, Report, Rule, _candidates, _explain,
                                 _golden, _set_hypers, _tape, check_optimizer, golden_path, identify, rule)
from nbutils.momentum import SGD

GOLDEN = json.loads((Path(__file__).parent / "golden_conformance.json").read_text())
O = torch.optim
L2 = {"weight_decay": 0.1, "decay": "L2"}


@pytest.fixture(autouse=True)
def float64_by_default():
    """torch's NAdam keeps a product in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ---- the reference ------------------------------------------------------------------------------

@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["rule"]["name"] + "-" + c["what"])
def test_golden_paths_stay_what_they_were(case):
    path = golden_path(rule(**case["rule"]), GOLDEN["start"], GOLDEN["gradients"], GOLDEN["lr"])
    expected = torch.tensor(case["path"], dtype=torch.float64)
    assert torch.allclose(torch.stack(path), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", [c for c in GOLDEN["cases"] if c["torch"]],
                         ids=lambda c: c["rule"]["name"] + "-" + c["what"])
def test_golden_paths_are_torchs(case):
    p = torch.nn.Parameter(torch.tensor(GOLDEN["start"], dtype=torch.float64))
    kind, arguments = case["torch"]
    optimizer, path = getattr(O, kind)([p], lr=GOLDEN["lr"], **arguments), []
    for g in GOLDEN["gradients"]:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        path.append(p.detach().tolist())
    assert torch.allclose(torch.tensor(path), torch.tensor(case["path"]), rtol=0, atol=1e-14)


def by_hand(start, gradients, lr, step, beta1=0.9, beta2=0.999):
    """Adam with plain numbers; `step` is a function of m, v, their corrections, and the state."""
    p, m, v, state = start, 0.0, 0.0, {"top": 0.0}
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p -= lr * step(m, v, 1 - beta1**t, 1 - beta2**t, state)
    return p


def optax_max(m, v, c1, c2, state):
    state["top"] = max(state["top"], v / c2)
    return m / c1 / (math.sqrt(state["top"]) + 1e-8)


def paper_max(m, v, c1, c2, state):
    state["top"] = max(state["top"], v)
    return m / (math.sqrt(state["top"]) + 1e-8)


@pytest.mark.parametrize("settings, step", [
    ({"amsgrad": "optax"}, optax_max), ({"amsgrad": "paper"}, paper_max),
    ({"eps_at": "before", "eps": 1e-3}, lambda m, v, c1, c2, s: m / c1 * math.sqrt(c2) / (math.sqrt(v) + 1e-3)),
    ({"eps_at": "root", "eps": 1e-3}, lambda m, v, c1, c2, s: m / c1 / math.sqrt(v / c2 + 1e-3)),
    ({"floor": 1e-15}, lambda m, v, c1, c2, s: m / c1 / (math.sqrt((v + 1e-15) / c2) + 1e-8)),
    ({"correct": "m"}, lambda m, v, c1, c2, s: m / c1 / (math.sqrt(v) + 1e-8)),
    ({"correct": "none"}, lambda m, v, c1, c2, s: m / (math.sqrt(v) + 1e-8)),
])
def test_what_torch_does_not_have_is_as_by_hand(settings, step):
    for size in (1.0, 1e-7):  # where eps and its like are nothing, and where they are much
        gradients = [size * g for g in (3.0, -0.5, 0.2, 0.1, -0.4)]
        path = golden_path(rule("adam", **settings), [1.0], [[g] for g in gradients], 0.1)
        assert path[-1].item() == pytest.approx(by_hand(1.0, gradients, 0.1, step), abs=1e-14)


def test_rules_have_names_and_refuse_others():
    assert rule("adamw") == rule("adam", weight_decay=0.01) and str(rule("adamw")) == "adam(weight_decay=0.01)"
    assert rule("adam", eps=1e-8) == rule("adam") and rule("nesterov").momentum == 0.9
    assert rule("adam", amsgrad="paper").correct == "none" and rule("adam").but(eps=0.1).eps == 0.1
    with pytest.raises(ValueError, match="unknown rule 'adan'. Did you mean adam"):
        rule("adan")
    with pytest.raises(TypeError, match="adam: unknown setting 'weightdecay'. Did you mean weight_decay"):
        rule("adam", weightdecay=0.1)
    with pytest.raises(ValueError, match="adam: unknown amsgrad 'keras'. There are: None, torch, optax"):
        rule("adam", amsgrad="keras")
    with pytest.raises(TypeError, match="adam: unknown setting 'lr_at'"):  # a setting of others would do nothing
        rule("adam", lr_at="memory")
    with pytest.raises(TypeError, match="sgd: unknown setting 'momentum'"):
        rule("sgd", momentum=0.9)
    with pytest.raises(ValueError, match=r"adam: betas=0.9 must be a pair of numbers in \[0, 1\)"):
        rule("adam", betas=0.9)
    with pytest.raises(ValueError, match=r"adamw: weight_decay=-1 must be a number in \[0, inf\)"):
        rule("adamw", weight_decay=-1)
    with pytest.raises(AttributeError, match="unknown setting 'decayed'. Did you mean undecayed or decay"):
        rule("adam").decayed


# ---- right optimizers pass ------------------------------------------------------------------------

WAYS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
TORCH = [
    (O.SGD, {}, rule("sgd")),
    (O.SGD, {"weight_decay": 0.1}, rule("sgd", **L2)),
    (O.SGD, {"momentum": 0.8}, rule("momentum", momentum=0.8)),
    (O.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, rule("nesterov", **L2)),
    (O.Adam, {"weight_decay": 0.1}, rule("adam", **L2)),
    (O.Adam, {"amsgrad": True, "eps": 1e-4}, rule("adam", amsgrad="torch", eps=1e-4)),
    (O.AdamW, {"weight_decay": 0.1}, rule("adamw", weight_decay=0.1)),
    (O.AdamW, {"betas": (0.8, 0.99), "amsgrad": True}, rule("adamw", betas=(0.8, 0.99), amsgrad="torch")),
    (O.NAdam, {"weight_decay": 0.1}, rule("nadam", **L2)),
    (O.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, rule("nadam", weight_decay=0.1)),
]
OURS = [
    (SGD, {"momentum": 0.9, "nesterov": True, "l2": 0.1}, rule("nesterov", **L2)),
    (SGD, {"momentum": 0.9, "weight_decay": 0.1}, rule("momentum", weight_decay=0.1)),
    (Adam, {"l2": 0.1, "amsgrad": True}, rule("adam", amsgrad="torch", **L2)),
    (AdamW, {"weight_decay": 0.1}, rule("adamw", weight_decay=0.1)),
]
# On the CPU torch's fused functions mistake these layouts (and SGD's a first gradient that comes late).
FUSED_MISTAKES = {"gaps in memory", "gradients laid out otherwise"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, arguments, expected", TORCH)
def test_torch_passes(kind, arguments, expected, way, capsys):
    check_optimizer(lambda groups: kind(groups, **arguments, **WAYS[way]), expected)
    assert f"passes {len(SCENARIOS)} of {len(SCENARIOS)} scenarios" in capsys.readouterr().out


@pytest.mark.parametrize("kind, arguments, expected", [t for t in TORCH if t[0] is not O.NAdam])
def test_torch_fused_passes_where_layouts_are_alike(kind, arguments, expected):
    left_out = FUSED_MISTAKES | ({"missing gradients"} if "momentum" in arguments else set())
    check_optimizer(lambda groups: kind(groups, **arguments, fused=True), expected,
                    [name for name in SCENARIOS if name not in left_out])


@pytest.mark.parametrize("engine", ["loop", "lists", "fused"])
@pytest.mark.parametrize("kind, arguments, expected", OURS)
def test_ours_pass(kind, arguments, expected, engine):
    check_optimizer(lambda groups: kind(groups, **arguments, engine=engine), expected)


@pytest.mark.parametrize("kind, arguments, expected, scenario", [
    (SGD, {"momentum": 0.9}, rule("momentum"), "moving lr and betas"),
    (AdamW, {"weight_decay": 0.1}, rule("adamw", weight_decay=0.1), "constant"),      # eps in double precision
])
def test_ours_compiled_passes(kind, arguments, expected, scenario):
    check_optimizer(lambda groups: kind(groups, **arguments, engine="compiled"), expected, [scenario])


# ---- planted faults -------------------------------------------------------------------------------

class ByHand(torch.optim.Optimizer):
    """AdamW with amsgrad, tensor by tensor, written apart from the reference; faults override a part."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group, self.state[p])
        return loss

    def move(self, p, group, state):
        if not state:
            state.update(n=0, m=torch.zeros_like(p), v=torch.zeros_like(p), top=torch.zeros_like(p))
        state["n"] += 1
        self.decay(p, group, state)
        state["m"] += (1 - group["betas"][0]) * (p.grad - state["m"])
        state["v"] += (1 - group["betas"][1]) * (p.grad**2 - state["v"])
        root = (self.largest(state) / (1 - group["betas"][1] ** state["n"])).sqrt()
        self.update(p, state["m"] / (1 - self.beta1(group) ** state["n"]), root, group)

    def decay(self, p, group, state):
        p -= group["lr"] * group["weight_decay"] * p

    def largest(self, state):
        torch.maximum(state["top"], state["v"], out=state["top"])
        return state["top"]

    def beta1(self, group):
        return group["betas"][0]

    def update(self, p, m, root, group):
        p -= group["lr"] * m / (root + group["eps"])


class EpsAddedToTheParameter(ByHand):
    def update(self, p, m, root, group):
        p.addcdiv_(m, root, value=-group["lr"]).add_(group["eps"])          # the bracket closes too early


class DecayAfterTheStep(ByHand):
    def move(self, p, group, state):
        super().move(p, group, state)
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def decay(self, p, group, state):
        pass


class DecayOwedUntilTheScheduler(O.Adam):
    """What a loop does that calls step, then the scheduler, and then shrinks the weights."""

    def __init__(self, groups):
        super().__init__(groups, amsgrad=True)
        for group in self.param_groups:
            group["wd"], group["weight_decay"] = 0.1, 0

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and self.state[p]:
                        p.mul_(1 - group["lr"] * group["wd"])
        super().step()
        return loss


class MaxNeverStored(ByHand):
    def largest(self, state):
        return torch.maximum(state["top"], state["v"])


class CorrectionByTheInitialBeta1(ByHand):
    def beta1(self, group):
        return self.defaults["betas"][0]


class CorrectionByTheFirstBeta1Seen(ByHand):
    def beta1(self, group):
        return group.setdefault("first_beta1", group["betas"][0])


class DecaySkippedForAGroup(ByHand):
    def decay(self, p, group, state):
        if group is not self.param_groups[1]:
            super().decay(p, group, state)


class OnlyTheFirstGroupDecays(ByHand):
    def decay(self, p, group, state):
        p -= (group is self.param_groups[0]) * group["lr"] * group["weight_decay"] * p


class BetasCached(ByHand):
    def move(self, p, group, state):
        super().move(p, group | {"betas": self.defaults["betas"]}, state)


class MissingTakenAsZero(ByHand):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                        self.move(p, group, self.state[p])
                        p.grad = None
        return loss


class OneCount(ByHand):
    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)

    def move(self, p, group, state):
        state.setdefault("n", 0)
        for name in ("m", "v", "top"):
            state.setdefault(name, torch.zeros_like(p))
        state["n"] = self.steps - 1
        super().move(p, group, state)

    def load_state_dict(self, saved):
        super().load_state_dict(saved)
        self.steps = max(state["n"] for state in self.state.values())


class StateLost(ByHand):
    def load_state_dict(self, saved):
        super().load_state_dict({**saved, "state": {}})


EXPECTED = rule("adamw", weight_decay=0.1, amsgrad="torch")
PLANTED = [
    (EpsAddedToTheParameter, "eps added to the parameter", "constant"),
    (DecayAfterTheStep, "decay after the step", "constant"),
    (MaxNeverStored, "max never stored", "constant"),
    (CorrectionByTheInitialBeta1, "correction by the initial beta1", "moving lr and betas"),
    (CorrectionByTheFirstBeta1Seen, "correction by the initial beta1", "moving lr and betas"),
    (DecaySkippedForAGroup, "decay skipped for group 1", "constant"),
    (OnlyTheFirstGroupDecays, "decay skipped for groups 1 and 2", "constant"),
    (BetasCached, "moves of betas and momentum ignored", "moving lr and betas"),
    (MissingTakenAsZero, "missing gradients taken as zero", "missing gradients"),
    (OneCount, "one count of steps for all parameters", "missing gradients"),
    (StateLost, "state lost on loading", "saved and loaded"),
]


def test_by_hand_passes_without_a_fault():
    check_optimizer(ByHand, EXPECTED)


@pytest.mark.parametrize("kind, fault, scenario", PLANTED, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_planted_faults_are_named(kind, fault, scenario):
    assert fault in FAULTS
    with pytest.raises(ConformanceError, match=r"parts at step \d+, group \d, parameter \d, element \(") as caught:
        check_optimizer(kind, EXPECTED)
    report = caught.value.args[0]
    assert report.explanation == fault and not report.passed
    assert next(iter(report.failures)) == scenario
    assert str(report).endswith(f"explained by: {fault}")
    assert "is " in report.failures[scenario] and ", should be " in report.failures[scenario]


def walk(right, taken, name):
    """A scenario for the rule `right`, and the path that the rule `taken` takes through it."""
    tape = _tape(name)
    opt = SimpleNamespace(param_groups=[{"betas": 0, "momentum": 0, "weight_decay": 0} for _ in range(3)])
    tape.hypers = [list(_set_hypers(right, opt, tape, t)) for t in range(1, tape.steps + 1)]
    return tape, list(_golden(taken, tape))


@pytest.mark.parametrize("base", ["adamw", "nadam", "momentum"])
def test_each_fault_is_explained_by_its_name_alone(base):
    """On the path of a faulty rule no other fault may fit before it."""
    right = rule(base, weight_decay=0.1, **({"amsgrad": "torch"} if base == "adamw" else {}))
    decays = {name for name in FAULTS if "decay" in name}
    has = {"adamw": set(FAULTS), "nadam": set(FAULTS) - {"max never stored"},
           "momentum": decays | {"moves of betas and momentum ignored", "missing gradients taken as zero",
                                 "state lost on loading"}}[base]
    names = ["constant", "moving lr and betas", "missing gradients", "groups' own decay", "saved and loaded"]
    for fault in sorted(has):
        assert _explain(right, [walk(right, right.but(**FAULTS[fault]), name) for name in names], {}) == fault


def test_reports_say_the_same_thing_once():
    report = Report("title", False, {"constant": "a", "closures": "b", "float32": "a"}, "")
    assert str(report) == "title\n  constant, float32:\n    a\n  closures:\n    b"


def test_decay_with_the_new_lr_is_named():
    scenarios = [name for name in SCENARIOS if name != "groups' own decay"]  # it keeps its decay to itself
    with pytest.raises(ConformanceError) as caught:
        check_optimizer(DecayOwedUntilTheScheduler, EXPECTED, scenarios)
    report = caught.value.args[0]
    assert report.explanation == "decay after the step with the new lr"
    assert report.failures["constant"].startswith("parts at step 1, group 0, parameter 0, element (0, 0): ")


def test_two_faults_are_both_named():
    class Both(MaxNeverStored, CorrectionByTheInitialBeta1):
        pass

    with pytest.raises(ConformanceError) as caught:
        check_optimizer(Both, EXPECTED)
    assert caught.value.args[0].explanation == "max never stored with correction by the initial beta1"


def test_other_conventions_and_the_unknown_are_told_apart(capsys):
    report = check_optimizer(lambda groups: O.Adam(groups, weight_decay=0.1), rule("adamw", weight_decay=0.1),
                             raises=False)
    assert report.explanation == "decay='L2'" and len(report.failures) == len(SCENARIOS)
    assert "passes 0 of" in capsys.readouterr().out
    report = check_optimizer(lambda groups: O.RAdam(groups), rule("adam"), ["constant"], raises=False)
    assert report.explanation == "no known fault; identify(factory) may know the rule"


def test_other_numbers_are_told_from_the_groups():
    """The commonest mistake: the factory's settings are not the rule's."""
    for arguments, said in (({"weight_decay": 0.1}, "the weight_decay=0.1 of its groups"),
                            ({"betas": (0.9, 0.99)}, "the betas=(0.9, 0.99) of its groups"),
                            ({"eps": 1e-6, "amsgrad": True}, "amsgrad='torch' with the eps=1e-06 of its groups")):
        report = check_optimizer(lambda groups: O.AdamW(groups, **arguments), rule("adamw"),
                                 ["constant", "moving lr and betas"], raises=False)
        assert report.explanation == said


def test_rounding_is_told_from_a_fault():
    """AdamW with eps in single precision: on the rule's path to 1e-9, and not to 1e-12."""
    eps = torch.tensor(1e-8, dtype=torch.float32).item()

    def factory(groups):
        opt = O.AdamW(groups)
        for group in opt.param_groups:
            group["eps"] = eps
        return opt

    report = check_optimizer(factory, rule("adamw"), ["constant"], raises=False)
    assert "e-11 apart (tolerance 1e-12)" in report.failures["constant"]
    assert report.explanation == "rounding, by less than 1e-9"


# ---- what else goes wrong ---------------------------------------------------------------------------

def test_closures_whose_loss_is_lost():
    class Forgets(O.SGD):
        def step(self, closure=None):
            super().step(closure)

    report = check_optimizer(Forgets, rule("sgd"), raises=False)
    assert report.failures == {"closures": "ValueError at step 1: step(closure) returned None, not the closure's loss"}
    assert report.explanation == ""


def test_closures_without_gradients():
    class Closed(ByHand):
        @torch.no_grad()
        def step(self, closure=None):
            with torch.no_grad():
                return super().step(None if closure is None else lambda: torch.no_grad()(closure)())

    report = check_optimizer(Closed, EXPECTED, ["closures"], raises=False)
    assert report.failures["closures"].startswith("RuntimeError at step 1: element 0 of tensors does not require grad")


def test_torch_fused_mistakes_on_the_cpu():
    """When this fails, torch has mended its fused functions: tell appendix A5."""
    report = check_optimizer(lambda groups: O.SGD(groups, momentum=0.9, fused=True), rule("momentum"), raises=False)
    assert set(report.failures) == FUSED_MISTAKES | {"missing gradients"}
    assert "TypeError at step 3" in report.failures["missing gradients"]
    report = check_optimizer(lambda groups: O.AdamW(groups, fused=True), rule("adamw"), raises=False)
    assert set(report.failures) == FUSED_MISTAKES and report.explanation.startswith("no known fault")


def test_nadam_keeps_a_product_in_single_precision():
    torch.set_default_dtype(torch.float32)
    report = check_optimizer(lambda groups: O.NAdam(groups), rule("nadam"), ["constant"], raises=False)
    assert "e-0" in report.failures["constant"] and "tolerance 1e-12" in report.failures["constant"]


@pytest.mark.parametrize("factory, message", [
    (lambda groups: None, "a NoneType with 0 groups, or other params, came back"),
    (lambda groups: torch.nn.Linear(1, 1), "a Linear with 0 groups"),
    (lambda groups: O.SGD([p for g in groups for p in g["params"]], lr=0.1), "a SGD with 1 groups"),
    (lambda groups: O.SGD([g | {"params": [p.clone().detach().requires_grad_() for p in g["params"]]}
                           for g in groups]), "params, came back: the factory must pass on the 3 given"),
])
def test_bad_factories_are_refused(factory, message):
    for use in (lambda: check_optimizer(factory, rule("sgd")), lambda: identify(factory)):
        with pytest.raises(ValueError, match=message):
            use()


def test_the_kit_sets_the_rates():
    check_optimizer(lambda groups: O.SGD([{"params": g["params"]} for g in groups], lr=7.0), rule("sgd"))


def test_only_rules_are_followed():
    with pytest.raises(TypeError, match=r"^adamw is no rule; take rule\('adamw'\) or identify\(f\)"):
        check_optimizer(O.AdamW, "adamw")
    with pytest.raises(TypeError, match=r"missing='unknown'.* is no rule; take"):
        check_optimizer(O.SGD, identify(O.SGD))


def test_an_optimizer_that_raises_is_not_identified():
    class NeedsClosure(ByHand):
        def step(self, closure=None):
            return super().step(closure)() if closure is None else super().step(closure)

    with pytest.raises(RuntimeError, match="cannot be identified: TypeError at step 1: 'NoneType'"):
        identify(NeedsClosure)
    found = identify(lambda groups: O.SGD(groups, momentum=0.9, fused=True))  # raises where a gradient comes late
    assert (found.family, found.missing) == ("momentum", "unknown")


def test_unknown_scenarios_are_refused():
    with pytest.raises(ValueError, match="unknown scenario 'moving lr'. Did you mean moving lr and betas"):
        check_optimizer(O.SGD, rule("sgd"), ["moving lr"])


# ---- conventions --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, arguments, expected", TORCH + OURS)
def test_identify_finds_torchs_and_ours(kind, arguments, expected):
    found = identify(lambda groups: kind(groups, **arguments))
    assert isinstance(found, Convention) and found.family == expected.family
    decays = expected.weight_decay > 0
    one_thing = {"sgd": {"count", "decay" if decays else "missing"}, "momentum": {"count"}, "nesterov": {"count"}}
    for name, value in found.settings.items():
        same = name in one_thing.get(found.family, ())  # whatever its value, the path is the same
        assert value == ("unknown" if same else getattr(expected, name)), name
    assert expected in found.rules


def test_each_convention_has_a_path_of_its_own():
    usual = {"momentum": 0.9, "betas": (0.9, 0.999), "eps": 1e-8}
    rules = [*_candidates(usual), rule("sgd")]
    others = ("eps_at", "floor", "correct", "power", "amsgrad", "schedule", "lr_at")
    rules += [r for r in _candidates(usual | {"weight_decay": 0.1})
              if all(getattr(r, n) == getattr(rule(r.family), n) for n in others)]
    rules = [r for i, r in enumerate(rules) if r not in rules[:i]]
    paths = torch.stack([torch.cat([p.flatten() for step in walk(r, r, "moving lr and betas")[1] for p in step])
                         for r in rules])
    for i, path in enumerate(paths[:-1]):
        far = ((paths[i + 1:] - path).abs() / (1 + path.abs())).amax(1)
        nearest = i + 1 + int(far.argmin())
        assert far.min() > 1e-8, f"{rules[i]} and {rules[nearest]}"  # identify's tolerance is 1e-9
    assert len(rules) > 150 and {r.family for r in rules} == {"sgd", "momentum", "nesterov", "adam", "nadam"}


class Follows(torch.optim.Optimizer):
    """Adam in any convention, by a function from (m, v, c1, c2, eps, state) to the direction."""

    def __init__(self, groups, direction, decay=lambda p, lr, wd: None, wd=0.0):
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": wd})
        self.direction, self.decay = direction, decay

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                s["n"] = s.get("n", 0) + 1
                s["m"] = b1 * s.get("m", 0) + (1 - b1) * p.grad
                s["v"] = b2 * s.get("v", 0) + (1 - b2) * p.grad**2
                self.decay(p, lr, group["weight_decay"])
                p -= lr * self.direction(s["m"], s["v"], 1 - b1 ** s["n"], 1 - b2 ** s["n"], group["eps"], s)


def stored_max(v, s):
    s["top"] = torch.maximum(s.get("top", v), v)
    return s["top"]


@pytest.mark.parametrize("direction, found", [
    (lambda m, v, c1, c2, e, s: m / c1 / ((v / c2).sqrt() + e), {}),
    (lambda m, v, c1, c2, e, s: m / c1 * c2**0.5 / (v.sqrt() + e), {"eps_at": "before"}),
    (lambda m, v, c1, c2, e, s: m / c1 / (v / c2 + e).sqrt(), {"eps_at": "root"}),
    (lambda m, v, c1, c2, e, s: m / c1 * c2**0.5 / ((v + 1e-15).sqrt() + e), {"eps_at": "before", "floor": 1e-15}),
    (lambda m, v, c1, c2, e, s: m / (v.sqrt() + e), {"correct": "none"}),
    (lambda m, v, c1, c2, e, s: m / c1 / (v.sqrt() + e), {"correct": "m"}),
    (lambda m, v, c1, c2, e, s: m / ((v / c2).sqrt() + e), {"correct": "v"}),
    (lambda m, v, c1, c2, e, s: m / c1 / ((stored_max(v, s) / c2).sqrt() + e), {"amsgrad": "torch"}),
    (lambda m, v, c1, c2, e, s: m / c1 / (stored_max(v / c2, s).sqrt() + e), {"amsgrad": "optax"}),
    (lambda m, v, c1, c2, e, s: m / (stored_max(v, s).sqrt() + e), {"amsgrad": "torch", "correct": "none"}),
])
def test_identify_finds_where_eps_corrections_and_max_stand(direction, found):
    convention = identify(lambda groups: Follows(groups, direction))
    expected = rule("adam", **found)
    assert convention.family == "adam" and convention.settings["weight_decay"] == 0
    for name in ("eps_at", "floor", "correct", "power", "amsgrad", "betas", "eps"):
        assert convention.settings[name] == getattr(expected, name), name


@pytest.mark.parametrize("decay, found", [
    (lambda p, lr, wd: p.mul_(1 - lr * wd), "times lr"), (lambda p, lr, wd: p.mul_(1 - wd), "not times lr")])
def test_identify_finds_what_scales_the_decay(decay, found):
    convention = identify(lambda groups: Follows(
        groups, lambda m, v, c1, c2, e, s: m / c1 / ((v / c2).sqrt() + e), decay, wd=0.1))
    assert convention.decay == found and convention.decay_at == "before"
    assert "decay='" + found in str(convention)


def test_identify_finds_the_lr_in_the_memory():
    class Keras(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"momentum": 0.9})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        s = self.state[p]
                        s["u"] = group["momentum"] * s.get("u", 0) - group["lr"] * p.grad
                        p += s["u"]

    found = identify(Keras)
    assert (found.family, found.lr_at, found.missing) == ("momentum", "memory", "skipped")


def test_identify_needs_no_names_in_the_groups():
    """Without momentum or betas in its groups, an optimizer is held against the usual numbers."""
    class Plain(torch.optim.Optimizer):
        def __init__(self, groups, keep=0.0):
            super().__init__(groups, {})
            self.keep = keep

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        s = self.state[p]
                        s["u"] = self.keep * s.get("u", 0) + p.grad
                        p -= group["lr"] * s["u"]

    assert identify(Plain).family == "sgd"
    assert identify(lambda groups: Plain(groups, keep=0.9)).family == "momentum"
    assert identify(lambda groups: Plain(groups, keep=0.8)).family == "unknown"


def test_identify_tells_two_nadams_apart():
    """torch's corrects with the product of its momenta; optax's with the current one, to the power t."""
    class Optax(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                b1, b2 = group["betas"]
                for p in group["params"]:
                    if p.grad is not None:
                        s = self.state[p]
                        s["n"] = s.get("n", 0) + 1
                        s["m"] = b1 * s.get("m", 0) + (1 - b1) * p.grad
                        s["v"] = b2 * s.get("v", 0) + (1 - b2) * p.grad**2
                        m = b1 * s["m"] / (1 - b1 ** (s["n"] + 1)) + (1 - b1) * p.grad / (1 - b1 ** s["n"])
                        p -= group["lr"] * m / ((s["v"] / (1 - b2 ** s["n"])).sqrt() + group["eps"])

    found = identify(Optax)
    assert (found.family, found.schedule, found.power) == ("nadam", math.inf, "current")
    check_optimizer(Optax, found.rules[0], [name for name in SCENARIOS if name != "closures"])
    assert identify(lambda groups: O.NAdam(groups)).power == "product"


def test_betas_of_another_length():
    class Three(ByHand):
        def __init__(self, groups):
            super().__init__(groups)
            for group in self.param_groups:
                group["betas"] = (0.9, 0.999, 0.5)

    found = identify(Three)
    assert (found.family, found.amsgrad) == ("adam", "torch")


def test_identify_does_not_guess():
    found = identify(lambda groups: O.RAdam(groups))
    assert found.family == "unknown" and found.rules == [] and found.missing == "unknown"
    without_eps = identify(lambda groups: O.Adam(groups, eps=0.0))
    assert without_eps.family == "adam" and without_eps.eps_at == "unknown" and without_eps.correct == "both"


def test_a_convention_is_a_rule():
    found = identify(lambda groups: O.AdamW(groups, weight_decay=0.1))
    assert isinstance(found, Rule)
    check_optimizer(lambda groups: O.AdamW(groups, weight_decay=0.1), found.rules[0], ["constant"])
