# SPDX-License-Identifier: Apache-2.0
"""Measures rows in turn, round by round, and writes each figure as soon as it is there.

A round is one measurement of every row at one length, one behind the other in one process: rows of a round saw the same
machine, and ratios are taken within it. What a run left undone of a round is not filled up later: another process would
have seen another machine. It begins a round of its own.
"""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import restkv
import torch
from quality.records import Records
from tqdm import tqdm

from . import memory, models
from .deadline import Deadline, OutOfTime
from .measure import Load, measure
from .rows import BASELINES, Row, parsed_row

MEMORY = "memory"  # the sample that holds what processes took, on the CPU
WARM_TOKENS = 1024

# What a row may raise without ending the run; an exhausted GPU raises a RuntimeError.
REFUSALS = (RuntimeError, ValueError, ImportError, MemoryError, NotImplementedError, OSError)


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    model: str
    dtype: str
    device: str
    layers: int | None
    lengths: Sequence[int]
    rows: Sequence[str]
    budget: float
    decode: int
    lead: int
    repeats: int
    threads: int | None
    clock: Literal["wall", "process"]
    memory: bool  # a process a row, on the CPU
    out: Path
    deadline: Deadline

    def load(self, tokens: int) -> Load:
        return Load(tokens, self.decode, self.lead, self.budget, self.threads, self.clock == "process")


def device_name(device: str) -> str:
    """What the figures were measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def processor_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def header_of(plan: Plan, tokens: int) -> dict[str, Any]:
    """What two runs must have in common to lie in one file."""
    return {
        "model": plan.model,
        "dtype": plan.dtype,
        "layers": plan.layers,
        "device": device_name(plan.device),
        "threads": torch.get_num_threads(),
        "clock": plan.clock,
        "tokens": tokens,
        "budget": plan.budget,
        "decode": plan.decode,
        "lead": plan.lead,
        "torch": torch.__version__,
        "restkv": restkv.__version__,
    }


def run(plan: Plan) -> bool:
    """Runs what has no result yet; whether all of it was done before the deadline. Raises ValueError for what the plan
    got wrong, before anything is measured."""
    rows = [parsed_row(name) for name in dict.fromkeys(plan.rows)]
    files = {tokens: Records.open(plan.out / f"{tokens}.jsonl", header_of(plan, tokens)) for tokens in plan.lengths}
    missing = {tokens: plan.repeats - complete(records, rows) for tokens, records in files.items()}
    try:
        with plan.deadline.enforced():
            if any(count > 0 for count in missing.values()):
                session = Session(plan)
                gc.freeze()  # the model and all libraries: what is freed between measurements is not among them
                for turn in range(max(missing.values())):
                    for tokens, records in files.items():
                        if turn < missing[tokens]:
                            session.round(in_order(rows, records), records, tokens)
            if plan.memory and torch.device(plan.device).type == "cpu":
                for tokens, records in files.items():
                    measure_memory(plan, rows, records, tokens)
    except OutOfTime:
        print("efficiency: the time is up; the same command goes on", file=sys.stderr)
        return False
    finally:
        gc.unfreeze()
    return True


def rounds(records: Records) -> dict[str, dict[str, Any]]:
    """The results of each round."""
    return {name: sample["results"] for name, sample in records.samples.items() if name != MEMORY}


def complete(records: Records, rows: Sequence[Row]) -> int:
    """Rounds with a result, or an error, of every row."""
    return sum(all(row.name in results for row in rows) for results in rounds(records).values())


def in_order(rows: Sequence[Row], records: Records) -> list[Row]:
    """The baselines first, since the others are measured against them; then those with the fewest results."""
    counts = {row.name: sum(row.name in results for results in rounds(records).values()) for row in rows}
    return sorted(rows, key=lambda row: (row.name not in BASELINES, counts[row.name]))


class Session:
    """A process that measures: the model, and what it knows of rows already. Raises ValueError for lengths that are too
    long for the model."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.model = models.load(plan.model, dtype=plan.dtype, device=plan.device, layers=plan.layers)
        # As long as all that is read and written: what is too long for the model should not be found after hours.
        self.prompts = {n: models.prompt(plan.model, self.model, plan.load(n).all_tokens)[:, :n] for n in plan.lengths}
        self.warm: set[Any] = set()
        self.refused: dict[tuple[str, int], str] = {}

    def round(self, rows: Sequence[Row], records: Records, tokens: int) -> None:
        """Measures every row once. One that failed in this process is not tried again at that length."""
        name = str(len(rounds(records)))
        for row in tqdm(rows, desc=f"{tokens} tokens, round {name}", unit="row", leave=False):
            key = (row.name, tokens)
            if key not in self.refused:
                try:
                    result = self.measure(row, tokens)
                except REFUSALS as error:
                    self.refused[key] = told(error)
            if key in self.refused:
                result = {"error": self.refused[key]}
            records.append({"sample": name, "results": {row.name: result}})

    def measure(self, row: Row, tokens: int) -> dict[str, Any]:
        """One measurement, behind a warm-up where there was none: a shorter prompt, which builds what a model's layers
        need once. Sparse kernels are compiled for a length, so their warm-up has it."""
        load, prompt = self.plan.load(tokens), self.prompts[tokens]
        state = (row.name, None if row.prefill == "dense" else tokens)
        if state not in self.warm:
            short = tokens if row.prefill != "dense" else int(max(WARM_TOKENS, 2 * load.budget))
            first = prompt[:, :short]
            measure(self.model, row, first, replace(load, tokens=first.shape[1], decode=2, lead=1))
            self.warm.add(state)
        return asdict(measure(self.model, row, prompt, load))


def measure_memory(plan: Plan, rows: Sequence[Row], records: Records, tokens: int) -> None:
    """What a process takes that runs one row alone. Not for rows that failed before."""
    failed = {name for results in rounds(records).values() for name, result in results.items() if "error" in result}
    weights = {"model": plan.model, "dtype": plan.dtype, "layers": plan.layers}
    for row in tqdm(rows, desc=f"{tokens} tokens, memory", unit="row", leave=False):
        if row.name in failed or records.has(MEMORY, row.name):
            continue
        facts = {**weights, "row": row.name, "tokens": tokens, "budget": plan.budget}
        try:
            result: dict[str, Any] = dict(memory.of_process(**facts))
        except REFUSALS as error:
            result = {"error": told(error)}
        records.append({"sample": MEMORY, "results": {row.name: result}})


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
