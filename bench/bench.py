#!/usr/bin/env python
"""Compare our Learner with a plain loop, fastai's Learner and Lightning's Trainer, on the same work.

    make bench                           on the CPU and, where there is one, on the GPU: a record
    make bench ARGS=--quick              a few steps of everything, to see that it runs: no record
    .bench-venv/bin/python bench/bench.py --help

A contender is a loop and a feed (`fastai+loader`); peers.py says what each does. Each is a process
of its own, so that its memory is its own. All are started and warmed up; then they take turns, one
epoch each, A B C D and back D C B A, and so on, while the others wait without computing. So every
round gives a ratio between two epochs measured within seconds of each other, and a machine that
grows slower for a minute slows both. An epoch here is `--steps` steps on a fixed part of CIFAR-10,
then an evaluation on a fifth as many test images. All contenders use the same number of threads;
a DataLoader's helper processes come on top of them, and their number (0, 1 or 2 on two cores) is the
one with which the plain loop was fastest in a trial before the rounds.

What others do on the machine meanwhile would be measured too: when they keep more than a quarter of
a core busy, the benchmark refuses to start (`--anyway` overrides, and the record says so).

The record, book/records/bench/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format          1
    name, started   the file's name; UTC
    seconds         of the whole benchmark
    machine         cpu, gpu (or null), cores that this process may use, memory_gb, platform
    load            before and after: load averages and busy_cores (cores that others kept busy in two
                    seconds; null where the system does not tell); steal: share of the time that the
                    machine's host gave to others; anyway: true when started in spite of other work
    data            "CIFAR-10", or that the images are random (their times are the same)
    versions, commit, code_hash, bench_hash
                    packages; the checkout (+: changed since); nbutils' files; bench.py's and peers.py's
    sets            a list; each is one device and precision:
        device, precision                 "cpu" or "cuda"; "fp32", "bf16", "fp16"
        not_run                           the reason, and then nothing else
        device_name, net, parameters, compiled
        settings                          images and test_images of a round, steps, rounds, batch_size, threads,
                                          warmup (epochs that are not counted), lr, weight_decay
        loader_workers, loader_trial      helper processes chosen; number -> seconds of an epoch in the trial
        contenders                        a list; each has
            name                          loop+feed
            optimizer                     whose AdamW
            rounds                        a list in the order of the rounds; each has
                train, total              seconds of the training, and with the evaluation
                loss, accuracy            on the test images, after this epoch
                threads                   torch's, as found after the epoch
                peak_mb                   the process' peak of resident memory up to then
                helpers, helpers_mb       its loader's processes, and the memory that only they hold
                gpu_mb, gpu_reserved_mb   on a GPU: peak of what torch allocated, and reserved
            warmup                        the same for the epochs before, slower for many reasons

Medians, ratios and n are not stored: `ratios` and `median` below compute them from `rounds`.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORDS = HERE.parent / "book" / "records" / "bench"
EPOCH_IMAGES, TEST_IMAGES = 50_000, 10_000
CONTENDERS = ("plain+batches", "learner+batches", "fastai+batches", "lightning+batches",
              "plain+loader", "fastai+loader", "lightning+loader")
KNOWN = (*CONTENDERS, "learner+loader")
BUSY_LIMIT = 0.25          # cores


# --- figures from a record -----------------------------------------------------------------------
def median(values):
    return statistics.median(values)


def find(found, name):
    """The contender of a set by its name, or None."""
    return next((c for c in found.get("contenders", ()) if c["name"] == name), None)


def ratios(contender, reference, key="train"):
    """Seconds of one contender over those of another, round by round."""
    return [a[key] / b[key] for a, b in zip(contender["rounds"], reference["rounds"], strict=True)]


def epoch_seconds(found, contender, evaluated=False):
    """Median seconds of an epoch on all 50,000 images, scaled up from the images of a round.

    With ``evaluated``, the evaluation on all 10,000 test images is added, scaled up likewise.
    """
    train = median([r["train"] for r in contender["rounds"]]) * EPOCH_IMAGES / found["settings"]["images"]
    extra = median([r["total"] - r["train"] for r in contender["rounds"]])
    return train + evaluated * extra * TEST_IMAGES / found["settings"]["test_images"]


def load_records(folder=RECORDS):
    """All records, newest first; each has its form (forms.py)."""
    import forms  # here: it imports torch, and frame.py chooses the threads before that

    return sorted(forms.read_all(folder), key=lambda record: record["started"], reverse=True)


# --- the machine ---------------------------------------------------------------------------------
def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ticks():
    """(busy, stolen, all) clock ticks of the machine since it started, or None where /proc is not."""
    try:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    idle = numbers[3] + numbers[4]
    return sum(numbers) - idle, numbers[7], sum(numbers)


def process_ticks():
    """Clock ticks of each process, by id and name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = re.match(r"\d+ \((.*)\) (.*)", path.read_text(), re.S).groups()
        except (OSError, AttributeError):
            continue
        fields = fields.split()
        found[int(path.parent.name), name] = int(fields[11]) + int(fields[12])
    return found


