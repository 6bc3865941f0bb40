#!/usr/bin/env python
"""Write book/speed.md, the page of the benchmarks, from book/records/bench, steps, decode and epochs.

The newest record of each machine is shown in full, older ones are listed. The page is made by
`make book` and not committed. bench/bench.py, bench/steps.py, bench/decode.py and bench/epochs.py
make the records and say what is in them.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "book" / "records" / "bench"
PAGE = ROOT / "book" / "speed.md"
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

from bench import epoch_seconds, find, load_records, median, ratios  # noqa: E402
import decode  # noqa: E402
import epochs  # noqa: E402
import steps  # noqa: E402
from markup import code, heading, record_link, table  # noqa: E402  (tools/markup.py)
from nbutils.records import escape_markdown as plain  # noqa: E402

GOAL = 1.02                # our Learner over the plain loop, fed alike
NAMES = {"plain": "plain loop", "learner": "our Learner", "fastai": "fastai's Learner",
         "lightning": "Lightning's Trainer"}
FEEDS = {"batches": "our Batches", "loader": "torchvision, DataLoader"}

HEAD = """# Speed

How fast is our loop, beside a loop without any library and beside two libraries that many people use? `make bench` measures it, on the machine where you run it, and leaves a record; this page is computed from the records.

All contenders do the same work: the same net from the same initial weights, AdamW with the 1cycle rates set at each step, the same images in batches of the same size, cropped and mirrored by the same rule, the same precision and number of threads, and at the end of each epoch the loss and the accuracy on test images. Each is a process of its own. They take turns, one epoch each, back and forth, so that each round compares epochs measured within seconds of each other. An *epoch* in a round is a number of steps on a fixed part of the data; the columns in seconds scale its median up to CIFAR10's 50,000 training (and 10,000 test) images. A ratio is the median over the rounds of training time over the reference's, with the smallest and the largest round in brackets; below 1 is faster than the reference. Warm-up epochs do not count.

There are two questions, and two tables. *Fed alike*: every loop gets its batches from our Batches, so the table shows what the loops themselves cost. *Each with its usual loader*: the others get single images from torchvision's CIFAR10 object and transforms through a DataLoader (fastai through its own), as their tutorials do, and our Learner its Batches; here loading counts too. Memory is the peak of the process, libraries included; what loader processes hold for themselves is added after a plus sign.

Everyone but our Learner uses torch's AdamW; ours is nbutils' own on the CPU, and torch's fused one, like everybody's, on a GPU. fastai and Lightning run as their documentation teaches, without bars, loggers and checkpoints, but with the bookkeeping of losses that each does by itself. fastai 2.8 knows mixed precision on CUDA only; on the CPU we gave it the processor's autocast. Only on a GPU are the nets compiled, for all. Two things weigh on the loaders here: torchvision's symmetric padding, which the recipe of 2018 asks for, goes through NumPy and is slower than its padding with zeros; and fastai starts its loader processes anew at each epoch (the others keep theirs), which a short epoch feels more than a whole one.
"""
EMPTY = "No benchmark is recorded yet: *not run*.\n"
STEPS = """## The optimizer's step

`make bench-steps` times AdamW's step alone, on the parameter sets of the book's three tasks, ours by each engine and torch's by each of its implementations, in turns; [chapter 5](../nbs/05-step-speed.ipynb) explains the engines and the floor, and judges the goals. Medians in ms; in brackets the median ratio to torch's fused function in the same round."""

DECODE = """## From files to one tensor

`make bench-decode` times `decode_pictures` of [appendix 7](../nbs/a7-pictures.ipynb) with one worker and with more, in turns, on files that lie in memory: the crops of Stanford Cars, and generated JPEGs of 640 x 480 as a stand-in for its whole pictures. Rates are of the median round. Beside them stands our own processor time, which a busy machine hardly moves."""

EPOCHS = """## Epochs of the larger models

