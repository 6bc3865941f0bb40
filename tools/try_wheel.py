#!/usr/bin/env python
"""Install a wheel into an empty environment, and use it there as a stranger would.

    python tools/try_wheel.py dist/nbutils-0.1.0-py3-none-any.whl

Outside of the checkout: the package imports without the extras, the command runs a row on the embedded
images, its record counts, and what is installed is the wheel's and not the checkout's.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LOOK = ("import nbutils, pathlib; print(pathlib.Path(nbutils.__file__).resolve()); "
        "from nbutils import AdamW, Learner, one_cycle, check_optimizer")
RECORD = "records/cifar10/smoke/adamw-18/0.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--installer", default="{python} -m pip install --quiet",
                        help="how to install, such as 'uv pip install --python {python}'")
    chosen = parser.parse_args()
    wheel = chosen.wheel.resolve(strict=True)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name).resolve()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("NBUTILS_", "PYTHON"))}

        def run(*words, **options):
            print("+", *words, flush=True)
            return subprocess.run([str(w) for w in words], cwd=home, env=environment, check=True, text=True, **options)

        run(sys.executable, "-m", "venv", "env")
        python, command = home / "env/bin/python", home / "env/bin/nbutils"
        install = [word.format(python=python) for word in chosen.installer.split()]
        run(*install, wheel)
        found = run(python, "-c", LOOK, stdout=subprocess.PIPE).stdout.strip()
        if not Path(found).is_relative_to(home):
            print(f"nbutils comes from {found}, which is not the wheel's")
            return 1
        run(command, "--help", stdout=subprocess.DEVNULL)
        run(*install, f"nbutils[data] @ {wheel.as_uri()}")
        run(command, "run", "cifar10", "adamw-18", "--size", "smoke", "--device", "cpu", "--progress", "silent")
        run(command, "check", RECORD)
        run(command, "table", "cifar10", "--size", "smoke")
    print(f"{wheel.name}: installs, imports, runs and checks")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
