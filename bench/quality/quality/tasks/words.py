# SPDX-License-Identifier: Apache-2.0
"""The word lists that RULER draws its keys and its lists of words from: those of the package wonderwords."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from random import Random


def draw_key(rng: Random) -> str:
    """A pair adjective-noun."""
    return f"{rng.choice(_list('adjective'))}-{rng.choice(_list('noun'))}"


@cache
def words() -> tuple[str, ...]:
    """All nouns, adjectives and verbs [some eight thousand], in alphabetical order."""
    return tuple(sorted({*_list("noun"), *_list("adjective"), *_list("verb")}))


@cache
def _list(kind: str) -> tuple[str, ...]:
    try:
        text = (files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("RULER's word lists are those of the package wonderwords: install it") from error
    return tuple(sorted(set(text.split())))
