#!/usr/bin/env python
"""Train a row of the WikiText-2 table and keep what its model says, for the reader's eye.

    make samples                             lstm-adam at laptop size, seed 0: about 5 minutes on a core, a record
    make samples ARGS="--row qrnn-adam"      another row; --size and --seed likewise
    .venv/bin/python bench/samples.py --help

The model is trained as `nbutils run wikitext2 ROW` trains it: by the task's own `build`, with the same seeds. Nothing is
chosen by hand: each prompt is continued once at each temperature, by `nbutils.wikitext2.sample` with its seed 0.

The record, book/records/samples/ROW-SIZE-SEED.json, is never overwritten:

    format          1
    name, started   the file's name; UTC
    seconds         of training and sampling
    task, size, row, seed, config, config_hash, recipe
                    as in the record of a run
    device, precision, versions, commit, code_hash
                    likewise
    valid           perplexity of the validation text, over every token
    vocabulary      number of words, padding included
    samples         a list; each has
        prompt, temperature, tokens, seed     as `sample` takes them
        text                                  what it gave: the prompt and what follows
"""
import argparse
import dataclasses
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from bench import cores, progress  # noqa: E402
from frame import set_threads  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "samples"
PROMPTS = ("The song was", "In 2010 ,", "he was born in", "the battle of")
TEMPERATURES = (0.5, 0.8, 1.0)
TOKENS = 40


def path_of(chosen):
    return chosen.out / f"{chosen.row}-{chosen.size}-{chosen.seed}.json"


def train(config, seed, device):
    """A trained Learner, as `nbutils run` makes it."""
    from nbutils.core import seed_everything
    from nbutils.experiment import Reseed
    from nbutils.wikitext2 import build

    seed_everything(seed)
    learner = build(config, seed, device)
    learner.callbacks = [Reseed(seed), *learner.callbacks]
    learner.fit(config.epochs)
    return learner


def known(prompts, vocabulary):
    """Those of the prompts whose words the vocabulary has; the first word of the text if it has none of them."""
    def has(prompt):
        return all(word in vocabulary.words for word in prompt.split())

    return [prompt for prompt in prompts if has(prompt)] or [vocabulary.words[2]]


def measure(config, seed, device, tokens):
    """Train and sample; the record but for its name and times."""
    from nbutils.cache_pointer import evaluate_tokens, perplexity
    from nbutils.records import code_state, config_hash, describe_device, versions
    from nbutils.wikitext2 import corpus_of, sample, task

    learner, corpus = train(config, seed, device), corpus_of(config)
    model = learner.model.model
    valid = perplexity(evaluate_tokens(model, corpus.valid.to(learner.device)).log_probs)
    said = [{"prompt": prompt, "temperature": temperature, "tokens": tokens, "seed": 0,
             "text": sample(model, corpus.vocabulary, prompt, tokens, temperature=temperature)}
            for prompt in known(PROMPTS, corpus.vocabulary) for temperature in TEMPERATURES]
    commit, code_hash = code_state()
    return {"task": config.task, "size": config.size, "row": config.row, "seed": seed,
            "config": json.loads(json.dumps(dataclasses.asdict(config))), "config_hash": config_hash(config),
            "recipe": task.recipe, "device": describe_device(learner.device), "precision": learner.precision,
            "versions": versions(), "commit": commit, "code_hash": code_hash, "valid": valid,
            "vocabulary": len(corpus.vocabulary), "samples": said}


def load_samples(folder=RECORDS):
    """All records of samples, by name; each has its form (forms.py)."""
    import forms  # here: it imports torch, and main() chooses the threads before that

    return {record["name"]: record for record in forms.read_all(folder)}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--row", default="lstm-adam", help="default: lstm-adam")
    add("--size", default="laptop", help="default: laptop")
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", default=None, help="default: the GPU where there is one")
    add("--tokens", type=int, default=TOKENS, help=f"of each continuation (default: {TOKENS})")
    add("--threads", type=int, default=cores(), help="default: all cores")
    add("--out", type=Path, default=RECORDS, help="folder of the records")
    chosen = parser.parse_args(argv)
    if chosen.tokens < 1 or chosen.threads < 1:
        parser.error("--tokens and --threads must be 1 or more")
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    path, begun = path_of(chosen), time.perf_counter()
    if path.exists():
        print(f"{path.name} is there; records are never overwritten: give another --out, or remove it by hand")
        return 2
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    set_threads(chosen.threads)
    from nbutils.core import default_device
    from nbutils.wikitext2 import task

    config = task.config(chosen.row, chosen.size)
    progress(f"{chosen.row} ({chosen.size}): {config.epochs} epochs")
    found = measure(config, chosen.seed, chosen.device or default_device(), chosen.tokens)
    record = {"format": 1, "name": path.stem, "started": started, "seconds": round(time.perf_counter() - begun, 1)} | found
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for s in record["samples"]:
        print(f"[{s['temperature']}] {s['text']}\n")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
