# SPDX-License-Identifier: Apache-2.0
"""RULER's two counting tasks: the most common words of a list, and the most frequent coded words of a text."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from random import Random

from ...metrics.strings import match_all
from .. import words
from ..generated import GeneratedTask, Recipe
from ..prompt import Prompt
from ..task import Sample, Tokenizer

COMMON = 10  # words to be found
SHORT = 4096  # tokens: shorter prompts repeat each word fewer times


class CommonWords(GeneratedTask):
    """A numbered list in which ten words stand thirty times and all others three times, behind a solved example."""

    name = "ruler/cwe"
    metric = "string match (all)"
    max_new_tokens = 120

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        often, seldom = (6, 1) if tokens < SHORT else (30, 3)
        example_words, example_often, example_seldom = (20, 3, 1) if tokens < SHORT else (40, 10, 3)
        rng = self.random(seed, index, "example")
        example, found = _word_list(rng.sample(words.words(), example_words), example_often, example_seldom, rng)
        prefix = f"Answer: The top {COMMON} words that appear most often in the list are:"
        solved = f"{_LIST_TASK}{example}{_LIST_QUESTION} {prefix} {_numbered(found)}\n"
        shuffled = list(words.words())
        self.random(seed, index, "words").shuffle(shuffled)

        def build(number: int) -> Prompt:
            text, common = _word_list(shuffled[:number], often, seldom, self.random(seed, index, "order"))
            return Prompt(f"{solved}{_LIST_TASK}{text}", _LIST_QUESTION, common, prefix)

        return Recipe(build, least=COMMON, most=len(shuffled), guess=max(tokens - 60 * often, 60) // (8 * seldom))

    def score(self, prediction: str, sample: Sample) -> float:
        return match_all(prediction, sample.answers)


_LIST_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_LIST_QUESTION = f"\nQuestion: What are the {COMMON} most common words in the above list?"


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def _word_list(chosen: Sequence[str], often: int, seldom: int, rng: Random) -> tuple[str, list[str]]:
    """The list made of the chosen words, the first ten of them the common ones, and these ten."""
    common = list(chosen[:COMMON])
    listed = common * often + list(chosen[COMMON:]) * seldom
    rng.shuffle(listed)
    return _numbered(listed), common


class FrequentWords(GeneratedTask):
    """Coded words whose frequencies fall as 1 / rank^2; the first rank is dots, the next three are asked for."""

    name = "ruler/fwe"
    metric = "string match (all)"
    max_new_tokens = 50

    LETTERS = 6
    ZETA_OF_2 = math.pi**2 / 6  # the sum of all frequencies

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        rng = self.random(seed, index, "vocabulary")
        vocabulary = ["..."]
        while len(vocabulary) < max(tokens // 50, 4):
            word = "".join(rng.choices(string.ascii_lowercase, k=self.LETTERS))
            if word not in vocabulary[:4]:
                vocabulary.append(word)

        def build(number: int) -> Prompt:
            listed: list[str] = []
            for rank, word in enumerate(vocabulary, 1):
                listed += [word] * int(number / (rank**2 * self.ZETA_OF_2))
            self.random(seed, index, "order").shuffle(listed)
            return Prompt(
                context="Read the following coded text and track the frequency of each coded word. "
                f"Find the three most frequently appeared coded words. {' '.join(listed)}",
                question="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
                "What are the three most frequently appeared words in the above coded text?",
                answer_prefix="Answer: According to the coded text above, "
                "the three most frequently appeared words are:",
                answers=vocabulary[1:4],
            )

        # From here on the fourth rank, and with it all three answers, stand apart in their counts.
        least = math.ceil(16 * self.ZETA_OF_2 * 3)
        return Recipe(build, least=least, guess=tokens // 2)

    def score(self, prediction: str, sample: Sample) -> float:
        return match_all(prediction, sample.answers)
