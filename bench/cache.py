#!/usr/bin/env python
"""Time the continuous cache over a whole text: ours in blocks, against a loop over its tokens.

    make bench-cache                     on the CPU and, where there is one, on the GPU: a record
    make bench-cache ARGS=--quick        a short text, to see that it runs: no record
    .venv/bin/python bench/cache.py --help

The text is made: WikiText-2's 217,646 tokens (or 245,569), words drawn by Zipf's law from 33,278, and
as outputs random directions of 400 features and length 6. A window of 3785, theta .662, float32.

The contenders take turns, a round each, A B C and back C B A, so that each round gives ratios between
times measured within a minute of each other:

    loop             `cache_distribution` for each token: a product of the window's outputs with one vector, a
                     softmax, an `index_add` over the vocabulary; `--loop-tokens` tokens behind a full window
    one-hot loop     the same with the window's words as one-hot vectors [window, vocabulary], multiplied out and
                     added up, as the scripts of 2018 do; `--one-hot-tokens` tokens
    product alone    the matrix products of blocks of 256 behind a full window and nothing else, which no blocked way
                     can beat; eight times the loop's tokens
    blocks of B      `cache_log_probs(..., block=B)` over the whole text

Blocks and loop must give the same log-probabilities for the loop's tokens; otherwise there is no record.

The record, book/records/cache/DATE-DEVICE.json (then -2, -3, ...; none is ever overwritten):

    format, name, started, seconds, machine, load, versions, commit, code_hash, bench_hash
                    as in bench.py
    cases           a list; each has
        device                            "cpu" or "cuda"
        not_run                           the reason, and then nothing else
        device_name, threads, rounds
        tokens, features, vocabulary, window, theta
        contenders                        a list; each has
            name, block                   as above; null for the others
            tokens                        targets of a round
            seconds                       a list: of a round, a round each
            bytes                         of the scores, by their shape: 4 * block * (window + block); null for the others
            peak_bytes                    on a GPU: most that torch had allocated in a round, beyond what was there
                                          before; null on a CPU, where torch does not count
        largest_difference                in log-probability between blocks and loop

Medians and ratios are not stored: the functions below compute them.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import frame  # noqa: E402
from bench import find, progress  # noqa: E402
from frame import add_options, need_positive, run  # noqa: E402

RECORDS = HERE.parent / "book" / "records" / "cache"
VOCABULARY, FEATURES, WINDOW, THETA, LENGTH = 33_278, 400, 3785, 0.662, 6.0
SPLITS = {"valid": 217_646, "test": 245_569}
BLOCKS = {"cpu": (64, 256, 1024), "cuda": (256, 1024, 4096)}
GOAL_SPEEDUP, GOAL_SECONDS = 100, 1.0       # on a CPU, over the loop; both splits on a GPU


# --- figures from a record -----------------------------------------------------------------------
def newest(folder=RECORDS):
    """The newest record of each machine (its card, or else its processor), newest first."""
    return frame.newest(folder)


def microseconds(case, name):
    """Median time of a token, in µs."""
    c = find(case, name)
    return 1e6 * statistics.median(c["seconds"]) / c["tokens"]


def speedup(case, name, reference="loop"):
    """How many times as fast as another contender, a token: median of the rounds, smallest, largest."""
    ours, theirs = find(case, name), find(case, reference)
    found = [(b / theirs["tokens"]) / (a / ours["tokens"])
             for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    return statistics.median(found), min(found), max(found)


def fastest(case):
    """The name of the block size with the smallest median."""
    return min((c["name"] for c in case["contenders"] if c["block"]), key=lambda name: microseconds(case, name))


def products_per_second(case, name):
    """Operations of a token's dot products, 2 window features, over its median time."""
    return 2 * case["window"] * case["features"] / (microseconds(case, name) / 1e6)


def both_splits_seconds(case):
    """Seconds for validation and test text by the fastest block size, from its time a token."""
    return sum(n - 1 for n in SPLITS.values()) * microseconds(case, fastest(case)) / 1e6