`make bench-epochs` times training epochs of [chapter 16](../nbs/16-wikitext-2.ipynb)'s AWD-LSTM and QRNN and of [chapter 12](../nbs/12-cars.ipynb)'s whole net through the tasks' own Learners: on a GPU at full size, after a warm-up epoch, one run alone and several at once; on a CPU at laptop size. Each run is a process. Seconds are of training alone, median with the smallest and largest of n epochs; the rate is one run's; *together* counts all runs' over their common time, evaluations included. Memory is what torch allocated at most on a GPU, and the process' peak on a CPU. The goals, in seconds of an epoch at full size: {goals}."""


def spread(values):
    """Median with the smallest and the largest."""
    return f"{median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def seconds(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def memory(contender):
    """Peak of the process, plus what its loader's processes hold for themselves."""
    last = contender["rounds"][-1]
    text = f"{max(r['peak_mb'] for r in contender['rounds']):,.0f}"
    return text + (f" + {last['helpers_mb']:,.0f} in {last['helpers']}" if last["helpers"] else "")


def lines(found, names, reference):
    """A table's lines for some contenders of a set; each ratio is to the reference."""
    gpu = any("gpu_mb" in c["rounds"][0] for c in found["contenders"])
    header = ["loop", "batches from", "s an epoch", "with evaluation", f"ratio to the {label(reference)}", "n",
              "memory, MB"] + ["on the GPU, MB"] * gpu
    base, rows = find(found, reference), []
    for name in names:
        contender = find(found, name)
        loop, feed = name.split("+")
        row = [NAMES[loop], FEEDS[feed]]
        if contender is None:
            rows.append(row + ["not run"] + ["–"] * (len(header) - 3))
            continue
        row += [seconds(epoch_seconds(found, contender)), seconds(epoch_seconds(found, contender, True)),
                "–" if base is None else "1" if contender is base else spread(ratios(contender, base)),
                len(contender["rounds"]), memory(contender)]
        rows.append(row + [f"{max(r['gpu_mb'] for r in contender['rounds']):,.0f}" for _ in range(gpu)])
    return table(header, rows)


def label(name):
    loop, feed = name.split("+")
    return f"{NAMES[loop]}{' with a DataLoader' if feed == 'loader' else ''}"


def verdicts(found):
    """What the goals say to this set: sentences."""
    said = []
    ours, plain = find(found, "learner+batches"), find(found, "plain+batches")
    if ours and plain:
        r = ratios(ours, plain)
        verdict, within = "met" if median(r) <= GOAL else "missed", sum(a <= GOAL for a in r)
        said.append(f"The goal of costing at most {100 * (GOAL - 1):.0f} % more than the plain loop is "
                    f"**{verdict}**: fed alike, our Learner takes {spread(r)} times its time, and was within the "
                    f"goal in {within} of {len(r)} rounds.")
    for peer in ("fastai", "lightning"):
        other = find(found, f"{peer}+loader")
        if ours and other:
            r = ratios(other, ours)
            verdict = "ahead of" if min(r) > 1 else "level with" if max(r) >= 1 else "behind"
            alike = find(found, f"{peer}+batches")
            fed = f", and fed alike {spread(ratios(alike, ours))} times" if alike else ""
            said.append(f"With its usual loader, {NAMES[peer]} takes {spread(r)} times our Learner's time "
                        f"(n = {len(r)}){fed}: as usually run, we are {verdict} it.")
    return " ".join(said)


def section(found, quiet):
    """One set: what was run, the verdicts (if the machine was quiet), two tables."""
    title = f"### {'CPU' if found['device'] == 'cpu' else 'GPU'}"
    if found["not_run"]:
        return f"{title}\n\n*Not run*: {plain(found['not_run'])}."
    trial = found["loader_trial"]
    chosen = f"loader processes: {plain(found['loader_workers'])}"
    if trial:
        chosen += " (the fastest in a trial: " + ", ".join(f"{plain(n)} took {s:.2f} s" for n, s in trial.items()) + ")"
    used = found["settings"]
    about = (f"{plain(found['net'])} ({found['parameters']:,} parameters{', compiled' if found['compiled'] else ''}) on "
             f"{plain(found['device_name'])}; {used['images']:,} training and {used['test_images']:,} test images a "
             f"round in batches of {used['batch_size']:,}, threads of each: {used['threads']:,}; {chosen}.")
    losses = [r["loss"] for c in found["contenders"] for r in c["rounds"][-1:]]
    agree = f"After the last round all contenders' test losses lay between {min(losses):.3f} and {max(losses):.3f}."
    loops = ("plain", "learner", "fastai", "lightning")
    usual = ["plain+loader", "learner+batches", "fastai+loader", "lightning+loader"]
    usual += ["learner+loader"] * bool(find(found, "learner+loader"))
    return "\n\n".join([
        f"{title}, {heading(found['precision'])}", about, *[verdicts(found)] * quiet, "Fed alike:",
        lines(found, [f"{loop}+batches" for loop in loops], "plain+batches"), "Each with its usual loader:",
        lines(found, usual, "plain+loader"), agree])


