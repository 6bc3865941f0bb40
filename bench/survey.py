#!/usr/bin/env python
"""Find out which conventions the optimizers of seven libraries follow, and write a record.

    make survey                                          all libraries: a record
    make survey ARGS="--only optax,keras-jax"            some of them, printed: no record
    make survey ARGS="--only timm --quick"               the first optimizer of each: no record
    .survey-venv/bin/python bench/survey.py --help

Each optimizer is taken through `identify` and `check_optimizer` of nbutils.conformance, in float64, on
the CPU, with one thread. The rule that it is checked against is what its library says of it: its
docstring, the paper that this names, and where both are silent (on eps, and on what is counted) its
source. Each library is run in a process of its own; Keras twice, on torch and on jax.

Optimizers that are not torch's in shape wear an adapter: it keeps torch-style groups, hands over
parameters, gradients and hyper-parameters before each step, and takes the parameters back after it.
What an adapter would have to invent is not checked, and the record says so for each optimizer:

    optax, Keras    saving and loading, closures, strides (their arrays have none that a user sees);
                    float32 and bfloat16 are passed on in these types
    optax           a missing gradient is handed over as zeros, as jax.grad gives it for a parameter
                    that the loss does not depend on
    fastai          closures go through to its step(), which says whether it takes them; its state may
                    hold an `L` of fastcore, which its own load_model allows as well

The record, book/records/conformance/DATE-MACHINE.json (then -2, -3, ...; none is ever overwritten):

    format          1
    name, started   the file's name; UTC
    seconds         of the whole survey
    machine         cpu, gpu (null: none is used), cores, platform
    versions        of all packages that were surveyed or computed
    commit, code_hash, survey_hash   the checkout (+: changed since); nbutils' files; this file
    entries         a list; each has
        library, version, backend   as installed; backend for Keras, else null
        name, arguments             the optimizer, and what it was given besides params and lr
        defaults                    of betas, eps, momentum and decay, as its signature has them
        expected                    the rule that it was checked against, or null: the kit does not know it
        convention                  family and settings that `identify` found; "unknown" where it was not sure
        left_out                    scenario to reason
        passed, failures, explanation   the report of `check_optimizer`
        note                        what was read in its source, or null
        not_run                     the reason, and then none of the six lines before
        seconds
"""
import argparse
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
RECORDS = HERE.parent / "book" / "records" / "conformance"
JOBS = ("torch", "nbutils", "timm", "pytorch_optimizer", "optax", "keras-torch", "keras-jax", "fastai")
PACKAGES = ("torch", "timm", "pytorch_optimizer", "optax", "jax", "jaxlib", "keras", "fastai", "numpy")
NUMBERS = ("betas", "b1", "b2", "beta_1", "beta_2", "sqr_mom", "mom", "momentum", "eps", "epsilon", "eps_root",
           "weight_decay", "wd", "l2", "momentum_decay")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
NO_ADAPTER = "the adapter would be checked, not the library"
ARRAYS = {"saved and loaded": NO_ADAPTER, "closures": NO_ADAPTER,
          **dict.fromkeys(("channels_last", "gaps in memory", "gradients laid out otherwise"),
                          "its arrays have no strides of a user's choice")}

# What a reading of the source adds: library, optimizers, an argument that must be given, the note.
NOTES = (
    ("torch", ("Adam", "AdamW"), "fused",
     "the kernel for the CPU walks through memory and does not look at strides"),
    ("torch", ("SGD",), "fused",
     "the kernel for the CPU walks through memory and does not look at strides; buffers of the momentum are made "
     "while there are none at all, so a first gradient that comes later finds none (optim/sgd.py, _fused_sgd)"),
    ("timm", ("NAdamW",), "",
     "m is averaged with the gradient once more before its one correction; the kit has no such rule"),
    ("pytorch_optimizer", ("AdamC",), "",
     "1e-15 is added to v in the root, besides eps (base/optimizer.py, apply_ams_bound)"),
    ("keras", ("Adam", "AdamW"), "",
     "in bfloat16 the step is 0: beta_2 is cast to the variables' type, where 0.999 is 1, and the rate is "
     "multiplied by the root of 1 - 1 (optimizers/adam.py)"),
    ("keras", ("Nadam",), "",
     "in bfloat16 v is divided by 1 - 1 (optimizers/nadam.py); on torch a number of numpy's bfloat16 is refused "
     "before (backend/torch/optimizers/torch_nadam.py)"),
    ("fastai", ("SGD", "Adam"), "", "its step() says that it takes no closure"))


