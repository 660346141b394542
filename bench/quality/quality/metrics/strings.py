# SPDX-License-Identifier: Apache-2.0
"""RULER's string matching."""

from __future__ import annotations

import re
from collections.abc import Sequence


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the prediction, letter case apart."""
    text = _printable(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the answers stands in the prediction, letter case apart, else 0."""
    text = _printable(prediction)
    return float(any(answer.lower() in text for answer in answers))


def _printable(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()
