#!/usr/bin/env python
"""Time an optimizer's step: ours by each engine, torch's by each of its implementations, and memory itself.

    make bench-steps                     on the CPU and, where there is one, on the GPU: a record
    make bench-steps ARGS=--quick        a few steps of everything, to see that it runs: no record
    .venv/bin/python bench/steps.py --help

A case is a device, a set of parameters (wide resnet 22, ResNet-50, AWD-LSTM; the weights are random, in
float32) and a rule (AdamW, or AdamW with amsgrad). In a case all contenders live in one process, each
with weights and state of its own and the same gradients. Each takes its first step (compilation
included) and a warm-up; then they take turns, a round of `--steps` steps each, A B C and back C B A. So
each round gives ratios between times measured within seconds of each other. lr and beta1 move at every
step, as in 1cycle. After the last round all must hold the same weights, and nothing may have been
compiled since the warm-up; otherwise there is no record.

On a GPU two times are told apart. `step` is what a program waits for: the time of a step when steps follow one
another, which for small nets is the time that Python needs to launch it. `busy` is what the device works for it: the
time of its kernels alone, added up by torch's profiler over some steps after the rounds. In a training the device has
work queued, and `busy` is what a step costs.

Memory takes turns too: `copy` copies a large tensor to another (8 bytes an element), `in place` multiplies
one by a number (8 bytes as well, but what is written was read before, as in a step). A step must move at
least 28 bytes a parameter (read p, g, m, v; write p, m, v), 36 with amsgrad; over the faster of the two
bandwidths that is the floor.

The record, book/records/steps/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format, name, started, seconds, machine, load, versions, commit, code_hash, bench_hash
                    as in bench.py
    cases           a list; each has
        device, parameters, rule          "cpu" or "cuda"; which set; "adamw" or "adamw-amsgrad"
        not_run                           the reason, and then nothing else
        device_name, threads, tensors, elements, bytes_a_parameter
        steps, rounds, warmup             steps of a round; rounds; steps before them
        elements_copied                   of the tensors of `copy` and `in place`
        contenders                        a list; each has
            name                          "torch loop", "nbutils fast", ..., "trial: ...", "copy", "in place"
            first_step                    seconds, with compilation; null for memory
            compiled                      graphs compiled in the first step
            step                          a list: seconds of a step (mean of a round), a round each
            busy, kernels                 seconds that the GPU's kernels took of a step, and their number; null
                                          on a CPU and for memory
        largest_difference                between any two contenders' weights at the end, relative

Medians, ratios and the floor are not stored: the functions below compute them.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import frame  # noqa: E402
from bench import find, load_records, progress  # noqa: E402
from frame import add_options, need_positive, run, split_lists  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "steps"
SETS = ("wide-resnet-22", "resnet-50", "awd-lstm")
RULES = {"adamw": 28, "adamw-amsgrad": 36}              # bytes a parameter
CONTENDERS = ("torch loop", "torch foreach", "torch fused", "nbutils loop", "nbutils lists", "nbutils compiled",
              "nbutils fused", "nbutils fast")
TRIALS = ("trial: two temporaries", "trial: rates as tensors")     # what chapter 5 tells of, on the first case alone
MEMORY = ("copy", "in place")


# --- figures from a record -----------------------------------------------------------------------
def newest(folder=RECORDS):
    """The newest record of each machine (its card, or else its processor), newest first."""
    return frame.newest(folder)


def milliseconds(case, name):
    """Median time of a step, in ms."""
    return 1e3 * statistics.median(find(case, name)["step"])


def step_ratios(case, name, reference):
    """Time of one contender's step over another's, round by round."""
    return [a / b for a, b in zip(find(case, name)["step"], find(case, reference)["step"], strict=True)]


def busy_milliseconds(case, name):
    """Time of a step's kernels on the GPU, in ms; None on a CPU."""
    busy = find(case, name).get("busy")
    return None if busy is None else 1e3 * busy


def bandwidth(case, name="in place"):
    """Median bandwidth in bytes a second; 8 bytes an element are counted."""
    return 8 * case["elements_copied"] / statistics.median(find(case, name)["step"])


def floor_milliseconds(case):
    """The time to move a step's bytes at the faster of the two measured bandwidths, in ms."""
    best = max(bandwidth(case, name) for name in MEMORY)
    return 1e3 * case["elements"] * case["bytes_a_parameter"] / best


