# SPDX-License-Identifier: Apache-2.0
"""The search for the amount of filling."""

from __future__ import annotations

from random import Random

import pytest
from quality.tasks import pieces as large
from quality.tasks.fit import SLACK, fill
from quality.tasks.generated import make
from quality.tasks.prompt import Prompt


@pytest.mark.parametrize("per_piece", [1, 3, 7])
@pytest.mark.parametrize("guess", [None, 0, 1, 10, 100_000])
@pytest.mark.parametrize("tokens", [40, 41, 500, 131_072])
def test_as_much_as_fits(per_piece, guess, tokens):
    built = []

    def build(number):
        built.append(number)
        return number

    number, prompt, length = fill(build, lambda n: 20 + per_piece * n, tokens, least=0, guess=guess)
    assert prompt == number
    assert length == 20 + per_piece * number <= tokens
    assert length + per_piece > tokens or tokens - length <= SLACK * tokens
    assert len(built) <= 20


def test_never_longer_where_pieces_vary():
    lengths = [1, 9, 2, 40, 1, 1, 3, 80, 2, 2] * 20
    for tokens in range(10, 900, 37):
        number, _, length = fill(lambda n: n, lambda n: sum(lengths[:n]), tokens, least=0, most=len(lengths), guess=5)
        assert length == sum(lengths[:number]) <= tokens
        assert number == len(lengths) or length + lengths[number] > tokens or tokens - length <= SLACK * tokens


def test_all_there_is():
    assert fill(lambda n: n, lambda n: 2 * n, 1000, least=1, most=30) == (30, 30, 60)


def test_too_long_already():
    with pytest.raises(ValueError, match="has 50 tokens, 49 were asked for"):
        fill(lambda n: n, lambda n: 50 + n, 49, least=0)


@pytest.mark.parametrize("tokens", [400, 701, 1500])
def test_large_pieces(tokens, pieces):
    """Pieces of 60 to 140 tokens fill a prompt to the last few, with one chosen by its length."""
    rng = Random(tokens)
    filling = ["a" + " b" * rng.randint(60, 140) + "\n" for _ in range(40)]
    filling = list(dict.fromkeys(filling))
    recipe = large.recipe(lambda chosen: Prompt("".join(chosen), "", []), filling, str, pieces, guess=3)
    prompt, length = make(recipe, tokens, pieces, "here")
    assert length == len(pieces.encode(prompt.text))
    assert tokens - 8 < length <= tokens
    used = prompt.text.splitlines(keepends=True)
    assert len(set(used)) == len(used)
    assert set(used) <= set(filling)
    assert len(set(used) - set(filling[: len(used)])) <= 1  # one is not taken in order
