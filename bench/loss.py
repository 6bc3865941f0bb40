#!/usr/bin/env python
"""Time the token loss by each way there is, and layers with and without padded sizes.

    make bench-loss                      on a GPU, about a minute: a record
    make bench-loss ARGS=--small         small sizes, on the CPU too
    make bench-loss ARGS="--small --quick"    a few calls of everything, to see that it runs: no record
    .venv/bin/python bench/loss.py --help

A case is a device, a dtype and what is timed, forward and backward together, at the article's size (70 steps of 100
streams, 33,279 words, word vectors of 400) or a small one:

    loss        the cross-entropy of all tokens from logits in the dtype, with a factor from above as a gradient scaler
                gives it: `definition` (F.cross_entropy in float32), `log_softmax` (nll_loss of a log_softmax that
                converts by itself), on a GPU `compiled` (the definition by torch.compile) and `kernel`
    decoder     word vectors, decoder and token_loss, from tokens to gradients: `unpadded`, and `padded` to
                multiples of 8
    lstm        a layer of AWD-LSTM from 1,150 features to 1,150 units: `unpadded` and `padded`, to 1,152
    qrnn        a layer of AWD-QRNN from 1,550 features to 1,550 channels: `unpadded` and `padded`, to 1,552

On a GPU `loss` is timed from bfloat16 and float16, the others under autocast in the dtype that the tasks take there; on
a CPU all is float32. After a warm-up the contenders take turns, a round of `--calls` calls each, A B C and back C B A.
Before that all must give the same results and gradients (from the same seed, hence with the same masks); otherwise there
is no record. On a GPU a call more is made to learn the peak of the memory.

The record, book/records/loss/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format, name, started, seconds, machine, load, versions, commit, code_hash, bench_hash
                    as in bench.py
    cases           a list; each has
        device                            "cpu" or "cuda"
        not_run                           the reason, and then nothing else
        what, size, sizes, dtype          one of the four; "article" or "small"; its numbers
        device_name, threads, calls, rounds
        contenders                        a list, the first is the reference; each has
            name
            first_call                    seconds, with compilation
            call                          a list: seconds of a call (mean of a round), a round each
            peak_mb                       memory that a call takes beyond what was there before; null on a CPU
        largest_difference                between the first contender's results and any other's, relative to the largest
                                          of each tensor

Medians and ratios are not stored: `report` computes them.
"""
import argparse
import contextlib
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import frame  # noqa: E402
from bench import progress  # noqa: E402
from frame import add_options, need_positive, run, split_lists  # noqa: E402
from qrnn import milliseconds, peak_mb, ratios  # noqa: E402
from steps import Contender  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "loss"
SIZES = {
    "small": {"steps": 10, "streams": 4, "words": 333, "embedding": 36, "lstm": 46, "qrnn": 62},
    "article": {"steps": 70, "streams": 100, "words": 33_279, "embedding": 400, "lstm": 1150, "qrnn": 1550},
}
KINDS = ("loss", "decoder", "lstm", "qrnn")
TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


def newest(folder=RECORDS):
    """The newest record of each machine, newest first."""
    return frame.newest(folder)


# --- what is timed -------------------------------------------------------------------------------
def definition(logits, targets):
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), targets)


def by_log_softmax(logits, targets):
    import torch
    import torch.nn.functional as F

    return F.nll_loss(F.log_softmax(logits, 1, dtype=torch.float32), targets)


def ways(device):
    """The losses that run on a device, by name; the first is the reference."""
    import torch

    from nbutils.awd_lstm import cross_entropy_kernel

    found = {"definition": definition, "log_softmax": by_log_softmax}
    if device == "cuda":
        found |= {"compiled": torch.compile(definition), "kernel": cross_entropy_kernel}
    return found


def losses(device, sizes, dtype):
    """Calls by name; each gives a loss and its gradient, from the same logits."""
    import torch

    n, words = sizes["steps"] * sizes["streams"], sizes["words"]
    logits = (3 * torch.randn(n, words, device=device)).to(dtype).requires_grad_()
    targets, factor = torch.randint(words, (n,), device=device), torch.tensor(1024.0, device=device)

    def call(way):
        loss = way(logits, targets)
        return loss, *torch.autograd.grad(loss, logits, factor)

    return {name: lambda way=way: call(way) for name, way in ways(device).items()}


def unpadded_and_padded(module, call):
    from nbutils.awd_lstm import pad_to

    def padded(multiple):
        pad_to(module, multiple)
        return call()

    return {"unpadded": lambda: padded(1), "padded": lambda: padded(8)}


def in_precision(device, dtype):
    import torch

    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


def decoders(device, sizes, dtype):
    """Calls by name; each gives the loss of a model without layers, and its gradients."""
    import torch

    from nbutils.awd_lstm import LanguageModel, token_loss

    model = LanguageModel(sizes["words"], sizes["embedding"], []).to(device)
    text = torch.randint(sizes["words"], (sizes["steps"] + 1, sizes["streams"]), device=device)

    def call():
        with in_precision(device, dtype):
            out = model(text[:-1])
        loss = token_loss(out, text[1:])
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    return unpadded_and_padded(model, call)