# --- what is timed -------------------------------------------------------------------------------
def shapes(name):
    """The shapes of a net's parameters."""
    import torch

    if name == "awd-lstm":                              # embedding (tied), three LSTM layers, decoder's bias
        found, words = [(33_279, 400)], 33_279
        for inputs, hidden in ((400, 1150), (1150, 1150), (1150, 400)):
            found += [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
        return found + [(words,)]
    with torch.device("meta"):
        if name == "resnet-50":
            from torchvision.models import resnet50 as make
        else:
            from nbutils.wide_resnet import wide_resnet_22 as make
        return [tuple(p.shape) for p in make().parameters()]


def make_optimizer(name, params, rule):
    import torch

    from nbutils.amsgrad import AdamW

    if name in TRIALS:
        return trial_optimizer(name, params)
    whose, engine = name.split()
    options = {"lr": 1e-3, "weight_decay": 0.1, "amsgrad": rule == "adamw-amsgrad"}
    if whose == "nbutils":
        return AdamW(params, engine=engine, **options)
    kind = {"loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return torch.optim.AdamW(params, **options, **kind[engine])


def trial_optimizer(name, params):
    """AdamW as we had it first: the loop with a second temporary; or the steppers compiled with 0-d tensors as rates."""
    import torch

    from nbutils.adam import adam_step, moments
    from nbutils.optimizer import optimizer, stepper, weight_decay

    @stepper
    def other_step(p, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8):
        root = (state["exp_avg_sq"].sqrt() / (1 - betas[1] ** state["step"]) ** 0.5).add_(eps)
        p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - betas[0] ** state["step"]))
        return g

    if name == "trial: two temporaries":
        return optimizer("Trial", weight_decay, moments, other_step)(params, lr=1e-3, weight_decay=0.1, engine="loop")

    @torch.compile(fullgraph=True)
    def run(grads, averages, squares, step, lr, beta1, beta2):
        for p, g, m, v in zip(params, grads, averages, squares):
            state = {"step": step, "exp_avg": m, "exp_avg_sq": v}
            weight_decay(p, g, state, lr=lr, weight_decay=0.1)
            moments(p, g, state, betas=(beta1, beta2))
            adam_step(p, g, state, lr=lr, betas=(beta1, beta2))

    class RatesAsTensors:
        param_groups, count = [{}], 0
        averages, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))

        @torch.no_grad()
        def step(self):
            self.count += 1
            group = self.param_groups[0]
            numbers = (self.count, group["lr"], *group["betas"])
            run([p.grad for p in params], self.averages, self.squares,
                *(torch.tensor(float(x), dtype=torch.float64) for x in numbers))

    return RatesAsTensors()


class Contender:
    """Something that takes steps and is timed."""

    def __init__(self, name, device, call):
        self.name, self.device, self.call = name, device, call
        self.first_step, self.compiled, self.times = None, 0, []
        self.busy = self.kernels = None

    def run(self, steps):
        """Seconds of a step, the mean of `steps`; by CUDA's events on a GPU."""
        import torch

        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(steps):
                self.call()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1e3 / steps
        start = time.perf_counter()
        for _ in range(steps):
            self.call()
        return (time.perf_counter() - start) / steps


    def watch(self, steps):
        """Let torch's profiler add up the time of a step's kernels."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                self.call()
            torch.cuda.synchronize()
        found = [e for e in profiler.events() if str(e.device_type).endswith("CUDA")]
        self.busy = sum(e.time_range.elapsed_us() for e in found) / 1e6 / steps or None
        self.kernels = len(found) / steps


def stepper(opt):
    """A call that moves lr and beta1 a little, and takes a step."""
    group, count = opt.param_groups[0], [0]

    def call():
        count[0] += 1
        phase = count[0] % 50 / 50
        group["lr"], group["betas"] = 1e-3 * (0.1 + phase), (0.95 - 0.1 * phase, 0.99)
        opt.step()
    return call


def compiled_graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def measure(device, which, rule, chosen):
    """One case; its part of the record."""
    import torch

    from nbutils.core import seed_everything
    from nbutils.records import describe_device

    seed_everything(0)
    start = [torch.randn(s, device=device) * 0.05 for s in shapes(which)]
    grads = [torch.randn_like(p) * 0.01 for p in start]
    elements = sum(p.numel() for p in start)
    big = torch.ones(25_000_000 if device == "cpu" else 250_000_000, device=device)
    other = torch.zeros_like(big)
    case = {"device": device, "parameters": which, "rule": rule, "not_run": None,
            "device_name": describe_device(device), "threads": torch.get_num_threads(), "tensors": len(start),
            "elements": elements, "bytes_a_parameter": RULES[rule], "steps": chosen.steps, "rounds": chosen.rounds,
            "warmup": chosen.steps, "elements_copied": big.numel()}
    contenders, weights = [], {}
    trials = TRIALS if (which, rule) == (SETS[0], "adamw") and chosen.trials else ()
    names = [name for name in chosen.contenders
             if device == "cpu" or name != "nbutils compiled" or which in chosen.compile_for]
    for name in (*names, *trials):
        weights[name] = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(weights[name], grads):
            p.grad = g                                    # shared: no contender writes to it
        contenders.append(Contender(name, device, stepper(make_optimizer(name, weights[name], rule))))
    for c in contenders:
        before = compiled_graphs()
        c.first_step, c.compiled = c.run(1), compiled_graphs() - before
        c.run(chosen.steps)
        progress(f"{device} {which} {rule}: {c.name}, first step {c.first_step:.3g} s, {c.compiled} graphs")
    contenders += [Contender("copy", device, lambda: other.copy_(big)),
                   Contender("in place", device, lambda: big.mul_(1.0))]
    graphs = compiled_graphs()
    for i in range(chosen.rounds):
        for c in contenders if i % 2 == 0 else reversed(contenders):
            c.times.append(c.run(chosen.steps))
    if compiled_graphs() != graphs:
        raise SystemExit(f"{device} {which} {rule}: {compiled_graphs() - graphs} graphs were compiled after the "
                         "warm-up, so the times hold compilations: no record")
    for c in contenders if device == "cuda" else ():
        if c.name not in MEMORY:
            c.watch(chosen.steps)
    case["contenders"] = [{"name": c.name, "first_step": c.first_step, "compiled": c.compiled, "step": c.times,
                           "busy": c.busy, "kernels": c.kernels} for c in contenders]
    case["largest_difference"] = apart(list(weights.values()))
    if not case["largest_difference"] < 1e-3:
        raise SystemExit(f"{device} {which} {rule}: the weights at the end differ by {case['largest_difference']:.3g} "
                         "relative to the largest: the contenders did not do the same work, no record")
    return case


def apart(paths):
    """Largest difference between the first's weights and any other's, over the first's largest weight."""
    first = paths[0]
    size = max(p.abs().max().item() for p in first)
    return max([(p - q).abs().max().item() / size for path in paths[1:] for p, q in zip(first, path)], default=0.0)


