# SPDX-License-Identifier: Apache-2.0
"""What a task is: the samples it gives and how an answer to one is scored.

A prompt has three parts, so that one run can compress the cache before or after the question is seen:

    context + question          the user's message; only the context may be compressed before the question is read
    answer_prefix               the first words of the assistant's answer, given to the model

A generation task yields `Sample`s and scores the text that the model wrote; a likelihood task yields
`LikelihoodSample`s and scores the log-likelihoods that the model gave to the continuations it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tasks use."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True)
class Sample:
    """One prompt and its right answers.

    `meta` holds what a report may want to group by ("depth", "haystack", ...) and, for every sample:
      "tokens"  length of context + question + answer_prefix [tokens], without a chat template
      "chat"    False where the benchmark feeds the prompt as plain text even to a chat model
      "stop"    strings that end the generation, the end of the turn apart
    """

    id: str
    context: str
    question: str
    answers: list[str]
    max_new_tokens: int
    answer_prefix: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The whole prompt as plain text."""
        return join(self.context + self.question, self.answer_prefix)


@dataclass(frozen=True)
class LikelihoodSample:
    """One prompt and the continuations [choices] of which the model should find choices[answer] the likeliest.

    A continuation starts right behind the prompt: where a space belongs between the two, it begins with it.
    A sample of running text, for perplexity, has one choice. `meta` is as for `Sample`; "choice_tokens" [choices] are
    the lengths of the continuations in tokens.
    """

    id: str
    context: str
    question: str
    choices: list[str]
    answer: int
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"{self.id}: the right choice is number {self.answer} of {len(self.choices)}")

    @property
    def prompt(self) -> str:
        """The whole prompt as plain text."""
        return self.context + self.question


@runtime_checkable
class Task(Protocol):
    """A benchmark task that a model answers in text."""

    name: str  # suite/task
    metric: str  # of the score, in [0, 1], higher is better

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        """At most `count` samples (fewer only where a file holds fewer), the same ones for the same arguments.

        `tokens` is the length of the whole prompt that is asked for. A generated prompt is never longer, and shorter
        by at most 2 % or one indivisible piece of its text; a prompt read from a file is cut in the middle where it
        is longer. Raises `DataFileError` where a published file is missing or is not what it should be, ValueError
        where a prompt of so few tokens cannot be made.
        """
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """How right the prediction is, in [0, 1]."""
        ...


@runtime_checkable
class LikelihoodTask(Protocol):
    """A benchmark task that a model answers by the likelihood it gives to continuations."""

    name: str
    metric: str  # "accuracy", "accuracy by byte": higher is better; "nll": nats a token, lower is better

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[LikelihoodSample]:
        """As `Task.samples`; `tokens` counts the prompt and its longest continuation."""
        ...

    def score_likelihoods(self, log_likelihoods: Sequence[float], sample: LikelihoodSample) -> float:
        """Score from the summed log-likelihoods [choices], in nats, of the sample's continuations."""
        ...


def join(prompt: str, answer_prefix: str) -> str:
    """The prompt and the answer's first words behind it, with a space between two words that would run together."""
    if not answer_prefix or not prompt or prompt[-1].isspace() or answer_prefix[0].isspace():
        return prompt + answer_prefix
    return f"{prompt} {answer_prefix}"


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Number of tokens of a text, without special ones."""
    return len(tokenizer.encode(text, add_special_tokens=False))


def check_request(count: int, tokens: int) -> None:
    """Raises ValueError unless at least one sample of at least one token is asked for."""
    if count < 1 or tokens < 1:
        raise ValueError(f"count and tokens must be positive, they are {count} and {tokens}")
