# SPDX-License-Identifier: Apache-2.0
"""`restkv.transformers` with budgets over all layers: one choice behind a prompt, and again while decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

import restkv
from model_families import make_model, prompt, restricted
from restkv.transformers import RestKVCache, RestKVLayer
from restkv.transformers.projections import metric_of
from transformers import DynamicCache

OVER_LAYERS = [name for name in restkv.policies() if restkv.policy(name).over_layers]
BUDGET, LAYERS, HEADS = 24, 3, 2
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def small():
    return make_model("llama-small")


def policy_of(name: str) -> restkv.Policy:
    return restkv.policy(name, budget=BUDGET, window=8, mass=0.3)


def kept_of(cache: RestKVCache) -> list[list[list[list[int]]]]:
    """Positions [layers][batch][heads]."""
    return [
        [[row.tolist() for row in rows] for rows in cache.kept(index)]
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, RestKVLayer)
    ]


def totals(cache: RestKVCache) -> list[int]:
    """Tokens that each sequence keeps in all layers and heads."""
    kept = kept_of(cache)
    return [sum(len(row) for of_layer in kept for row in of_layer[b]) for b in range(len(kept[0]))]


def full_cache(model, ids, mask=None) -> RestKVCache:
    """A prompt with nothing evicted, read in two chunks."""
    cache = RestKVCache(None, model, when="manual", window=16)
    at = ids.shape[1] // 2
    for part in (slice(0, at), slice(at, None)):
        seen = None if mask is None else mask[:, : part.stop]
        model(ids[:, part], past_key_values=cache, attention_mask=seen)
    return cache


@pytest.mark.parametrize("name", OVER_LAYERS)
def test_a_prompt_is_chosen_from_once(small, name: str) -> None:
    ids = prompt(1, 64)
    cache = RestKVCache(policy_of(name), small)
    small(ids, past_key_values=cache)
    full = full_cache(small, ids)
    layers = [
        (layer.queries.view(), *layer.prompt.dense(), metric_of(layer.module, 3 * HEADS)) for layer in full.layers
    ]
    expected = restkv.select_layers(policy_of(name), layers)
    assert kept_of(cache) == [[[row.tolist() for row in kept]] for kept in expected]
    assert totals(cache) == [LAYERS * HEADS * BUDGET]
    assert len({n for kept in expected for n in kept.lengths.flatten().tolist()}) > 1, "all heads have the same share"
    assert kept_of(full.evict(policy_of(name))) == kept_of(cache)


@pytest.mark.parametrize("name", ["lava_layers", "la_prox_global"])
def test_tokens_behind_it_see_what_was_kept(small, name: str) -> None:
    ids, steps = prompt(2, 64), prompt(2, 4, seed=1)
    cache = RestKVCache(policy_of(name), small)
    small(ids, past_key_values=cache)
    visible = {}
    for index, of_layer in enumerate(kept_of(cache)):
        visible[index] = torch.zeros(2, HEADS, 64, dtype=torch.bool)
        for b, h in itertools.product(range(2), range(HEADS)):
            visible[index][b, h, of_layer[b][h]] = True
    with restricted(small, visible):
        reference = DynamicCache(config=small.config)
        small(ids, past_key_values=reference)
        expected = [small(step, past_key_values=reference).logits for step in steps.split(1, dim=1)]
    for step, of_reference in zip(steps.split(1, dim=1), expected, strict=True):
        torch.testing.assert_close(small(step, past_key_values=cache).logits, of_reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_it_is_chosen_again_while_decoding(small, when: str) -> None:
    policy, slack = policy_of("lowest_error_global"), 5
    cache = RestKVCache(policy, small, when=when, slack=slack)
    small(prompt(2, 40), past_key_values=cache)
    evictions = [layer.evictions for layer in cache.layers]
    assert evictions == [int(when == "prefill")] * LAYERS
    exact, most = [LAYERS * HEADS * BUDGET] * 2, LAYERS * HEADS * (BUDGET + slack + (when == "decode"))
    for step in prompt(2, 24, seed=1).split(1, dim=1):
        small(step, past_key_values=cache)
        now = [layer.evictions for layer in cache.layers]
        assert len(set(now)) == 1
        if now != evictions:
            # The token that came last is stored behind an eviction by "decode".
            assert totals(cache) == (exact if when == "prefill" else [n + LAYERS * HEADS for n in exact])
        evictions = now
        assert max(totals(cache)) <= most
    assert evictions[0] >= 4
    assert all(row[-1] == 63 for of_layer in kept_of(cache) for rows in of_layer for row in rows)


def test_variants_of_one_prompt_decode_as_a_batch(small) -> None:
    full, step = full_cache(small, prompt(1, 64)), prompt(1, 1, seed=1)
    variants = [full.fork().evict(policy_of(name)) for name in ("cake", "lava_layers", "la_prox_global")]
    assert totals(full) == [LAYERS * HEADS * 64]
    stacked = RestKVCache.stack(variants)
    together = small(step.expand(3, 1), past_key_values=stacked).logits
    for b, variant in enumerate(variants):
        alone = small(step, past_key_values=variant).logits
        torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(small, side: str) -> None:
    """Sequences of a batch are chosen from as they are alone."""
    ids, policy = prompt(2, 64), policy_of("cake")
    mask = torch.ones(2, 64, dtype=torch.long)
    part = slice(20, None) if side == "left" else slice(0, 44)
    mask[1] = 0
    mask[1, part] = 1
    cache = RestKVCache(policy, small, when="manual")
    small(ids, past_key_values=cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache.evict(policy)
    for b, alone_ids in enumerate((ids[:1], ids[1:, part])):
        alone = RestKVCache(policy, small)
        small(alone_ids, past_key_values=alone)
        assert [of_layer[b] for of_layer in kept_of(cache)] == [of_layer[0] for of_layer in kept_of(alone)]


def test_a_cache_that_was_not_told_its_model_and_one_with_sliding_windows(small) -> None:
    ids = prompt(1, 64)
    policy = policy_of("layer_defensive_kv")
    told, untold = RestKVCache(policy, small), RestKVCache(policy)
    for cache in (told, untold):
        small(ids, past_key_values=cache)
    assert kept_of(told) == kept_of(untold)

    gemma = make_model("gemma-3-small")
    cache = RestKVCache(policy, gemma)
    gemma(ids, past_key_values=cache)
    assert [isinstance(layer, RestKVLayer) for layer in cache.layers] == [False, True, False]
    assert totals(cache) == [BUDGET]  # one head of one layer
    untold = RestKVCache(policy)
    gemma(ids, past_key_values=untold)
    assert kept_of(untold)[1] == kept_of(cache)[0]
    assert [layer.left_alone for layer in untold.layers] == [True, False, True]


def test_other_users_of_policies_say_so(small) -> None:
    policy = policy_of("cake")
    cache = RestKVCache(None, small, when="manual")
    small(prompt(1, 40), past_key_values=cache)
    with pytest.raises(restkv.Error, match="select_layers"):
        cache.layers[0].evict(policy)
    cache.layers[0].evict(restkv.policy("snap_kv", budget=16, window=8))
    cache.layers[1].evict(restkv.policy("snap_kv", budget=20, window=8))
    with pytest.raises(restkv.Error, match="budget is 2 tokens per head"):
        cache.evict(policy.replace(budget=2))
    pytest.importorskip("kvpress", reason="needs kvpress")
    from restkv.kvpress import RestKVPress

    with pytest.raises(restkv.Error, match="all layers at once"):
        RestKVPress(policy, compression_ratio=0.5)