# --- torch, and libraries of the same shape --------------------------------------------------------
def torch_entries(rule):
    import torch.optim as optim

    ways = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    for how, way in ways.items():
        yield optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1} | way, \
            rule("nesterov", weight_decay=0.1, decay="L2"), {}
        yield optim.SGD, {"weight_decay": 0.1} | way, rule("sgd", weight_decay=0.1, decay="L2"), {}
        yield optim.Adam, {"weight_decay": 0.1, "amsgrad": True} | way, \
            rule("adam", weight_decay=0.1, decay="L2", amsgrad="torch"), {}
        yield optim.AdamW, {"weight_decay": 0.1} | way, rule("adamw", weight_decay=0.1), {}
        if how != "fused":                                     # NAdam has no fused form
            yield optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True} | way, \
                rule("nadam", weight_decay=0.1), {}


def nbutils_entries(rule):
    from nbutils.amsgrad import Adam, AdamW
    from nbutils.momentum import SGD

    slow = {name: "each scenario is compiled anew: two must do" for name in scenario_names()
            if name not in ("constant", "moving lr and betas")}
    for engine in ("loop", "lists", "fused", "compiled"):
        left_out = slow if engine == "compiled" else {}
        yield SGD, {"momentum": 0.9, "nesterov": True, "l2": 0.1, "engine": engine}, \
            rule("nesterov", weight_decay=0.1, decay="L2"), left_out
        yield Adam, {"l2": 0.1, "amsgrad": True, "engine": engine}, \
            rule("adam", weight_decay=0.1, decay="L2", amsgrad="torch"), left_out
        yield AdamW, {"weight_decay": 0.1, "engine": engine}, rule("adamw", weight_decay=0.1), left_out


def timm_entries(rule):
    from timm import optim

    yield optim.AdamWLegacy, {"weight_decay": 0.1, "amsgrad": True}, \
        rule("adamw", weight_decay=0.1, amsgrad="torch"), {}
    yield optim.SGDW, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, \
        rule("nesterov", weight_decay=0.1), {}
    yield optim.NAdamLegacy, {"weight_decay": 0.1}, rule("nadam", weight_decay=0.1, decay="L2"), {}
    yield optim.NAdamW, {"weight_decay": 0.1}, None, {}        # NAdam as in Choi et al. 2019


def pytorch_optimizer_entries(rule):
    import pytorch_optimizer as po

    yield po.SGDW, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, \
        rule("nesterov", weight_decay=0.1), {}
    adamc = {"weight_decay": 0.1, "eps_at": "before", "floor": 1e-15, "count": "shared"}
    yield po.AdamC, {"weight_decay": 0.1}, rule("adamw", **adamc), {}
    yield po.AdamC, {"weight_decay": 0.1, "ams_bound": True}, rule("adamw", amsgrad="torch", **adamc), {}
    yield po.AdamC, {"weight_decay": 0.1, "fixed_decay": True}, rule("adamw", decay="not times lr", **adamc), {}
    yield po.load_optimizer("adamw"), {"weight_decay": 0.1}, rule("adamw", weight_decay=0.1), {}


