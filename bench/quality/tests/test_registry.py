# SPDX-License-Identifier: Apache-2.0
"""All tasks, through the interface that the runner uses."""

from __future__ import annotations

import pytest
from quality import tasks
from quality.tasks import LikelihoodSample, LikelihoodTask, Sample, Task, count_tokens

COUNTS = {"ruler": 13, "niah": 2, "longbench": 16, "infinitebench": 11, "arc": 2, "humaneval": 1, "perplexity": 1}
# Of this project's own questions and documents there are not enough for longer prompts.
TOKENS = {"ruler/qa_1": 640, "ruler/qa_2": 640, "humaneval/pass_at_1": 700, "arc/easy": 640, "arc/challenge": 512}


def test_names():
    assert tasks.suites() == list(COUNTS)
    assert {suite: len(tasks.names(suite)) for suite in COUNTS} == COUNTS
    names = tasks.names()
    assert len(names) == len(set(names)) == sum(COUNTS.values())
    assert all(name.startswith(f"{suite}/") for suite in COUNTS for name in tasks.names(suite))


def test_unknown_names():
    with pytest.raises(KeyError, match="no task 'ruler/nothing'; there are ruler/niah_single_1"):
        tasks.by_name("ruler/nothing")
    with pytest.raises(KeyError, match="no suite 'nothing'; there are ruler"):
        tasks.names("nothing")


@pytest.mark.parametrize("name", tasks.names())
def test_samples(name, pieces):
    """Every task gives samples from this project's own data: the same ones again, with all that a runner needs."""
    tokens = TOKENS.get(name, 1024)
    task = tasks.by_name(name)
    assert task.name == name
    assert isinstance(task, Task | LikelihoodTask)
    samples = list(task.samples(2, tokens, pieces, 3))
    assert 1 <= len(samples) <= 2
    assert samples == list(tasks.by_name(name).samples(2, tokens, pieces, 3))
    assert len({sample.id for sample in samples}) == len(samples)
    more = {sample.id: sample for sample in task.samples(3, tokens, pieces, 3)}  # one id is one sample, for ever
    assert all(more[sample.id] == sample for sample in samples if sample.id in more)
    for sample in samples:
        longest = max(sample.choices, key=len) if isinstance(sample, LikelihoodSample) else ""
        assert sample.context
        assert sample.question
        assert count_tokens(pieces, sample.prompt + longest) <= sample.meta["tokens"] <= tokens
        if isinstance(sample, Sample):
            assert sample.answers
            assert all(sample.answers)
            assert sample.max_new_tokens > 0
        else:
            assert sample.meta["choice_tokens"] == [count_tokens(pieces, choice) for choice in sample.choices]


GENERATED = [name for name in tasks.names() if name.startswith(("ruler/", "niah/"))] + [
    "infinitebench/passkey", "infinitebench/number_string", "infinitebench/kv_retrieval", "arc/easy", "perplexity/text",
]  # fmt: skip


@pytest.mark.parametrize("name", GENERATED)
def test_length_is_reached(name, tokenizer):
    """Prompts have the length asked for, 2 % or one piece of their text less, and never more."""
    pieces = {"ruler/niah_multikey_3": 110, "infinitebench/kv_retrieval": 110, "ruler/niah_multikey_2": 45}
    pieces |= {"ruler/qa_1": 110, "ruler/qa_2": 110}  # of these there are only eight documents to choose from
    piece = pieces.get(name, 0)
    for tokens in [TOKENS[name]] if name in TOKENS else [1024, 2048, 4096, 8192]:
        for sample in tasks.by_name(name).samples(3, tokens, tokenizer, 1):
            if isinstance(sample, LikelihoodSample):
                lengths_with = [count_tokens(tokenizer, sample.prompt + choice) for choice in sample.choices]
                reached = max(lengths_with)
            else:
                reached = count_tokens(tokenizer, sample.prompt)
                assert reached == sample.meta["tokens"]
            slack = 2 if name == "perplexity/text" else 0  # tokens that the cut into two texts can make
            assert max(0.98 * tokens - slack, 0) <= reached + (piece if 0.02 * tokens < piece else 0)
            assert reached <= tokens + slack


@pytest.mark.parametrize("name", [name for name in GENERATED if not name.startswith(("perplexity/", "niah/sandwich"))])
def test_seeds_and_samples_differ(name, pieces):
    tokens = TOKENS.get(name, 1024)
    task = tasks.by_name(name)
    first, second = list(task.samples(2, tokens, pieces, 1))
    assert first.prompt != second.prompt
    assert first.prompt not in {sample.prompt for sample in task.samples(2, tokens, pieces, 2)}


@pytest.mark.parametrize("name", ["ruler/vt", "longbench/hotpotqa", "arc/easy", "perplexity/text"])
@pytest.mark.parametrize(("count", "tokens"), [(0, 100), (1, 0)])
def test_requests_must_be_positive(name, count, tokens, pieces):
    with pytest.raises(ValueError, match=f"they are {count} and {tokens}"):
        next(tasks.by_name(name).samples(count, tokens, pieces, 1))


@pytest.mark.parametrize("name", ["ruler/cwe", "ruler/vt", "arc/easy", "humaneval/pass_at_1"])
def test_too_short(name, pieces):
    with pytest.raises(ValueError, match=rf"{name}.*has \d+ tokens, 9 were asked for"):
        next(tasks.by_name(name).samples(1, 9, pieces, 1))


@pytest.mark.parametrize("name", ["ruler/qa_1", "arc/challenge", "humaneval/pass_at_1", "perplexity/text"])
def test_too_long_for_the_data(name, pieces):
    with pytest.raises(ValueError, match=rf"{name}.*\d+ tokens, .*300000 was|{name}.*\d+ tokens, 300000 were"):
        next(tasks.by_name(name).samples(1, 300_000, pieces, 1))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ruler/qa_1", "dev-v2.0.json"),
        ("ruler/qa_2", "hotpot_dev_distractor_v1.json"),
        ("longbench/qasper", "qasper.jsonl, qasper_e.jsonl"),
        ("infinitebench/code_run", "code_run.jsonl"),
        ("arc/easy", "ARC-Easy-Test.jsonl"),
        ("humaneval/pass_at_1", "HumanEval.jsonl.gz"),
    ],
)
def test_missing_file_is_named(name, told, tmp_path, pieces):
    with pytest.raises(tasks.DataFileError) as error:
        next(tasks.by_name(name, tmp_path).samples(1, 500, pieces, 1))
    assert told in str(error.value)
    assert str(tmp_path / name.partition("/")[0]) in str(error.value)
    assert "{" in str(error.value)  # the fields of a row
