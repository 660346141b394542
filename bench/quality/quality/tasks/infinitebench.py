# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench (Zhang et al., arXiv 2402.13718): its eleven English tasks.

passkey, number_string and kv_retrieval are generated, at any length; the others are read from the published files,
data/infinitebench/<task>.jsonl. Prompts, answer lengths and metrics are the benchmark's own, in the form it gives to
open models (github.com/OpenBMB/InfiniteBench, MIT licence); prompts from files are cut in the middle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

from ..metrics import infinitebench as metrics
from .files import DataFileError
from .generated import GeneratedTask, Recipe, grid_depth
from .prompt import Prompt
from .published import PublishedTask
from .ruler import noise
from .task import Sample, Task, Tokenizer

Metric = Callable[[str, Sequence[str]], float]


class Hidden(GeneratedTask):
    """A key said twice in a line among lines of noise; the samples go through the depths in turn."""

    def __init__(self, task: str, what: str, max_new_tokens: int, draw: Callable[[Random], str], memorise: str) -> None:
        self.name = f"infinitebench/{task}"
        self.metric = "exact number"
        self.max_new_tokens = max_new_tokens
        self.meta = {"chat": False, "haystack": "noise"}
        self.what = what
        self.draw = draw
        self.header = (
            f"There is an important info hidden inside a lot of irrelevant text. Find it{memorise}. "
            "I will quiz you about the important information there.\n\n"
        )

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        key = self.draw(self.random(seed, index, "key"))
        share = grid_depth(index)

        def build(sentences: int) -> Prompt:
            lines = noise.lines(sentences)
            lines.insert(round(share * len(lines)), f"The {self.what} is {key}. Remember it. {key} is the {self.what}.")
            return Prompt(
                context=self.header + "\n".join(lines),
                question=f"\n\nWhat is the {self.what}?\n\n",
                answer_prefix=f"The {self.what} is",
                answers=[key],
                meta={"depth": round(share, 4)},
            )

        return Recipe(build, guess=tokens // 5)

    def score(self, prediction: str, sample: Sample) -> float:
        return metrics.first_number(prediction, sample.answers)


def _digits(rng: Random) -> str:
    return "".join(str(rng.randint(0, 9)) for _ in range(5))


def _repeated_digits(rng: Random) -> str:
    """Ten digits, half of them a repetition of the one before."""
    digits = [str(rng.randint(0, 9)) for _ in range(5)]
    while len(digits) < 10:
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


class KeyValue(GeneratedTask):
    """One value out of a JSON object of random identifiers; the samples go through the depths in turn."""

    name = "infinitebench/kv_retrieval"
    metric = "exact value"
    max_new_tokens = 50
    meta: Mapping[str, Any] = {"chat": False, "haystack": "key-value pairs"}

    def recipe(self, index: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Recipe:
        rng = self.random(seed, index, "pairs")
        share = grid_depth(index)
        pairs: list[tuple[str, str]] = []

        def build(number: int) -> Prompt:
            while len(pairs) < number:
                pairs.append((_identifier(rng), _identifier(rng)))
            wanted, value = pairs[round(share * (number - 1))]
            return Prompt(
                context="Extract the value corresponding to the specified key in the JSON object below.\n\n"
                f"JSON data:\n{json.dumps(dict(pairs[:number]))}",
                question=f'\n\nKey: "{wanted}"\nThe value associated with the specified key is: ',
                answers=[value],
                meta={"depth": round(share, 4)},
            )

        return Recipe(build, least=1, guess=tokens // 80)

    def score(self, prediction: str, sample: Sample) -> float:
        return metrics.named_value(prediction, sample.answers)


def _identifier(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class Kind:
    """A task from a file: the prompt around its context, the answer's first words, its length [tokens], its metric."""

    before: str
    behind: str
    answer_prefix: str
    max_new_tokens: int
    metric: str
    score: Metric
    options: bool = False


_OPTIONS = "A. {option_a}\nB. {option_b}\nC. {option_c}\nD. {option_d}\n\n"

KINDS = {
    "longbook_sum_eng": Kind("Summarize the book below.\n\n", "\n\n", "Summary:", 1200, "ROUGE-Lsum", metrics.summary),
    "longbook_choice_eng": Kind(
        "Read the book and answer the question.\n\n",
        f"\n\nQuestion: {{question}}\n{_OPTIONS}",
        "The letter of the correct answer is",
        40,
        "choice",
        metrics.choice,
        options=True,
    ),
    "longbook_qa_eng": Kind(
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "\n\nQuestion: {question}\n",
        "Answer:",
        40,
        "F1",
        metrics.best_f1,
    ),
    "longdialogue_qa_eng": Kind(
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\n",
        "\n\n",
        "The name that has been replaced with $$MASK$$ is likely",
        40,
        "name",
        metrics.speaker,
    ),
    "math_find": Kind("{find}\n\n", "\n\n{question}", "", 3, "exact number", metrics.first_value),
    "math_calc": Kind(
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ",
        "\n",
        "Values:",
        30000,
        "right values before the first mistake",
        metrics.leading_values,
    ),
    "code_run": Kind(
        "There is a function called {function} in the following Python code.\n\n",
        "\n\nPlease compute the exact value of {call}. ",
        "The value of {call} is",
        5,
        "exact number",
        metrics.last_integer,
    ),
    "code_debug": Kind(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n",
        f"\n\nOptions:\n{_OPTIONS}",
        "The correct option is:",
        5,
        "choice",
        metrics.code_choice,
        options=True,
    ),
}


class FromFile(PublishedTask):
    """A task of InfiniteBench that is read from its file."""

    fields = ("context", "input", "answer")
    meta: Mapping[str, Any] = {"chat": False}

    def __init__(self, task: str, folder: Path) -> None:
        super().__init__(folder)
        self.task = task
        self.kind = KINDS[task]
        self.name = f"infinitebench/{task}"
        self.metric = self.kind.metric
        self.max_new_tokens = self.kind.max_new_tokens

    @property
    def file_names(self) -> list[str]:
        return [f"{self.task}.jsonl"]

    @property
    def origin(self) -> str:
        return (
            "InfiniteBench's published data; one object a line, {id, context, input, answer: [text] or a value, "
            "options: [four texts] where there is a choice}"
        )

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        answers = [str(answer) for answer in answers]
        words = {"question": row["input"]}
        if self.kind.options:
            options = [str(option) for option in row.get("options") or []]
            if len(options) != 4 or answers[0] not in options:
                raise DataFileError(f"{self.name}: {len(options)} options, and {answers[0]!r} should be one of four")
            words |= {f"option_{letter}": option for letter, option in zip("abcd", options, strict=True)}
            answers = [answers[0], "ABCD"[options.index(answers[0])]]
        if self.task == "code_run":
            words["call"] = _search(r"func_[0-9]+\(.*\)", row["input"])
            words["function"] = words["call"].partition("(")[0]
        if self.task == "math_find":
            words["find"] = f"What is {_search(r'The .+(?= of)', row['input']).lower()} in the following list?"
        return Prompt(
            context=_filled(self.kind.before, words) + row["context"],
            question=_filled(self.kind.behind, words),
            answer_prefix=_filled(self.kind.answer_prefix, words),
            answers=answers,
        )

    def score(self, prediction: str, sample: Sample) -> float:
        return self.kind.score(prediction, sample.answers)


def _filled(template: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: words[name[1]], template)


def _search(pattern: str, question: str) -> str:
    found = re.search(pattern, question)
    if found is None:
        raise DataFileError(f"no {pattern} in the question {question!r}")
    return found[0]


def tasks(data: Path) -> list[Task]:
    """All eleven, reading what is not generated from data/infinitebench."""
    return [
        Hidden("passkey", "pass key", 6, _digits, " and memorize them"),
        Hidden("number_string", "sequence of digits", 12, _repeated_digits, ""),
        KeyValue(),
        *(FromFile(task, data / "infinitebench") for task in KINDS),
    ]
