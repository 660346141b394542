# SPDX-License-Identifier: Apache-2.0
"""Perplexity on long text: how well a model goes on behind a context whose cache was compressed.

A window slides over the text so that the scored pieces lie side by side: each has the text before it as its context,
and is one continuation; the word in front of it stands for the question. `metrics.likelihood.perplexity` makes one
figure of all pieces. The licence texts that are used without a file are known to every model by heart: compare
policies on them, not models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import text
from .fit import fill
from .task import LikelihoodSample, Tokenizer, check_request, count_tokens

SCORED = 128  # tokens of a window that are scored, its last ones; in short windows a quarter


class Perplexity:
    """Windows over folder/text.txt or folder/text.json, or without either over the text that `text.load` gives."""

    name = "perplexity/text"
    metric = "nll"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def samples(self, count: int, tokens: int, tokenizer: Tokenizer, seed: int) -> Iterator[LikelihoodSample]:
        """The first `count` windows, or as many as the text has; the seed changes nothing."""
        check_request(count, tokens)
        source = text.load(next((path for path in self._paths() if path.is_file()), None))
        # Words with the space before them; longer runs of letters or of spaces are several.
        words = re.findall(r"\s?\S{1,24}|\s", source.text)
        scored = min(SCORED, tokens // 4)

        def length(piece: str) -> int:
            return count_tokens(tokenizer, piece)

        def piece(start: int, end: int) -> str:
            return "".join(words[start:end])

        def behind(start: int, most: int, wanted: int) -> tuple[int, str, int]:
            """As many words from `start` on as make the wanted number of tokens."""
            return fill(lambda n: piece(start, start + n), length, wanted, least=1, most=most, guess=wanted // 2)

        def before(end: int, wanted: int) -> tuple[int, str, int]:
            """As many words in front of `end` as make the wanted number of tokens."""
            return fill(lambda n: piece(end - n, end), length, wanted, least=2, most=end, guess=wanted // 2)

        # The first piece is scored behind a whole context, so the text that is read before it is not scored.
        place, _, reached = behind(0, len(words), tokens - scored)
        if place == len(words):
            raise ValueError(f"{self.name}: {source.name} has {reached} tokens, a window of {tokens} was asked for")
        for index in range(count):
            if place == len(words):
                break
            number, scored_text, scored_length = behind(place, len(words) - place, scored)
            _, context, context_length = before(place, tokens - scored_length)
            last_word = words[place - 1]
            place += number
            yield LikelihoodSample(
                id=f"{self.name}/{source.name}/{tokens}/{index}",
                context=context.removesuffix(last_word),
                question=last_word,
                choices=[scored_text],
                answer=0,
                meta={
                    "chat": False,
                    "haystack": source.name,
                    "tokens": context_length + scored_length,
                    "choice_tokens": [scored_length],
                },
            )

    def score_likelihoods(self, log_likelihoods: Sequence[float], sample: LikelihoodSample) -> float:
        """Mean negative log-likelihood of a token [nats]."""
        return -log_likelihoods[0] / sample.meta["choice_tokens"][0]

    def _paths(self) -> list[Path]:
        return [self.folder / "text.txt", self.folder / "text.json"]


def tasks(data: Path) -> list[Perplexity]:
    """The one task, reading from data/perplexity."""
    return [Perplexity(data / "perplexity")]
