#!/usr/bin/env python
"""Time epochs of training for the AWD-LSTM and the QRNN of chapter 16 and the ResNet of chapter 12, by the tasks' own Learners.

    make bench-epochs                        on the CPU and, where there is one, on the GPU: a record
    make bench-epochs ARGS=--quick           the smoke size, to see that it runs: no record
    .venv/bin/python bench/epochs.py --help

A case is a device, a model, a size and a number of runs at once. Each run is a process of its own, which builds the row's
Learner as `nbutils run` does (rows lstm-adam, qrnn-adam and crops-adam-l2), trains a warm-up epoch on a GPU (none on a CPU;
before it, for the ResNet, one with the body frozen, so that what is timed is the whole net) and waits; when all are ready they train `--rounds` epochs, evaluating the validation text after each. The seconds of an epoch are
the Learner's own: training alone, up to the losses' way home. On a GPU 1, 2 and 4 runs at once are timed, for a card that
is not full with one run gives more with several; on a CPU one.

The record, book/records/epochs/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format, name, started, seconds, machine, load, versions, commit, code_hash, bench_hash
                    as in bench.py
    cases           a list; each has
        device                            "cpu" or "cuda"
        model, size, at_once              "lstm", "qrnn" or "cars"; of the task; number of runs at once. (A device that is not
                                          there is one case, which has none of these.)
        not_run                           the reason, and then nothing else
        device_name, threads, rounds, warmup, precision, parameters
        goals                             seconds of an epoch at full size, by card
        runs                              a list; each has
            seconds, valid                two lists: of an epoch's training and evaluation, a round each
            tokens                        a list: tokens, or pictures, trained on in these epochs
            began, ended                  of all rounds, in seconds of a clock that the runs share
            peak_mb                       on a GPU: most that torch had allocated; else the process' peak of resident
                                          memory, libraries included

Medians and rates are not stored: the functions below compute them.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import frame  # noqa: E402
from bench import progress  # noqa: E402
from frame import add_options, need_positive, run, split_lists  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "epochs"
MODELS = {"lstm": "AWD-LSTM", "qrnn": "QRNN", "cars": "ResNet on crops of Cars"}
ROWS = {"lstm": ("wikitext2", "lstm-adam"), "qrnn": ("wikitext2", "qrnn-adam"), "cars": ("cars", "crops-adam-l2")}
SIZES = ("smoke", "laptop", "colab", "full")
GOALS = {"lstm": {"H200": 3.0, "T4": 45.0}, "qrnn": {"H200": 1.8, "T4": 30.0},
         "cars": {"H200": 4.0}}                                                       # s an epoch, at full size
AT_ONCE = (1, 2, 4)
ROUNDS = {"cpu": 2, "cuda": 5}


# --- figures from a record -----------------------------------------------------------------------
def newest(folder=RECORDS):
    """The newest record of each machine, newest first."""
    return frame.newest(folder)


def epoch_seconds(case):
    """Seconds of an epoch: median over all epochs of all runs, smallest, largest, and their number."""
    found = [s for one in case["runs"] for s in one["seconds"]]
    return statistics.median(found), min(found), max(found), len(found)


def tokens_per_second(case):
    """Tokens of one run's epoch over its seconds: median over all epochs of all runs."""
    return statistics.median(n / s for one in case["runs"] for n, s in zip(one["tokens"], one["seconds"], strict=True))


def joint_tokens_per_second(case):
    """Tokens of all runs over the time from the first's begin to the last's end, evaluations included."""
    span = max(one["ended"] for one in case["runs"]) - min(one["began"] for one in case["runs"])
    return sum(sum(one["tokens"]) for one in case["runs"]) / span


def peak_mb(case):
    """The largest run's peak of memory."""
    return max(one["peak_mb"] for one in case["runs"])


def goal(case):
    """The goal for this case's card, in s an epoch, or None: there is one for full size and a run alone."""
    if case["size"] != "full" or case["at_once"] > 1:
        return None
    return next((seconds for card, seconds in case["goals"].items() if card in case["device_name"].split()), None)


def verdict(case):
    """What the goal says to this case, in words."""
    seconds = goal(case)
    if seconds is None:
        return "–"
    return f"{seconds:g} s: {'met' if epoch_seconds(case)[0] <= seconds else 'missed'}"


