#!/usr/bin/env python
"""Time the QRNN's recurrence by each way that nbutils.qrnn has for it, and a whole layer beside torch's LSTM.

    .venv/bin/python bench/qrnn.py             on the CPU and, where there is one, on the GPU: a record
    .venv/bin/python bench/qrnn.py --quick     a few calls of everything, to see that it runs: no record
    .venv/bin/python bench/qrnn.py --help

A case is a device, a size (steps x streams x channels: `article`, one hidden layer of AWD-QRNN, and `small`), a dtype
(float32; on a GPU bfloat16 too) and what is timed, always forward and backward together:

    pooling     from the gates to h and the last memory: `loop` (the definition, by autograd), `scan`, on a GPU `kernel`,
                and for comparison `doubling`, a scan of logarithmic depth
    layer       QRNN from as many features as channels, pooling by `loop`, `scan` and on a GPU `kernel`; and `lstm`,
                torch's nn.LSTM (cuDNN's on a GPU) from as many features to as many channels

After a warm-up the contenders take turns, a round of `--calls` calls each, A B C and back C B A. So each round gives
ratios between times measured within seconds of each other; on a busy machine these count, and not the times. Before
that all ways must give the same outputs and gradients; otherwise there is no record. On a GPU a call more is made to
learn the peak of the memory.

The record, book/records/qrnn/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format, name, started, seconds, machine, load, versions, commit, code_hash, bench_hash
                    as in bench.py
    cases           a list; each has
        device                            "cpu" or "cuda"
        not_run                           the reason, and then nothing else
        what, size, shape, dtype          "pooling" or "layer"; its name; steps, streams, channels
        device_name, threads, calls, rounds
        contenders                        a list; each has
            name
            first_call                    seconds, with compilation
            call                          a list: seconds of a call (mean of a round), a round each
            peak_mb                       memory that a call takes beyond what was there before; null on a CPU
        largest_difference                between the loop's outputs and gradients and any other way's, relative to the
                                          largest of each tensor; the LSTM is another function and is left out

Medians and ratios are not stored: the functions below compute them.
"""
import argparse
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import frame  # noqa: E402
from bench import find, progress  # noqa: E402
from frame import add_options, need_positive, run, split_lists  # noqa: E402
from steps import Contender  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "qrnn"
SIZES = {"small": (70, 20, 200), "article": (70, 100, 1550)}
KINDS = ("pooling", "layer")
GOAL = 10                                               # a scan so many times as fast as the loop
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


# --- figures from a record -----------------------------------------------------------------------
def newest(folder=RECORDS):
    """The newest record of each machine, newest first."""
    return frame.newest(folder)


def milliseconds(case, name):
    """Median time of a call, in ms."""
    return 1e3 * statistics.median(find(case, name)["call"])


def ratios(case, name, reference):
    """Time of one contender's call over another's, round by round."""
    return [a / b for a, b in zip(find(case, name)["call"], find(case, reference)["call"], strict=True)]


# --- what is timed -------------------------------------------------------------------------------
def doubling_pool(z, f, o=None, c=None):
    """Spans of 1, 2, 4, ... steps are joined: a scan of logarithmic depth, both ways, by autograd's rules written out."""
    import torch

    def scan(k, b):
        span = 1
        while span < len(b):
            b = torch.cat([b[:span], torch.addcmul(b[span:], k[span:], b[:-span])])
            if 2 * span < len(b):
                k = torch.cat([k[:span], k[span:] * k[:-span]])
            span *= 2
        return b

    class Doubling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, f, o, c0):
            k, b = 1 - f, f * z
            b[0].addcmul_(k[0], c0)
            c = scan(k, b)
            ctx.save_for_backward(z, f, o, c0, c)
            return o * c, c[-1].clone()

        @staticmethod
        def backward(ctx, g, g_last):
            z, f, o, c0, c = ctx.saved_tensors
            k, b = 1 - f, g * o
            b[-1] += g_last
            a = scan(torch.cat([k[1:], k[:1]]).flip(0), b.flip(0)).flip(0)
            before = torch.cat([c0[None], c[:-1]])
            return f * a, (z - before) * a, g * c, k[0] * a[0]

    wide = (t.to(c.dtype) for t in (z, f, o))
    h, last = Doubling.apply(*wide, c)
    return h.to(z.dtype), last


def ways(device):
    """The poolings that run on a device, by name."""
    from nbutils import qrnn

    found = {"loop": qrnn.pool_loop, "scan": qrnn.pool_scan}
    if device == "cuda":
        found["kernel"] = qrnn.pool_kernel
    return found


