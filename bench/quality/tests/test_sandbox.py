# SPDX-License-Identifier: Apache-2.0
"""The sandbox holds programs that run for ever, multiply, eat memory, or reach for files and the network.

Everything but the audit hook's own test runs without that hook as well, so that the kernel's guards are seen to hold
alone; what they cannot do on a machine that does not permit them is skipped, visibly.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest
from quality.sandbox import SandboxError, executor, run

SECONDS = 2.0
both = pytest.mark.parametrize("audit", [True, False], ids=["audit", "kernel"])


def guards() -> tuple[str, ...]:
    return run("", SECONDS).guards


@both
def test_right_program_passes(audit):
    outcome = run("import math, re, collections\nassert math.sqrt(4) == 2", SECONDS, audit=audit)
    assert outcome.passed, outcome.reason
    assert {"limits"} <= set(outcome.guards)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("syntax error", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "without a report"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
    ],
)
def test_wrong_program_fails(program, reason):
    outcome = run(program, SECONDS)
    assert not outcome.passed
    assert reason in outcome.reason


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_program_is_ended(program):
    begin = time.monotonic()
    outcome = run(program, 0.5)
    assert not outcome.passed
    assert outcome.reason == "no end within 0.5 s"
    assert time.monotonic() - begin < 8


@both
def test_no_new_processes(audit):
    """A fork bomb fails at its first fork, and leaves no process behind."""
    outcome = run("import os\nwhile True: os.fork()", SECONDS, audit=audit)
    assert not outcome.passed
    assert outcome.reason.startswith("PermissionError" if audit else "BlockingIOError")
    assert _left_behind() == []


@both
def test_no_new_threads(audit):
    program = "import threading\nthreading.Thread(target=print).start()"
    assert "can't start new thread" in run(program, SECONDS, audit=audit).reason


@both
def test_memory_is_limited(audit):
    outcome = run("x = bytearray(2**29)", SECONDS, memory=2**28, audit=audit)
    assert outcome.reason.startswith("MemoryError")
    outcome = run("x = []\nwhile True: x.append(bytearray(2**20))", 10.0, memory=2**28, audit=audit)
    assert outcome.reason.startswith("MemoryError")


@both
def test_no_file_is_written(audit, tmp_path):
    tmp_path.chmod(0o777)
    target = tmp_path / "written"
    program = f"open({str(target)!r}, 'w').write('x')"
    outcome = run(program, SECONDS, audit=audit)
    assert not outcome.passed
    # Without Landlock a file can come into being, but nothing can be written to it.
    assert not target.exists() or (target.stat().st_size == 0 and "files" not in outcome.guards and not audit)


@both
def test_no_file_is_removed_or_executed(audit, tmp_path):
    tmp_path.chmod(0o777)
    target = tmp_path / "here"
    target.write_text("x")
    if not audit and "files" not in guards():
        pytest.skip("the kernel has no Landlock")
    for program in (
        f"import os; os.remove({str(target)!r})",
        f"import os; os.rename({str(target)!r}, {str(tmp_path / 'there')!r})",
        "import os; os.execv('/bin/true', ['true'])",
    ):
        outcome = run(program, SECONDS, audit=audit)
        assert outcome.reason.startswith("PermissionError"), program
    assert target.read_text() == "x"


@both
def test_no_network(audit):
    if not audit and "network" not in guards():
        pytest.skip("the system permits no network name spaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\ns = socket.socket()\ns.connect(('127.0.0.1', {port}))"
        outcome = run(program, SECONDS, audit=audit)
        assert not outcome.passed
        assert outcome.reason.startswith("PermissionError" if audit else "OSError")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_flood_of_output_is_not_read():
    program = "import os\nwhile True:\n for n in range(16):\n  try: os.write(n, b'x' * 65536)\n  except OSError: pass"
    begin = time.monotonic()
    assert not run(program, 1.0).passed
    assert time.monotonic() - begin < 8


def test_forged_report_does_not_pass():
    report = json.dumps({"passed": True, "token": "guessed", "reason": "passed", "guards": []}).encode()
    program = f"import os\nfor n in range(3, 16):\n try: os.write(n, {report!r})\n except OSError: pass\nos._exit(0)"
    outcome = run(program, SECONDS)
    assert not outcome.passed
    assert outcome.reason == "ended without a report, with status 0"


def test_broken_sandbox_is_no_failed_program(monkeypatch, tmp_path):
    """Without a sandbox every program would fail, and a model would seem unable to write any."""
    broken = tmp_path / "child.py"
    broken.write_text("import sys\nsys.exit('no such right')")
    monkeypatch.setattr(executor, "CHILD", broken)
    with pytest.raises(SandboxError, match="no such right"):
        run("", SECONDS)


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="they are 0 and"):
        run("", 0)


def _left_behind() -> list[str]:
    """Command lines of sandboxed processes that are this process's children, or nobody's any more."""
    if not Path("/proc/self/stat").is_file():
        pytest.skip("this system does not list its processes under /proc")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if parent in (1, os.getpid()) and "quality/sandbox/child.py" in line:
                found.append(line)
    return found