def machine(record):
    return record["machine"]["gpu"] or record["machine"]["cpu"]


def conditions(record, folder="bench"):
    """Date, load, versions, data and code of a record, as a paragraph."""
    load, commit = record["load"], record["commit"]
    data = f"data: {plain(record['data'])}; " if "data" in record else ""
    busy = [plain(load[when]["busy_cores"]) for when in ("before", "after")]
    parts = [f"{plain(record['started'][:10])}, {record['seconds'] / 60:.1f} minutes; {data}"
             f"{plain(record['machine']['cores'])} cores, {plain(record['machine']['memory_gb'])} GB.",
             f"Others kept {busy[0]} cores busy before and {busy[1]} after; "
             f"load averages before: {', '.join(map(plain, load['before']['averages']))}."]
    if load["steal"]:
        parts.append(f"The machine's host gave {100 * load['steal']:.1f} % of the time to others.")
    if load["anyway"]:
        parts.append("**The machine was not quiet: these figures are not to be trusted.**")
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in record["versions"].items())
    parts.append(f"{versions}; commit {code(commit[:10] + '+' * commit.endswith('+'))}. {link(record, folder=folder)}.")
    return " ".join(parts)


def link(record, text="Record", folder="bench"):
    return record_link(f"{folder}/{record['name']}.json", text)


def steps_table(record, rule):
    """Each contender's step on each parameter set, for one rule."""
    cases = [case for case in record["cases"] if not case["not_run"] and case["rule"] == rule]
    header = ["", *(f"{case['device']}, {case['parameters']}" for case in cases)]
    rows = []
    for name in steps.CONTENDERS:
        row = [name]
        for case in cases:
            own = steps.find(case, name) and steps.find(case, "torch fused")
            row.append(f"{steps.milliseconds(case, name):.3g} "
                       f"({median(steps.step_ratios(case, name, 'torch fused')):.2f})" if own else "not run")
        rows.append(row)
    rows.append(["floor", *(f"{steps.floor_milliseconds(case):.3g}" for case in cases)])
    return table(header, rows)


def steps_section(records):
    """The newest record of each machine; what was not run is said."""
    if not records:
        return [STEPS, EMPTY.strip()]
    parts = [STEPS]
    for record in records:
        measured = [case for case in record["cases"] if not case["not_run"]]
        missing = [f"{plain(case['device'])}: *not run*, {plain(case['not_run'])}." for case in record["cases"] if case["not_run"]]
        n = f"n = {measured[0]['rounds']:,} rounds of {measured[0]['steps']:,} steps, float32"
        parts += [f"### Steps on {heading(machine(record))}", f"{n}. {conditions(record, 'steps')} {' '.join(missing)}".strip()]
        for rule in dict.fromkeys(case["rule"] for case in measured):
            parts += [f"{plain(rule)}:", steps_table(record, rule)]
    return parts


