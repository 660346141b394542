# SPDX-License-Identifier: Apache-2.0
"""RULER's prompts: their wording, and that their answers are what a careful reader finds in them."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from quality import tasks
from quality.tasks.ruler.niah import NIAH_TASKS

TOKENS = 2048
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


def samples(name, tokenizer, count=5, tokens=TOKENS, seed=1):
    return list(tasks.by_name(f"ruler/{name}").samples(count, tokens, tokenizer, seed))


@pytest.mark.parametrize("name", NIAH_TASKS)
def test_needles(name, pieces):
    parameters = NIAH_TASKS[name]
    asked_keys = parameters.queries
    for sample in samples(name, pieces):
        hidden: dict[str, list[str]] = {}
        for kind, key, value in NEEDLE.findall(sample.context):
            assert kind == parameters.value
            hidden.setdefault(key, []).append(value)
        keys = re.search(r"for (.*) mentioned", sample.question)[1].replace(" and ", " ").replace(",", "").split()
        assert len(keys) == asked_keys
        assert Counter(sample.answers) == Counter(value for key in keys for value in hidden[key])
        assert len(sample.answers) == asked_keys * parameters.values
        if parameters.haystack == "needle":
            assert len(hidden) > 10
            assert {len(values) for values in hidden.values()} == {1}
        else:
            assert len(hidden) == max(parameters.keys, parameters.queries)
        pattern = r"\d{7}" if parameters.value == "numbers" else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}"
        assert all(re.fullmatch(pattern, answer) for answer in sample.answers)
        assert 0 <= sample.meta["depth"] <= 1


def test_wording_of_one_needle(pieces):
    sample = samples("niah_single_1", pieces)[0]
    key, value = NEEDLE.search(sample.context)[2], sample.answers[0]
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    lines = sample.context.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert Counter(lines[1:-1]).keys() <= {noise, f"One of the special magic numbers for {key} is: {value}."}
    assert noise.startswith(lines[-1]) or value in lines[-1]
    assert sample.question == f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    assert sample.answer_prefix == f"The special magic number for {key} mentioned in the provided text is"
    assert sample.prompt == f"{sample.context}{sample.question} {sample.answer_prefix}"
    assert sample.max_new_tokens == 128


def test_wording_of_several_needles(pieces):
    sample = samples("niah_multiquery", pieces)[0]
    assert sample.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    asked = r"(\S+, ){3}and \S+"
    question = rf"\nWhat are all the special magic numbers for {asked} mentioned in the provided text\?"
    assert re.fullmatch(question, sample.question)
    assert re.fullmatch(
        rf"The special magic numbers for {asked} mentioned in the provided text are", sample.answer_prefix
    )


def test_depths_are_spread(pieces):
    for name in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        depths = [sample.meta["depth"] for sample in samples(name, pieces, count=60)]
        assert min(depths) < 0.15
        assert max(depths) > 0.85
        assert 0.35 < sum(depths) / len(depths) < 0.65


def test_essays_from_a_file(tmp_path, pieces):
    (tmp_path / "ruler").mkdir()
    text = " ".join(f"Sentence number {number} of an essay." for number in range(300))
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    sample = next(tasks.by_name("ruler/niah_single_2", tmp_path).samples(1, 4000, pieces, 1))
    assert sample.meta["haystack"].startswith("PaulGrahamEssays-")
    numbers = [int(number) for number in re.findall(r"number (\d+) of", sample.context)]
    assert len(numbers) > 300
    assert numbers == [place % 300 for place in range(len(numbers))]  # a text too short is begun again
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_text("[]")
    with pytest.raises(tasks.DataFileError, match="under the key text"):
        next(tasks.by_name("ruler/niah_single_2", tmp_path).samples(1, 3000, pieces, 1))


def test_variable_tracking(pieces):
    for sample in samples("vt", pieces):
        example, _, own = sample.context.partition("\n\nMemorize and track")
        assert example.startswith(
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
        )
        asked = re.search(r"assigned the value (\d+) in the text above", sample.question)[1]
        values = dict(re.findall(r"VAR (\w+) = (\d+)", own))
        for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", own):
            values[new] = values[old]  # an assignment stands behind the one that it refers to
        assert [name for name, value in values.items() if value == asked] == sample.answers
        assert len(set(sample.answers)) == 5
        # The example is solved, by the same rule.
        solved = example.rpartition("they are: ")[2].split()
        assert len(solved) == 5
        assert all(re.search(rf"VAR {name} = ", example) for name in solved)
        assert sample.answer_prefix == (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {asked}, they are:"
        )


@pytest.mark.parametrize(("tokens", "often", "seldom"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words(tokens, often, seldom, pieces):
    for sample in samples("cwe", pieces, count=2, tokens=tokens):
        lists = sample.context.split("Memorize the ones that appear most often.\n")
        assert len(lists) == 3
        entries = re.findall(r"(\d+)\. (\S+)", lists[2])
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert {word for word, count in counts.items() if count == often} == set(sample.answers)
        assert set(counts.values()) == {often, seldom}
        assert len(sample.answers) == 10


def test_frequent_words(pieces):
    for sample in samples("fwe", pieces):
        coded = sample.context.partition("appeared coded words. ")[2].split()
        counts = Counter(coded)
        assert counts.most_common(1)[0][0] == "..."
        del counts["..."]
        assert [word for word, _ in counts.most_common(3)] == sample.answers
        ordered = [count for _, count in counts.most_common(4)]
        assert ordered[0] > ordered[1] > ordered[2] > ordered[3]


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_documents(name, pieces):
    asked = set()
    for sample in samples(name, pieces, count=4, tokens=640):
        documents = re.findall(r"Document (\d+):\n", sample.context)
        assert [int(number) for number in documents] == list(range(1, sample.meta["documents"] + 1))
        question = sample.question.partition("Question: ")[2]
        assert question
        assert question not in asked
        asked.add(question)
        if name == "qa_1":
            assert any(answer in sample.context for answer in sample.answers)
        assert sample.answer_prefix == "Answer:"


def test_questions_without_an_answer_are_left_out(pieces):
    questions, documents = tasks.by_name("ruler/qa_1").published
    assert len(questions) == 9
    assert len(documents) == 8
    assert not any("drowned" in question.text for question in questions)


def test_hotpot_keeps_what_answers(pieces):
    questions, documents = tasks.by_name("ruler/qa_2").published
    assert len(documents) == 8  # the same paragraph in several rows is one document
    for question in questions:
        assert len(question.documents) == 2
        assert len(question.related) == 6


def test_broken_file(tmp_path, pieces):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "squad.json").write_text('{"data": [{"paragraphs": [{"qas": []}]}]}')
    with pytest.raises(tasks.DataFileError, match=r"format of SQuAD 2\.0: KeyError\('context'\)"):
        next(tasks.by_name("ruler/qa_1", tmp_path).samples(1, 500, pieces, 1))


def test_score():
    task = tasks.by_name("ruler/niah_multivalue")
    sample = tasks.Sample("x", "c", "q", ["111", "222"], 8)
    assert task.score("111 and 222", sample) == 1
    assert task.score("111", sample) == 0.5
    assert tasks.by_name("ruler/qa_1").score("222", sample) == 1
