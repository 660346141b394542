# SPDX-License-Identifier: Apache-2.0
"""What tasks whose prompts are generated have in common: random numbers, length, and the sample made of a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from .fit import fill
from .prompt import Prompt
from .task import Sample, Tokenizer, check_request, count_tokens

DEPTHS = 11  # of things that are hidden at a chosen depth: the beginning, every tenth of the text, and the end
TOLERANCE = 0.02  # how much shorter than asked for a prompt may be where there is more to fill it with
MARGINS = (0, 3, 8)  # tokens


@dataclass(frozen=True)
class Recipe:
    """How to make one sample's prompt of any length: `build(n)` uses n pieces of filling, least <= n <= most.

    Where the pieces are large, `top_up(n, gap)` may give a prompt of n pieces and something of at most `gap` tokens.
    """

    build: Callable[[int], Prompt]
    least: int = 0
    most: int | None = None
    guess: int | None = None
    top_up: Callable[[int, int], Prompt] | None = None


class GeneratedTask(ABC):
    """A task that makes its samples itself."""

    name: str
    metric: str
    max_new_tokens: int
    meta: Mapping[str, Any] = {}

    @abstractmethod
    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        """The recipe of sample `index`, which is the same one however many samples are asked for."""

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """How right the prediction is, in [0, 1]."""

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        check_request(count, tokens)
        for index in range(count):
            prompt, length = make(self.recipe(index, tokens, tokenizer, seed), tokens, tokenizer, self.name)
            name = f"{self.name}/{tokens}/{seed}/{index}"
            yield prompt.sample(name, self.max_new_tokens, {**self.meta, "tokens": length})

    def random(self, seed: int, index: int, what: str) -> Random:
        """Random numbers that depend on the arguments and the task's name alone, not on the order of calls."""
        return Random(f"{self.name}/{seed}/{index}/{what}")


def make(recipe: Recipe, tokens: int, tokenizer: Tokenizer, where: str) -> tuple[Prompt, int]:
    """The prompt of a recipe that has as nearly as possible the length asked for, and its length [tokens].

    Raises ValueError where the recipe's shortest prompt is too long, or its longest too short by more than `TOLERANCE`;
    `where` says whose recipe it is.
    """

    def length(made: Prompt) -> int:
        return count_tokens(tokenizer, made.text)

    try:
        pieces, prompt, reached = fill(
            recipe.build, length, tokens, least=recipe.least, most=recipe.most, guess=recipe.guess
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if recipe.top_up is not None:
        # A piece may have a few tokens more in its place than by itself.
        for margin in MARGINS:
            topped = recipe.top_up(pieces, tokens - reached - margin)
            if reached < (topped_length := length(topped)) <= tokens:
                prompt, reached = topped, topped_length
                break
    if recipe.most is not None and pieces >= recipe.most and reached < (1 - TOLERANCE) * tokens:
        raise ValueError(f"{where}: all there is to fill a prompt with makes {reached} tokens, {tokens} were asked for")
    return prompt, reached


def grid_depth(index: int) -> float:
    """The depth at which sample `index` hides something, in [0, 1]: the samples go through `DEPTHS` of them in turn."""
    return index % DEPTHS / (DEPTHS - 1)


def depth(context: str, piece: str) -> float:
    """Where in the context a piece of it begins, as a share of its characters."""
    return context.index(piece) / len(context)
