# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: which variables have a value, through a chain of assignments hidden in noise."""

from __future__ import annotations

import string
from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import Any

from ...metrics.strings import match_all
from ..fit import fill
from ..generated import GeneratedTask, Recipe
from ..prompt import Prompt
from ..task import Sample, Tokenizer, count_tokens
from . import noise

CHAINS = 1
HOPS = 4
EXAMPLE_TOKENS = 470  # of the solved example, which has shorter names


class VariableTracking(GeneratedTask):
    """Noise with one chain of five variables in it, behind a solved example of the same kind."""

    name = "ruler/vt"
    metric = "string match (all)"
    max_new_tokens = 30
    meta: Mapping[str, Any] = {"haystack": "noise"}

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        # One example for all samples, as in the benchmark.
        _, solved, _ = fill(
            lambda pieces: _prompt("", 3, pieces, self.random(seed, 0, "example")),
            lambda made: count_tokens(tokenizer, made.text),
            EXAMPLE_TOKENS,
            least=_LEAST,
            guess=90,
        )
        example = f"{solved.text} {' '.join(solved.answers)}\n\n"
        return Recipe(
            lambda pieces: _prompt(example, 5, pieces, self.random(seed, index, "chain")),
            least=_LEAST,
            guess=tokens // 5,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return match_all(prediction, sample.answers)


_LEAST = len(noise.SENTENCES) * (HOPS + 1)  # a line of noise for each assignment


def _prompt(example: str, letters: int, sentences: int, rng: Random) -> Prompt:
    names: list[str] = []
    while len(names) < CHAINS * (HOPS + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    lines = [f"{line}\n" for line in noise.lines(sentences)]
    values: list[int] = []
    for first in range(0, len(names), HOPS + 1):
        chain = names[first : first + HOPS + 1]
        values.append(rng.randint(10000, 99999))
        assignments = [f"VAR {chain[0]} = {values[-1]}"]
        assignments += [f"VAR {new} = VAR {old}" for old, new in pairwise(chain)]
        # In order, each at a place of its own.
        places = sorted(rng.sample(range(len(lines)), len(assignments)))
        for offset, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
            lines.insert(place + offset, assignment)
    haystack = " ".join(lines)
    return Prompt(
        context=f"{example}Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{haystack}",
        question=f"Question: Find all variables that are assigned the value {values[0]} in the text above.",
        answer_prefix="Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {values[0]}, they are:",
        answers=names[: HOPS + 1],
    )
