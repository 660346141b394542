# SPDX-License-Identifier: Apache-2.0
"""`restkv.transformers`: random weights in the true geometry of each family's layers, against transformers' own cache
and against attention over the full cache that is restricted to what was kept."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

import restkv
from model_families import FAMILIES, make_model, prompt, restricted
from restkv.transformers import RestKVCache, RestKVLayer, attach, forget_metrics
from restkv.transformers.attend import Logits, attend_varlen
from restkv.transformers.projections import metric_of, weight_of
from restkv.transformers.rows import LEAST_ROOM, PaddedRows, RaggedRows
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

STANDARD = restkv.policy("standard", budget=24, window=8)
"""Heads compete, and W_O is needed."""
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

EVERYTHING = restkv.policy("standard", budget=100_000, window=8)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def small():
    return make_model("llama-small")


def logits_of(model, cache, ids, steps, mask=None, first: torch.Tensor | None = None) -> torch.Tensor:
    """Reads ids [batch, tokens], then one token after the other of `steps` [batch, n]; the last token's logits and
    those of each step [batch, n + 1, vocabulary]."""
    kwargs = {}
    if mask is not None:
        kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
    rows = [model(ids, past_key_values=cache, **kwargs).logits[:, -1]]
    rows += decode(model, cache, steps, mask)
    return torch.stack(rows, 1)


def decode(model, cache, steps, mask=None) -> list[torch.Tensor]:
    rows = []
    for i in range(steps.shape[1]):
        kwargs = {}
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            kwargs = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        rows.append(model(steps[:, i : i + 1], past_key_values=cache, **kwargs).logits[:, -1])
    return rows


def visible_of(cache: RestKVCache, tokens: int, pads: list[int] | None = None) -> dict[int, torch.Tensor]:
    """What a cache holds, as masks over the token axis for `restricted`."""
    masks = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, RestKVLayer) or layer.left_alone:
            continue
        kept = cache.kept(index)
        masks[index] = torch.zeros(len(kept), len(kept[0]), tokens, dtype=torch.bool)
        for b, of_sequence in enumerate(kept):
            for h, positions in enumerate(of_sequence):
                masks[index][b, h, positions.long() + (pads[b] if pads else 0)] = True
    return masks


def lengths_of(cache: RestKVCache) -> list[list[int]]:
    return [n for layer in cache.layers if isinstance(layer, RestKVLayer) for n in layer.rows.lengths]


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-4) -> None:
    difference = (a.double() - b.double()).abs().max().item()
    assert difference <= bound, f"differ by {difference}"


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    model = make_model(family)
    ids, steps = prompt(1, 64), prompt(1, 8, seed=1)
    attach(model)
    full = logits_of(model, DynamicCache(config=model.config), ids, steps)

    # A budget that nothing exceeds.
    everything = RestKVCache(EVERYTHING, model)
    close(logits_of(model, everything, ids, steps), full, 1e-5)
    assert all(n == 72 for of in lengths_of(everything) for n in of)

    # Tokens decoded behind an eviction see what was kept, at its true positions.
    cache = RestKVCache(STANDARD, model)
    first = model(ids, past_key_values=cache).logits[:, -1]
    close(first, full[:, 0], 1e-5)
    visible = visible_of(cache, 64)
    assert visible and all(mask.float().mean() < 0.5 for mask in visible.values())
    compressed = torch.stack(decode(model, cache, steps), 1)
    assert (compressed - full[:, 1:]).abs().max() > 1e-2
    with restricted(model, visible):
        reference = logits_of(model, DynamicCache(config=model.config), ids, steps)
    close(compressed, reference[:, 1:])


def test_plain_caches_are_as_with_sdpa() -> None:
    for family in ("llama-small", "gemma-3-small"):
        model = make_model(family)
        ids, steps = prompt(2, 40), prompt(2, 4, seed=1)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[0, :9] = 0
        expected = logits_of(model, DynamicCache(config=model.config), ids, steps, mask)
        attach(model)
        assert torch.equal(logits_of(model, DynamicCache(config=model.config), ids, steps, mask), expected)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("name", ["standard", "snap_kv", "rest_kv_released", "streaming_llm"])
def test_layouts_and_granularities(small, layout: str, name: str) -> None:
    ids, steps = prompt(2, 64), prompt(2, 6, seed=1)
    # Two sequences with other budgets for each head; one kept set for each query head with rest_kv_released.
    policy = restkv.policy(name, budget=24, window=8)
    cache = RestKVCache(policy, small, layout=layout)
    small(ids, past_key_values=cache)
    heads = 6 if policy.per_query_head else 2
    assert all(layer.rows.heads == heads for layer in cache.layers)
    assert all(isinstance(x.rows, {"padded": PaddedRows, "ragged": RaggedRows}[layout]) for x in cache.layers)
    if name == "standard":
        assert any(len(set(of)) > 1 for of in lengths_of(cache)), "heads should differ here"
    visible = visible_of(cache, 64)
    compressed = torch.stack(decode(small, cache, steps), 1)
    # A turn of many tokens behind the eviction.
    turn = prompt(2, 11, seed=2)
    cache.policy = None
    more = small(turn, past_key_values=cache).logits
    with restricted(small, visible):
        full = DynamicCache(config=small.config)
        close(compressed, logits_of(small, full, ids, steps)[:, 1:])
        close(more, small(turn, past_key_values=full).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [24, 100_000])
def test_batch_with_padding(small, side: str, budget: int) -> None:
    lengths, tokens = [64, 37, 5], 64
    ids, steps = prompt(3, tokens), prompt(3, 6, seed=1)
    mask = torch.zeros(3, tokens, dtype=torch.long)
    for b, n in enumerate(lengths):
        mask[b, slice(tokens - n, None) if side == "left" else slice(0, n)] = 1
    policy = STANDARD.replace(budget=budget)
    cache = RestKVCache(policy, small)
    batched = logits_of(small, cache, ids, steps, mask)
    stored = sum(map(sum, lengths_of(cache)))
    for b in range(3):
        alone = RestKVCache(policy, small)
        expected = logits_of(small, alone, ids[b : b + 1, mask[b].bool()], steps[b : b + 1])
        close(batched[b, 1:], expected[0, 1:], 1e-5 if budget > tokens else 1e-4)
        for layer in range(3):
            for mine, theirs in zip(cache.kept(layer)[b], alone.kept(layer)[0], strict=True):
                assert torch.equal(mine, theirs)
        stored -= sum(map(sum, lengths_of(alone)))
    assert stored == 0, "padding is counted"


def test_a_share_of_each_sequence(small) -> None:
    lengths = [64, 37, 5]
    ids = prompt(3, 64)
    mask = torch.stack([torch.arange(64) >= 64 - n for n in lengths]).long()
    cache = RestKVCache(restkv.policy("snap_kv", window=8, compression_ratio=0.75), small)
    small(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    # A quarter; of 37 tokens 9; and of 5 all, which the window protects.
    assert cache.layers[1].rows.lengths == [[16, 16], [9, 9], [5, 5]]


def test_padding_between_turns(small) -> None:
    ids = prompt(2, 40)
    turn = prompt(2, 20, seed=2)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 40:49] = 0  # the second turn of the first sequence is shorter
    steps = prompt(2, 4, seed=3)
    for layout in ("padded", "ragged"):
        cache = RestKVCache(STANDARD, small, layout=layout)
        small(ids, past_key_values=cache)
        batched = logits_of(small, cache, turn, steps, mask)
        for b in range(2):
            alone = RestKVCache(STANDARD, small, layout=layout)
            small(ids[b : b + 1], past_key_values=alone)
            expected = logits_of(small, alone, turn[b : b + 1, mask[b, 40:].bool()], steps[b : b + 1])
            close(batched[b], expected[0])
            for layer in range(3):
                for mine, theirs in zip(cache.kept(layer)[b], alone.kept(layer)[0], strict=True):
                    assert torch.equal(mine, theirs)


def test_prompt_in_chunks(small) -> None:
    ids, steps = prompt(2, 64), prompt(2, 5, seed=1)
    whole = RestKVCache(STANDARD, small)
    expected = logits_of(small, whole, ids, steps)
    # Evicted before the first single token: as if the prompt had come in one piece.
    chunks = RestKVCache(STANDARD, small, when="decode")
    for chunk in ids.split([30, 20, 14], dim=1):
        small(chunk, past_key_values=chunks)
        assert chunks.layers[0].evictions == 0
    close(torch.stack(decode(small, chunks, steps), 1), expected[:, 1:])
    assert all(
        torch.equal(a, b)
        for layer in range(3)
        for mine, theirs in zip(chunks.kept(layer), whole.kept(layer), strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    # Evicted after each chunk: memory stays at the budget, and later chunks see what is left.
    running = RestKVCache(STANDARD, small)
    full = DynamicCache(config=small.config)
    seen = 0
    for chunk in ids.split([30, 20, 14], dim=1):
        visible = visible_of(running, seen) if seen else {}
        got = small(chunk, past_key_values=running).logits
        with restricted(small, visible):
            close(got, small(chunk, past_key_values=full).logits)
        seen += chunk.shape[1]
        assert all(sum(of) / 2 == 24 for of in lengths_of(running))
    # generate in chunks.
    how = {"max_new_tokens": 6, "do_sample": False, "prefill_chunk_size": 17}
    plain = small.generate(ids, past_key_values=DynamicCache(config=small.config), **how)
    assert torch.equal(small.generate(ids, past_key_values=RestKVCache(EVERYTHING, small), **how), plain)


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 3}])
def test_generate(small, how: dict) -> None:
    ids = prompt(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0

    def generate(cache, inputs=ids, attention_mask=mask):
        torch.manual_seed(0)
        chosen = {"do_sample": False, "max_new_tokens": 12, **how}
        return small.generate(inputs, attention_mask=attention_mask, past_key_values=cache, **chosen)

    expected = generate(DynamicCache(config=small.config))
    assert torch.equal(generate(RestKVCache(EVERYTHING, small)), expected)
    cache = RestKVCache(STANDARD, small, slack=4)
    evicted = generate(cache)
    assert evicted.shape == expected.shape and not torch.equal(evicted, expected)
    assert all(sum(of) / 2 <= 24 + 4 for of in lengths_of(cache))
    assert cache.get_seq_length() == evicted.shape[1] - 1


def test_conversation(small) -> None:
    first, second = prompt(1, 40), prompt(1, 9, seed=1)

    def converse(cache):
        answer = small.generate(first, max_new_tokens=7, do_sample=False, past_key_values=cache)
        both = torch.cat([answer, second], 1)
        return small.generate(both, max_new_tokens=7, do_sample=False, past_key_values=cache)

    expected = converse(DynamicCache(config=small.config))
    assert torch.equal(converse(RestKVCache(EVERYTHING, small)), expected)
    cache = RestKVCache(STANDARD, small)
    end = converse(cache)
    assert cache.get_seq_length() == end.shape[1] - 1 == 62
    assert all(layer.evictions == 2 for layer in cache.layers)
    for layer in range(3):
        for positions in cache.kept(layer)[0]:
            # The window of the second turn, and what was decoded since, at their places.
            assert positions[-14:].tolist() == list(range(48, 62))
            assert positions.diff().min() > 0


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_eviction_while_decoding(small, layout: str, ratio: float) -> None:
    policy = STANDARD.replace(compression_ratio=ratio) if ratio else STANDARD.replace(budget=16)
    cache, full = RestKVCache(policy, small, slack=6, layout=layout), DynamicCache(config=small.config)
    ids, steps = prompt(1, 10), prompt(1, 60, seed=1)
    small(ids, past_key_values=full)
    small(ids, past_key_values=cache)
    for i in range(60):
        step = steps[:, i : i + 1]
        # Both in step: what the full cache stores has seen the same tokens.
        with restricted(small, visible_of(cache, 10 + i)):
            expected = small(step, past_key_values=full).logits
        close(small(step, past_key_values=cache).logits, expected)
        budget = int((11 + i) * 0.5) if ratio else 16
        assert all(sum(of) / 2 <= max(budget, 8) + 6 for of in lengths_of(cache))
    assert all(layer.evictions >= 4 for layer in cache.layers)
    assert torch.equal(cache.next_positions(), torch.tensor([[70]]))


def test_one_prefill_serves_many_policies(small) -> None:
    ids, steps = prompt(1, 64), prompt(1, 5, seed=1)
    full = RestKVCache(None, small, window=8)
    small(ids, past_key_values=full)
    before = full.bytes()
    policies = [STANDARD, restkv.policy("snap_kv", budget=16, window=8), restkv.policy("streaming_llm", budget=32)]
    forks = [full.fork().evict(policy) for policy in policies]
    assert full.bytes() == before and all(layer.evictions == 0 for layer in full.layers)
    alone = []
    for policy, fork in zip(policies, forks, strict=True):
        cache = RestKVCache(policy, small)
        small(ids, past_key_values=cache)
        for layer in range(3):
            for mine, theirs in zip(fork.kept(layer)[0], cache.kept(layer)[0], strict=True):
                assert torch.equal(mine, theirs)
        alone.append(torch.stack(decode(small, cache, steps), 1))
    # All variants and the full cache decoded as one batch.
    stacked = RestKVCache.stack([*forks, full])
    assert stacked.bytes() == sum(cache.bytes() for cache in [*forks, full])
    together = torch.stack(decode(small, stacked, steps.expand(4, -1)), 1)
    for b, expected in enumerate([*alone, torch.stack(decode(small, full.fork(), steps), 1)]):
        close(together[b], expected[0], 2e-5)
    # A fork that was evicted is evicted again by another policy.
    again = forks[0].fork().evict(restkv.policy("snap_kv", budget=12, window=8))
    assert all(of == [12, 12] for of in lengths_of(again))


def test_stack_of_different_prompts(small) -> None:
    policies = [STANDARD, EVERYTHING, STANDARD.replace(budget=12)]
    caches, alone = [], []
    steps = prompt(3, 5, seed=9)
    for b, (policy, tokens) in enumerate(zip(policies, (64, 31, 50), strict=True)):
        cache = RestKVCache(policy, small)
        small(prompt(1, tokens, seed=b), past_key_values=cache)
        caches.append(cache)
        alone.append(torch.stack(decode(small, cache.fork(), steps[b : b + 1]), 1))
    stacked = RestKVCache.stack(caches)
    assert stacked.next_positions(2).tolist() == [[64, 65], [31, 32], [50, 51]]
    mask = stacked.attention_mask(0)
    assert mask.sum(1).tolist() == [64, 31, 50] and mask.shape == (3, 64)
    together = torch.stack(decode(small, stacked, steps, mask), 1)
    for b in range(3):
        close(together[b], alone[b][0], 2e-5)
    assert stacked.kept(0)[1][0].tolist() == list(range(36))


def test_stack_and_then_evict(small) -> None:
    """Queries and padding of stacked caches stay with their sequences."""
    policy = restkv.policy("snap_kv", budget=9, window=8, kernel=1)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    sources = [(prompt(1, 5), None), (prompt(2, 20, seed=1), mask), (prompt(1, 30, seed=2), None)]
    steps = prompt(4, 5, seed=3)
    caches, alone = [], []
    for ids, of in sources:
        first = sum(len(cache.kept(0)) for cache in caches)
        caches.append(RestKVCache(None, small, window=8))
        facts = {} if of is None else {"attention_mask": of, "position_ids": (of.cumsum(1) - 1).clamp(min=0)}
        small(ids, past_key_values=caches[-1], **facts)
        for b in range(len(ids)):
            alone.append(RestKVCache(None, small, window=8))
            small(ids[b : b + 1, slice(None) if of is None else of[b].bool()], past_key_values=alone[-1])
            decode(small, alone[-1], steps[first + b : first + b + 1])
    stacked = RestKVCache.stack(caches)
    assert [len(x) for x in (row[0] for row in stacked.kept(0))] == [5, 14, 20, 30]
    decode(small, stacked, steps, stacked.attention_mask(0))
    stacked.evict(policy)
    for b, cache in enumerate(alone):
        cache.evict(policy)
        for layer in range(3):
            for mine, theirs in zip(stacked.kept(layer)[b], cache.kept(layer)[0], strict=True):
                assert torch.equal(mine, theirs)


def test_forks_do_not_touch_each_other(small) -> None:
    ids = prompt(1, 50)
    for policy in (EVERYTHING, STANDARD):
        for layout in ("padded", "ragged"):
            cache = RestKVCache(policy, small, layout=layout)
            small(ids, past_key_values=cache)
            small(prompt(1, 1, seed=7), past_key_values=cache)  # into memory of its own
            twin = cache.fork()
            shared = [layer.rows.key.data_ptr() for layer in twin.layers]
            assert shared == [layer.rows.key.data_ptr() for layer in cache.layers]
            apart = copy.deepcopy(cache)
            outcomes = []
            for other in (twin, apart):
                # In turns, so that each would read what the other wrote over it.
                outcomes.append([])
                for seed in range(3):
                    outcomes[-1] += decode(small, other, prompt(1, 2, seed=10 + seed))
                    if other is twin:
                        decode(small, cache, prompt(1, 2, seed=seed))
            assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_sequences_are_chosen(small) -> None:
    ids = prompt(3, 50)
    for layout in ("padded", "ragged"):
        cache = RestKVCache(STANDARD, small, layout=layout)
        small(ids, past_key_values=cache)
        step = prompt(3, 1, seed=1)
        expected = small(step, past_key_values=cache.fork()).logits
        for index in ([2, 0, 0], [1]):
            chosen = cache.fork()
            chosen.reorder_cache(torch.tensor(index))
            close(small(step[index], past_key_values=chosen).logits, expected[index], 1e-5)
        chosen = cache.fork()
        chosen.batch_select_indices(torch.tensor([1, 2]))
        close(small(step[1:], past_key_values=chosen).logits, expected[1:], 1e-5)
        chosen.batch_repeat_interleave(2)
        index = [1, 1, 2, 2]
        got = [layer.rows.lengths for layer in chosen.layers]
        decode(small, chosen, step[index])
        assert all(len(of) == 4 and of[0] == of[1] and of[2] == of[3] for of in got)


def resident_bytes() -> int:
    """Memory of this process, without what the allocator holds back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_is_freed() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=16, num_key_value_heads=16, head_dim=128, num_hidden_layers=3,
        vocab_size=512, intermediate_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cache = RestKVCache(restkv.policy("standard", budget=128), model, when="manual", window=32)
    model(prompt(1, 1536), past_key_values=cache, logits_to_keep=1)
    cache.fork().evict()  # so that the metrics and the library's scratch memory are there before
    full = resident_bytes()
    token = 16 * 2 * 128 * 4
    assert cache.bytes() == cache.bytes(allocated=True) == 3 * 1536 * token
    cache.evict()
    freed = full - resident_bytes()
    assert cache.bytes() == 3 * 128 * token
    # Each row has room for an eighth of the longest row, at least LEAST_ROOM.
    longest = max(map(max, lengths_of(cache)))
    slack = 3 * max(LEAST_ROOM, longest // 8) * token
    assert cache.bytes() <= cache.bytes(allocated=True) <= 1.125 * cache.bytes() + slack
    assert freed >= 0.9 * (3 * 1536 * token - cache.bytes(allocated=True)), f"{freed / 2**20:.0f} MiB were freed"
    # While the model runs, a layer is evicted before the next one is read: never all layers in full.
    small_peak = RestKVCache(restkv.policy("standard", budget=128), model)
    model(prompt(1, 1536), past_key_values=small_peak, logits_to_keep=1)
    assert small_peak.bytes() == cache.bytes()


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_appending_moves_nothing(small, layout: str) -> None:
    cache = RestKVCache(STANDARD.replace(budget=40), small, slack=10_000, layout=layout)
    small(prompt(1, 64), past_key_values=cache)
    moves, last = 0, cache.layers[0].rows.key.data_ptr()
    for _ in range(300):
        small(prompt(1, 1), past_key_values=cache)
        moves += cache.layers[0].rows.key.data_ptr() != last
        last = cache.layers[0].rows.key.data_ptr()
    assert 1 <= moves <= 300 // LEAST_ROOM


def test_a_part_of_a_larger_tensor_is_copied() -> None:
    """Keys and values that a model cuts from a fused projection would keep all of it alive."""
    fused = torch.zeros(1, 2, 10, 96)
    rows = PaddedRows.of_prompt(fused[..., 32:64], fused[..., 64:], torch.zeros(1, 10, dtype=torch.int32))
    assert rows.stored_bytes() == rows.allocated_bytes() == 2 * 10 * 64 * 4


def test_auto_layout_follows_the_lengths(small) -> None:
    ids = prompt(1, 64)
    uniform = RestKVCache(restkv.policy("snap_kv", budget=24, window=8), small)
    small(ids, past_key_values=uniform)
    assert all(isinstance(layer.rows, PaddedRows) and layer.rows.rows_are_equal for layer in uniform.layers)
    ragged = RestKVCache(restkv.policy("standard", budget=24, window=8, floor=0.0), small, padding=0.0)
    small(ids, past_key_values=ragged)
    for layer in ragged.layers:
        assert isinstance(layer.rows, RaggedRows) == (len(set(layer.rows.lengths[0])) > 1)
    assert any(isinstance(layer.rows, RaggedRows) for layer in ragged.layers)


def test_policies_that_look_at_every_query(small) -> None:
    ids = prompt(1, 48)
    policy = restkv.policy("h2o", budget=40)
    assert policy.needs_every_query
    cache = RestKVCache(policy, small)
    small(ids, past_key_values=cache)
    full = RestKVCache(None, small, window="all")
    for chunk in ids.split(20, dim=1):
        small(chunk, past_key_values=full)
    full.evict(policy)
    assert all(torch.equal(a, b) for x in range(3) for a, b in zip(full.kept(x)[0], cache.kept(x)[0], strict=True))
    with pytest.raises(restkv.Error, match="all queries, the cache remembers 64"):
        RestKVCache(None, small).evict(policy)
    with pytest.raises(restkv.Error, match="100 queries, the cache remembers 8"):
        RestKVCache(STANDARD, small).evict(STANDARD.replace(window=100))


def test_segments_are_those_of_a_whole_prompt(small) -> None:
    policy = STANDARD.replace(spatial="segments")
    for when in ("prefill", "decode"):
        with pytest.raises(restkv.Error, match=f"'{when}', 'manual' is needed"):
            RestKVCache(policy, small, when=when)
        with pytest.raises(restkv.Error, match="'manual' is needed"):
            RestKVCache(STANDARD, small, when=when).policy = policy
    caches = []
    for chosen in (policy, policy.replace(share=1.0), STANDARD.replace(spatial="none")):
        cache = RestKVCache(None, small, when="manual", window=8)
        small(prompt(1, 60), past_key_values=cache)
        caches.append(cache.evict(chosen).kept(0)[0])
    assert all(torch.equal(a, b) for a, b in zip(caches[1], caches[2], strict=True))
    assert not all(len(a) == len(b) and torch.equal(a, b) for a, b in zip(caches[0], caches[2], strict=True))


def test_selection_is_the_librarys(small) -> None:
    """The cache hands over the tensors that `restkv.select` should see: recorded from the model by a hook."""
    ids = prompt(1, 64)
    seen: dict[int, tuple] = {}

    def record(module, arguments, kwargs, output):
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        query, key, value = (
            getattr(module, name)(hidden).view(shape).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        cos, sin = (x[:, None] for x in kwargs["position_embeddings"])
        query, key = (x * cos + torch.cat((-x[..., 32 // 2 :], x[..., : 32 // 2]), -1) * sin for x in (query, key))
        seen[module.layer_idx] = query[:, :, -8:].contiguous(), key.contiguous(), value.contiguous()

    hooks = [layer.self_attn.register_forward_hook(record, with_kwargs=True) for layer in small.model.layers]
    cache = RestKVCache(STANDARD, small)
    small(ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    for index, tensors in seen.items():
        weight = small.model.layers[index].self_attn.o_proj.weight.detach().clone()
        kept = restkv.select(STANDARD, *(x.clone() for x in tensors), w_o=weight)
        for h, positions in enumerate(cache.kept(index)[0]):
            assert positions.tolist() == kept.positions[0, h, : kept.lengths[0, h]].tolist()


def test_scaled_logits() -> None:
    """Gemma 2 divides logits by sqrt(144) at 64 channels: policies see queries for which that is sqrt(64)."""
    model = make_model("gemma-2-small")
    cache = RestKVCache(STANDARD, model)
    model(prompt(1, 40), past_key_values=cache)
    plain = make_model("gemma-2-small")
    plain.model.layers[1].self_attn.scaling = 64**-0.5
    unscaled = RestKVCache(STANDARD, plain)
    plain(prompt(1, 40), past_key_values=unscaled)
    a, b = (x.layers[1].queries.view() for x in (cache, unscaled))
    close(a, b * (64 / 144) ** 0.5, 1e-5)


def test_cache_that_does_not_know_its_model(small) -> None:
    attach(small)
    ids, steps = prompt(1, 64), prompt(1, 4, seed=1)
    told, untold = RestKVCache(STANDARD, small), RestKVCache(STANDARD)
    assert torch.equal(logits_of(small, told, ids, steps), logits_of(small, untold, ids, steps))
    # Layers with a sliding window are found by what attention is called with.
    model = attach(make_model("gemma-3-small"))
    full = logits_of(model, DynamicCache(config=model.config), ids, steps)
    cache = RestKVCache(EVERYTHING)
    close(logits_of(model, cache, ids, steps), full, 1e-5)
    evicted, told = RestKVCache(STANDARD), RestKVCache(STANDARD, model)
    close(logits_of(model, evicted, ids, steps), logits_of(model, told, ids, steps), 1e-5)
    assert [layer.evictions for layer in evicted.layers] == [0, 1, 0]


def test_weights_of_other_kinds(small) -> None:
    plain = torch.nn.Linear(12, 8, bias=True)

    class Adapted(torch.nn.Module):
        """What a LoRA adapter or a quantised layer look like: a weight of their own is not the one that acts."""

        in_features = 12

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))
            self.dropout = torch.nn.Dropout(0.9)

        def forward(self, x):
            return plain(self.dropout(x)) + x[..., :8]

    close(weight_of(plain), plain.weight, 0)
    adapted = Adapted().train()
    close(weight_of(adapted), plain.weight + torch.eye(8, 12), 1e-6)
    assert adapted.dropout.training
    with pytest.raises(restkv.Error, match="no output projection"):
        metric_of(plain, 2)

    attention = small.model.layers[0].self_attn
    built = metric_of(attention, 6)
    assert metric_of(attention, 6) is built
    forget_metrics(small)
    assert metric_of(attention, 6) is not built


def test_misuse() -> None:
    model = make_model("llama-small")
    ids = prompt(1, 40)
    lost = RestKVCache(STANDARD)  # the model was not attached
    model(ids, past_key_values=lost)
    with pytest.raises(restkv.Error, match="attn_implementation='restkv'"):
        model(prompt(1, 1), past_key_values=lost)
    with pytest.raises(restkv.Error, match="attn_implementation='restkv'"):
        lost.evict()

    cache = RestKVCache(STANDARD, model)
    model(ids, past_key_values=cache)
    cache.crop(0)
    tokens = torch.zeros(1, 2, 1, 32)
    module = model.model.layers[0].self_attn
    attention = ALL_ATTENTION_FUNCTIONS["restkv"]
    shared = RestKVCache(STANDARD, model)
    marked, _ = shared.update(tokens, tokens, 0)
    attention(module, tokens.repeat(1, 3, 1, 1), marked, tokens, None, 0.0)
    calls: list[tuple[str, Callable]] = [
        ("cropped by 3 tokens", lambda: cache.crop(-3)),
        ("holds 1 sequences, 2 come", lambda: model(prompt(2, 1), past_key_values=cache)),
        ("attention with s_aux", lambda: attention(module, tokens, tokens, tokens, None, 0.0, s_aux=tokens)),
        ("read a second time", lambda: attention(module, tokens, marked, tokens, None, 0.0)),
        ("no policy", lambda: RestKVCache(None, model).evict()),
        ("when is 'never'", lambda: RestKVCache(STANDARD, when="never")),
        ("layout is 'flat'", lambda: RestKVCache(STANDARD, layout="flat")),
        ("slack is 0", lambda: RestKVCache(STANDARD, slack=0)),
        ("0 caches", lambda: RestKVCache.stack([])),
        ("empty", lambda: RestKVCache(STANDARD, model).next_positions()),
        ("must be bool", lambda: model(ids[:, :2], past_key_values=cache, attention_mask=torch.zeros(1, 1, 2, 42))),
    ]
    for message, call in calls:
        with pytest.raises(restkv.Error, match=message):
            call()
    cache.reset()
    assert cache.bytes() == 0 and cache.get_seq_length() == 0 and cache.kept(0) == []
    model(ids, past_key_values=cache)
    assert cache.layers[0].evictions == 1


def test_policy_travels_with_the_settings(small) -> None:
    cache = RestKVCache(STANDARD, small)
    assert pickle.loads(pickle.dumps(cache.policy)) == STANDARD
    cache.policy = STANDARD.replace(budget=16)
    small(prompt(1, 40), past_key_values=cache)
    assert all(sum(of) == 32 for of in lengths_of(cache))
    with pytest.raises(restkv.Error, match="99 queries, the cache remembers 8"):
        cache.policy = STANDARD.replace(window=99)
    assert "budget=16" in repr(cache)


@contextlib.contextmanager
def autograd(mode: str) -> Iterator[None]:
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "gradients"):
        yield


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("policy", [STANDARD, EVERYTHING], ids=["evicted", "full"])
def test_modes_of_autograd(small, layout: str, policy: restkv.Policy) -> None:
    """What was read in one of autograd's modes can be gone on with in another."""
    with torch.inference_mode(False):
        ids, step = prompt(1, 40), prompt(1, 1, seed=1)
    outcomes = []
    for first, then in itertools.permutations(["inference", "no gradients", "gradients"], 2):
        with autograd(first):
            cache = RestKVCache(policy, small, layout=layout)
            small(ids, past_key_values=cache)
            small(step, past_key_values=cache)
        with autograd(then):
            small(step, past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
        with autograd(first):
            outcomes.append(small(step, past_key_values=cache).logits.detach().clone())
        assert not any(layer.rows.key.requires_grad for layer in cache.layers)
    for outcome in outcomes[1:]:
        close(outcome, outcomes[0], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype) -> None:
    model = make_model("llama-small").to(dtype)
    ids, steps = prompt(2, 64), prompt(2, 4, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    attach(model)
    full = logits_of(model, DynamicCache(config=model.config), ids, steps, mask)
    cache = RestKVCache(EVERYTHING, model)
    close(logits_of(model, cache, ids, steps, mask), full, 0.1)
    evicted = RestKVCache(STANDARD, model, layout="ragged")
    logits_of(model, evicted, ids, steps, mask)
    assert evicted.layers[0].rows.key.dtype == dtype
    assert evicted.bytes() == sum(map(sum, lengths_of(evicted))) * 2 * 32 * 2


def test_variable_length_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel is called with: a row is a sequence, and the room behind it is not looked at."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def by_definition(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, enable_gqa, seqused_k):
        assert enable_gqa and max_q == 1 and int(cu_k.diff().max()) <= max_k
        assert all(x.dtype == torch.int32 for x in (cu_q, cu_k, seqused_k))
        output = torch.empty_like(query)
        for row, used in enumerate(seqused_k.tolist()):
            tokens = slice(int(cu_k[row]), int(cu_k[row]) + used)
            logits = query[int(cu_q[row])] @ key[tokens, 0].T * scale
            output[int(cu_q[row])] = torch.softmax(logits, -1) @ value[tokens, 0]
        return output

    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    rows = RaggedRows([[7, 3], [1, 12]], (torch.empty(0, 16), torch.empty(0, 16)))
    for tensor in (rows.key, rows.value):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor))))
    for _ in range(2):
        query = torch.randn(2, 6, 1, 16)
        expected = rows.attend(query, None, None, Logits(0.3, None))
        close(attend_varlen(query, rows, 0.3), expected, 1e-5)
        rows.append(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), torch.zeros(2, 1, dtype=torch.int32))
    assert rows.lengths == [[9, 5], [3, 14]]


def test_flash_attention_reads_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash_attn is called with, of which this stands in: causal attention that ends with the last key."""
    calls = []

    def flash_attn_func(query, key, value, *, dropout_p, softmax_scale, causal, window_size, softcap):
        assert causal and dropout_p == 0
        calls.append((query.shape[1], window_size))
        query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        logits = query @ key.transpose(-1, -2) * softmax_scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        n, tokens = logits.shape[-2:]
        behind = (torch.arange(n)[:, None] + tokens - n) - torch.arange(tokens)
        seen = (behind >= 0) if window_size[0] < 0 else (behind >= 0) & (behind <= window_size[0])
        output = torch.softmax(logits.masked_fill(~seen, -1e30), -1) @ value
        return output.transpose(1, 2).to(torch.bfloat16)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    for family in ("llama-small", "gemma-2-small"):
        model = make_model(family).to(torch.bfloat16)
        ids, steps = prompt(2, 20), prompt(2, 2, seed=1)
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        expected = [logits_of(model, RestKVCache(STANDARD, model), ids, steps, m) for m in (None, mask)]
        assert not calls
        model.config._attn_implementation = "flash_attention_2"
        attach(model)
        assert model.config._attn_implementation == "restkv_fa2"
        close(logits_of(model, RestKVCache(STANDARD, model), ids, steps), expected[0], 0.1)
        assert len(calls) >= 2 and calls[0] == (20, (-1, -1) if family == "llama-small" else (23, 0))
        calls.clear()
        # Not with padding, where there is a mask.
        close(logits_of(model, RestKVCache(STANDARD, model), ids, steps, mask), expected[1], 0.1)
        assert not calls


def test_policies_learn_their_layer(small) -> None:
    cache = RestKVCache(restkv.policy("pyramid_kv", budget=32, window=8, kernel=5), small)
    small(prompt(1, 120), past_key_values=cache)
    totals = [sum(of) for of in lengths_of(cache)]
    assert totals[0] > totals[1] > totals[2] and sum(totals) <= 3 * 2 * 32
