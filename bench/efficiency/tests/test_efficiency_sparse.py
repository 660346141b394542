# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: flex_attention's plain form on the CPU, against dense attention under the same mask."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from efficiency import sparse
from efficiency.attention import prompts_read_by
from efficiency.measure import Load, Reader
from efficiency.rows import parsed_row
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TOKENS = 700  # 6 blocks, the last of them short
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    # Blocks with directions of their own, so that their means tell them apart.
    key = draw(1, 2, TOKENS, 16) + 2 * draw(1, 2, 6, 16).repeat_interleave(128, dim=2)[:, :, :TOKENS]
    query = draw(1, 4, TOKENS, 16) + 2 * draw(1, 4, 6, 16).repeat_interleave(128, dim=2)[:, :, :TOKENS]
    return query, key, draw(1, 2, TOKENS, 16)


def read(states, gamma: float) -> torch.Tensor:
    return sparse.flex_reader(gamma, flex_attention)(None, *states, None)[0]


def dense(states, mask: torch.Tensor) -> torch.Tensor:
    output = scaled_dot_product_attention(*states, attn_mask=mask, enable_gqa=True)
    return output.transpose(1, 2)


def test_all_blocks_are_dense_attention(states):
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    torch.testing.assert_close(read(states, 1.1), dense(states, causal), rtol=1e-4, atol=1e-5)


def test_chosen_blocks_are_what_is_seen(states):
    chosen = sparse.chosen_blocks(*states[:2], 0.5)
    assert not torch.equal(chosen, torch.ones_like(chosen).tril())
    mask = chosen.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :TOKENS, :TOKENS]
    mask = mask & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    torch.testing.assert_close(read(states, 0.5), dense(states, mask), rtol=1e-4, atol=1e-5)


def test_fewest_blocks_that_reach_the_share(states):
    query, key, _ = states
    gamma = 0.6
    chosen = sparse.chosen_blocks(query, key, gamma)[0]
    pooled = [torch.stack([part.mean(1) for part in x[0].split(128, dim=1)], 1) for x in (query, key)]
    for head in range(4):
        for block in range(6):
            shares = torch.softmax(pooled[0][head, block] @ pooled[1][head // 2, : block + 1].T / 4, -1)
            expected = {0, block, max(0, block - 1)}
            total = 0.0
            for index in shares.argsort(descending=True).tolist():
                if total >= gamma:
                    break
                expected.add(index)
                total += float(shares[index])
            assert set(chosen[head, block].nonzero().flatten().tolist()) == expected


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tuned", "standard/ragged"])
def test_caches_behind_a_sparse_prompt(model, prompt, name):
    """Both the tuned baseline and the adapter read the prompt by it; with all blocks nothing changes."""
    load = Load(tokens=300, decode=2, lead=0, budget=64)
    expected, reader = Reader(model, parsed_row(name), load), Reader(model, parsed_row(name), load)
    calls = []

    def counting(*arguments, **named):
        calls.append(arguments[1].shape[2])
        return sparse.flex_reader(1.1, flex_attention)(*arguments, **named)

    reader.sparse = counting
    first, second = expected.prefill(prompt), reader.prefill(prompt)
    assert calls == [300, 300]  # once a layer, and not for tokens that are written
    assert torch.equal(first, second)
    assert torch.equal(expected.forward(first), reader.forward(second))
    if name != "tuned":
        for layer in range(2):
            pairs = zip(expected.cache.kept(layer)[0], reader.cache.kept(layer)[0], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_dense_attention_is_back_behind_it():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with prompts_read_by(lambda *_, **__: None):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_parts_of_prompts_are_refused(states):
    query, key, value = states
    with pytest.raises(ValueError, match="4 queries to 700 keys"):
        read((query[:, :, :4], key, value), 0.9)


def test_lists_of_blocks_are_the_chosen_ones(states):
    """What a compiled kernel goes by: those on the diagonal under the mask, the others whole."""
    chosen = sparse.chosen_blocks(*states[:2], 0.5)
    mask = sparse.block_mask(chosen, TOKENS)
    for counts, lists, expected in (
        (mask.kv_num_blocks, mask.kv_indices, chosen & torch.eye(6, dtype=torch.bool)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, chosen & ~torch.eye(6, dtype=torch.bool)),
    ):
        for head in range(4):
            for block in range(6):
                listed = lists[0, head, block, : counts[0, head, block]].tolist()
                assert listed == expected[0, head, block].nonzero().flatten().tolist()


def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="needs a GPU, the device is cpu"):
        sparse.reader("minference", "cpu")
    assert sparse.reader("dense", "cpu") is None


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(sparse, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the package minference is not installed"):
        sparse.reader("minference", "cuda")