def poolings(device, shape, dtype):
    """Calls by name; each gives outputs and gradients of a pooling of the same gates."""
    import torch

    steps, streams, channels = shape
    z, f, o = torch.randn(3, *shape, device=device)
    leaves = [t.to(dtype).requires_grad_() for t in (z.tanh(), f.sigmoid(), o.sigmoid())]
    leaves.append(torch.rand(streams, channels, device=device).requires_grad_())
    g, g_last = torch.randn(shape, device=device).to(dtype), torch.randn(streams, channels, device=device)

    def call(way):
        h, last = way(*leaves)
        return h, last, *torch.autograd.grad((h, last), leaves, (g, g_last))

    return {name: lambda way=way: call(way) for name, way in (ways(device) | {"doubling": doubling_pool}).items()}


def layers(device, shape, dtype):
    """Calls by name; each gives outputs and gradients of a layer."""
    import torch

    from nbutils import qrnn

    steps, streams, channels = shape
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    g = torch.randn(shape, device=device).to(dtype)
    ours = qrnn.QRNN(channels, channels).to(device, dtype)
    lstm = torch.nn.LSTM(channels, channels).to(device, dtype)

    def call(layer, way=None):
        usual, qrnn.recurrent_pool = qrnn.recurrent_pool, way or qrnn.recurrent_pool
        try:
            h, _ = layer(x)
        finally:
            qrnn.recurrent_pool = usual
        return h, *torch.autograd.grad(h, [x, *layer.parameters()], g)

    return {name: lambda way=way: call(ours, way) for name, way in ways(device).items()} | {"lstm": lambda: call(lstm)}


def largest_difference(calls):
    """Between the loop and the other ways, over the largest number of each tensor."""
    reference, worst = [t.detach() for t in calls["loop"]()], 0.0
    for name, call in calls.items():
        if name not in ("loop", "lstm"):
            for ours, theirs in zip(call(), reference, strict=True):
                worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


def peak_mb(call):
    """What a call takes on the GPU beyond what was there, in MB."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def measure(device, what, size, dtype, chosen):
    """One case; its part of the record."""
    import torch

    from nbutils.core import seed_everything
    from nbutils.records import describe_device

    seed_everything(0)
    rounds = chosen.rounds if what == "pooling" else chosen.layer_rounds
    calls = (poolings if what == "pooling" else layers)(device, SIZES[size], getattr(torch, dtype))
    case = {"device": device, "not_run": None, "what": what, "size": size, "shape": list(SIZES[size]), "dtype": dtype,
            "device_name": describe_device(device), "threads": torch.get_num_threads(), "calls": chosen.calls,
            "rounds": rounds}
    contenders = [Contender(name, device, call) for name, call in calls.items()]
    for c in contenders:
        c.first_step = c.run(1)
        progress(f"{device} {what} {size} {dtype}: {c.name}, first call {c.first_step:.3g} s")
    case["largest_difference"] = largest_difference(calls)
    if not case["largest_difference"] < TOLERANCE[dtype]:
        raise SystemExit(f"{device} {what} {size} {dtype}: the ways differ by {case['largest_difference']:.3g} relative "
                         "to the largest: they did not do the same work, no record")
    for i in range(rounds):
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
    lines = [f"{case['device']}, {case['what']}, {case['size']} ({' x '.join(map(str, case['shape']))}), {case['dtype']}",
             f"  {'':<12}{'ms':>10}{'times as fast as the loop':>32}{'peak, MB':>12}"]
    for c in case["contenders"]:
        r = ratios(case, "loop", c["name"])
        speed = f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})"
        peak = "–" if c["peak_mb"] is None else f"{c['peak_mb']:,.0f}"
        lines.append(f"  {c['name']:<12}{milliseconds(case, c['name']):>10.3f}{speed:>32}{peak:>12}")
    return "\n".join(lines)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_options(parser, "2 rounds of 1 call of the small size", RECORDS)
    add("--sizes", default=",".join(SIZES), help=f"some of {', '.join(SIZES)}, with commas between")
    add("--kinds", default=",".join(KINDS), help=f"some of {', '.join(KINDS)}")
    add("--calls", type=int, default=3, help="calls of a round (default: 3)")
    add("--rounds", type=int, default=20, help="of poolings (default: 20)")
    add("--layer-rounds", type=int, default=5, help="of layers (default: 5)")
    chosen = parser.parse_args(argv)
    split_lists(parser, chosen, sizes=SIZES, kinds=KINDS)
    need_positive(parser, chosen, "calls", "rounds", "layer_rounds", "threads")
    if chosen.quick:
        chosen.calls, chosen.rounds, chosen.layer_rounds, chosen.sizes = 1, 2, 2, ["small"]
    return chosen


def main(argv=None):
    chosen = arguments(argv)

    def cases_on(device):
        for size in chosen.sizes:
            for what in chosen.kinds:
                for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
                    yield measure(device, what, size, dtype, chosen)

    return run(__file__, chosen, cases_on, report)


if __name__ == "__main__":
    raise SystemExit(main())