def layers(what, device, sizes, dtype):
    """Calls by name; each gives outputs and gradients of a layer."""
    import torch

    from nbutils.awd_lstm import WeightDropLSTM
    from nbutils.qrnn import QRNN

    n = sizes[what]
    layer = (WeightDropLSTM(n, n, 0.5) if what == "lstm" else QRNN(n, n, weight_drop=0.1)).to(device)
    x, g = torch.randn(2, sizes["steps"], sizes["streams"], n, device=device).unbind()
    x.requires_grad_()

    def call():
        with in_precision(device, dtype):
            out, _ = layer(x)
        return out, *torch.autograd.grad(out, [x, *layer.parameters()], g.to(out.dtype))

    return unpadded_and_padded(layer, call)


def largest_difference(calls):
    """Between the first contender's results and the others', over the largest number of each tensor."""
    from nbutils.core import seed_everything

    found = []
    for call in calls.values():
        seed_everything(0)                               # the same masks
        found.append([t.detach().float() for t in call()])
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item()
               for other in found[1:] for ours, theirs in zip(other, found[0], strict=True))


def measure(device, what, size, dtype, chosen):
    """One case; its part of the record."""
    import torch

    from nbutils.core import seed_everything
    from nbutils.records import describe_device

    seed_everything(0)
    made = {"loss": losses, "decoder": decoders}.get(what) or (lambda *given: layers(what, *given))
    calls = made(device, SIZES[size], getattr(torch, dtype))
    case = {"device": device, "not_run": None, "what": what, "size": size, "sizes": SIZES[size], "dtype": dtype,
            "device_name": describe_device(device), "threads": torch.get_num_threads(), "calls": chosen.calls,
            "rounds": chosen.rounds}
    contenders = [Contender(name, device, call) for name, call in calls.items()]
    for c in contenders:
        c.first_step = c.run(1)
        progress(f"{device} {what} {size} {dtype}: {c.name}, first call {c.first_step:.3g} s")
    case["largest_difference"] = largest_difference(calls)
    if not case["largest_difference"] < TOLERANCE[dtype]:
        raise SystemExit(f"{device} {what} {size} {dtype}: the contenders differ by {case['largest_difference']:.3g} "
                         "relative to the largest: they did not do the same work, no record")
    for i in range(chosen.rounds):
        for c in contenders if i % 2 == 0 else reversed(contenders):
            c.times.append(c.run(chosen.calls))
    case["contenders"] = [{"name": c.name, "first_call": c.first_step, "call": c.times,
                           "peak_mb": peak_mb(c.call) if device == "cuda" else None} for c in contenders]
    return case


# --- what is shown and kept ------------------------------------------------------------------------
def report(case):
    """A case as lines of text."""
    if case["not_run"]:
        return f"{case['device']}: not run: {case['not_run']}"
    first = case["contenders"][0]["name"]
    lines = [f"{case['device_name']}, {case['what']}, {case['size']} size, {case['dtype']}; medians of n = "
             f"{case['rounds']} rounds",
             f"  {'':<12}{'ms':>10}{'times as fast as ' + first:>32}{'peak, MB':>12}"]
    for c in case["contenders"]:
        r = ratios(case, first, c["name"])
        speed = f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})"
        peak = "–" if c["peak_mb"] is None else f"{c['peak_mb']:,.0f}"
        lines.append(f"  {c['name']:<12}{milliseconds(case, c['name']):>10.3f}{speed:>32}{peak:>12}")
    return "\n".join(lines)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_options(parser, "2 rounds of 1 call", RECORDS)
    add("--small", action="store_true", help="small sizes, on the CPU too")
    add("--kinds", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}, with commas between")
    add("--calls", type=int, default=3, help="calls of a round (default: 3)")
    add("--rounds", type=int, default=20, help="default: 20")
    chosen = parser.parse_args(argv)
    split_lists(parser, chosen, kinds=KINDS)
    need_positive(parser, chosen, "calls", "rounds", "threads")
    if chosen.quick:
        chosen.calls, chosen.rounds = 1, 2
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    size = "small" if chosen.small else "article"

    def cases_on(device):
        from nbutils.learner import PRECISIONS, best_precision

        if device == "cpu" and not chosen.small:
            yield {"device": "cpu", "not_run": "there it is run at small sizes only: give --small"}
            return
        for what in chosen.kinds:
            kinds = ["float32"]
            if device == "cuda":
                half = str(PRECISIONS[best_precision(device)]).removeprefix("torch.")
                kinds = ["bfloat16", "float16"] if what == "loss" else [half]
            for dtype in kinds:
                yield measure(device, what, size, dtype, chosen)

    return run(__file__, chosen, cases_on, report)


if __name__ == "__main__":
    raise SystemExit(main())
