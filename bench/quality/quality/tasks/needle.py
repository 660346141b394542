# SPDX-License-Identifier: Apache-2.0
"""Needle in a Haystack: one sentence at a chosen depth of a long text (depth x length, a heat map).

Two needles. `niah/number` hides a number that no model can guess, another one in each sample, so that a right answer
was read; `niah/sandwich` is the sentence that the test became known with (Kamradt, 2023), which always is the same one
and can be answered by guessing in part.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from random import Random

from ..metrics.overlap import normalised
from ..metrics.strings import match_all
from . import text
from .generated import GeneratedTask, Recipe, grid_depth
from .prompt import Prompt
from .task import Sample, Tokenizer


class Needle(GeneratedTask):
    """Samples go through the depths in turn, so that their number should be a multiple of `DEPTHS`.

    meta["depth"] is the depth asked for, in [0, 1]; each sample's text begins at another sentence.
    """

    max_new_tokens = 50

    def __init__(self, path: Path | None = None) -> None:
        """`path`: the text to hide the needle in, see `text.load`."""
        self.path = path

    @abstractmethod
    def needle(self, rng: Random) -> tuple[str, str, str]:
        """The sentence to hide, the question about it, and the answer."""

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        rng = self.random(seed, index, "needle")
        needle, question, answer = self.needle(rng)
        hay = text.load(self.path)
        share = grid_depth(index)
        start = rng.randrange(len(hay.sentences))

        def build(words: int) -> Prompt:
            taken = text.take_words(hay.sentences, words, start)
            taken.insert(_place(taken, share), needle)
            return Prompt(
                context=f"{_INSTRUCTION}\n\n{' '.join(taken)}",
                question=f"\n\n{question}",
                answers=[answer],
                meta={"depth": round(share, 4), "haystack": hay.name},
            )

        return Recipe(build, least=1, guess=tokens * 3 // 4)


_INSTRUCTION = "Read the text below. A question about it follows."


def _place(sentences: list[str], share: float) -> int:
    """The gap between sentences that has the wanted share of all characters before it, as nearly as there is one."""
    lengths = [len(sentence) + 1 for sentence in sentences]
    wanted, before, best, place = share * sum(lengths), 0, float("inf"), 0
    for gap in range(len(lengths) + 1):
        if abs(before - wanted) < best:
            best, place = abs(before - wanted), gap
        before += lengths[gap] if gap < len(lengths) else 0
    return place


class NumberNeedle(Needle):
    """A seven-digit number that belongs to a city."""

    name = "niah/number"
    metric = "string match (all)"

    CITIES = ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Quito", "Dublin", "Jakarta", "Tunis", "Havana", "Vienna")

    def needle(self, rng: Random) -> tuple[str, str, str]:
        city = rng.choice(self.CITIES)
        number = str(rng.randint(1_000_000, 9_999_999))
        return (
            f"The secret number of {city} is {number}.",
            f"What is the secret number of {city}? Answer with the number only.",
            number,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return match_all(prediction, sample.answers)


class SandwichNeedle(Needle):
    """The sentence about San Francisco; scored by the share of the answer's words that the prediction has."""

    name = "niah/sandwich"
    metric = "word recall"

    ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."

    def needle(self, rng: Random) -> tuple[str, str, str]:
        return (
            f"The best thing to do in San Francisco is {self.ANSWER}",
            "What is the best thing to do in San Francisco?",
            self.ANSWER,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        wanted = set(normalised(sample.answers[0]).split())
        return len(wanted & set(normalised(prediction).split())) / len(wanted)


def tasks(data: Path) -> list[Needle]:
    """Both, hiding the needle in data/niah/text.txt or text.json where there is one."""
    path = next((path for name in ("text.txt", "text.json") if (path := data / "niah" / name).is_file()), None)
    return [NumberNeedle(path), SandwichNeedle(path)]
