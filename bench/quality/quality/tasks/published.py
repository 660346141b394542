# SPDX-License-Identifier: Apache-2.0
"""What tasks whose prompts are read from published files have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from .files import find, read_rows, require
from .prompt import Prompt
from .task import Sample, Tokenizer, check_request, count_tokens

T = TypeVar("T")


class PublishedTask(ABC):
    """A task that reads its samples from a file with one row a sample."""

    name: str
    metric: str
    max_new_tokens: int
    fields: tuple[str, ...]  # that every row must have
    meta: Mapping[str, Any] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    @abstractmethod
    def file_names(self) -> list[str]:
        """The names that the file may have [alternatives]."""

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the file comes from and what its rows hold, for whoever does not have it."""

    @abstractmethod
    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt that a row stands for."""

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the file."""
        path = find(self.folder, self.file_names, self.origin)
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            require(row, self.fields, f"{path}, row {number}")
        return rows

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """How right the prediction is, in [0, 1]."""

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[Sample]:
        check_request(count, tokens)
        for index, row in choose(self.rows, count, seed):
            whole = self.prompt(row)
            prompt, length = cut_middle(whole, tokens, tokenizer, f"{self.name}, row {index + 1}")
            meta = {**self.meta, "tokens": length, "cut": prompt is not whole}
            yield prompt.sample(f"{self.name}/{tokens}/{index}", self.max_new_tokens, meta)


def choose(rows: list[T], count: int, seed: int) -> list[tuple[int, T]]:
    """Rows [at most count] and their numbers, drawn by the seed and in the order of the file."""
    if count >= len(rows):
        return list(enumerate(rows))
    return [(index, rows[index]) for index in sorted(Random(f"rows/{seed}").sample(range(len(rows)), count))]


def cut_middle(whole: Prompt, tokens: int, tokenizer: Tokenizer, where: str) -> tuple[Prompt, int]:
    """The prompt without the middle of its context, so that it has at most `tokens` tokens, and its length.

    As LongBench and InfiniteBench cut: the first and the last half of the tokens of the whole prompt stay, of which
    the question is the end. Raises ValueError where the question alone has as many tokens as the last half.
    """
    length = count_tokens(tokenizer, whole.text)
    if length <= tokens:
        return whole, length
    ids = tokenizer.encode(whole.context, add_special_tokens=False)
    behind = length - len(ids)
    first, last = tokens // 2, tokens - tokens // 2 - behind
    # The two pieces of text may make a few more tokens than they were cut from.
    while last > 0:
        head = tokenizer.decode(ids[:first], skip_special_tokens=True)
        cut = replace(whole, context=head + tokenizer.decode(ids[-last:], skip_special_tokens=True))
        length = count_tokens(tokenizer, cut.text)
        if length <= tokens:
            return cut, length
        last -= length - tokens
    raise ValueError(f"{where}: the question has {behind} tokens, too many for a prompt cut to {tokens}")
