#!/usr/bin/env python
"""Run the counter-examples of Reddi, Kale and Kumar (2018) for six million steps, by each variant.

    make counterexamples                     all of it, in one process: about 8 minutes, a record
    make counterexamples ARGS=--quick        20,000 steps of everything, to see that it runs: no record
    .venv/bin/python bench/counterexamples.py --help

The simulation is `nbutils.amsgrad.counterexample`; chapter 4 says what it does and shows the figures.
The numbers do not depend on the machine or on what else it does: they are Python's own floats.

The record, book/records/counterexamples/DATE-CPU.json (then -2, -3, ...; none is ever overwritten):

    format          1
    name, started   the file's name; UTC
    seconds         of all runs together
    machine         cpu, gpu (null: none is used), cores that this process may use, platform
    versions, commit, code_hash, bench_hash
                    packages; the checkout (+: changed since); nbutils' files; this file
    steps           of each run
    runs            a list; each has
        variant, lr, falling, betas, start, seed      as `counterexample` takes them; seed null: online
        steps, x, regret                              what it returns, thinned, to six digits
"""
import argparse
import hashlib
import math
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from bench import cores, progress, write_record  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "counterexamples"
STEPS, QUICK_STEPS, SEEDS = 6_000_000, 20_000, 5
CONTENDERS = [("adam", 0.99), ("paper", 0.99), ("torch", 0.99), ("optax", 0.99), ("adam", 0.9999), ("adam", 0.999)]
RATES = [(0.5, True), (1e-3, False)]                                  # lr; whether it falls as 1 / sqrt(t)
TRAPS = [{"lr": 0.1, "falling": True}, {"lr": 0.5, "falling": False}, {"lr": 0.5, "falling": True, "start": 1.0}]


def plan(seeds):
    """The settings of every run, in order: online, the traps, stochastic."""
    usual = [{"variant": variant, "betas": [0.9, beta2], "lr": lr, "falling": falling, "start": 0.0, "seed": None}
             for lr, falling in RATES for variant, beta2 in CONTENDERS]
    traps = [usual[0] | {"variant": variant} | trap for trap in TRAPS for variant in ("torch", "optax")]
    return [*usual, *traps, *({**run, "seed": seed} for run in usual for seed in range(seeds))]


def words(run):
    """A run's settings in a line."""
    rate = f"{run['lr']:g}" + " / sqrt(t)" * run["falling"]
    gradients = "online" if run["seed"] is None else f"stochastic, seed {run['seed']}"
    return f"{run['variant']:5} beta2 {run['betas'][1]:<6g} lr {rate:13} from {run['start']:g}, {gradients}"


def simulate(run, steps):
    """Run one; return its settings with the thinned paths."""
    from nbutils.amsgrad import _log_steps, counterexample

    at = _log_steps(steps, 200 if run["seed"] is None else 50)
    found = counterexample(steps=steps, at=at, **run)
    rounded = {name: [float(f"{value:.6g}") for value in found[name]] for name in ("x", "regret")}
    return run | {"steps": found["steps"]} | rounded


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_STEPS:,} steps, one seed: only to see that it runs; no record")
    add("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS:,})")
    add("--seeds", type=int, default=SEEDS, help=f"of the stochastic example (default: {SEEDS})")
    add("--out", type=Path, default=RECORDS, help="folder of the records")
    chosen = parser.parse_args(argv)
    for name in ("steps", "seeds"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"--out {chosen.out} is no folder")
    if chosen.quick:
        chosen.steps, chosen.seeds = QUICK_STEPS, 1
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    from nbutils.records import code_state, describe_device, versions

    commit, code_hash = code_state()                   # of the code that runs, not of what it may become meanwhile
    bench_hash = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    todo, runs = plan(chosen.seeds), []
    for number, run in enumerate(todo, 1):
        runs.append(simulate(run, chosen.steps))
        x, regret = runs[-1]["x"][-1], runs[-1]["regret"][-1]
        progress(f"{number:2}/{len(todo)} {words(run)}: x {x:+.4f}, average regret {regret:.4f} "
                 f"({time.perf_counter() - begun:.0f} s)")
        if not (math.isfinite(x) and math.isfinite(regret)):
            print(f"{words(run)}: x is {x}, regret {regret}: no record")
            return 1
    if chosen.quick:
        print("--quick shows only that it runs: no record")
        return 0
    record = {
        "format": 1, "name": "", "started": started, "seconds": round(time.perf_counter() - begun, 1),
        "machine": {"cpu": describe_device("cpu").rsplit(", ", 1)[0], "gpu": None, "cores": cores(),
                    "platform": versions()["platform"]},
        "versions": versions(), "commit": commit, "code_hash": code_hash, "bench_hash": bench_hash,
        "steps": chosen.steps, "runs": runs}
    print(f"record: {write_record(record, chosen.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