# --- adapters ----------------------------------------------------------------------------------------
class Adapter:
    """Torch-style groups around an optimizer of another shape."""

    def __init__(self, groups, **hypers):
        self.param_groups = [hypers | group for group in groups]

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def optax_entries(rule):
    import jax
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import optax
    import torch

    kinds = {torch.float64: jnp.float64, torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}

    def to_jax(t, like):
        return jnp.asarray(t.detach().double().numpy(), dtype=kinds[like.dtype])

    class Optax(Adapter):
        """`make` gives the transformation for the numbers of this step; only the state is kept."""

        def __init__(self, groups, make, **hypers):
            super().__init__(groups, **hypers)
            self.make, self.states = make, [None] * len(groups)

        def step(self):
            for i, group in enumerate(self.param_groups):
                params = [to_jax(p, p) for p in group["params"]]
                grads = [to_jax(torch.zeros_like(p) if p.grad is None else p.grad, p) for p in group["params"]]
                rule = self.make(**{n: x for n, x in group.items() if n != "params"})
                state = self.states[i] if self.states[i] is not None else rule.init(params)
                updates, self.states[i] = rule.update(grads, state, params)
                for p, new in zip(group["params"], optax.apply_updates(params, updates)):
                    p.data.copy_(torch.tensor(jax.device_get(new).astype("float64")))

    def make(build):
        def with_numbers(lr, betas=None, **others):
            beta = {} if betas is None else {"b1": betas[0], "b2": betas[1]}
            return build(lr, **beta, **others)
        return with_numbers

    betas = {"betas": (0.9, 0.999), "eps": 1e-8}
    for name, hypers, expected in (
            ("sgd", {"momentum": 0.9}, rule("momentum", missing="zero")),
            ("sgd", {"momentum": 0.9, "nesterov": True}, rule("nesterov", missing="zero")),
            ("adam", betas, rule("adam", missing="zero")),
            ("adamw", betas | {"weight_decay": 0.1}, rule("adamw", weight_decay=0.1, missing="zero")),
            ("amsgrad", betas, rule("adam", amsgrad="optax", missing="zero")),
            ("amsgrad", betas | {"bias_correction_mu": False, "bias_correction_nu": False},
             rule("adam", amsgrad="paper", missing="zero")),
            ("nadam", betas, rule("nadam", schedule=math.inf, power="current", missing="zero")),
            ("nadamw", betas | {"weight_decay": 0.1},
             rule("nadam", schedule=math.inf, power="current", weight_decay=0.1, missing="zero"))):
        build = getattr(optax, name)
        given = {n: x for n, x in hypers.items() if n not in betas}
        yield build, given, expected, ARRAYS, (lambda groups, b=build, h=hypers: Optax(groups, make(b), **h)), name


def keras_entries(rule, backend):
    os.environ["KERAS_BACKEND"] = backend
    if backend == "jax":
        import jax
        jax.config.update("jax_enable_x64", True)
    import keras
    import torch

    keras.backend.set_floatx("float64")

    def to_keras(t):
        kind = str(t.dtype).split(".")[1]
        return keras.ops.convert_to_tensor(t.detach().double().numpy(), dtype=kind)

    class Keras(Adapter):
        """One optimizer of Keras for each group."""

        def __init__(self, groups, kind, arguments, **hypers):
            super().__init__(groups, **hypers)
            self.inner, self.variables = [kind(**arguments) for _ in groups], []
            for group, inner in zip(self.param_groups, self.inner):
                made = [keras.Variable(to_keras(p), dtype=str(p.dtype).split(".")[1]) for p in group["params"]]
                inner.build(made)
                self.variables.append(made)

        def step(self):
            for group, inner, made in zip(self.param_groups, self.inner, self.variables):
                inner.learning_rate = group["lr"]
                for name in ("momentum", "weight_decay"):
                    if group.get(name):
                        setattr(inner, name, group[name])
                if "betas" in group:
                    inner.beta_1, inner.beta_2 = group["betas"]
                for p, variable in zip(group["params"], made):
                    variable.assign(to_keras(p))
                inner.apply([None if p.grad is None else to_keras(p.grad) for p in group["params"]], made)
                for p, variable in zip(group["params"], made):
                    value = keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float64"))
                    p.data.copy_(torch.tensor(value))

    o, betas = keras.optimizers, {"betas": (0.9, 0.999), "eps": 1e-7}
    decay, counted = {"weight_decay": 0.1}, {"eps": 1e-7, "count": "shared"}
    for kind, arguments, hypers, expected in (
            (o.SGD, {"momentum": 0.9}, {}, rule("momentum", lr_at="memory")),
            (o.SGD, {"momentum": 0.9, "nesterov": True}, {}, rule("nesterov", lr_at="memory")),
            (o.SGD, {"momentum": 0.9} | decay, {}, rule("momentum", lr_at="memory", weight_decay=0.1)),
            (o.Adam, {}, betas, rule("adam", **counted, eps_at="before")),
            (o.Adam, {"amsgrad": True} | decay, betas,
             rule("adamw", **counted, eps_at="before", amsgrad="torch", weight_decay=0.1)),
            (o.AdamW, decay, betas, rule("adamw", **counted, eps_at="before", weight_decay=0.1)),
            (o.Nadam, {}, betas, rule("nadam", **counted, schedule=1.0))):
        known = hypers | {n: x for n, x in arguments.items() if n in ("momentum", "weight_decay")}
        yield kind, arguments, expected, ARRAYS, \
            (lambda groups, k=kind, a=arguments, h=known: Keras(groups, k, a, **h))


