# SPDX-License-Identifier: Apache-2.0
"""All tasks by name, "suite/task".

Tasks read published files from one folder, a folder a suite; without one they read the samples of this project's own
that lie in `data`, in the same layout and formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import arc, humaneval, infinitebench, longbench, needle, perplexity, ruler
from .files import OWN_DATA, DataFileError
from .task import LikelihoodSample, LikelihoodTask, Sample, Task, Tokenizer, count_tokens

__all__ = [
    "OWN_DATA",
    "DataFileError",
    "LikelihoodSample",
    "LikelihoodTask",
    "Sample",
    "Task",
    "Tokenizer",
    "by_name",
    "count_tokens",
    "names",
    "suites",
]

AnyTask = Task | LikelihoodTask

_SUITES: dict[str, Callable[[Path], Sequence[AnyTask]]] = {
    "ruler": ruler.tasks,
    "niah": needle.tasks,
    "longbench": longbench.tasks,
    "infinitebench": infinitebench.tasks,
    "arc": arc.tasks,
    "humaneval": humaneval.tasks,
    "perplexity": perplexity.tasks,
}


def suites() -> list[str]:
    """The names of all suites."""
    return list(_SUITES)


def names(suite: str | None = None) -> list[str]:
    """The names of all tasks, or of one suite's."""
    if suite is not None and suite not in _SUITES:
        raise KeyError(f"no suite {suite!r}; there are {', '.join(_SUITES)}")
    return [task.name for name in ([suite] if suite else _SUITES) for task in _SUITES[name](OWN_DATA)]


def by_name(name: str, data: Path = OWN_DATA) -> AnyTask:
    """The task of that name, reading its files from `data`/suite. Files are read when samples are asked for.

    Raises KeyError, with the names there are, for another name.
    """
    suite = name.partition("/")[0]
    found = next((task for task in _SUITES.get(suite, lambda _: [])(data) if task.name == name), None)
    if found is None:
        raise KeyError(f"no task {name!r}; there are {', '.join(names())}")
    return found