# --- a run: a process of its own -------------------------------------------------------------------
def work(settings, say, hear):
    """Train as told; `say` a dict when ready and at the end, and `hear` when to go on."""
    import torch
    from peers import peak

    from nbutils.core import seed_everything, synchronize
    from nbutils.experiment import Reseed, get_task
    from nbutils.learner import Callback

    torch.set_num_threads(settings["threads"])
    device, warmup, facts = torch.device(settings["device"]), settings["warmup"], {}
    torch.backends.cudnn.benchmark = device.type == "cuda"
    name, row = ROWS[settings["model"]]
    task, frozen = get_task(name), {"head_epochs": 1} if name == "cars" else {}
    warmup += len(frozen)
    config = replace(task.config(row, settings["size"]), epochs=warmup + settings["rounds"], **frozen)

    class Wait(Callback):
        """Between warm-up and rounds: out of the time of any epoch."""

        def before_fit(self, learner):
            if not warmup:
                self.ready()

        def after_epoch(self, learner):
            if learner.epoch == warmup:
                self.ready()

        def ready(self):
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            say({"ready": True})
            hear()
            facts["began"] = time.monotonic()

    seed_everything(0)
    learner = task.build(config, 0, device)
    learner.callbacks = [Reseed(0), *learner.callbacks, Wait()]
    learner.fit(config.epochs)
    synchronize(device)
    facts["ended"], rows = time.monotonic(), learner.history[warmup:]
    tokens = []
    for epoch in range(warmup, config.epochs):
        learner.train.set_epoch(epoch)
        tokens.append(len(learner.train.images) if frozen else sum(learner.train.lengths()) * config.streams)
    used = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else peak()
    say({"seconds": [row["seconds"] for row in rows], "valid": [row["valid_seconds"] for row in rows], "tokens": tokens,
         **facts, "peak_mb": round(used, 1), "precision": learner.precision,
         "parameters": sum(p.numel() for p in learner.model.parameters())})


def worker(settings):
    """What the process of a run does."""
    import torch

    def say(facts):
        print(json.dumps(facts), flush=True)

    try:
        work(settings, say, sys.stdin.readline)
    except torch.OutOfMemoryError:
        say({"failed": "out of memory"})
    return 0


class Run:
    """A process that trains, and the talk with it."""

    def __init__(self, settings, log):
        environment = os.environ | {"PYTHONPATH": str(HERE.parent), "NBUTILS_NO_BAR": "1"}
        environment |= {name: str(settings["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "epochs.py"), "--worker", json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)

    def hear(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SystemExit("a run failed. The end of what it wrote:\n"
                             + "\n".join(self.log.read_text().splitlines()[-25:]))
        return json.loads(line)

    def go(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def close(self):
        self.process.kill()
        self.process.communicate()


def measure(device, model, at_once, chosen):
    """One case; its part of the record."""
    from nbutils.records import describe_device

    size = chosen.size or ("laptop" if device == "cpu" else "full")
    rounds, warmup = chosen.rounds or ROUNDS[device], int(device == "cuda")
    case = {"device": device, "model": model, "size": size, "at_once": at_once, "not_run": None}
    settings = {"device": device, "model": model, "size": size, "rounds": rounds, "warmup": warmup,
                "threads": chosen.threads}
    progress(f"{device} {size}: {MODELS[model]}, {at_once} at once, {warmup} + {rounds} epochs")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i in range(at_once):
                runs.append(Run(settings, Path(folder) / f"{i}.log"))
            heard = [one.hear() for one in runs]
            if all("ready" in facts for facts in heard):
                for one in runs:
                    one.go()
                heard = [one.hear() for one in runs]
        finally:
            for one in runs:
                one.close()
    failed = [facts["failed"] for facts in heard if "failed" in facts]
    if failed:
        return case | {"not_run": failed[0]}
    precision, parameters = [(facts.pop("precision"), facts.pop("parameters")) for facts in heard][0]
    return case | {"device_name": describe_device(device), "threads": chosen.threads, "rounds": rounds,
                   "warmup": warmup, "precision": precision, "parameters": parameters, "goals": GOALS[model],
                   "runs": heard}


# --- what is shown and kept ------------------------------------------------------------------------
def report(case):
    """A case as a line of text."""
    what = ", ".join(str(case[key]) for key in ("device", "size", "model") if key in case)
    if case["not_run"]:
        return f"{what}: not run: {case['not_run']}"
    middle, low, high, n = epoch_seconds(case)
    return (f"{what}, {case['at_once']} at once: {middle:.3g} s an epoch ({low:.3g} to {high:.3g}, n = {n}), "
            f"{tokens_per_second(case):,.0f} tokens or pictures a second, together {joint_tokens_per_second(case):,.0f} with "
            f"evaluation, peak {peak_mb(case):,.0f} MB; goal {verdict(case)}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_options(parser, "the smoke size, 2 epochs", RECORDS)
    add("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}, with commas between")
    add("--size", choices=SIZES, default=None, help="default: laptop on a CPU, full on a GPU")
    add("--rounds", type=int, default=None, help=f"epochs that are timed (default: {ROUNDS})")
    add("--at-once", default=",".join(map(str, AT_ONCE)), help="numbers of runs at once on a GPU (default: 1,2,4)")
    add("--worker", type=json.loads, default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    split_lists(parser, chosen, models=MODELS)
    try:
        chosen.at_once = [int(value) for value in chosen.at_once.split(",") if value]
    except ValueError:
        chosen.at_once = []
    if not chosen.at_once or min(chosen.at_once) < 1:
        parser.error("--at-once must hold whole numbers of 1 or more, with commas between")
    if chosen.quick:
        chosen.size, chosen.rounds = "smoke", 2
    need_positive(parser, chosen, "threads", *["rounds"] * (chosen.rounds is not None))
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    if chosen.worker:
        return worker(chosen.worker)

    def cases_on(device):
        for model in chosen.models:
            for at_once in chosen.at_once if device == "cuda" else (1,):
                yield measure(device, model, at_once, chosen)

    return run(__file__, chosen, cases_on, report)


if __name__ == "__main__":
    raise SystemExit(main())