# --- what is timed -------------------------------------------------------------------------------
def make_text(tokens, device):
    """Outputs [tokens - 1, features] and the words that followed [tokens - 1]."""
    import torch

    from nbutils.core import seed_everything

    seed_everything(0)
    raw = torch.nn.functional.normalize(torch.randn(tokens - 1, FEATURES), dim=1).mul_(LENGTH)
    chances = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    words = torch.multinomial(chances / chances.sum(), tokens - 1, replacement=True)
    return raw.to(device), words.to(device)


def by_loop(raw, words, begin, count):
    """Probability of each of `count` targets from `begin` on, by the definition."""
    import torch

    from nbutils.cache_pointer import cache_distribution

    found = []
    for t in range(begin, begin + count):
        p = cache_distribution(raw[t], raw[t - WINDOW:t], words[t - WINDOW:t], theta=THETA, vocabulary=VOCABULARY)
        found.append(p[words[t]])
    return torch.stack(found)


def by_one_hot_loop(raw, words, one_hot, begin, count):
    """The same with the window's words as one-hot vectors; `one_hot` are those of the first window."""
    import torch

    found = []
    for t in range(begin, begin + count):
        votes = (THETA * (raw[t - WINDOW:t] @ raw[t])).softmax(0)
        p = (votes[:, None] * one_hot).sum(0)       # the window does not slide here: that would only cost more
        found.append(p[words[t]])
    return torch.stack(found)


