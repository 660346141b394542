# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Wall time, with everything that was asked of the device done. With `of_process` what the processor spent on this
    process instead: on a machine that is shared, others take no part of it. That is for one thread on the CPU."""

    def __init__(self, device: torch.device, of_process: bool = False):
        self.cuda = device.type == "cuda"
        self.read = time.process_time if of_process else time.perf_counter

    def now(self) -> float:
        """Seconds. Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.read()


class Stopwatch:
    """The time of some calls among others, summed. On a GPU by events on its own timeline, so that nothing waits that
    would not have waited: time in which the device waits for the host within a call counts too."""

    def __init__(self, clock: Clock):
        self.cuda, self.read = clock.cuda, clock.read
        self.spans: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if not self.cuda:
            return self.read()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, function: Callable) -> Callable:
        """The function, its calls timed."""

        def call(*args: Any, **kwargs: Any) -> Any:
            begin = self.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append((begin, self.mark()))

        return call

    def take(self) -> float:
        """Seconds since the last `take`; the device must have done everything."""
        spans, self.spans = self.spans, []
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in spans)


class PeakMemory:
    """Bytes of a GPU that this process has allocated; nothing on the CPU, where `memory` measures a process."""

    def __init__(self, clock: Clock):
        self.cuda = clock.cuda

    def begin(self) -> None:
        """From here on a new peak counts."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None

    def now(self) -> int | None:
        return torch.cuda.memory_allocated() if self.cuda else None


def free(clock: Clock) -> None:
    """Gives back what earlier measurements left, so that none pays for another."""
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()
