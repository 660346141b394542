# SPDX-License-Identifier: Apache-2.0
"""Finds how much filling makes a prompt as long as was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

P = TypeVar("P")

SLACK = 0.005  # a prompt this near to the length asked for is near enough: the search may stop


def fill(
    build: Callable[[int], P],
    length: Callable[[P], int],
    tokens: int,
    *,
    least: int,
    most: int | None = None,
    guess: int | None = None,
) -> tuple[int, P, int]:
    """How many pieces of filling fit into a prompt of `tokens` tokens, that prompt, and its length [tokens].

    `build(n)` makes the prompt with n pieces of filling, n in [least, most], the same one for the same n; its length
    should grow by about as much with each piece. The prompt that is returned always fits, and is the longest that
    does or within `SLACK` of the length asked for. Cost: some three to eight prompts built and tokenised. Raises
    ValueError where the least filling is too long already.
    """
    best = build(least)
    low, low_length = least, length(best)
    if low_length > tokens:
        raise ValueError(f"the shortest prompt of this kind has {low_length} tokens, {tokens} were asked for")
    base, base_length = low, low_length
    high = None if most is None else most + 1
    high_length: int | None = None
    pieces = guess if guess is not None else least + 8
    for step in range(64):
        if tokens - low_length <= SLACK * tokens or (high is not None and high - low <= 1):
            break
        pieces = max(pieces, low + 1) if high is None else min(max(pieces, low + 1), high - 1)
        prompt = build(pieces)
        measured = length(prompt)
        if measured <= tokens:
            best, low, low_length = prompt, pieces, measured
        else:
            high, high_length = pieces, measured
        # Between two measured ends the length is nearly a line; halving every other time makes both ends close in.
        if high is None or high_length is None:
            rate = (low_length - base_length) / max(low - base, 1)
            pieces = low + (int((tokens - low_length) / rate) if rate > 0 else low - base + 8)
        elif step % 2:
            pieces = (low + high) // 2
        else:
            pieces = low + round((tokens - low_length) / max(high_length - low_length, 1) * (high - low))
    return low, best, low_length
