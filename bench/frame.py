"""The frame that steps.py, qrnn.py, loss.py, cache.py and epochs.py share: common options, a quiet machine, the record.

A benchmark gives its cases (dicts with "device", "not_run" and, where something ran, "device_name"); `run` does what
stands around them. What a record's head holds is said in bench.py.
"""
import hashlib
import os
import time
from datetime import datetime, timezone
from pathlib import Path

from bench import BUSY_LIMIT, cores, load, load_records, memory_gb, ticks, write_record


def newest(folder):
    """The newest record of each machine (its card, or else its processor), newest first."""
    shown = {}
    for record in load_records(folder):
        shown.setdefault(record["machine"]["gpu"] or record["machine"]["cpu"], record)
    return list(shown.values())


def add_options(parser, quick, records):
    """The options of every benchmark; `quick` says what --quick runs, `records` is the folder of the records."""
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{quick}: writes no record")
    add("--anyway", action="store_true", help="start even if others use the machine")
    add("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all there are")
    add("--threads", type=int, default=cores(), help="default: all cores")
    add("--out", type=Path, default=records, help="folder of the records")


def split_lists(parser, chosen, **known):
    """Make lists of the options that hold names with commas between; refuse a name that is not known."""
    for name, there_are in known.items():
        values = [value for value in getattr(chosen, name).split(",") if value]
        setattr(chosen, name, values)
        for value in values:
            if value not in there_are:
                parser.error(f"unknown {name.rstrip('s')} {value!r}; there are: {', '.join(there_are)}")


def need_positive(parser, chosen, *names):
    for name in names:
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")


def is_quiet(before, busiest, chosen):
    """Whether the machine is quiet (else it is told), and whether the benchmark may start."""
    busy = before["averages"][0] > 0.5 * cores() if before["busy_cores"] is None else before["busy_cores"] > BUSY_LIMIT
    go = not busy or chosen.quick or chosen.anyway
    if not go:
        print("Others are using this machine, and would be measured too:\n  "
              + "\n  ".join(busiest or ["see the load averages"])
              + "\nWait until it is quiet, or give --anyway; the record then says so.")
    return not busy, go


def set_threads(number):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(number)
    import torch

    torch.set_num_threads(number)


def run(script, chosen, cases_on, report):
    """Run a benchmark on each device, print its cases, write its record; return the exit status.

    `script` is the benchmark's file; `cases_on(device)` yields its cases, `report(case)` gives their text.
    """
    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    before, busiest = load()
    quiet, go = is_quiet(before, busiest, chosen)
    if not go:
        return 2
    set_threads(chosen.threads)
    import torch

    start_ticks, cases = ticks(), []
    for device in ("cpu", "cuda") if chosen.device == "all" else (chosen.device,):
        lacking = device == "cuda" and not torch.cuda.is_available()
        for case in [{"device": device, "not_run": "no GPU in this machine"}] if lacking else cases_on(device):
            cases.append(case)
            print(report(case), flush=True)
    measured = [case for case in cases if not case["not_run"]]
    if chosen.quick or not measured:
        print("--quick measures nothing: no record" if chosen.quick else "nothing was run: no record")
        return 0
    weight = {"before": before, "after": load()[0], "steal": stolen(start_ticks, ticks()), "anyway": not quiet}
    record = head(script, measured, started) | {
        "seconds": round(time.perf_counter() - begun, 1), "load": weight, "cases": cases}
    print(f"record: {write_record(record, chosen.out)}")
    return 0


def stolen(start, end):
    """The share of the time that the machine's host gave to others, or None."""
    return (end[1] - start[1]) / max(1, end[2] - start[2]) if start and end else None


def head(script, measured, started):
    """What every record begins with; "seconds", "load" and "cases" keep their places for what is still to come."""
    from nbutils.records import code_state, describe_device, versions

    commit, code_hash = code_state()
    gpu = next((case["device_name"] for case in measured if case["device"] == "cuda"), None)
    source = b"".join(Path(path).read_bytes() for path in (script, __file__))
    return {"format": 1, "name": "", "started": started, "seconds": None,
            "machine": {"cpu": describe_device("cpu"), "gpu": gpu, "cores": cores(), "memory_gb": memory_gb(),
                        "platform": versions()["platform"]},
            "load": None, "versions": versions(), "commit": commit, "code_hash": code_hash,
            "bench_hash": hashlib.sha256(source).hexdigest()[:16], "cases": None}
