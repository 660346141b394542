# SPDX-License-Identifier: Apache-2.0
"""Word overlap: the F1 of SQuAD, and ROUGE by the two packages that the benchmarks' own code uses.

LongBench takes the F of ROUGE-L from the package `rouge`, InfiniteBench ROUGE-Lsum from `rouge-score`. The two
differ (the first compares sets of words, sentence by sentence at full stops, and does not stem), so that a figure is
only comparable with published ones if it comes from the same package.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Small letters, no ASCII punctuation, no English articles, single spaces: SQuAD's normal form."""
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def f1(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two bags of words; 0 where they share none."""
    shared = (Counter(prediction) & Counter(truth)).total()
    return 2 * shared / (len(prediction) + len(truth)) if shared else 0.0


def answer_f1(prediction: str, truth: str) -> float:
    """F1 of the words of two answers in normal form."""
    return f1(normalised(prediction).split(), normalised(truth).split())


def rouge_l(prediction: str, truth: str) -> float:
    """F of ROUGE-L as LongBench counts it; 0 where either text is empty.

    The package recurses once a word, and LongBench counts a text too long for that as 0, which is kept here.
    """
    try:
        return float(_rouge().get_scores([prediction], [truth], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_lsum(prediction: str, truth: str) -> float:
    """F of ROUGE-Lsum as InfiniteBench counts it, without stemming; sentences end at line ends."""
    return float(_rouge_scorer().score(truth, prediction)["rougeLsum"].fmeasure)


@cache
def _rouge():
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"], stats=["f"])


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"])