# --- what is shown and kept ------------------------------------------------------------------------
def report(case):
    """A case as lines of text."""
    if case["not_run"]:
        return f"{case['device']}: not run: {case['not_run']}"
    lines = [f"{case['device']}, {case['parameters']}, {case['rule']}: {case['elements']:,} parameters in "
             f"{case['tensors']} tensors; floor {floor_milliseconds(case):.3g} ms "
             f"(copy {bandwidth(case, 'copy') / 1e9:.0f}, in place {bandwidth(case) / 1e9:.0f} GB/s)",
             f"  {'':<24}{'ms':>9}{'first, s':>10}{'to torch foreach':>24}{'to torch fused':>24}{'to the floor':>14}"
             f"{'busy, to the floor':>20}"]
    for c in case["contenders"]:
        cells = []
        for reference in ("torch foreach", "torch fused"):
            r = step_ratios(case, c["name"], reference) if find(case, reference) and c["name"] not in MEMORY else []
            cells.append(f"{statistics.median(r):.3f} ({min(r):.3f}-{max(r):.3f})" if r else "–")
        ms = milliseconds(case, c["name"])
        over = "–" if c["name"] in MEMORY else f"{ms / floor_milliseconds(case):.2f}"
        first = "–" if c["first_step"] is None else f"{c['first_step']:.2f}"
        busy = busy_milliseconds(case, c["name"])
        busy = "–" if busy is None else f"{busy / floor_milliseconds(case):.2f}"
        lines.append(f"  {c['name']:<24}{ms:>9.3f}{first:>10}{cells[0]:>24}{cells[1]:>24}{over:>14}{busy:>20}")
    return "\n".join(lines)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_options(parser, "2 rounds of 2 steps of the smallest set", RECORDS)
    add("--sets", default=",".join(SETS), help=f"some of {', '.join(SETS)}, with commas between")
    add("--rules", default=",".join(RULES), help=f"some of {', '.join(RULES)}")
    add("--compile-for", default=",".join(SETS), help="sets with 'nbutils compiled' on a GPU, where many tensors take minutes")
    add("--contenders", default=",".join(CONTENDERS), help=f"some of {', '.join(CONTENDERS)}")
    add("--trials", action=argparse.BooleanOptionalAction, default=True, help=f"with {' and '.join(TRIALS)}")
    add("--steps", type=int, default=10, help="steps of a round (default: 10)")
    add("--rounds", type=int, default=20, help="default: 20")
    chosen = parser.parse_args(argv)
    split_lists(parser, chosen, sets=SETS, rules=RULES, compile_for=SETS, contenders=CONTENDERS)
    need_positive(parser, chosen, "steps", "rounds", "threads")
    if chosen.quick:
        chosen.steps, chosen.rounds, chosen.sets, chosen.rules = 2, 2, chosen.sets[:1], chosen.rules[:1]
    return chosen


def main(argv=None):
    chosen = arguments(argv)

    def cases_on(device):
        for which in chosen.sets:
            for rule in chosen.rules:
                yield measure(device, which, rule, chosen)

    return run(__file__, chosen, cases_on, report)


if __name__ == "__main__":
    raise SystemExit(main())
