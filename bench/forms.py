"""The forms of the records beside those of runs: what each kind may hold, and the one way to read them.

A folder of book/records is a kind here or a task. Whoever adds a benchmark adds its form; `make verify` holds every
record against it, and no page or chapter reads one that does not have it (`read`). The top of a record is known name by
name; below it stand numbers that are finite, and short lines without markup, nested no deeper than they must be. Three
things may be longer: what a language model says, a picture, and what a library said when it failed.
"""
import base64
import io
import warnings
from pathlib import Path

from nbutils.records import COMMIT, HASH, LABEL, LINE, NAME, NUMBER, RECORD, TIME, misfits, nested, printable, read_json

LEAF = {None, True, False, NUMBER, LINE, ""}
SECONDS = (0.0, 1e8)
SENTENCE = ("[ -~]{1,1000}", "a line of 1,000 printable ASCII characters at most")
PICTURE_BYTES, PICTURE_SIDE = 100_000, 1024


def said(value, where):
    """The form of a model's text: lines that can be printed, and no more than a page of them."""
    if not isinstance(value, str) or len(value) > 5000:
        yield f"{where} is not a text of 5,000 characters at most"
    elif printable(value.replace("\n", " "), 5000) != value.replace("\n", " "):
        yield f"{where} holds a character that cannot be printed"


def jpeg(value, where):
    """The form of a picture: base64 of a JPEG of a small size, which can be decoded, and of nothing else."""
    from PIL import Image

    try:
        if not isinstance(value, str) or len(value) > PICTURE_BYTES:
            raise ValueError(f"not a text of {PICTURE_BYTES:,} characters at most")
        raw = base64.b64decode(value, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(raw), formats=["JPEG"]) as picture:
                if max(picture.size) > PICTURE_SIDE:
                    raise ValueError(f"of {picture.size[0]} x {picture.size[1]} pixels, and {PICTURE_SIDE} a side are allowed")
                picture.load()
        if not raw.endswith(b"\xff\xd9"):
            raise ValueError("a picture with something behind its end")
    except Exception as error:  # a damaged picture can raise nearly anything
        yield f"{where} is no picture: {printable(error)}"


MACHINE = {"cpu": LINE, "gpu": {None, LINE}, "cores": (1, 100_000), "memory_gb?": {None, SECONDS}, "platform": LINE}
BUSY = {"averages": [SECONDS, 0, 3], "busy_cores": {None, SECONDS}}
LOAD = {"before": BUSY, "after": BUSY, "steal": {None, (0.0, 1.0)}, "anyway": {True, False}}
HEAD = {"format": 1, "name": NAME, "started": TIME, "seconds": SECONDS, "machine": MACHINE, "versions": {LABEL: LINE},
        "commit": COMMIT, "code_hash": HASH}
BENCHMARK = HEAD | {"load": LOAD, "bench_hash": HASH}
RUN = {name: RECORD[name] for name in ("task", "size", "row", "seed", "config_hash", "versions", "commit", "code_hash", "device")}


def cases(required, most=1000):
    """A list of cases: each a tree that says at least whether and where it was run, or why not."""
    tree = nested(LEAF, 6, most)
    return [dict.fromkeys(required, LINE) | {"not_run": {None, SENTENCE}, LABEL: tree}, 0, 1000]


FORMS = {
    "bench": BENCHMARK | {"data?": LINE, "sets": cases(["device", "precision"])},
    "cache": BENCHMARK | {"cases": cases(["device"])},
    "cases": RUN | {
        "format": 1, "started": TIME, "seconds": SECONDS, "metrics": RECORD["metrics"], "same": {None, True, False},
        "counts": {LABEL: (0, 10**9)},
        "cases": [{"kind": NAME, "number": (0, 10**9), "truth": LINE, "jpeg": jpeg,
                   "plain": [[{LINE, (0.0, 1.0)}, 2, 2], 0, 10], "views": [[{LINE, (0.0, 1.0)}, 2, 2], 0, 10]}, 0, 100]},
    "conformance": HEAD | {"survey_hash": HASH, "entries": [{
        "library": LINE, "version": {None, LINE}, "backend": {None, NAME}, "name?": NAME, "not_run?": SENTENCE, "seconds?": SECONDS,
        "arguments?": {LABEL: nested(LEAF, 1)}, "defaults?": {LABEL: nested(LEAF, 1)}, "expected?": nested(LEAF, 2),
        "convention?": {LABEL: nested(LEAF, 1)}, "left_out?": {LABEL: LINE}, "passed?": {None, True, False},
        "failures?": {LABEL: SENTENCE}, "explanation?": {"", SENTENCE}, "note?": {None, SENTENCE}}, 0, 500]},
    "counterexamples": HEAD | {"bench_hash": HASH, "steps": (1, 10**12), "runs": [{
        "variant": NAME, "betas": [(0.0, 1.0), 2, 2], "lr": SECONDS, "falling": {True, False}, "start": NUMBER,
        "seed": {None, (0, 2**63 - 1)}, "steps": [(0, 10**12), 1, 1000], "x": [NUMBER, 1, 1000], "regret": [NUMBER, 1, 1000]},
        0, 1000]},
    "decode": BENCHMARK | {"cases": cases(["pictures"])},
    "epochs": BENCHMARK | {"cases": cases(["device"])},
    "loss": BENCHMARK | {"cases": cases(["device"])},
    "qrnn": BENCHMARK | {"cases": cases(["device"])},
    "samples": RUN | {
        "format": 1, "name": NAME, "started": TIME, "seconds": SECONDS, "config": RECORD["config"], "recipe": RECORD["recipe"],
        "precision": RECORD["precision"], "valid": (1.0, 1e9), "vocabulary": (1, 10**9),
        "samples": [{"prompt": said, "temperature": (0.0, 1e3), "tokens": (1, 10**6), "seed": (0, 2**63 - 1), "text": said},
                    0, 100]},
    "steps": BENCHMARK | {"cases": cases(["device", "rule", "parameters"])},
}


def problems(path):
    """Yield what is wrong with a record, which lies in the folder of its kind.

    Parameters
    ----------
    path : Path
    """
    path = Path(path)
    kind, name = path.parent.name, path.stem
    if kind not in FORMS:
        yield f"{printable(kind)} is no kind of record: bench/forms.py has {', '.join(FORMS)}"
        return
    try:
        record = read_json(path)
    except ValueError as error:
        yield str(error)
        return
    yield from misfits(record, FORMS[kind])
    if isinstance(record, dict) and record.get("name", name) != name:
        yield f"name is {printable(record['name'], 100)!r}, and the file's is {printable(name)!r}"


def read(path):
    """Return a record that has the form of its kind.

    Raises
    ------
    ValueError
        Naming the file and what is wrong.
    """
    for problem in problems(path):
        raise ValueError(f"{printable(path)} is not a record ({problem}): take it away, or restore it from the repository")
    return read_json(path)


def read_all(folder):
    """The records of a folder, sorted by name."""
    return [read(path) for path in sorted(Path(folder).glob("*.json"))]
