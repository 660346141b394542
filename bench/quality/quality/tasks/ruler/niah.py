# SPDX-License-Identifier: Apache-2.0
"""RULER's eight needle tasks: find the values that belong to a key, among filling and other keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from uuid import UUID

from ...metrics.strings import match_all
from .. import text, words
from ..generated import GeneratedTask, Recipe, depth
from ..prompt import Prompt
from ..task import Sample, Tokenizer
from . import noise

DEPTHS = [round(100 * step / 39) for step in range(40)]  # in percent of an essay's sentences


@dataclass(frozen=True)
class Parameters:
    """What a needle task hides where: the columns of RULER's synthetic.yaml."""

    haystack: str  # "noise", "essay" or "needle": other needles
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH_TASKS = {
    "niah_single_1": Parameters("noise"),
    "niah_single_2": Parameters("essay"),
    "niah_single_3": Parameters("essay", value="uuids"),
    "niah_multikey_1": Parameters("essay", keys=4),
    "niah_multikey_2": Parameters("needle"),
    "niah_multikey_3": Parameters("needle", key="uuids", value="uuids"),
    "niah_multivalue": Parameters("essay", values=4),
    "niah_multiquery": Parameters("essay", queries=4),
}

_DRAW: dict[str, Callable[[Random], str]] = {
    "words": words.draw_key,
    "numbers": lambda rng: str(rng.randint(1_000_000, 9_999_999)),
    "uuids": lambda rng: str(UUID(int=rng.getrandbits(128), version=4)),
}


class Niah(GeneratedTask):
    """One needle task; the essays are folder/PaulGrahamEssays.json where it exists, else the text that `text` gives."""

    metric = "string match (all)"
    max_new_tokens = 128

    def __init__(self, name: str, parameters: Parameters, folder: Path) -> None:
        self.name = f"ruler/{name}"
        self.parameters = parameters
        self.essays = folder / "PaulGrahamEssays.json"

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        needles = _Needles(self.parameters, self.random(seed, index, "needles"))
        places = f"places of {self.parameters.haystack}"
        if self.parameters.haystack == "essay":
            essay = text.load(self.essays if self.essays.is_file() else None)

            def build(pieces: int) -> Prompt:
                filled = _essay(essay.sentences, pieces, needles.lines, self.random(seed, index, places))
                return needles.prompt(filled, essay.name)

            return Recipe(build, least=1, guess=tokens * 3 // 4)
        if self.parameters.haystack == "noise":
            filling: Callable[[int], list[str]] = noise.lines
            per_piece = 5
        else:
            filling = _Distractors(needles, self.random(seed, index, "distractors")).first
            per_piece = 30 if self.parameters.key == "words" else 80

        def build_lines(pieces: int) -> Prompt:
            lines = filling(pieces)
            rng = self.random(seed, index, places)
            for place, needle in zip(
                sorted(rng.sample(range(len(lines)), len(needles.lines)), reverse=True), needles.lines, strict=True
            ):
                lines.insert(place, needle)
            return needles.prompt("\n".join(lines), self.parameters.haystack)

        # Each needle has a place of its own, so there are at least as many lines; noise has five pieces to a line.
        least = len(needles.lines) * (len(noise.SENTENCES) if self.parameters.haystack == "noise" else 1)
        return Recipe(build_lines, least=least, guess=tokens // per_piece)

    def score(self, prediction: str, sample: Sample) -> float:
        return match_all(prediction, sample.answers)


class _Needles:
    """The keys of one sample, the values of each, and the sentences that say so."""

    def __init__(self, parameters: Parameters, rng: Random) -> None:
        self.parameters = parameters
        wanted = max(parameters.keys, parameters.queries)
        self.values: dict[str, list[str]] = {}
        while len(self.values) < wanted:
            key = _DRAW[parameters.key](rng)
            self.values.setdefault(key, [_DRAW[parameters.value](rng) for _ in range(parameters.values)])
        self.lines = [self.line(key, value) for key, values in self.values.items() for value in values]
        rng.shuffle(self.lines)
        self.queries = rng.sample(list(self.values), parameters.queries)

    def line(self, key: str, value: str) -> str:
        return f"One of the special magic {self.parameters.value} for {key} is: {value}."

    def prompt(self, haystack: str, name: str) -> Prompt:
        """The prompt about a haystack that has the needles in it."""
        query = self.queries[0]
        if len(self.queries) > 1:
            query = f"{', '.join(self.queries[:-1])}, and {self.queries[-1]}"
        answers = [value for key in self.queries for value in self.values[key]]
        if len(answers) == 1:
            kind = self.parameters.value[:-1]
            start, ask, be = f"A special magic {kind} is", "What is the", "is"
        else:
            kind = self.parameters.value
            start, ask, be = f"Some special magic {kind} are", "What are all the", "are"
        context = (
            f"{start} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{haystack}"
        )
        return Prompt(
            context=context,
            question=f"\n{ask} special magic {kind} for {query} mentioned in the provided text?",
            answer_prefix=f"The special magic {kind} for {query} mentioned in the provided text {be}",
            answers=answers,
            meta={
                "haystack": name,
                "depth": depth(context, self.line(self.queries[0], answers[0])),
            },
        )


class _Distractors:
    """Needles nobody asks for, as many as are wanted, the first n always the same."""

    def __init__(self, needles: _Needles, rng: Random) -> None:
        self.needles = needles
        self.rng = rng
        self.lines: list[str] = []

    def first(self, number: int) -> list[str]:
        kinds = self.needles.parameters
        while len(self.lines) < number:
            key = _DRAW[kinds.key](self.rng)
            if key not in self.needles.values:
                self.lines.append(self.needles.line(key, _DRAW[kinds.value](self.rng)))
        return self.lines[:number]


def _essay(sentences: tuple[str, ...], number: int, needles: list[str], rng: Random) -> str:
    """The first `number` words of an essay, begun again where it ends, with the needles between its sentences."""
    taken = text.take_words(sentences, number)
    places = sorted(int(len(taken) * share / 100) for share in rng.sample(DEPTHS, len(needles)))
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        taken.insert(place, needle)
    return " ".join(taken)
