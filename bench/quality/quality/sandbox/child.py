# SPDX-License-Identifier: Apache-2.0
"""The sandboxed process: takes its order from standard input, shuts itself in, and runs the program.

Guards, from the outside in: another user without rights (where it starts as root), a network name space without a
network, no way to write, remove or execute a file (Landlock), no new processes, no file of more than 0 bytes, limited
memory and time (resource limits), and an audit hook that refuses the same things inside the interpreter. Those that
the kernel does not permit are left out and missing from the report; the resource limits and the hook always hold.

Only the standard library is imported, since this runs with an interpreter shut off from everything else.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

NOBODY = 65534
OPEN_FILES = 32

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIGKILL = 9
# The same numbers on all architectures.
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
# Every right of Landlock's first version but to read files and folders.
LANDLOCK_REFUSED = 0x1FFF & ~(1 << 2 | 1 << 3)

# What programs import in good faith, loaded while the interpreter's files can certainly be read: they may belong to
# the user that this process ceases to be.
USUAL_MODULES = [
    "abc",
    "array",
    "bisect",
    "calendar",
    "cmath",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "io",
    "itertools",
    "json",
    "math",
    "numbers",
    "operator",
    "queue",
    "random",
    "re",
    "socket",
    "statistics",
    "string",
    "struct",
    "textwrap",
    "threading",
    "time",
    "typing",
    "unicodedata",
    "unittest",
    "zlib",
]

REFUSED_EVENTS = (
    "socket.", "subprocess.", "shutil.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "pty.", "signal.pthread_kill",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refuse(event: str, arguments: tuple) -> None:
    """The audit hook."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(REFUSED_EVENTS):
        raise PermissionError(f"{event} is not allowed here")


def shut_in(seconds: float, memory: int) -> list[str]:
    """Applies the kernel's guards to this process, and says which of them hold."""
    kernel = ctypes.CDLL(None, use_errno=True)
    guards = []
    kernel.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    network = os.geteuid() == 0 and kernel.unshare(CLONE_NEWNET) == 0
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        guards.append("user")
    network = network or kernel.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    if network:
        guards.append("network")
    kernel.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    refused = ctypes.c_uint64(LANDLOCK_REFUSED)
    rules = kernel.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(refused), ctypes.sizeof(refused), 0)
    if rules >= 0:
        if kernel.syscall(LANDLOCK_RESTRICT_SELF, rules, 0) == 0:
            guards.append("files")
        os.close(rules)
    whole_seconds = int(seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, whole_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    return [*guards, "limits"]


def main() -> None:
    order = json.load(sys.stdin)
    for module in USUAL_MODULES:
        __import__(module)
    report = os.dup(1)
    started = os.dup(2)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    os.chdir("/")
    try:
        guards = shut_in(order["seconds"], order["memory"])
    except BaseException as error:
        os.write(started, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    if order["audit"]:
        sys.addaudithook(refuse)
        guards.append("audit")
    os.write(started, b"started\n")
    os.close(started)
    passed, reason = False, ""
    try:
        exec(compile(order["program"], "program", "exec"), {"__name__": "__main__"})
        passed, reason = True, "passed"
    except BaseException as error:  # also SystemExit: a program that leaves early has not passed its tests
        reason = f"{type(error).__name__}: {error}"[:400]
    answer = {"token": order["token"], "passed": passed, "reason": reason, "guards": guards}
    os.write(report, json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