def by_product(raw, count, block=256):
    """Matrix products as for `count` targets in blocks; the last of them."""
    for _ in range(-(-count // block)):
        scores = raw[WINDOW:WINDOW + block] @ raw[:WINDOW + block].T
    return scores


class Contender:
    """Something that goes over tokens and is timed."""

    def __init__(self, name, tokens, call, block=None):
        self.name, self.tokens, self.call, self.block = name, tokens, call, block
        self.seconds, self.peak, self.result = [], None, None

    def turn(self, device):
        from nbutils.core import synchronize

        before = self.watch(device)
        start = time.perf_counter()
        self.result = self.call()
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        if before is not None:
            import torch

            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated() - before)

    @staticmethod
    def watch(device):
        """On a GPU: the bytes allocated now, from which the peak begins."""
        import torch

        from nbutils.core import synchronize

        synchronize(device)
        if device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def record(self):
        scores = self.block and 4 * self.block * (WINDOW + self.block)
        return {"name": self.name, "block": self.block, "tokens": self.tokens, "seconds": self.seconds,
                "bytes": scores, "peak_bytes": self.peak}


def measure(device, chosen):
    """One device; its part of the record."""
    import torch

    from nbutils.cache_pointer import cache_log_probs
    from nbutils.records import describe_device

    raw, words = make_text(chosen.tokens, device)
    one_hot = torch.nn.functional.one_hot(words[:WINDOW], VOCABULARY).to(raw.dtype)
    products = max(1, 8 * chosen.loop_tokens // 256)
    contenders = [
        Contender("loop", chosen.loop_tokens, lambda: by_loop(raw, words, WINDOW, chosen.loop_tokens)),
        Contender("one-hot loop", chosen.one_hot_tokens,
                  lambda: by_one_hot_loop(raw, words, one_hot, WINDOW, chosen.one_hot_tokens)),
        Contender("product alone", products * 256, lambda: by_product(raw, products * 256))]
    for block in chosen.blocks or BLOCKS[device]:
        contenders.append(Contender(
            f"blocks of {block}", len(words),
            lambda block=block: cache_log_probs(raw, words, theta=THETA, window=WINDOW, block=block), block))
    by_loop(raw, words, WINDOW, 20)                                     # warm-up
    cache_log_probs(raw[:2 * WINDOW], words[:2 * WINDOW], theta=THETA, window=WINDOW)
    for i in range(chosen.rounds):
        for c in contenders if i % 2 == 0 else reversed(contenders):
            c.turn(device)
            progress(f"{device}, round {i + 1}: {c.name}, {1e6 * c.seconds[-1] / c.tokens:.4g} µs a token")
    loop, blocked = contenders[0].result, [c.result for c in contenders if c.block]
    expected = loop.log()
    seen = expected.isfinite()
    difference = max((found[WINDOW:WINDOW + chosen.loop_tokens] - expected)[seen].abs().max().item()
                     for found in blocked)
    same = all(torch.equal(found[WINDOW:WINDOW + chosen.loop_tokens].isfinite(), seen) for found in blocked)
    if not (same and difference < 1e-3):
        raise SystemExit(f"{device}: blocks and loop differ by {difference:.3g} in log-probability: no record")
    return {"device": device, "not_run": None, "device_name": describe_device(device),
            "threads": torch.get_num_threads(), "rounds": chosen.rounds, "tokens": chosen.tokens,
            "features": FEATURES, "vocabulary": VOCABULARY, "window": WINDOW, "theta": THETA,
            "contenders": [c.record() for c in contenders], "largest_difference": difference}


# --- what is shown and kept ------------------------------------------------------------------------
def report(case):
    """A case as lines of text."""
    if case["not_run"]:
        return f"{case['device']}: not run: {case['not_run']}"
    lines = [f"{case['device_name']}: {case['tokens']:,} tokens, window {case['window']}, {case['rounds']} rounds; "
             f"largest difference {case['largest_difference']:.2g}",
             f"  {'':<16}{'µs a token':>12}{'times as fast as the loop':>30}{'scores, MB':>12}{'peak, MB':>10}"]
    for c in case["contenders"]:
        middle, low, high = speedup(case, c["name"])
        cells = [f"{c[key] / 1e6:.1f}" if c[key] is not None else "–" for key in ("bytes", "peak_bytes")]
        lines.append(f"  {c['name']:<16}{microseconds(case, c['name']):>12,.1f}"
                     f"{f'{middle:.2f} ({low:.2f} to {high:.2f})':>30}{cells[0]:>12}{cells[1]:>10}")
    middle, best = speedup(case, fastest(case))[0], fastest(case)
    if case["device"] == "cpu":
        limit = speedup(case, "product alone")[0]
        lines.append(f"  goal: {GOAL_SPEEDUP} times as fast as the loop: {middle:.1f} with {best}, "
                     f"{'met' if middle >= GOAL_SPEEDUP else 'missed'}; the product alone: {limit:.1f}")
    else:
        seconds = both_splits_seconds(case)
        lines.append(f"  goal: both splits in {GOAL_SECONDS:g} s: {seconds:.2f} s with {best}, "
                     f"{'met' if seconds <= GOAL_SECONDS else 'missed'}")
    return "\n".join(lines)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_options(parser, "2 rounds over 8,000 tokens", RECORDS)
    add("--tokens", type=int, default=SPLITS["valid"], help=f"of the text (default: {SPLITS['valid']})")
    add("--blocks", default="", help="block sizes, with commas between (default: "
        f"{BLOCKS['cpu']} on a CPU, {BLOCKS['cuda']} on a GPU)")
    add("--loop-tokens", type=int, default=2000, help="tokens of the loop in a round (default: 2000)")
    add("--one-hot-tokens", type=int, default=4, help="tokens of the one-hot loop in a round (default: 4)")
    add("--rounds", type=int, default=5, help="default: 5")
    chosen = parser.parse_args(argv)
    try:
        chosen.blocks = [int(value) for value in chosen.blocks.split(",") if value]
    except ValueError:
        parser.error(f"--blocks is {chosen.blocks!r}: whole numbers are needed, with commas between")
    if chosen.quick:
        chosen.tokens, chosen.rounds, chosen.loop_tokens, chosen.one_hot_tokens = 8000, 2, 50, 1
    need_positive(parser, chosen, "loop_tokens", "one_hot_tokens", "rounds", "threads")
    if any(block < 1 for block in chosen.blocks):
        parser.error("--blocks must be 1 or more")
    most = chosen.tokens - 1 - WINDOW
    if max(chosen.loop_tokens, chosen.one_hot_tokens) > most:
        parser.error(f"--tokens is {chosen.tokens}: behind a window of {WINDOW} that leaves {max(most, 0)} for the loops")
    return chosen


def main(argv=None):
    chosen = arguments(argv)
    return run(__file__, chosen, lambda device: [measure(device, chosen)], report)


if __name__ == "__main__":
    raise SystemExit(main())
