#!/usr/bin/env python
"""Time how pictures become one tensor: `decode_pictures` with one worker and with more.

    make bench-decode                    crops and stand-ins for whole pictures: a record
    make bench-decode ARGS=--quick       a few pictures, to see that it runs: no record
    .venv/bin/python bench/decode.py --help

Two sets of pictures, whose files lie in memory, so that no disk is measured:

    crops            the first training pictures of cars-224 (WebP, 224 x 224), kept at 224 x 224
    640x480 JPEGs    generated: smooth noise under JPEG's quality 90, about as many bytes as a picture of
                     Stanford Cars has on average (121 kB); kept at 235 x 313. A stand-in for whole
                     pictures, not the pictures themselves

Numbers of workers take turns, a round each, 1 2 and back 2 1. All must give the same tensor; otherwise there
is no record. The goal: 16,185 pictures in 3 minutes on two cores.

The record, book/records/decode/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format, name, started, seconds, machine, load, versions, commit, code_hash, bench_hash
                    as in bench.py
    cases           a list; each has
        pictures, not_run                 the name of the set, and the reason; then nothing else
        pictures, n, rounds, bytes        bytes: of the files, on average
        side, width                       of what is kept
        contenders                        a list; each has
            workers, seconds              a list of a round's seconds for n pictures
            cpu_seconds                   a list of the same rounds' processor seconds, which count only our own

Medians and rates are not stored: the functions below compute them.
"""
import argparse
import hashlib
import io
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from bench import (BUSY_LIMIT, cores, load, load_records, memory_gb, progress,  # noqa: E402
                   ticks, write_record)

RECORDS = HERE.parent / "book" / "records" / "decode"
CARS, GOAL_MINUTES, GOAL_WORKERS = 16_185, 3.0, 2
CROPS, STAND_INS = "crops", "640x480 JPEGs, generated"


# --- figures from a record -----------------------------------------------------------------------
def newest(folder=RECORDS):
    """The newest record of each machine, newest first."""
    shown = {}
    for record in load_records(folder):
        shown.setdefault(record["machine"]["cpu"], record)
    return list(shown.values())


def contender(case, workers):
    """The contender with so many workers, or None."""
    return next((c for c in case["contenders"] if c["workers"] == workers), None)


def rate(case, workers):
    """Pictures per second, of the median round."""
    return case["n"] / statistics.median(contender(case, workers)["seconds"])


def minutes(case, workers, n=CARS):
    """Minutes for all of Stanford Cars, at that rate."""
    return n / rate(case, workers) / 60


def cpu_milliseconds(case, workers):
    """Processor time of a picture in the median round, in ms; a busy machine hardly moves it."""
    return 1e3 * statistics.median(contender(case, workers)["cpu_seconds"]) / case["n"]


def speedup(case, workers, reference=1):
    """How many times as fast as with one worker: median of the rounds, smallest, largest."""
    ours, theirs = (contender(case, w)["seconds"] for w in (workers, reference))
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(found), min(found), max(found)


# --- what is timed -------------------------------------------------------------------------------
def crops(folder, n):
    """The first n training pictures' bytes."""
    from nbutils.pictures import find_pictures

    return [path.read_bytes() for path, _ in find_pictures(folder)[0]["train"][:n]]


