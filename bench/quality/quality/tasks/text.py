# SPDX-License-Identifier: Apache-2.0
"""The long texts that needles are hidden in and that perplexity is measured on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .files import DataFileError

# Debian and its children install these with every system, so that a run without any download has real prose.
LICENCES = Path("/usr/share/common-licenses")
LICENCE_NAMES = ("GPL-3", "MPL-2.0", "GFDL-1.3", "Artistic", "LGPL-2.1", "CC0-1.0", "Apache-2.0", "GPL-1", "LGPL-3")
REPOSITORY = Path(__file__).resolve().parents[4]


@dataclass(frozen=True)
class LongText:
    """A text with the name that reports give it; the same name is the same text, to the letter."""

    name: str
    text: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The text's sentences, white space folded."""
        return _sentences(self.text)


def take_words(sentences: Sequence[str], words: int, start: int = 0) -> list[str]:
    """Sentences of so many words together, from number `start` on and again from the first; the last may be cut off."""
    taken: list[str] = []
    left = words
    while left > 0:
        sentence = sentences[(start + len(taken)) % len(sentences)].split(" ")[:left]
        left -= len(sentence)
        taken.append(" ".join(sentence))
    return taken


def load(path: Path | None = None) -> LongText:
    """A text from a file, or without one the licence texts of the system, or else this repository's own.

    A .json file holds {"text": ...}, as RULER's PaulGrahamEssays.json does; any other file is plain text.
    """
    if path is None:
        return _licences()
    if not path.is_file():
        raise DataFileError(f"{path} is missing: a plain text, or a .json file with the text under the key text")
    raw = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            raw = json.loads(raw)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataFileError(f"{path} should hold an object with the text under the key text") from error
    return _named(path.stem, raw)


@cache
def _licences() -> LongText:
    paths = [LICENCES / name for name in LICENCE_NAMES if (LICENCES / name).is_file()]
    if paths:
        return _named("licences", "\n\n".join(path.read_text(encoding="utf-8") for path in paths))
    return _named("apache-licence", (REPOSITORY / "LICENSE").read_text(encoding="utf-8"))


def _named(name: str, text: str) -> LongText:
    if not text.strip():
        raise DataFileError(f"the text {name} is empty")
    return LongText(f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", text)


@cache
def _sentences(text: str) -> tuple[str, ...]:
    folded = re.sub(r"\s+", " ", text).strip()
    # An end mark, a closing quote perhaps, and a beginning that is no small letter: enough for filling.
    return tuple(part for part in re.split(r"(?<=[.!?])[\"')\]]? (?=[^a-z ])", folded) if part)
