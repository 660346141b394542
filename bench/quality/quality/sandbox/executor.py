# SPDX-License-Identifier: Apache-2.0
"""Starts the sandboxed process, waits for it no longer than it may run, and reads how it went.

The guards are in `child.py`. They keep a careless program from doing harm, and most hostile ones; for programs by an
adversary run the whole benchmark in a container or a virtual machine of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CHILD = Path(__file__).with_name("child.py")
START_SECONDS = 10.0  # for the interpreter and the guards, on a busy machine
END_SECONDS = 0.5  # for a process to end that has closed its report
REPORT_BYTES = 4096
BEGIN = b"started"  # what the child writes to standard error when the program begins
MEBIBYTE = 2**20


class SandboxError(Exception):
    """The sandbox itself does not work here, so that nothing can be said of the program."""


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an exception, why not, and which guards held while it ran."""

    passed: bool
    reason: str
    guards: tuple[str, ...] = ()


def run(program: str, seconds: float, memory: int = 1024 * MEBIBYTE, *, audit: bool = True) -> Outcome:
    """Runs a Python program in a sandbox, for at most `seconds` and with at most `memory` bytes of address space.

    `audit=False` leaves out the guard inside the interpreter, so that tests can see the kernel's guards work alone.
    Cost: one process of some 60 ms. Raises ValueError unless both limits are positive, and
    SandboxError where the sandbox cannot be set up.
    """
    if seconds <= 0 or memory <= 0:
        raise ValueError(f"seconds and memory must be positive, they are {seconds} and {memory}")
    token = secrets.token_hex(16)
    order = {"program": program, "token": token, "seconds": seconds, "memory": memory, "audit": audit}
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # Libraries that start threads would fail, since there are no new ones.
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    with child:
        try:
            return _wait(child, json.dumps(order).encode(), token, seconds)
        finally:
            _kill(child)


def _wait(child: subprocess.Popen[bytes], order: bytes, token: str, seconds: float) -> Outcome:
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    # One that does not live to read its order will miss its report.
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(order)
        child.stdin.close()
    # The child says when the program begins, so that a slow start of the interpreter does not count.
    begin = os.read(child.stderr.fileno(), REPORT_BYTES) if _readable(child.stderr, START_SECONDS) else b""
    if not begin.startswith(BEGIN):
        _kill(child)
        said = (begin + child.stderr.read(REPORT_BYTES)).decode(errors="replace")
        raise SandboxError(f"the sandbox did not start within {START_SECONDS} s; it said {said or 'nothing'}")
    if not _readable(child.stdout, seconds):
        return Outcome(False, f"no end within {seconds} s")
    # A program that writes to this pipe itself fills it and stands still: no more is ever read than this.
    raw = os.read(child.stdout.fileno(), REPORT_BYTES)
    try:
        report = json.loads(raw)
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("token") != token:
        with contextlib.suppress(subprocess.TimeoutExpired):  # of one that has only closed the pipe
            child.wait(END_SECONDS)
        child.kill()
        return Outcome(False, f"ended without a report, with status {child.wait()}")
    return Outcome(bool(report["passed"]), report["reason"], tuple(report["guards"]))


def _readable(pipe: IO[bytes], seconds: float) -> bool:
    return bool(select.select([pipe], [], [], seconds)[0])


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and everything in its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
