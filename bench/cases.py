#!/usr/bin/env python
"""Show a person what a row of Stanford Cars sees: right, wrong, and what test-time augmentation changes.

    make cases                               trains crops-adamw (laptop, seed 0) once more, 5 minutes: a record
    make cases ARGS="--row crops-adam-l2 --seed 1"
    .venv/bin/python bench/cases.py --help

The row is trained by the task's own `build`, as `nbutils run` would do, and each test picture is predicted
plainly and as the mean over its views. Four lists are taken from all test pictures, each in the order of how
sure the net was (the largest mean probability; for the last two, how far the mean moved):

    right     right plainly and with views          wrong     wrong both times
    mended    wrong plainly, right with views       spoiled   right plainly, wrong with views

The record, book/records/cases/ROW-SIZE-SEED.json (an older one is replaced: the run is the same):

    format, started, seconds, device, versions, commit, code_hash, config_hash
    task, size, row, seed
    metrics              of this run, as in its record
    same                 whether book/records has this run's record with the same metrics; null without a record
    counts               of the four lists, over all test pictures
    cases                a list; each has
        kind, number             one of the four; the picture's place in the row's test set
        truth                    the name of its class
        plain, views             the three most probable classes: a list of [name, probability]
        jpeg                     the middle view, base64
"""
import argparse
import base64
import io
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "book" / "records"
KINDS = ("right", "wrong", "mended", "spoiled")


def kinds(plain, views, targets):
    """Sort pictures by what the two predictions made of them.

    plain, views: probabilities [n, classes]; targets [n]. Returns a dict of the four kinds to the numbers of
    their pictures, first those of which the net was surest.
    """
    before, after = plain.argmax(1) == targets, views.argmax(1) == targets
    sure = views.amax(1)
    moved = (views - plain).gather(1, targets[:, None])[:, 0].abs()
    which = {"right": before & after, "wrong": ~before & ~after, "mended": ~before & after, "spoiled": before & ~after}
    order = {"right": sure, "wrong": sure, "mended": moved, "spoiled": moved}
    return {kind: sorted(mask.nonzero().flatten().tolist(), key=lambda i: -order[kind][i].item())
            for kind, mask in which.items()}


def top(probabilities, classes, k=3):
    """The k most probable classes with their probabilities."""
    values, places = probabilities.topk(min(k, len(classes)))
    return [[classes[i], round(v, 4)] for v, i in zip(values.tolist(), places.tolist())]


def jpeg(picture):
    """A uint8 picture [3, h, w] as a JPEG in base64."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def choose(found, plain, views, images, size, each):
    """The first `each` pictures of each kind, as the record holds them."""
    from nbutils.pictures import Views

    middle, names = Views(size, train=False), images.classes
    for kind in KINDS:
        for i in found[kind][:each]:
            yield {"kind": kind, "number": i, "truth": names[int(images.y[i])],
                   "plain": top(plain[i], names), "views": top(views[i], names),
                   "jpeg": jpeg(middle(images.x[i : i + 1])[0])}


def same_as_record(task, config, seed, metrics):
    """Whether the run's record has these metrics; None where there is no record."""
    from nbutils.records import read_record

    path = RECORDS / config.task / config.size / config.row / f"{seed}.json"
    if not path.exists():
        return None
    return read_record(path).metrics == metrics


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--row", default="crops-adamw")
    add("--size", default="laptop")
    add("--seed", type=int, default=0)
    add("--each", type=int, default=4, help="pictures of each kind (default: 4)")
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="records of the laptop size were made with 1")
    add("--out", type=Path, default=RECORDS / "cases", help="folder of the record")
    chosen = parser.parse_args(argv)

    from nbutils.core import seed_everything
    from nbutils.experiment import Reseed, get_task
    from nbutils.learner import tta
    from nbutils.records import code_state, config_hash, describe_device, versions

    torch.set_num_threads(chosen.threads)
    started, begun = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    task = get_task("cars")
    config = task.config(chosen.row, chosen.size)
    seed_everything(chosen.seed)
    learner = task.build(config, chosen.seed, torch.device(chosen.device))
    learner.callbacks = [Reseed(chosen.seed), *learner.callbacks]
    learner.progress.kind = "lines"
    _ = learner.fit(config.epochs)
    metrics = task.score(learner, config)

    from nbutils.cars import augmented_batches

    images, test = learner.valid.images, learner.valid
    plain = tta(learner, test, test, 0)[0]
    views, targets = tta(learner, test, augmented_batches(learner, config), config.views)
    found = kinds(plain, views, targets)
    commit, code_hash = code_state()
    record = {
        "format": 1, "started": started, "seconds": round(time.perf_counter() - begun, 1),
        "device": describe_device(chosen.device), "versions": versions(), "commit": commit, "code_hash": code_hash,
        "config_hash": config_hash(config), "task": "cars", "size": config.size, "row": config.row,
        "seed": chosen.seed, "metrics": metrics, "same": same_as_record(task, config, chosen.seed, metrics),
        "counts": {kind: len(found[kind]) for kind in KINDS},
        "cases": list(choose(found, plain, views, images, config.side, chosen.each))}
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{config.row}-{config.size}-{chosen.seed}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['counts']}; same as the record: {record['same']}; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
