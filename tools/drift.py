"""What a test run found when it compared the notebooks' stored outputs with fresh ones.

conftest.py registers `Drift`, which writes _build/drift.json after a run; tools/status_page.py
reads it. An entry counts as long as its notebook has the bytes that were compared.
"""
import hashlib
import json
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import nb  # tools/nb.py

FILE = nb.ROOT / "_build" / "drift.json"


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read(file=FILE):
    """What was compared so far: notebook's name to its entry; empty if nothing was."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def current(path, found):
    """A notebook's entry, or None if it was not compared since it changed."""
    entry = found.get(Path(path).name)
    return entry if entry and entry["sha256"] == digest(path) else None


class Drift:
    """Collects what nbval says of each cell and writes it down at the end of a run.

    Only notebooks of which every code cell was run are written down: a run of a part of the
    tests leaves the others' entries as they are.
    """

    def __init__(self, file=FILE, folder=nb.NBS):
        self.file, self.folder, self.cells = file, folder, {}

    def pytest_runtest_logreport(self, report):
        place, _, cell = report.nodeid.partition(".ipynb::")
        if cell and (report.when == "call" or report.outcome != "passed"):
            name = place.split("/")[-1] + ".ipynb"
            worst = self.cells.setdefault(name, {})
            worst[cell] = "failed" if "failed" in (report.outcome, worst.get(cell)) else report.outcome

    def pytest_sessionfinish(self):
        entries = {}
        for name, cells in self.cells.items():
            path = self.folder / name
            if path.is_file() and len(cells) == len(nb.code_cells(nb.read(path))):
                entries[name] = {
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "sha256": digest(path), "cells": len(cells), "machine": platform.machine(),
                    "differ": sorted(cell for cell, outcome in cells.items() if outcome == "failed"),
                    "python": platform.python_version(), "torch": metadata.version("torch")}
        if entries:
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text(json.dumps({**read(self.file), **entries}, indent=1), encoding="utf-8")
