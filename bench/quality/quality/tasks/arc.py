# SPDX-License-Identifier: Apache-2.0
"""ARC (Clark et al., arXiv 1803.05457), easy and challenge: multiple choice by log-likelihood, many-shot.

The solved examples are the context, which is read first and compressed; the question and its choices follow. Examples
come from the training split, where its file lies beside the test split's, and otherwise from the other questions of
the test split. A prompt that is shorter than the cache's budget is not compressed at all: ask for a length well above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from ..metrics.likelihood import likeliest_by_byte
from . import pieces
from .files import DataFileError, find, read_rows, require
from .generated import make
from .prompt import Prompt
from .published import choose
from .task import LikelihoodSample, Tokenizer, check_request, count_tokens


@dataclass(frozen=True)
class Question:
    """A question with its choices, of which choices[answer] is right."""

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        return f"Question: {self.text}\nAnswer:"

    @property
    def solved(self) -> str:
        return f"{self.prompt} {self.choices[self.answer]}\n\n"


class Arc:
    """ "easy" or "challenge", read from the folder."""

    metric = "accuracy by byte"

    def __init__(self, level: str, folder: Path) -> None:
        self.name = f"arc/{level}"
        self.set = f"ARC-{level.capitalize()}"
        self.folder = folder

    @cached_property
    def questions(self) -> list[Question]:
        """The test split."""
        return self._read(self._names("Test"))

    @cached_property
    def examples(self) -> list[Question]:
        """The training split, or the test split where there is no other."""
        names = self._names("Train")
        there = any((self.folder / name).is_file() for name in names)
        return self._read(names) if there else self.questions

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[LikelihoodSample]:
        check_request(count, tokens)
        for index, question in choose(self.questions, count, seed):
            others = [other.solved for other in self.examples if other.text != question.text]
            Random(f"{self.name}/{seed}/{index}").shuffle(others)
            choices = [f" {choice}" for choice in question.choices]
            longest = max(choices, key=lambda choice: count_tokens(tokenizer, choice))

            def build(chosen: Sequence[str], question: Question = question, longest: str = longest) -> Prompt:
                return Prompt("".join(chosen), question.prompt, [], longest, {"shots": len(chosen)})

            recipe = pieces.recipe(build, others, str, tokenizer, tokens // 40)
            prompt, length = make(recipe, tokens, tokenizer, f"{self.name}, {question.id}")
            yield LikelihoodSample(
                id=f"{self.name}/{tokens}/{seed}/{question.id}",
                context=prompt.context,
                question=prompt.question,
                choices=choices,
                answer=question.answer,
                meta={
                    **prompt.meta,
                    "chat": False,
                    "tokens": length,
                    "choice_tokens": [count_tokens(tokenizer, choice) for choice in choices],
                },
            )

    def score_likelihoods(self, log_likelihoods: Sequence[float], sample: LikelihoodSample) -> float:
        return likeliest_by_byte(log_likelihoods, sample.answer, sample.choices)

    def _names(self, split: str) -> list[str]:
        jsonl = f"{self.set}-{split}.jsonl"
        return [jsonl, f"{self.set}/{jsonl}", f"{self.set}/{split.lower()}-00000-of-00001.parquet"]

    def _read(self, names: list[str]) -> list[Question]:
        path = find(
            self.folder,
            names,
            "the AI2 Reasoning Challenge of 2018; rows {id, question: {stem, choices: [{text, label}]}, answerKey}, "
            "or, in the later layout, {id, question, choices: {text: [text], label: [label]}, answerKey}",
        )
        return [parse(row, f"{path}, row {number}") for number, row in enumerate(read_rows(path), 1)]


def parse(row: Mapping[str, Any], where: str) -> Question:
    """A row of either published layout. Raises DataFileError where it is neither."""
    require(dict(row), ("id", "question", "answerKey"), where)
    try:
        if isinstance(row["question"], str):
            text, choices, labels = row["question"], row["choices"]["text"], row["choices"]["label"]
        else:
            text = row["question"]["stem"]
            choices = [choice["text"] for choice in row["question"]["choices"]]
            labels = [choice["label"] for choice in row["question"]["choices"]]
    except (KeyError, TypeError) as error:
        raise DataFileError(f"{where} is in neither of ARC's layouts: {error!r}") from error
    if row["answerKey"] not in labels:
        raise DataFileError(f"{where}: the answer {row['answerKey']!r} is none of the choices {', '.join(labels)}")
    return Question(row["id"], text, tuple(choices), list(labels).index(row["answerKey"]))


def tasks(data: Path) -> list[Arc]:
    """Both, reading from data/arc."""
    return [Arc(level, data / "arc") for level in ("easy", "challenge")]
