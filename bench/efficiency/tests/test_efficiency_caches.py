# SPDX-License-Identifier: Apache-2.0
"""Rows give the model's own answers where nothing is evicted, and their bytes are those of the formula."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from efficiency import attention
from efficiency.caches import counted_bytes, filled_cache
from efficiency.measure import Load, Reader, measure
from efficiency.rows import parsed_row
from transformers import DynamicCache, MistralConfig

LAYERS, HEADS, QUERY_HEADS, DIM, FLOAT = 2, 2, 8, 8, 4
A_TOKEN = LAYERS * HEADS * 2 * DIM * FLOAT  # bytes of its keys and values
LOAD = Load(tokens=300, decode=4, lead=1, budget=64)


def written(reader: Reader, prompt: torch.Tensor, tokens: int) -> list[int]:
    token = reader.prefill(prompt)
    out = [int(token)]
    for _ in range(tokens):
        token = reader.forward(token)
        out.append(int(token))
    return out


@torch.inference_mode()
def plain(model, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Without any cache, by transformers' own attention."""
    model.set_attn_implementation("eager")
    ids = prompt
    for _ in range(tokens + 1):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["slow", "tuned", "untouched", "standard/padded", "standard/ragged"])
def test_a_cache_that_holds_everything_writes_what_the_model_writes(model, prompt, name):
    expected = plain(model, prompt, 5)
    assert len(set(expected)) > 2
    whole = Load(tokens=300, decode=5, lead=0, budget=400)
    assert written(Reader(model, parsed_row(name), whole), prompt, 5) == expected


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("slow", 300),
        ("tuned", 300),
        ("untouched", 300),
        ("standard:allocation=uniform/padded", 64),
        ("standard/ragged", 64),
        ("snap_kv_kv_heads/padded", 64),
        ("cake/ragged", 64),  # one budget for all layers
        # A set for each of the 4 query heads of a KV head, of 16 tokens each: the same bytes.
        ("rest_kv_released:window=8/padded", 64),
    ],
)
def test_bytes_after_the_prompt_are_those_of_the_formula(model, prompt, name, tokens):
    measured = measure(model, parsed_row(name), prompt, LOAD)
    assert measured.attended_bytes == tokens * A_TOKEN
    assert measured.cache_bytes >= measured.attended_bytes


def test_bytes_of_the_weights(model, prompt):
    attention = 64 * (64 + 16 + 16 + 64)  # queries, keys, values, output
    parameters = 2 * (attention + 3 * 64 * 96 + 2 * 64) + 2 * 256 * 64 + 64  # layers, embeddings, last norm
    assert measure(model, parsed_row("tuned"), prompt, LOAD).weight_bytes == parameters * FLOAT


def test_allocated_bytes_of_the_baselines(model, prompt):
    tuned = measure(model, parsed_row("tuned"), prompt, LOAD)
    assert tuned.cache_bytes == tuned.cache_bytes_end == (300 + 1 + 4) * A_TOKEN  # allocated once
    slow = measure(model, parsed_row("slow"), prompt, LOAD)
    assert (slow.cache_bytes, slow.cache_bytes_end) == (300 * A_TOKEN, 305 * A_TOKEN)


def test_a_share_of_the_prompt_as_budget(model, prompt):
    measured = measure(model, parsed_row("standard/ragged"), prompt, Load(tokens=300, decode=4, lead=1, budget=0.2))
    assert measured.attended_bytes == 60 * A_TOKEN


def test_times_are_of_what_they_say(model, prompt):
    full = measure(model, parsed_row("tuned"), prompt, LOAD)
    assert full.evicting == full.decode_evicting == 0
    assert 0 < full.decode < full.ttft
    for name in ("standard/padded", "cake"):
        evicted = measure(model, parsed_row(name), prompt, LOAD)
        assert 0 < evicted.evicting < evicted.ttft
        assert evicted.decode_evicting == 0
    growing = measure(model, parsed_row("standard/padded"), prompt, Load(tokens=300, decode=70, lead=0, budget=64))
    assert 0 < growing.decode_evicting < growing.decode  # 64 tokens are the adapter's slack
    assert growing.peak_prefill is None  # of a GPU


def test_time_of_the_process_leaves_out_what_others_take(model, prompt, monkeypatch):
    """Here others take a second of each read prompt."""
    prefill = Reader.prefill

    def slept(self, tokens):
        time.sleep(1)
        return prefill(self, tokens)

    monkeypatch.setattr(Reader, "prefill", slept)
    assert measure(model, parsed_row("tuned"), prompt, LOAD).ttft > 1
    assert measure(model, parsed_row("tuned"), prompt, replace(LOAD, of_process=True)).ttft < 1


def test_too_many_tokens_for_memory_that_was_allocated_once(model):
    cache = filled_cache(model.config, 3)
    states = torch.zeros(1, HEADS, 2, DIM)
    cache.update(states, states, 0)
    assert cache.get_seq_length() == 2
    with pytest.raises(ValueError, match="4 tokens do not fit into a cache of 3"):
        cache.update(states, states, 0)


def test_counted_bytes_of_a_shared_storage():
    cache = DynamicCache()
    both = torch.zeros(2, 1, HEADS, 5, DIM)
    cache.update(both[0], both[1], 0)
    cache.layers[0].keys, cache.layers[0].values = both[0], both[1]
    assert counted_bytes(cache) == (both.nbytes, both.nbytes)


def test_a_sliding_window_is_refused():
    config = MistralConfig(sliding_window=16, num_hidden_layers=3)
    with pytest.raises(ValueError, match="3 of 3 layers have no full attention"):
        filled_cache(config, 10)


@pytest.mark.parametrize("function", [attention.slow, attention.tuned])
def test_prompts_in_pieces_are_refused(function):
    query, key = torch.zeros(1, QUERY_HEADS, 2, DIM), torch.zeros(1, HEADS, 5, DIM)
    with pytest.raises(ValueError, match="2 queries to 5 keys"):
        function(None, query, key, key, None)
