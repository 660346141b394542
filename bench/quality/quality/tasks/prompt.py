# SPDX-License-Identifier: Apache-2.0
"""A prompt before it becomes a sample: the parts that depend on how much filling it has, or on where it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .task import Sample, join


@dataclass(frozen=True)
class Prompt:
    """The parts of a sample's prompt, its right answers, and what its sample's `meta` says of it."""

    context: str
    question: str
    answers: list[str]
    answer_prefix: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return join(self.context + self.question, self.answer_prefix)

    def sample(self, name: str, max_new_tokens: int, meta: Mapping[str, Any]) -> Sample:
        """The sample of that name that this prompt is, with more to say of it."""
        return Sample(
            id=name,
            context=self.context,
            question=self.question,
            answers=self.answers,
            max_new_tokens=max_new_tokens,
            answer_prefix=self.answer_prefix,
            meta={**self.meta, **meta},
        )