def fastai_entries(rule):
    import torch
    from fastai import optimizer as fo
    from fastcore.foundation import L

    torch.serialization.add_safe_globals([L])
    class Fastai(Adapter):
        """fastai's Optimizer; its hyper-parameters are mom, sqr_mom and wd."""

        def __init__(self, groups, make, arguments, **hypers):
            super().__init__(groups, **hypers)
            self.inner = make([list(g["params"]) for g in groups], lr=groups[0]["lr"], **arguments)

        def step(self, closure=None):
            for group, own in zip(self.param_groups, self.inner.hypers):
                own["lr"] = group["lr"]
                own["wd"] = group.get("weight_decay", own["wd"])
                if "betas" in group:
                    own["mom"], own["sqr_mom"] = group["betas"]
                elif "momentum" in group:
                    own["mom"] = group["momentum"]
            return self.inner.step() if closure is None else self.inner.step(closure)

        def state_dict(self):
            return self.inner.state_dict()

        def load_state_dict(self, state):
            self.inner.load_state_dict(state)

    betas = {"betas": (0.9, 0.99), "eps": 1e-5}
    for make, arguments, hypers, expected in (
            (fo.SGD, {"mom": 0.9, "wd": 0.1}, {"momentum": 0.9, "weight_decay": 0.1},
             rule("momentum", weight_decay=0.1)),
            (fo.SGD, {"mom": 0.9, "wd": 0.1, "decouple_wd": False}, {"momentum": 0.9, "weight_decay": 0.1},
             rule("momentum", weight_decay=0.1, decay="L2")),
            (fo.Adam, {"wd": 0.1}, betas | {"weight_decay": 0.1},
             rule("adamw", weight_decay=0.1, betas=(0.9, 0.99), eps=1e-5)),
            (fo.Adam, {"wd": 0.1, "decouple_wd": False}, betas | {"weight_decay": 0.1},
             rule("adam", weight_decay=0.1, decay="L2", betas=(0.9, 0.99), eps=1e-5))):
        yield make, arguments, expected, {}, \
            (lambda groups, m=make, a=arguments, h=hypers: Fastai(groups, m, a, **h))


# --- one library -------------------------------------------------------------------------------------
def scenario_names():
    from nbutils.conformance import SCENARIOS
    return list(SCENARIOS)


def entries(job):
    from nbutils.conformance import rule
    if job.startswith("keras-"):
        return keras_entries(rule, job.split("-")[1])
    return {"torch": torch_entries, "nbutils": nbutils_entries, "timm": timm_entries, "optax": optax_entries,
            "pytorch_optimizer": pytorch_optimizer_entries, "fastai": fastai_entries}[job](rule)


def plain(value):
    """A value as JSON can hold it; infinity and other objects as text."""
    if isinstance(value, dict):
        return {str(n): plain(x) for n, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if value is None or isinstance(value, (bool, int)) or isinstance(value, float) and math.isfinite(value):
        return value
    return re.sub(r"\x1b\[[0-9;]*m", "", str(value))            # torch colours some of its messages


def defaults(kind):
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.name in NUMBERS and p.default is not p.empty}


