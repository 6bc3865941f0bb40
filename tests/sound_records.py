"""Records that pass every check, without a run: for the tests of what checks records."""
import dataclasses
import json
import random

from nbutils.experiment import get_task
from nbutils.records import config_hash


def sound(task="cifar10", row="adamw-30", size="full", seed=0, **changes):
    """The fields of a record that counts; each seed has losses of its own."""
    it, draw = get_task(task), random.Random(f"{task} {row} {size} {seed}")
    config = json.loads(json.dumps(dataclasses.asdict(it.config(row, size))))
    share = 1 / config.get("divide", [1])[0]                  # a curve is of the first group
    low, peak, epochs = share * config["lr"] / 10, share * max(config["lr"], config.get("head_lr", 0)), config["epochs"]
    n = 2 * epochs                                            # two steps an epoch, up to the peak and down again
    up = [min(i, n - 1 - i) / ((n - 1) // 2) for i in range(n)]
    curve = {"step": list(range(n)), "loss": [2 / (1 + i // 2) for i in range(n)], "lr": [low + (peak - low) * u for u in up],
             "momentum": [config["momentum"][0] + (config["momentum"][1] - config["momentum"][0]) * u for u in up]}
    history = [{"epoch": i + 1, "loss": 2 / (i + 1), "valid_loss": 1 / (i + 1) + draw.random() / 100,
                "lr": curve["lr"][2 * i + 1], "momentum": curve["momentum"][2 * i + 1], "seconds": 10.0, "valid_seconds": 1.0}
               for i in range(epochs)]
    metrics = {}
    if "error" in it.columns:
        wrong = draw.randrange(500, 600)
        for line in history:
            line["accuracy"] = 1 - (wrong + 10 * (epochs - line["epoch"])) / 10_000
        metrics = {"error": wrong / 10_000, "loss": history[-1]["valid_loss"]}
        metrics |= {"error_tta": (wrong - 20) / 10_000} if config.get("views") else {}
    else:
        for line in history:
            line["token_loss"] = 5 + line["valid_loss"]
        metrics = {name: 2.718281828459045 ** history[-1]["token_loss"] - 10 * name.endswith("cache") for name in it.columns}
    fields = {
        "task": task, "size": size, "row": row, "seed": seed, "config": config, "config_hash": config_hash(config),
        "recipe": it.recipe, "history": history,
        "curve": curve,
        "metrics": metrics, "seconds": 11.0 * epochs + 2, "device": "a card",
        "precision": it.precision(it.config(row, size)),
        "versions": {"python": "3.12.1", "platform": "Linux x86_64", "torch": "2.15.0", "torchvision": "0.29.2", "nbutils": "0.1.0"},
        "commit": "0123456789abcdef" * 2 + "01234567", "code_hash": "0123456789abcdef", "started": "2026-11-26T10:00:00+00:00"}
    return fields | changes


def write(folder, fields, name=None):
    """Write fields as a record below a folder, at its own place or at ``name``; return the path."""
    path = folder / (name or "{task}/{size}/{row}/{seed}.json".format(**fields))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=1) + "\n")
    return path
