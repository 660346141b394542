# SPDX-License-Identifier: Apache-2.0
"""Needle in a Haystack: the needle is where it should be, and there is one."""

from __future__ import annotations

import pytest
from quality import tasks
from quality.tasks.generated import DEPTHS
from quality.tasks.needle import NumberNeedle


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_depths(tokens, pieces):
    task = tasks.by_name("niah/number")
    samples = list(task.samples(2 * DEPTHS, tokens, pieces, 1))
    for index, sample in enumerate(samples):
        wanted = (index % DEPTHS) / (DEPTHS - 1)
        assert sample.meta["depth"] == pytest.approx(wanted, abs=1e-4)
        needle = f"is {sample.answers[0]}."
        assert sample.context.count(needle) == 1
        text = sample.context.partition("\n\n")[2]
        start = text.index(f"The secret number of {sample.question.split(' of ')[1].split('?')[0]} is")
        length = len(text) - text.index(needle, start) - len(needle) + start
        # Between sentences, of which the longest in this text has some six hundred letters.
        assert start / length == pytest.approx(wanted, abs=400 / length)
    assert len({sample.answers[0] for sample in samples}) == len(samples)
    assert samples[0].context.partition("\n\n")[2] != samples[DEPTHS].context.partition("\n\n")[2]


def test_own_text(tmp_path, pieces):
    (tmp_path / "niah").mkdir()
    (tmp_path / "niah" / "text.txt").write_text("One line. Another line.\nA third line. ")
    sample = next(tasks.by_name("niah/sandwich", tmp_path).samples(1, 300, pieces, 1))
    assert sample.meta["haystack"].startswith("text-")
    assert sample.context.count("A third line.") > 10
    (tmp_path / "niah" / "text.txt").write_text("  \n")
    with pytest.raises(tasks.DataFileError, match="is empty"):
        next(tasks.by_name("niah/sandwich", tmp_path).samples(1, 300, pieces, 1))
    with pytest.raises(tasks.DataFileError, match=r"nothing\.txt is missing"):
        next(NumberNeedle(tmp_path / "nothing.txt").samples(1, 300, pieces, 1))


def test_scores(pieces):
    task = tasks.by_name("niah/number")
    sample = next(task.samples(1, 500, pieces, 1))
    assert task.score(f"It is {sample.answers[0]}.", sample) == 1
    assert task.score(f"It is {sample.answers[0][:-1]}", sample) == 0
    task = tasks.by_name("niah/sandwich")
    sample = next(task.samples(1, 500, pieces, 1))
    assert task.score("Sit in Dolores Park and eat a sandwich on a sunny day!", sample) == 1
    # 5 of the answer's 10 words: an article is none.
    assert task.score("in the park, on a day: dolores", sample) == pytest.approx(0.5)
    assert task.score("", sample) == 0