def note_of(library, name, arguments):
    given = {*arguments, *map(str, arguments.values())}
    return next((text for other, names, needed, text in NOTES
                 if library == other and name in names and (not needed or needed in given)), None)


def survey(job, kind, arguments, expected, left_out, factory=None, name=None):
    """Identify one optimizer, and check it where the kit knows the rule that its library tells."""
    from nbutils.conformance import check_optimizer, identify

    factory, begun = factory or (lambda groups: kind(groups, **arguments)), time.perf_counter()
    library, _, backend = job.partition("-")
    name = name or kind.__name__
    found = identify(factory)
    scenarios = [scenario for scenario in scenario_names() if scenario not in left_out]
    report = expected and check_optimizer(factory, expected, scenarios, raises=False)
    return {"library": library, "version": metadata.version(library), "backend": backend or None,
            "name": name, "arguments": arguments, "defaults": defaults(kind),
            "expected": expected and {"family": expected.family, **expected.settings},
            "convention": {"family": found.family, **found.settings}, "left_out": left_out,
            "passed": report and report.passed, "failures": report.failures if report else {},
            "explanation": report.explanation if report else "", "note": note_of(library, name, arguments),
            "seconds": round(time.perf_counter() - begun, 2)}


def run_job(job, quick):
    """Print a JSON list, the entries of one library."""
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        found = [survey(job, *entry) for entry in itertools.islice(entries(job), 1 if quick else None)]
    print(json.dumps(plain(found)))


def ask(job, quick=False):
    """The entries of one library, from a process of its own; one that says why there are none."""
    environment = os.environ | ONE_THREAD | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--job", job, *["--quick"] * quick],
                          env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    library, _, backend = job.partition("-")
    try:
        version, reason = metadata.version(library), "its process failed; see the output of the survey"
    except metadata.PackageNotFoundError:
        version, reason = None, "it is not installed"
    return [{"library": library, "version": version, "backend": backend or None, "not_run": reason}]


# --- what is shown and kept --------------------------------------------------------------------------
COLUMNS = ("eps", "averages", "decay", "amsgrad", "without a gradient")
_HOW = {"foreach": {False: "for-loop", True: "foreach"}, "fused": {True: "fused"}}


def conventions(entry):
    """What `identify` found, in the words of a table: one string for each of COLUMNS."""
    c, missing = entry["convention"], entry["failures"].get("missing gradients", "")
    if c["family"] == "unknown":
        return ["not known to the kit", *["–"] * 4]
    eps = averages = "–"
    if "adam" in c["family"]:
        small = ", 1e-15 in the root" * bool(c.get("floor"))
        where = {"outside": "outside the root", "before": "before the correction", "root": "in the root"}
        eps = f"{c['eps']:g}".replace("e-0", "e-") + f" {where.get(c['eps_at'], c['eps_at'])}{small}"
        by = {"current": "beta1^t", "initial": "the first beta1^t", "product": "the product"}[c["power"]]
        corrected = {"both": f"corrected, by {by}", "none": "not corrected"}
        averages = corrected.get(c.get("correct", "both"), f"only {c.get('correct')} corrected, by {by}")
        if c["family"] == "nadam":
            averages += {"inf": ", no schedule"}.get(c["schedule"], f", schedule {c['schedule']}")
    elif c["family"] != "sgd":
        averages = {"step": "lr at the step", "memory": "lr in the memory"}[c["lr_at"]]
    decay = {None: "none given", "unknown": "L2, or times lr"}.get(c.get("decay"), c.get("decay"))
    amsgrad = "paper" if c.get("correct") == "none" and c["amsgrad"] else c.get("amsgrad") or "–"
    found = "raises" if "Error at" in missing else {"zero": "as zeros"}.get(c["missing"], c["missing"])
    return [eps, averages, decay, amsgrad, found + ", but counted" * (c["count"] == "shared")]


