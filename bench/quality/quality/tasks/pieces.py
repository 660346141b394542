# SPDX-License-Identifier: Apache-2.0
"""Prompts that are filled with large pieces: solved examples, documents."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

from .generated import Recipe
from .prompt import Prompt
from .task import Tokenizer, count_tokens

T = TypeVar("T")

CANDIDATES = 300  # pieces that are looked at for the one that fits best


def recipe(
    build: Callable[[Sequence[T]], Prompt],
    filling: Sequence[T],
    text: Callable[[T], str],
    tokenizer: Tokenizer,
    guess: int,
) -> Recipe:
    """The recipe of `build(chosen)`, which makes a prompt with the chosen ones of the pieces of filling.

    They are taken in order, but one of them is chosen by its length, since the gap that whole pieces leave is longer
    than a prompt's length may be off. `text(piece)` is what a piece adds to the prompt.
    """

    def length(piece: T) -> int:
        return count_tokens(tokenizer, text(piece))

    def top_up(number: int, gap: int) -> Prompt:
        spare = sorted(((length(piece), at) for at, piece in enumerate(filling[number : number + CANDIDATES], number)))
        lengths = [tokens for tokens, _ in spare]
        # The best piece to add at the end, or to put into the place of another.
        gain, place, best = 0, number, number
        for at in [number, *range(max(number - CANDIDATES, 0), number)]:
            freed = length(filling[at]) if at < number else 0
            fitting = bisect_right(lengths, gap + freed) - 1
            if fitting >= 0 and lengths[fitting] - freed > gain:
                gain, place, best = lengths[fitting] - freed, at, spare[fitting][1]
        chosen = list(filling[:number])
        if gain > 0:
            chosen[place : place + 1] = [filling[best]]
        return build(chosen)

    return Recipe(lambda number: build(filling[:number]), most=len(filling), guess=guess, top_up=top_up)