def stand_ins(n, width=640, height=480, quality=90):
    """The bytes of n generated JPEGs."""
    import numpy as np
    from PIL import Image

    rng, made = np.random.default_rng(0), []
    for _ in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = rng.normal(0, 8, (height, width, 1)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
        made.append(file.getvalue())
    return made


def measure(name, files, side, ratio, chosen):
    """One set of pictures; its part of the record."""
    import torch

    from nbutils.pictures import decode_pictures

    seconds, cpu, seen = {w: [] for w in chosen.workers}, {w: [] for w in chosen.workers}, None
    decode_pictures([io.BytesIO(raw) for raw in files[:8]], side, ratio)               # warm-up
    for i in range(chosen.rounds):
        for workers in chosen.workers if i % 2 == 0 else reversed(chosen.workers):
            opened = [io.BytesIO(raw) for raw in files]
            start, own = time.perf_counter(), time.process_time()
            x = decode_pictures(opened, side, ratio, workers)
            seconds[workers].append(time.perf_counter() - start)
            cpu[workers].append(time.process_time() - own)
            progress(f"{name}, round {i + 1}, {workers} workers: {len(files) / seconds[workers][-1]:.0f} a second")
            if seen is not None and not torch.equal(x, seen):
                raise SystemExit(f"{name}: {workers} workers give another tensor: no record")
            seen = x
    return {"pictures": name, "not_run": None, "n": len(files), "rounds": chosen.rounds,
            "bytes": round(sum(map(len, files)) / len(files)), "side": side, "width": round(ratio * side),
            "contenders": [{"workers": w, "seconds": seconds[w], "cpu_seconds": cpu[w]} for w in chosen.workers]}


# --- what is shown and kept ------------------------------------------------------------------------
def verdict(case):
    """Whether the goal is met, as a sentence; nothing if it was not measured."""
    if contender(case, GOAL_WORKERS) is None:
        return ""
    needed = minutes(case, GOAL_WORKERS)
    met = "met" if needed <= GOAL_MINUTES else "missed"
    return f"goal: {CARS:,} pictures in {GOAL_MINUTES:g} minutes with {GOAL_WORKERS} workers: {needed:.2f}, {met}"


def report(case):
    """A case as lines of text."""
    if case["not_run"]:
        return f"{case['pictures']}: not run: {case['not_run']}"
    lines = [f"{case['pictures']}: n = {case['n']:,} of {case['bytes'] / 1e3:.0f} kB, kept at {case['side']} x "
             f"{case['width']}; {case['rounds']} rounds"]
    for c in case["contenders"]:
        middle, low, high = speedup(case, c["workers"], case["contenders"][0]["workers"])
        lines.append(f"  {c['workers']} workers: {rate(case, c['workers']):.0f} a second, {minutes(case, c['workers']):.2f} "
                     f"minutes for {CARS:,}; {middle:.2f} times as fast as the first ({low:.2f} to {high:.2f}); "
                     f"{cpu_milliseconds(case, c['workers']):.1f} ms of a processor a picture")
    return "\n".join([*lines, *[f"  {verdict(case)}"] * bool(verdict(case))])


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="2 rounds of 16 pictures: writes no record")
    add("--anyway", action="store_true", help="start even if others use the machine")
    add("--folder", type=Path, help="of the crops (default: cars-224 in the data folder)")
    add("--n", type=int, default=500, help="pictures of a round (default: 500)")
    add("--workers", default="1,2", help="with commas between (default: 1,2)")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--out", type=Path, default=RECORDS, help="folder of the records")
    chosen = parser.parse_args(argv)
    try:
        chosen.workers = [int(value) for value in chosen.workers.split(",")]
    except ValueError:
        parser.error(f"--workers is {chosen.workers!r}: whole numbers are needed, with commas between")
    if chosen.quick:
        chosen.n, chosen.rounds = 16, 2
    if min(chosen.workers) < 1 or len(set(chosen.workers)) < len(chosen.workers):
        parser.error("--workers must be different numbers from 1 on")
    for name in "n", "rounds":
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    before, busiest = load()
    busy = before["averages"][0] > 0.5 * cores() if before["busy_cores"] is None else before["busy_cores"] > BUSY_LIMIT
    if busy and not (chosen.quick or chosen.anyway):
        print("Others are using this machine, and would be measured too:\n  "
              + "\n  ".join(busiest or ["see the load averages"])
              + "\nWait until it is quiet, or give --anyway; the record then says so.")
        return 2
    import torch

    from nbutils.files import data_home
    from nbutils.records import code_state, describe_device, versions

    torch.set_num_threads(1)                    # the workers are the threads
    start_ticks, cases = ticks(), []
    folder = chosen.folder or data_home() / "cars-224"
    if folder.is_dir():
        cases.append(measure(CROPS, crops(folder, chosen.n), 224, 1.0, chosen))
    else:
        cases.append({"pictures": CROPS, "not_run": f"there is no folder {folder.name}"})
    cases.append(measure(STAND_INS, stand_ins(chosen.n), 235, 4 / 3, chosen))
    print("\n".join(map(report, cases)), flush=True)
    if chosen.quick:
        print("--quick measures nothing: no record")
        return 0
    after, _ = load()
    end_ticks = ticks()
    steal = (end_ticks[1] - start_ticks[1]) / max(1, end_ticks[2] - start_ticks[2]) if end_ticks else None
    commit, code_hash = code_state()
    import PIL

    record = {
        "format": 1, "name": "", "started": started, "seconds": round(time.perf_counter() - begun, 1),
        "machine": {"cpu": describe_device("cpu"), "gpu": None, "cores": cores(), "memory_gb": memory_gb(),
                    "platform": versions()["platform"]},
        "load": {"before": before, "after": after, "steal": steal, "anyway": bool(busy)},
        "versions": versions() | {"pillow": PIL.__version__}, "commit": commit, "code_hash": code_hash,
        "bench_hash": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16], "cases": cases}
    print(f"record: {write_record(record, chosen.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
