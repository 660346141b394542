# SPDX-License-Identifier: Apache-2.0
"""The stubs, as a type checker sees them."""

import subprocess
import sys
from pathlib import Path

import pytest
import restkv

HERE = Path(__file__).parent


def check(path, cache):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", cache, path]
    return subprocess.run(command, capture_output=True, text=True, cwd=cache, check=False)


def test_mypy(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy")
    done = check(HERE / "typed_program.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import restkv\nrestkv.policy(3)\nrestkv.select(1, 2, 3, 4)\nrestkv.policy().budget = 4\n")
    done = check(wrong, tmp_path)
    assert done.returncode == 1 and done.stdout.count("error") >= 4, done.stdout


def test_everything_is_documented():
    for name in restkv.__all__:
        if name != "__version__":
            assert (getattr(restkv, name).__doc__ or "").strip(), name
    assert restkv.__version__.count(".") == 2