def load(seconds=2.0):
    """Load averages, and how many cores are busy while this process sleeps; then the busiest processes."""
    facts = {"averages": [round(a, 2) for a in os.getloadavg()], "busy_cores": None}
    before, processes = ticks(), process_ticks()
    time.sleep(seconds)
    after, later = ticks(), process_ticks()
    if before is None or after[2] == before[2]:
        return facts, []
    facts["busy_cores"] = round((after[0] - before[0]) / (after[2] - before[2]) * os.cpu_count(), 2)
    used = {key: n - processes.get(key, 0) for key, n in later.items()}
    share = {key: n / os.sysconf("SC_CLK_TCK") / seconds for key, n in used.items()}
    busiest = sorted(share, key=share.get, reverse=True)[:4]
    return facts, [f"{name} (process {pid}): {share[pid, name]:.0%} of a core"
                   for pid, name in busiest if share[pid, name] >= 0.05]


def memory_gb():
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def all_versions(found):
    """The versions that nbutils reports, with those of the peers."""
    for name in ("fastai", "lightning"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- processes -----------------------------------------------------------------------------------
class Peer:
    """A process of peers.py and the talk with it."""

    def __init__(self, job, settings, folder):
        self.job, self.results = job, []
        self.log = Path(folder) / f"{job}.log"
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE.parent)}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(settings["threads"])
        environment |= {} if settings.get("device") == "cuda" or job == "prepare" else {"CUDA_VISIBLE_DEVICES": ""}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "peers.py"), json.dumps(settings | {"job": job})],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def hear(self):
        """The next reply; an empty one at the end of a process that ended well."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        if self.process.wait():
            raise SystemExit(f"{self.job} failed. The end of what it wrote:\n"
                             + "\n".join(self.log.read_text().splitlines()[-25:]))
        return {}

    def turn(self):
        """Let it do one epoch, and wait until it is ready for the next."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.results.append(self.hear())
        self.hear()

    def close(self):
        """End it: it leaves when nothing more can come."""
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def ask(job, settings, folder):
    """What a process that takes no turns replies."""
    peer = Peer(job, settings, folder)
    try:
        return peer.hear()
    finally:
        peer.close()


def progress(text):
    print(text, file=sys.stderr, flush=True)


# --- one device and precision ----------------------------------------------------------------------
STEPS = {"cpu fp32": 6, "cpu bf16": 20}      # a few seconds on two cores; elsewhere a whole epoch


