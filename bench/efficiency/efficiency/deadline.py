# SPDX-License-Identifier: Apache-2.0
"""Ends a run in time."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STARTED = time.monotonic()
SHARE = 0.9  # of the time is for measuring; a step that has begun by then, tables and plots have the rest


class OutOfTime(BaseException):
    """The time is up. No `Exception`: nothing that catches errors should go on."""


class Deadline:
    """When to end, so that everything has ended `minutes` after the program's start; None: never."""

    def __init__(self, minutes: float | None, started: float = STARTED):
        self.at = math.inf if minutes is None else started + SHARE * minutes * 60

    def left(self) -> float:
        """Seconds."""
        return self.at - time.monotonic()

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Raises OutOfTime at the deadline, wherever the program is: between two of its own steps, so a step of the
        device that has begun is waited for. In the main thread."""
        if math.isinf(self.at):
            yield
            return
        if self.left() <= 0:
            raise OutOfTime

        def end(*args: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, self.left(), 1)  # again each second, should a library swallow it
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
