"""What pytest needs to know about the notebooks.

It stands in the root, because hooks of tests/conftest.py would not see what runs in nbs/.
"""
import base64
import os
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import drift  # noqa: E402  (tools/drift.py)
import nb  # noqa: E402  (tools/nb.py)

CUDA = "CUDA_VISIBLE_DEVICES"
SLOWER = "NBUTILS_SLOWER"  # 3 on a machine that needs three times as long as two busy cores

for _name in nb.UNSET_ENV:
    os.environ.pop(_name, None)
# Tests may use a graphics processor; notebooks may not (see pytest_configure).
os.environ.update({name: value for name, value in nb.KERNEL_ENV.items() if name != CUDA})


def budget_seconds():
    return nb.BUDGET_SECONDS * float(os.environ.get(SLOWER) or 1)


class NotebookBudget:
    """Adds up the seconds of each notebook's cells; the cell that crosses the budget fails."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.spent = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        start = time.perf_counter()
        result = yield
        if hasattr(item, "raise_cell_error"):
            self.add(item, time.perf_counter() - start)
        return result

    def add(self, item, seconds):
        cells = self.spent.setdefault(item.path, [])
        before = sum(s for s, _ in cells)
        cells.append((seconds, item.name))
        if before <= self.seconds < before + seconds:
            slowest = ", ".join(f"{name} {s:.1f} s" for s, name in sorted(cells)[:-4:-1])
            item.raise_cell_error(
                f"{item.path.name} has taken {before + seconds:.1f} s and may take "
                f"{self.seconds:g} s (slowest so far: {slowest}); make it shorter, or set "
                f"{SLOWER}=2 on a machine that is slow or busy")


PICTURE = re.compile(r"data:image/(svg\+xml|png);base64,([A-Za-z0-9+/=]+)")


def comparable(match):
    """An embedded picture as nbval should see it: SVG as text, PNG (never compared) as a word."""
    return base64.b64decode(match[2]).decode("utf-8") if match[1] == "svg+xml" else "data:png"


def pytest_configure(config):
    config.pluginmanager.register(NotebookBudget(budget_seconds()), "notebook-budget")
    if not (config.option.nbval or config.option.nbval_lax):
        return
    if config.option.nbval and not hasattr(config, "workerinput"):   # not in xdist's workers
        config.pluginmanager.register(drift.Drift(), "notebook-drift")
    from nbval.plugin import IPyNbCell, IPyNbFile

    start_kernel, sanitize = IPyNbFile.setup, IPyNbCell.sanitize

    def setup(self):
        """Start the kernel where it sees no graphics processor, as tools/nb.py does."""
        seen = os.environ.get(CUDA)
        os.environ[CUDA] = nb.KERNEL_ENV[CUDA]
        try:
            start_kernel(self)
        finally:
            os.environ.pop(CUDA) if seen is None else os.environ.update({CUDA: seen})

    def sanitize_pictures(self, text):
        """Look into embedded pictures, so that tests/nbval_sanitize.cfg applies to them too."""
        return sanitize(self, PICTURE.sub(comparable, text) if isinstance(text, str) else text)

    IPyNbFile.setup, IPyNbCell.sanitize = setup, sanitize_pictures
    config.add_cleanup(lambda: setattr(IPyNbFile, "setup", start_kernel))
    config.add_cleanup(lambda: setattr(IPyNbCell, "sanitize", sanitize))


def pytest_collection_modifyitems(items):
    """Refuse tests named by an object's address: parallel workers would not agree on them."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: the address in this name differs from process to process; give ids=")


def pytest_terminal_summary(terminalreporter):
    """Say aloud, once, what was not checked for want of a browser (tests/test_lab.py)."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    reasons = [why[2] for why in skipped if isinstance(why, tuple) and "NO BROWSER" in why[2]]
    if reasons:
        terminalreporter.write_sep("!", f"{len(reasons)} tests skipped", yellow=True, bold=True)
        terminalreporter.write_line(reasons[0].removeprefix("Skipped: "), yellow=True)
