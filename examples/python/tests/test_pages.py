# SPDX-License-Identifier: Apache-2.0
"""The Python that the pages show is run, block after block of a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.2")

ROOT = Path(__file__).parents[3]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if "```python" in path.read_text())
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


def what_pages_assume() -> dict:
    """A layer of Llama-3-8B's heads, and a small model with a prompt."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    inputs = {"input_ids": torch.randint(1, 128, (1, 700)), "attention_mask": torch.ones(1, 700, dtype=torch.long)}
    return {
        "query": torch.randn(1, 32, 32, 16),
        "key": torch.randn(1, 8, 1500, 16),
        "value": torch.randn(1, 8, 1500, 16),
        "o_proj": torch.nn.Linear(512, 512, bias=False),
        "model": transformers.LlamaForCausalLM(config).eval(),
        "inputs": inputs,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path) -> None:
    names = what_pages_assume()
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), names)  # noqa: S102: our own pages
    if "loss" in names:
        assert names["new_key"].shape == (1, 8, int(names["kept"].lengths.max()), 16)
        assert 0 < names["loss"] < 1
    assert names["cache"].bytes() < 0.9 * 2 * 2 * 4 * 700 * 16 * 4  # a part of what the prompt's keys and values are


def test_pages_are_found() -> None:
    assert [page.name for page in PAGES] == ["README.md", "python.md"]
