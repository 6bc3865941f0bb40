"""Write what a restructuring may not change, by the code as it is: run once, before the change.

    python tests/guards/write.py

records.json   every run record: its settings' hash, and whether it counts
paths.json     float64 paths of every rule, by every engine, as hexadecimal numbers
ptx.json       the kernels of four rules for two GPUs, as hashes of their PTX without debug lines
calls.json     Python and C calls of one optimizer step
"""
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHAPES = [(4, 3), (3,), (2, 2, 2), (), (5,), (6,)]
RULES = {
    "sgd": ("SGD", {}), "sgd-l2": ("SGD", {"l2": 0.1}), "sgd-momentum": ("SGD", {"momentum": 0.9, "l2": 0.1}),
    "sgd-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}), "sgdw": ("SGDW", {"momentum": 0.9, "weight_decay": 0.1}),
    "sgdw-l2": ("SGDW", {"weight_decay": 0.1, "l2": 0.05}), "adam": ("Adam", {}), "adam-l2": ("Adam", {"l2": 0.1}),
    "adam-l2-amsgrad": ("Adam", {"l2": 0.1, "amsgrad": True}), "adamw": ("AdamW", {"weight_decay": 0.1}),
    "adamw-amsgrad": ("AdamW", {"weight_decay": 0.1, "amsgrad": True}), "adamw-0": ("AdamW", {"weight_decay": 0.0}),
}


def path(make, steps=30):
    """The parameters after each tenth step of a path with three groups, missing gradients, moving rates and a restart."""
    random = torch.Generator().manual_seed(0)

    def draw():
        return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in SHAPES]

    params, curves, found = [torch.nn.Parameter(p) for p in draw()], draw(), []

    def groups():
        return [{"params": params[2 * i:2 * i + 2], "lr": 0.1 / 3**i} for i in range(3)]

    optimizer = make(groups())
    for t in range(1, steps + 1):
        jump = draw()
        if t == steps // 2:
            state, optimizer = optimizer.state_dict(), make(groups())
            optimizer.load_state_dict(state)
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 / 3**i * (0.9 + 0.1 * math.sin(0.3 * t + i))
        for k, p in enumerate(params):
            silent = k == 1 or (k == 3 and t % 3 != 0)
            p.grad = None if silent else curves[k].abs() * p.detach() + jump[k]
        optimizer.step()
        if t % 10 == 0:
            found += [float(x).hex() for p in params for x in p.detach().flatten()]
    return found


def calls(step):
    """Python and C calls of a function."""
    counts = {"call": 0, "c_call": 0}

    def count(frame, event, argument):
        if event in counts:
            counts[event] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {"python": counts["call"] - 1, "c": counts["c_call"] - 1}


def plain_ptx(text):
    """PTX without its comments and debug sections."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"\.section\s+\.debug.*?\n\s*\}", "", text, flags=re.S)
    lines = [line.strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not re.match(r"\.(loc|file)\b|\$L__(tmp|func|info)", line)]
    return "\n".join(kept)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def save(name, value):
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def main():
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "slow")]
    import triton
    from test_triton_compiles import compiled, optimizer_kernel

    import nbutils
    from nbutils.experiment import TASKS, get_task
    from nbutils.records import read_record

    records = {}
    for name in TASKS:
        for file in sorted((ROOT / "book/records" / name).rglob("*.json")):
            record = read_record(file)
            records[file.relative_to(ROOT / "book/records").as_posix()] = [record.config_hash, get_task(name).counts(record)]
    save("records.json", records)

    paths = {}
    for rule, (kind, hypers) in RULES.items():
        make = getattr(nbutils, {"SGDW": "SGD"}.get(kind, kind))
        for engine in ("loop", "lists", "compiled", "fused"):
            paths[f"{rule} {engine}"] = path(lambda groups: make(groups, engine=engine, **hypers))
    save("paths.json", paths)

    rules = ("momentum", "adam", "adamw", "adamw-amsgrad")
    save("ptx.json", {"triton": triton.__version__} | {
        f"{rule} sm_{capability}": digest(plain_ptx(compiled(*optimizer_kernel(rule, torch.float32), capability)["ptx"]))
        for rule in rules for capability in (75, 90)})

    counted = {}
    for engine in ("loop", "lists", "fused", "fast"):
        params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(62)]
        for p in params:
            p.grad = torch.ones(3)
        optimizer = nbutils.AdamW(params, lr=1e-3, engine=engine)
        for _ in range(3):
            optimizer.step()
        counted[f"AdamW, 62 tensors, {engine}"] = calls(optimizer.step)
    save("calls.json", counted)


if __name__ == "__main__":
    main()
