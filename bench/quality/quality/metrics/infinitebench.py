# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's metrics. Each takes one prediction and the right answers [answers]."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .overlap import answer_f1, rouge_lsum


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first run of digits is the right one, else 0 (passkey, number_string)."""
    number = re.search(r"[0-9]+", prediction)
    return float(number is not None and number[0] == answers[0])


def named_value(prediction: str, answers: Sequence[str]) -> float:
    """1 if the right value is one of the words, else 0 (kv_retrieval)."""
    return float(answers[0] in _words(prediction, "\n:\"'.,?!{}"))


def last_integer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last word is the right integer, else 0 (code_run)."""
    words = _words(prediction, "\n.`'\":")
    try:
        return float(bool(words) and int(words[-1]) == int(answers[0]))
    except ValueError:
        return 0.0


def first_value(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first number is the right one, else 0 (math_find)."""
    number = re.search(r"\d+\.\d+|\d+", prediction)
    return float(number is not None and float(number[0]) == float(answers[0]))


def leading_values(prediction: str, answers: Sequence[str]) -> float:
    """Share of the right sequence of numbers that the prediction gives before its first mistake (math_calc)."""
    right = 0
    for number, answer in zip(re.findall(r"[0-9]+", prediction), answers, strict=False):
        if int(number) != int(answer):
            break
        right += 1
    return right / len(answers)


def choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the right letter, or its text, is chosen, else 0 (longbook_choice); the answers are both.

    Looked at in this order: the first letter, the whole text, what stands behind "answer is" and the like, and the
    first word that is a letter of a choice.
    """
    text = prediction.strip()
    if text[:1] and text[0] in "ABCD":
        return float(text[0] in answers)
    if text in answers:
        return 1.0
    text = " ".join(_words(text, "\n\"'.,?!{}"))
    for mark in ("answer is:", "answer:", "answer is", "option is"):
        _, found, behind = text.partition(mark)
        if found:
            return float(behind[1:].startswith(tuple(answers)))
    letters = [word for word in text.split() if word in ("A", "B", "C", "D")]
    return float(bool(letters) and letters[0] in answers)


def code_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last letter that stands alone is the right choice's, or "answer is:" is followed by it or its text.

    The answers are the text and the letter (code_debug).
    """
    letters = re.findall(r"\b[A-J]\b", prediction)
    if letters and letters[-1] == answers[1]:
        return 1.0
    text = " ".join(_words(prediction, "\n`'\"-*"))
    for mark in ("answer is:", "is:", "answer:"):
        _, found, behind = text.partition(mark)
        if found:
            return float(behind[1:].startswith((answers[1], answers[0])))
    return 0.0


def speaker(prediction: str, answers: Sequence[str]) -> float:
    """1 if any of the right names stands in the prediction, letter case apart, else 0 (longdialogue_qa)."""
    return float(any(answer.upper() in prediction.upper() for answer in answers))


def best_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 over the right answers (longbook_qa)."""
    return max(answer_f1(prediction, answer) for answer in answers)


def summary(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-Lsum (longbook_sum)."""
    return rouge_lsum(prediction, answers[0])


def _words(text: str, separators: str) -> list[str]:
    return re.sub(f"[{re.escape(separators)}]", " ", text).split()
