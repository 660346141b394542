# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest
from quality.metrics import code, infinitebench, likelihood, longbench, overlap, strings


def test_string_match():
    assert strings.match_all("It is 12345 and ABCDE", ["12345", "abcde", "7"]) == pytest.approx(2 / 3)
    assert strings.match_part("It is 12345", ["7", "12345"]) == 1
    assert strings.match_part("It is 12345", ["7"]) == 0
    assert strings.match_all("a\x00b", ["a\nb"]) == 1  # control characters count as line ends


def test_normal_form():
    assert overlap.normalised(' The  "Grey" Hare, an Inn.\n') == "grey hare inn"
    assert overlap.normalised("theatre a-b") == "theatre ab"  # an article only as a word; a hyphen joins


def test_answer_f1():
    # 2 of 3 words are right, 2 of 2 are found: 2 * 2 / (3 + 2).
    assert overlap.answer_f1("The Grey Hare inn", "grey hare") == pytest.approx(0.8)
    assert overlap.answer_f1("hare hare", "hare") == pytest.approx(2 / 3)  # a repeated word is found once
    assert overlap.answer_f1("lantern", "hare") == 0
    assert overlap.answer_f1("", "hare") == 0


def test_rouge():
    prediction, truth = "the cat sat on the mat", "the cat is on a mat"
    # The common subsequence is "the cat on mat". As sets of words 4 of 5 and 4 of 6, as lists 4 of 6 both times.
    assert overlap.rouge_l(prediction, truth) == pytest.approx(2 * 0.8 * (4 / 6) / (0.8 + 4 / 6), abs=1e-6)
    assert overlap.rouge_lsum(prediction, truth) == pytest.approx(4 / 6)
    assert overlap.rouge_l("", truth) == 0
    assert overlap.rouge_l("...", truth) == 0
    # Two sentences in another order: each is found whole, by LongBench's measure by sentence.
    assert overlap.rouge_l("it froze. we went home.", "we went home. it froze.") == pytest.approx(1, abs=1e-6)


def test_counts():
    assert longbench.count_score("There are 4, or 5, or 4.", "4") == pytest.approx(2 / 3)
    assert longbench.count_score("four", "4") == 0
    assert longbench.count_score("14", "4") == 0
    assert longbench.retrieval_score("Paragraph 6", "Paragraph 6") == 1
    assert longbench.retrieval_score("Paragraph 6 or 7", "Paragraph 6") == 0.5
    with pytest.raises(ValueError, match="Paragraph N"):
        longbench.retrieval_score("6", "six")


def test_classification():
    classes = ["Number", "Number of something", "Place", "Person"]
    assert longbench.classification_score("Place", "Place", classes) == 1
    assert longbench.classification_score("Place or Person", "Place", classes) == 0.5
    # "Number" stands in the longer name, and is not a second answer.
    assert longbench.classification_score("Number of something", "Number of something", classes) == 1
    # The other way round it is: who writes the longer name has given two.
    assert longbench.classification_score("Number of something", "Number", classes) == 0.5
    assert longbench.classification_score("a thing", "Place", classes) == 0


def test_code_similarity():
    # One insertion in 8 + 9 characters: 1 - 1 / 17 = 0.941.
    assert longbench.code_similarity("\n```python\n# so\nreturn a\nreturn b", "return ab") == 0.94
    assert longbench.code_similarity("// only a comment", "return a") == 0
    assert longbench.code_similarity("return a", "return a") == 1


def test_infinitebench():
    assert infinitebench.first_number(" 71432, or 5", ["71432"]) == 1
    assert infinitebench.first_number("5 or 71432", ["71432"]) == 0
    assert infinitebench.first_number("none", ["71432"]) == 0
    assert infinitebench.named_value('"ab-1".', ["ab-1"]) == 1
    assert infinitebench.named_value("xab-1", ["ab-1"]) == 0
    assert infinitebench.last_integer("It returns -14.", ["-14"]) == 1
    assert infinitebench.last_integer("14 at last", ["14"]) == 0
    assert infinitebench.last_integer("", ["14"]) == 0
    assert infinitebench.first_value("7.50 of 9", ["7.5"]) == 1
    assert infinitebench.first_value("no number", ["7"]) == 0
    assert infinitebench.leading_values("[12, 42, 9, 40]", ["12", "42", "35", "40"]) == 0.5
    assert infinitebench.leading_values("[12]", ["12", "42", "35", "40"]) == 0.25
    assert infinitebench.speaker("I think Ines.", ["INES"]) == 1
    assert infinitebench.speaker("Tam", ["INES"]) == 0


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("B", 1),
        ("B. Bishop", 1),
        ("A. Petrel", 0),
        ("Bishop", 1),
        ("The answer is: B", 1),
        ("The correct answer is Bishop.", 1),
        ("The answer is: C", 0),
        ("I say B", 1),
        ("I say C and B", 0),
        ("", 0),
        ("the answer is", 0),
    ],
)
def test_choice(prediction, score):
    assert infinitebench.choice(prediction, ["Bishop", "B"]) == score


@pytest.mark.parametrize(
    ("prediction", "score"), [("C.", 1), ("B. C", 1), ("C or B", 0), ("the answer is: first", 1), ("first", 0)]
)
def test_code_choice(prediction, score):
    assert infinitebench.code_choice(prediction, ["first", "C"]) == score


def test_pass_at_k():
    assert code.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    # Of the 10 pairs of 5 programs 3 have none of the 2 that pass.
    assert code.pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert code.pass_at_k(5, 4, 2) == 1
    with pytest.raises(ValueError, match="of 2 programs 3 passed"):
        code.pass_at_k(2, 3, 1)


def test_likelihoods():
    choices = [" no", " a much longer answer"]
    assert likelihood.likeliest([-3.0, -4.0], 1) == 0
    # 3 / 2 bytes is more than 4 / 20.
    assert likelihood.likeliest_by_byte([-3.0, -4.0], 1, choices) == 1
    assert likelihood.likeliest_by_byte([-0.1, -4.0], 1, choices) == 0
    assert likelihood.perplexity([-2.0, -4.0], [1, 2]) == pytest.approx(math.exp(2))
    with pytest.raises(ValueError, match="1 log-likelihoods for 2"):
        likelihood.perplexity([-1.0], [1, 2])
