# SPDX-License-Identifier: Apache-2.0
"""RULER's two question answering tasks: the paragraphs that answer a question among others of the same data set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...metrics.strings import match_part
from .. import pieces
from ..files import DataFileError, find, read_json
from ..generated import GeneratedTask, Recipe
from ..prompt import Prompt
from ..task import Sample, Tokenizer

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Question:
    """A question, its answers, and the numbers of the documents that answer it and of related ones."""

    text: str
    answers: list[str]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


class DocumentQuestions(GeneratedTask):
    """Questions about documents; the filling is other documents, related ones first."""

    metric = "string match (part)"
    max_new_tokens = 32

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def published(self) -> tuple[Sequence[Question], Sequence[str]]:
        """All questions and all documents of the file."""
        questions, documents = self.read()
        if not questions:
            raise DataFileError(f"{self.name}: the file in {self.folder} has no question that can be answered")
        return questions, documents

    @abstractmethod
    def read(self) -> tuple[list[Question], list[str]]:
        """Reads the file."""

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        questions, documents = self.published
        question = questions[self._order(seed)[index % len(questions)]]
        rng = self.random(seed, index, "documents")
        others = set(range(len(documents))) - set(question.documents) - set(question.related)
        filling = rng.sample(question.related, len(question.related)) + rng.sample(sorted(others), len(others))

        def build(chosen: Sequence[int]) -> Prompt:
            order = [*question.documents, *chosen]
            self.random(seed, index, "order").shuffle(order)
            listed = "\n\n".join(f"Document {place}:\n{documents[number]}" for place, number in enumerate(order, 1))
            return Prompt(
                context=f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}",
                question=f"\n\n{_INSTRUCTION}\n\nQuestion: {question.text}",
                answer_prefix="Answer:",
                answers=question.answers,
                meta={"documents": len(order)},
            )

        def text(number: int) -> str:
            return f"Document {number}:\n{documents[number]}\n\n"

        return pieces.recipe(build, filling, text, tokenizer, tokens // 150)

    def score(self, prediction: str, sample: Sample) -> float:
        return match_part(prediction, sample.answers)

    def _order(self, seed: int) -> list[int]:
        order = list(range(len(self.published[0])))
        self.random(seed, 0, "questions").shuffle(order)
        return order


class Squad(DocumentQuestions):
    """Questions of SQuAD 2.0 that have an answer; related are the other paragraphs of the same article."""

    name = "ruler/qa_1"

    def read(self) -> tuple[list[Question], list[str]]:
        path = find(
            self.folder,
            ["squad.json", "dev-v2.0.json"],
            "the development set of SQuAD 2.0 (dev-v2.0.json), {data: [{paragraphs: [{context, qas: [{question, "
            "answers: [{text}], is_impossible}]}]}]}",
        )
        questions: list[Question] = []
        numbers: dict[str, int] = {}
        try:
            for article in read_json(path)["data"]:
                own = [numbers.setdefault(part["context"], len(numbers)) for part in article["paragraphs"]]
                for number, part in zip(own, article["paragraphs"], strict=True):
                    related = tuple(sorted(set(own) - {number}))
                    questions += [
                        Question(asked["question"], [answer["text"] for answer in asked["answers"]], (number,), related)
                        for asked in part["qas"]
                        if not asked.get("is_impossible", False)
                    ]
        except (KeyError, TypeError) as error:
            raise DataFileError(f"{path} is not in the format of SQuAD 2.0: {error!r}") from error
        return questions, list(numbers)


class Hotpot(DocumentQuestions):
    """Questions of HotpotQA, each of which takes two paragraphs; related are the others of its ten."""

    name = "ruler/qa_2"

    def read(self) -> tuple[list[Question], list[str]]:
        path = find(
            self.folder,
            ["hotpotqa.json", "hotpot_dev_distractor_v1.json"],
            "the distractor development set of HotpotQA (hotpot_dev_distractor_v1.json), [{question, answer, "
            "context: [[title, [sentence]]], supporting_facts: [[title, number]]}]",
        )
        questions: list[Question] = []
        numbers: dict[str, int] = {}
        try:
            for row in read_json(path):
                needed = {title for title, _ in row["supporting_facts"]}
                places = {
                    title: numbers.setdefault(f"{title}\n{''.join(sentences)}", len(numbers))
                    for title, sentences in row["context"]
                }
                questions.append(
                    Question(
                        row["question"],
                        [row["answer"]],
                        tuple(number for title, number in places.items() if title in needed),
                        tuple(number for title, number in places.items() if title not in needed),
                    )
                )
        except (KeyError, TypeError, ValueError) as error:
            raise DataFileError(f"{path} is not in the format of HotpotQA: {error!r}") from error
        return questions, list(numbers)
