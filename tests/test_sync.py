"""nbutils/ is what the notebooks export: the same files, byte for byte."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"_modidx.py"}  # nbdev's index for its own documentation; nothing reads it here


def modules(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*.py") if p.name not in NOT_OURS}


def test_modules_are_what_the_notebooks_export(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # would export nothing
    done = subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    exported, committed = modules(tmp_path / "nbutils"), modules(ROOT / "nbutils")
    assert exported, "nbdev-export wrote nothing"
    assert sorted(committed) == sorted(exported), \
        "modules without a notebook, or notebooks without a module: run `make export`"
    differ = sorted(name for name in exported if exported[name] != committed[name])
    assert not differ, f"{differ} differ from their notebooks: run `make export`"


def test_readme_tables_are_what_the_records_give():
    done = subprocess.run([sys.executable, ROOT / "tools" / "readme_tables.py", "--check"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
