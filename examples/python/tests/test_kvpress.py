# SPDX-License-Identifier: Apache-2.0
"""`restkv.kvpress`: policies of restkv run by NVIDIA's kvpress, and kvpress's own beside them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
kvpress = pytest.importorskip("kvpress")

import restkv
from model_families import make_model, prompt
from restkv.kvpress import RestKVPress, with_current_transformers
from restkv.transformers import RestKVCache
from transformers import DynamicCache

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
RATIO = 0.6


@pytest.fixture(scope="module")
def small():
    return make_model("llama-small")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prefill(model, press, ids) -> DynamicCache:
    cache = DynamicCache()
    with with_current_transformers(press)(model):
        model.model(input_ids=ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", ["snap_kv", "standard", "knorm", "h2o"])
def test_press_keeps_what_the_cache_keeps(small, name: str) -> None:
    ids, step = prompt(1, 70), prompt(1, 1, seed=1)
    policy = restkv.policy(name, window=8, recent=8)
    ours = RestKVCache(policy.replace(compression_ratio=RATIO), small)
    small(ids, past_key_values=ours)
    small.set_attn_implementation("sdpa")
    cache = prefill(small, RestKVPress(policy, RATIO), ids)
    total = 0
    for index, layer in enumerate(small.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        kept = ours.kept(index)[0]
        total += sum(map(len, kept))
        if len(set(map(len, kept))) == 1:
            assert cache.layers[index].keys.shape[2] == len(kept[0]) == 28
            row, _, _ = ours.layers[index].rows.row(0, 1)
            assert torch.allclose(cache.layers[index].keys[0, 1], row, atol=1e-6)
            continue
        for h, positions in enumerate(kept):
            hidden = masked[2][masked[1] == h]
            assert sorted([*hidden.tolist(), *positions.tolist()]) == list(range(70))
    assert total == 3 * 2 * 28
    position = torch.tensor([[70]])
    got = small(step, past_key_values=cache, position_ids=position).logits
    expected = small_with_cache(small, ours, step)
    assert (got - expected).abs().max() < 1e-3


def small_with_cache(model, cache, step):
    model.set_attn_implementation("restkv")
    try:
        return model(step, past_key_values=cache).logits
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"name": "snap_kv", "window": 8}, lambda: kvpress.SnapKVPress(RATIO, window_size=8)),
        # TOVA itself may evict the newest token; kvpress keeps it.
        ({"name": "tova", "recent": 1}, lambda: kvpress.TOVAPress(RATIO)),
        ({"name": "key_diff", "n_sink": 0, "recent": 0}, lambda: kvpress.KeyDiffPress(RATIO)),
        ({"name": "knorm", "n_sink": 0, "recent": 0}, lambda: kvpress.KnormPress(RATIO)),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)
def test_the_same_tokens_as_kvpress(small, ours: dict, theirs) -> None:
    """All layers' keys are those of the full cache: kvpress evicts behind a layer's attention."""
    # No token twice: the norms of its keys would be equal.
    ids = 3 + torch.randperm(500, generator=torch.Generator().manual_seed(0))[None, :70]
    small.set_attn_implementation("sdpa")
    full = DynamicCache()
    small.model(input_ids=ids, past_key_values=full)
    press = RestKVPress(restkv.policy(**ours), RATIO)
    mine, others = prefill(small, press, ids), prefill(small, theirs(), ids)
    same = kept = 0
    for a, b, reference in zip(mine.layers, others.layers, full.layers, strict=True):
        for h in range(2):
            sets = []
            for keys in (a.keys[0, h], b.keys[0, h]):
                difference = (keys[:, None] - reference.keys[0, h]).abs().amax(-1)
                sets.append(set((difference < 1e-6).nonzero()[:, 1].tolist()))
                assert len(sets[-1]) == 28
            same += len(sets[0] & sets[1])
            kept += 28
    assert same == kept, f"{same} of {kept} tokens are the same"


def test_pipeline_runs(small) -> None:
    """What the pipeline does: prefill under the press, then a question and its answer token by token."""
    assert "press" in inspect.signature(kvpress.KVPressTextGenerationPipeline._forward).parameters
    press = with_current_transformers(RestKVPress(restkv.policy("standard", window=8), RATIO))
    small.set_attn_implementation("sdpa")
    small.generation_config.eos_token_id = 2

    class Words:
        model_max_length = 10_000

        @staticmethod
        def decode(tokens, **_):
            return " ".join(str(int(token)) for token in tokens)

    pipe = kvpress.KVPressTextGenerationPipeline.__new__(kvpress.KVPressTextGenerationPipeline)
    pipe.model, pipe.tokenizer = small, Words()
    tensors = {"context_ids": prompt(1, 70), "questions_ids": [prompt(1, 9, seed=1), prompt(1, 5, seed=2)]}
    answers = pipe._forward(tensors, max_new_tokens=4, press=press, cache=DynamicCache())
    assert [len(answer.split()) for answer in answers] == [4, 4]


def test_misuse() -> None:
    with pytest.raises(restkv.Error, match="compression_ratio is 1"):
        RestKVPress(compression_ratio=1)
    with pytest.raises(restkv.Error, match="each query head"):
        RestKVPress(restkv.policy("rest_kv_released"))
