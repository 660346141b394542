# SPDX-License-Identifier: Apache-2.0
"""HumanEval (Chen et al., arXiv 2107.03374): write a function, which must pass the problem's tests; pass@1.

Solved other problems of the same file are the context, which is read first and compressed; the problem follows. A
prompt that is shorter than the cache's budget is not compressed at all: ask for a length well above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from ..sandbox import run
from . import pieces
from .files import find, read_rows, require
from .generated import make
from .prompt import Prompt
from .published import choose
from .task import Sample, Tokenizer, check_request

# Where the paper ends a completion: it has left the function.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class HumanEval:
    """The problems of the folder's file."""

    name = "humaneval/pass_at_1"
    metric = "pass@1"
    max_new_tokens = 512

    def __init__(self, folder: Path, seconds: float = 5.0) -> None:
        """`seconds`: how long the tests of one problem may run."""
        self.folder = folder
        self.seconds = seconds

    @cached_property
    def problems(self) -> list[dict[str, Any]]:
        path = find(
            self.folder,
            ["HumanEval.jsonl.gz", "HumanEval.jsonl", "test-00000-of-00001.parquet"],
            "HumanEval's published file; rows {task_id, prompt, entry_point, canonical_solution, test}",
        )
        problems = read_rows(path)
        for number, problem in enumerate(problems, 1):
            fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
            require(problem, fields, f"{path}, row {number}")
        return problems

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        check_request(count, tokens)
        for index, problem in choose(self.problems, count, seed):
            others = [_solved(other) for other in self.problems if other is not problem]
            Random(f"{self.name}/{seed}/{index}").shuffle(others)

            def build(chosen: Sequence[str], problem: Mapping[str, Any] = problem) -> Prompt:
                return Prompt(
                    context="".join(chosen),
                    question=problem["prompt"],
                    answers=[problem["canonical_solution"]],
                    meta={"shots": len(chosen)},
                )

            recipe = pieces.recipe(build, others, str, tokenizer, tokens // 200)
            prompt, length = make(recipe, tokens, tokenizer, f"{self.name}, {problem['task_id']}")
            meta = {
                "chat": False,
                "tokens": length,
                "stop": list(STOP),
                "test": problem["test"],
                "entry_point": problem["entry_point"],
            }
            yield prompt.sample(f"{self.name}/{tokens}/{seed}/{problem['task_id']}", self.max_new_tokens, meta)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the program passes its tests in the sandbox, else 0. Cost: one process, at most `seconds`."""
        return float(run(self.program(prediction, sample), self.seconds).passed)

    def program(self, prediction: str, sample: Sample) -> str:
        """The problem, the completion up to where it leaves the function, and the call of the tests."""
        ends = [place for stop in STOP if (place := prediction.find(stop)) >= 0]
        completion = prediction[: min(ends)] if ends else prediction
        return f"{sample.question}{completion}\n\n{sample.meta['test']}\n\ncheck({sample.meta['entry_point']})\n"


def _solved(problem: Mapping[str, Any]) -> str:
    return f"{problem['prompt']}{problem['canonical_solution'].rstrip()}\n\n\n"


def tasks(data: Path) -> list[HumanEval]:
    """The one task, reading from data/humaneval."""
    return [HumanEval(data / "humaneval")]
