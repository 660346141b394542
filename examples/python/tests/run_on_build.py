# SPDX-License-Identifier: Apache-2.0
"""Runs the tests on a module that was built but not installed.

    run_on_build.py MODULE STUBS [PYTEST OPTION...]

A missing pytest is a skipped test, status 77.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "restkv"


def main() -> int:
    for needed in ("pytest", "numpy", "safetensors"):
        if importlib.util.find_spec(needed) is None:
            print(f"skipped: {sys.executable} has no {needed}")
            return 77
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "restkv"
        staged.mkdir()
        for file in [*PACKAGE.iterdir(), *(Path(argument).resolve() for argument in sys.argv[1:3])]:
            (staged / file.name).symlink_to(file)
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *sys.argv[3:], TESTS]
        return subprocess.run(command, env=environment, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