def decode_section(records):
    """The newest record of each machine; what was not run is said."""
    parts = [DECODE] if records else [DECODE, EMPTY.strip()]
    header = ["pictures", "kept", "n", "rounds", "workers", "a second", f"minutes for {decode.CARS:,}",
              "times as fast as one", "processor ms a picture"]
    for record in records:
        measured = [case for case in record["cases"] if not case["not_run"]]
        missing = [f"{plain(case['pictures'])}: *not run*, {plain(case['not_run'])}." for case in record["cases"] if case["not_run"]]
        rows = []
        for case in measured:
            first = case["contenders"][0]["workers"]
            for workers in (c["workers"] for c in case["contenders"]):
                middle, low, high = decode.speedup(case, workers, first)
                rows.append([f"{case['pictures']}, {case['bytes'] / 1e3:.0f} kB", f"{case['width']} x {case['side']}",
                             f"{case['n']:,}", case["rounds"], workers, f"{decode.rate(case, workers):.0f}",
                             f"{decode.minutes(case, workers):.2f}", f"{middle:.2f} ({low:.2f}–{high:.2f})",
                             f"{decode.cpu_milliseconds(case, workers):.1f}"])
        goals = [f"{plain(case['pictures'])}: {decode.verdict(case)}." for case in measured if decode.verdict(case)]
        parts += [f"### Decoding on {heading(machine(record))}",
                  f"{conditions(record, 'decode')} {' '.join(missing)}".strip(), table(header, rows), "\n".join(f"- {g}" for g in goals)]
    return parts


def epochs_row(case):
    """A case as a line of the table."""
    row = [epochs.MODELS[case["model"]], f"{case['device']}, {case['size']}", case["at_once"]]
    if case["not_run"]:
        return row + [f"not run: {case['not_run']}"] + ["–"] * 5
    middle, low, high, n = epochs.epoch_seconds(case)
    return row + [f"{middle:.3g} ({low:.3g}–{high:.3g})", n, f"{epochs.tokens_per_second(case):,.0f}",
                  f"{epochs.joint_tokens_per_second(case):,.0f}", f"{epochs.peak_mb(case):,.0f}", epochs.verdict(case)]


def epochs_section(records):
    """The newest record of each machine; cards with a goal that none has seen are said."""
    goals = "; ".join(f"{epochs.MODELS[model]} " + ", ".join(f"{card} {seconds:g} s" for card, seconds in cards.items())
                      for model, cards in epochs.GOALS.items())
    parts = [EPOCHS.format(goals=goals)]
    header = ["model", "size", "runs at once", "s an epoch", "n", "tokens or pictures/s", "together", "peak, MB", "goal"]
    for record in records:
        cases = [case for case in record["cases"] if "model" in case]
        missing = [f"{plain(case['device'])}: *not run*, {plain(case['not_run'])}." for case in record["cases"] if "model" not in case]
        parts += [f"### Epochs on {heading(machine(record))}", f"{conditions(record, 'epochs')} {' '.join(missing)}".strip(),
                  table(header, map(epochs_row, cases))]
    seen = {card for record in records for case in record["cases"] if not case["not_run"] and epochs.goal(case)
            for card in case["goals"] if card in case["device_name"].split()}
    cards = dict.fromkeys(card for cards in epochs.GOALS.values() for card in cards)
    return parts + [" ".join(f"{card}: *not run*." for card in cards if card not in seen)] * bool(cards.keys() - seen)


def page(records, of_steps=(), of_decode=(), of_epochs=()):
    """The whole page as Markdown; records come newest first."""
    parts, older, shown = [HEAD], [], set()
    for record in records:
        if machine(record) in shown:
            older.append(record)
            continue
        shown.add(machine(record))
        parts += [f"## {heading(machine(record))}", conditions(record),
                  *(section(found, not record["load"]["anyway"]) for found in record["sets"])]
    if older:
        parts += ["## Earlier records", "\n".join(f"- {link(r, r['name'])}: {plain(machine(r))}" for r in older)]
    if not any(found["device"] == "cuda" for record in records for found in record["sets"]):
        parts.append("No benchmark of the loops has seen a GPU so far: *not run*.")
    parts = parts if records else [HEAD, EMPTY.strip()]
    parts += [*steps_section(of_steps), *epochs_section(of_epochs), *decode_section(of_decode)]
    return "\n\n".join(parts).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write")
    chosen = parser.parse_args()
    records = load_records(chosen.records)
    of_steps = steps.newest(chosen.records.parent / "steps")
    of_decode = decode.newest(chosen.records.parent / "decode")
    of_epochs = epochs.newest(chosen.records.parent / "epochs")
    chosen.page.write_text(page(records, of_steps, of_decode, of_epochs), encoding="utf-8")
    print(f"{chosen.page.name}: {len(records)} benchmarks of loops, {len(of_steps)} of steps, {len(of_epochs)} of epochs, "
          f"{len(of_decode)} of decoding")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
