# SPDX-License-Identifier: Apache-2.0
"""LongBench's metrics apart from F1 and ROUGE. Each takes one prediction and one right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz import fuzz


def count_score(prediction: str, truth: str) -> float:
    """Share of the numbers in the prediction that are the right one; 0 where it has none."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, truth: str) -> float:
    """The same for a paragraph's number, which the right answer gives as "Paragraph N"."""
    number = re.search(r"Paragraph (\d+)", truth)
    if number is None:
        raise ValueError(f'the right answer should say "Paragraph N", it says {truth!r}')
    return count_score(prediction, number[1])


def classification_score(prediction: str, truth: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the prediction names, if the right one is among them, else 0.

    A class whose name is a part of the right one's is not counted: who writes the longer name writes the shorter.
    """
    named = [name for name in classes if name in prediction and (name == truth or name not in truth)]
    return 1 / len(named) if truth in named else 0.0


def code_similarity(prediction: str, truth: str) -> float:
    """Similarity, in whole percent, of the right line and the first predicted one that is code, not comment or fence.

    The ratio is 1 - (insertions + deletions) / both lengths, which is what the benchmark's matcher gives when it has
    its fast back end.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, truth)) / 100
