# SPDX-License-Identifier: Apache-2.0
"""Scores made of the log-likelihoods of continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence


def likeliest(log_likelihoods: Sequence[float], answer: int) -> float:
    """1 if the right continuation is the likeliest, else 0; the first of equal ones counts as chosen."""
    return float(max(range(len(log_likelihoods)), key=lambda index: log_likelihoods[index]) == answer)


def likeliest_by_byte(log_likelihoods: Sequence[float], answer: int, choices: Sequence[str]) -> float:
    """The same, each log-likelihood divided by the length of its continuation in UTF-8 bytes, outer spaces apart.

    Without that a long right answer loses to a short wrong one.
    """
    lengths = [max(len(choice.strip().encode()), 1) for choice in choices]
    return likeliest([value / length for value, length in zip(log_likelihoods, lengths, strict=True)], answer)


def perplexity(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of a token over all pieces of text [pieces]."""
    if not tokens or len(tokens) != len(log_likelihoods):
        raise ValueError(f"{len(log_likelihoods)} log-likelihoods for {len(tokens)} pieces of text")
    return math.exp(-sum(log_likelihoods) / sum(tokens))