def plan(device, precision, chosen):
    """The settings of one device and precision."""
    size = chosen.batch_size
    steps = chosen.steps or (4 if chosen.quick else STEPS.get(f"{device} {precision}", EPOCH_IMAGES // size))
    steps = min(steps, EPOCH_IMAGES // size)
    return {"steps": steps, "rounds": chosen.rounds or (2 if chosen.quick else 8), "batch_size": size,
            "images": steps * size, "test_images": min(TEST_IMAGES, max(1, steps // 5) * size),
            "warmup": 1 if device == "cpu" else 2, "threads": chosen.threads, "lr": 3e-3, "weight_decay": 0.1}


def candidates(threads):
    """Numbers of loader processes to try: 0, 1, 2 on two cores; more on larger machines."""
    return sorted({0, 1, 2, threads // 2, threads}) if threads > 2 else [0, 1, 2]


def measure(device, precision, info, chosen, folder):
    """All contenders on one device in one precision; the set's part of the record."""
    net, shared = "plain-6" if device == "cpu" else "wide-resnet-22", plan(device, precision, chosen)
    found = {"device": device, "precision": precision, "not_run": None,
             "device_name": info["devices"][device]["name"], "net": net, "parameters": info["parameters"][net],
             "compiled": device == "cuda", "settings": shared, "loader_trial": None}
    settings = shared | {"device": device, "precision": precision, "net": net, "file": info["file"],
                         "loader_workers": chosen.loader_workers or 0, "candidates": candidates(chosen.threads)}
    if chosen.loader_workers is None and not chosen.quick and any(c.endswith("+loader") for c in chosen.contenders):
        progress(f"{device} {precision}: how many loader processes?")
        trial = ask("tune", settings | {"warmup": 1, "rounds": 1}, folder)["seconds"]
        settings["loader_workers"] = int(min(trial, key=trial.get))
        found["loader_trial"] = trial
        progress("  " + ", ".join(f"{n}: {seconds:.2f} s" for n, seconds in trial.items()))
    found["loader_workers"] = settings["loader_workers"]
    peers = []
    try:
        for name in chosen.contenders:
            progress(f"{device} {precision}: starting {name}")
            peers.append(Peer(name, settings, folder))
            peers[-1].hear()
            for _ in range(settings["warmup"]):
                peers[-1].turn()
        for i in range(settings["rounds"]):
            for peer in peers if i % 2 == 0 else reversed(peers):
                peer.turn()
            times = ", ".join(f"{p.job} {p.results[-1]['train']:.3g}" for p in peers)
            progress(f"{device} {precision}: round {i + 1} of {settings['rounds']}, training, s: {times}")
    finally:
        for peer in peers:
            peer.close()
    ours = "nbutils" if device == "cpu" else "torch, fused"
    others = "torch" if device == "cpu" else "torch, fused"
    warmup = settings["warmup"]
    found["contenders"] = [
        {"name": p.job, "optimizer": ours if p.job.startswith("learner") else others,
         "rounds": p.results[warmup:], "warmup": p.results[:warmup]} for p in peers]
    return found


def same_work(found):
    """What speaks against all contenders having done the same work, in words; empty if nothing does.

    With the same batches only rounding differs, so on the CPU the first, short epochs must end within 2 %;
    on a GPU a whole epoch lets rounding grow. With another feed the order and the crops differ as well.
    """
    problems, first, close = [], found["contenders"][0], 0.02 if found["device"] == "cpu" else 0.35
    for contender in found["contenders"]:
        name, ends = contender["name"], [r["loss"] for r in contender["warmup"] + contender["rounds"]]
        threads = {r["threads"] for r in contender["rounds"]}
        if not all(abs(loss) < float("inf") for loss in ends):
            problems.append(f"{name}: the loss is not finite")
        if threads != {r["threads"] for r in first["rounds"]}:
            problems.append(f"{name} ran with {threads} threads")
        feed = name.split("+")[1]
        reference = next(c for c in found["contenders"] if c["name"].endswith(feed)) if feed == "batches" else first
        for other, tolerance in ((reference, close), (first, 0.35)):
            a, b = contender["warmup"][0]["loss"], other["warmup"][0]["loss"]
            if abs(a - b) > tolerance * b:
                problems.append(f"{name}: test loss {a:.4g} after its first epoch, and {b:.4g} for {other['name']}")
    return problems


# --- what is shown and kept ------------------------------------------------------------------------
def report(found):
    """A set as lines of text."""
    title = f"{found['device']}, {found['precision']}"
    if found["not_run"]:
        return f"{title}: not run: {found['not_run']}"
    lines = [f"{title}: {found['net']} on {found['device_name']}, {found['settings']['images']:,} images a round, "
             f"{found['loader_workers']} loader processes",
             f"  {'contender':<20}{'s an epoch':>11}{'with eval':>11}{'to plain+batches':>24}"
             f"{'to plain+loader':>24}{'n':>4}{'peak MB':>9}{'loss':>8}{'accuracy':>10}"]
    for c in found["contenders"]:
        cells = []
        for name in ("plain+batches", "plain+loader"):
            other = find(found, name)
            r = ratios(c, other) if other else []
            cells.append(f"{median(r):.3f} ({min(r):.3f}-{max(r):.3f})" if r else "–")
        last = c["rounds"][-1]
        lines.append(f"  {c['name']:<20}{epoch_seconds(found, c):>11.4g}{epoch_seconds(found, c, True):>11.4g}"
                     f"{cells[0]:>24}{cells[1]:>24}{len(c['rounds']):>4}{last['peak_mb']:>9.0f}"
                     f"{last['loss']:>8.3f}{last['accuracy']:>10.3f}")
    return "\n".join(lines)


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def write_record(record, folder):
    """Write a record under the first free name of its date and device; return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record['started'][:10]}-{slug(record['machine']['gpu'] or record['machine']['cpu'])}"
    handle, part = tempfile.mkstemp(dir=folder, prefix=".bench.", suffix=".part")
    try:
        for number in range(1, 1000):
            record["name"] = stem if number == 1 else f"{stem}-{number}"
            path = folder / f"{record['name']}.json"
            if path.exists():
                continue
            with open(part, "w", encoding="utf-8") as f:
                f.write(json.dumps(record, indent=1) + "\n")
            os.chmod(part, 0o644)
            try:
                os.link(part, path)                                # fails if the name was taken meanwhile
                return path
            except FileExistsError:
                continue
    finally:
        os.close(handle)
        os.unlink(part)
    raise SystemExit(f"{folder} has too many records of {stem}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="4 steps, 2 rounds: only to see that it runs; writes no record")
    add("--anyway", action="store_true", help="start even if others use the machine")
    add("--device", choices=("cpu", "cuda", "all"), default="all", help="default: all there are")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: the device's best, on the CPU fp32 too")
    add("--contenders", default=",".join(CONTENDERS), help=f"some of {', '.join(KNOWN)}, with commas between")
    add("--steps", type=int, help="steps of an epoch (default: 24 on the CPU, a whole epoch on a GPU)")
    add("--rounds", type=int, help="default: 8")
    add("--batch-size", type=int, default=128)
    add("--threads", type=int, default=cores(), help="of every contender (default: all cores)")
    add("--loader-workers", type=int, help="helper processes of loaders (default: the best in a trial)")
    add("--out", type=Path, default=RECORDS, help="folder of the records")
    chosen = parser.parse_args(argv)
    chosen.contenders = chosen.contenders.split(",")
    for name in chosen.contenders:
        if name not in KNOWN:
            parser.error(f"unknown contender {name!r}; there are: {', '.join(KNOWN)}")
    for name in ("steps", "rounds", "batch_size", "threads"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if chosen.batch_size > TEST_IMAGES:
        parser.error(f"--batch-size must be {TEST_IMAGES:,} or less")
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    begun, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    before, busiest = load()
    progress(f"load averages {before['averages']}, others keep {before['busy_cores']} cores busy")
    if before["busy_cores"] is None:                               # no /proc: the load average must do
        busy = before["averages"][0] > 0.5 * cores()
    else:
        busy = before["busy_cores"] > BUSY_LIMIT
    if busy and not (chosen.quick or chosen.anyway):
        print("Others are using this machine, and would be measured too:\n  "
              + "\n  ".join(busiest or ["see the load averages"])
              + "\nWait until it is quiet, or give --anyway; the record then says so.")
        return 2
    start_ticks, sets = ticks(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = str(Path(folder) / "images.pt")
        info = ask("prepare", {"threads": chosen.threads, "file": file}, folder) | {"file": file}
        progress(f"data: {info['data']}")
        for device in ("cpu", "cuda") if chosen.device == "all" else (chosen.device,):
            if device not in info["devices"]:
                sets.append({"device": device, "precision": "any", "not_run": "no GPU in this machine"})
                print(report(sets[-1]), flush=True)
                continue
            for precision in [chosen.precision] if chosen.precision else info["devices"][device]["precisions"]:
                sets.append(measure(device, precision, info, chosen, folder))
                print(report(sets[-1]), flush=True)
    after, _ = load()
    measured = [found for found in sets if not found["not_run"]]
    problems = [f"{f['device']} {f['precision']}: {p}" for f in measured for p in same_work(f)]
    if problems:
        print("The contenders did not do the same work; no record:\n  " + "\n  ".join(problems))
        return 1
    if chosen.quick or not measured:
        print("--quick measures nothing: no record" if chosen.quick else "nothing was run: no record")
        return 0
    end_ticks = ticks()
    steal = (end_ticks[1] - start_ticks[1]) / max(1, end_ticks[2] - start_ticks[2]) if end_ticks else None
    sources = b"".join((HERE / name).read_bytes() for name in ("bench.py", "peers.py"))
    used = {found["device"] for found in measured}
    record = {
        "format": 1, "name": "", "started": started, "seconds": round(time.perf_counter() - begun, 1),
        "machine": {"cpu": info["devices"]["cpu"]["name"],
                    "gpu": info["devices"]["cuda"]["name"] if "cuda" in used else None,
                    "cores": cores(), "memory_gb": memory_gb(),
                    "platform": f"{platform.system()} {platform.machine()}"},
        "load": {"before": before, "after": after, "steal": steal, "anyway": bool(busy)},
        "data": info["data"], "versions": all_versions(info["versions"]), "commit": info["commit"],
        "code_hash": info["code_hash"], "bench_hash": hashlib.sha256(sources).hexdigest()[:16],
        "sets": sets}
    print(f"record: {write_record(record, chosen.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