def title(entry):
    """The optimizer with its switches, and by which engine or backend it ran."""
    given = dict(entry["arguments"])
    how = entry["backend"] or given.pop("engine", "")
    for name in _HOW.keys() & given.keys():
        how = _HOW[name][given.pop(name)]
    switches = [name if value else f"no {name}" for name, value in given.items() if isinstance(value, bool)]
    return ", ".join([entry["name"], *switches]), how


def outcome(entry):
    """How many scenarios were passed of those that were checked."""
    if entry["passed"] is None:
        return "not checked"
    checked = len(scenario_names()) - len(entry["left_out"])
    return f"{checked - len(entry['failures'])} of {checked}"


def rows(record):
    """Lines of the record's table: library, optimizer, engines or backends, conventions, outcome."""
    found = {}
    for entry in record["entries"]:
        library = f"{entry['library']} {entry['version'] or ''}".strip()
        if entry.get("not_run"):
            found[library, f"not run: {entry['not_run']}", *["–"] * len(COLUMNS), "–"] = []
        else:
            name, how = title(entry)
            found.setdefault((library, name, *conventions(entry), outcome(entry)), []).append(how)
    return [[library, name, ", ".join(filter(None, hows)), *others] for (library, name, *others), hows in found.items()]


def failures(record):
    """What failed: library, optimizer, engines or backends, scenarios, where, and what its source says of it."""
    found = {}
    for entry in record["entries"]:
        for scenario, what in entry.get("failures", {}).items():
            name, how = title(entry)
            where = re.sub(r", element.*|: .*", "", what)
            key = f"{entry['library']} {entry['version']}", entry["note"] or "", where
            optimizers, hows, scenarios = found.setdefault(key, ([], [], []))
            for names, new in ((optimizers, name), (hows, how), (scenarios, scenario)):
                names += [new] * (new not in names)
    return [[library, "; ".join(optimizers), ", ".join(filter(None, hows)), ", ".join(scenarios), where, note]
            for (library, note, where), (optimizers, hows, scenarios) in found.items()]


def newest(folder=RECORDS):
    """The record that was begun last."""
    import forms  # bench/forms.py

    return max(forms.read_all(folder), key=lambda record: record["started"])


def line(entry):
    if entry.get("not_run"):
        return f"{entry['library']} {entry['version'] or ''}: not run: {entry['not_run']}"
    said = ", ".join(f"{n}={x}" for n, x in entry["convention"].items())
    where = "; ".join(f"{n}: {x}" for n, x in entry["failures"].items())
    checked = {True: "passes", None: "not checked"}.get(entry["passed"], f"{where} [{entry['explanation']}]")
    return f"{entry['library']} {entry['backend'] or ''} {entry['name']} {entry['arguments']}:\n  {said}\n  {checked}"


def versions():
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"some of {', '.join(JOBS)}, with commas between: no record")
    parser.add_argument("--quick", action="store_true", help="the first optimizer of each library: no record")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.job:
        return run_job(chosen.job, chosen.quick)
    jobs = chosen.only.split(",") if chosen.only else JOBS
    for job in jobs:
        if job not in JOBS:
            parser.error(f"unknown library {job!r}; there are: {', '.join(JOBS)}")
    from bench import cores, write_record
    from nbutils.records import code_state, describe_device

    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    commit, code_hash = code_state()                   # of the code that runs, not of what it may become meanwhile
    survey_hash, found = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16], []
    for job in jobs:
        of_job = ask(job, chosen.quick)
        found += of_job
        print("\n".join(map(line, of_job)), flush=True)
    if chosen.only or chosen.quick:
        return 0
    cpu = describe_device("cpu").rsplit(", ", 1)[0]
    record = {"format": 1, "name": "", "started": started, "seconds": round(time.perf_counter() - begun, 1),
              "machine": {"cpu": cpu, "gpu": None, "cores": cores(),
                          "platform": f"{platform.system()} {platform.machine()}"},
              "versions": versions(), "commit": commit, "code_hash": code_hash,
              "survey_hash": survey_hash, "entries": found}
    print(f"record: {write_record(record, chosen.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
