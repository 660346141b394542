# SPDX-License-Identifier: Apache-2.0
"""Output errors, against attention computed apart from it in float64."""

import numpy as np
import pytest
import restkv
from case_layers import GOLDEN, random_layer, random_w_o, read


def attention(query, key, value, mask):
    """Outputs of the newest queries over the tokens of a mask, in float64. [batch, query_heads, queries, head_dim]"""
    group = query.shape[1] // key.shape[1]
    key, value = (np.repeat(x.astype(np.float64), group, 1) for x in (key, value))
    queries, tokens = query.shape[2], key.shape[2]
    logits = query.astype(np.float64) @ key.swapaxes(2, 3) / np.sqrt(query.shape[3])
    seen = np.arange(tokens) <= np.arange(tokens - queries, tokens)[:, None]
    logits = np.where(seen & np.repeat(mask, query.shape[1] // mask.shape[1], 1)[:, :, None], logits, -np.inf)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return shares @ value, shares


@pytest.mark.parametrize("name", ["standard", "rest_kv_paper"])
@pytest.mark.parametrize("with_w_o", [True, False])
def test_against_attention(name, with_w_o):
    query, key, value = random_layer(queries=32)
    w_o = random_w_o()
    kept = restkv.select(restkv.policy(name, 40), query, key, value, w_o=w_o)
    full, shares = attention(query, key, value, np.ones((2, 1, 96), bool))
    part, _ = attention(query, key, value, kept.mask(96))
    change = part - full
    errors = restkv.output_error(kept, query, key, value, w_o=w_o if with_w_o else None)
    assert errors.projected == with_w_o

    def behind(outputs):  # [batch, queries, hidden]
        flat = outputs.transpose(0, 2, 1, 3).reshape(2, 32, -1)
        return flat @ w_o.astype(np.float64).T if with_w_o else flat

    norm = np.linalg.norm
    np.testing.assert_allclose(errors.head, norm(change, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(errors.head_output_norm, norm(full, axis=-1), rtol=1e-9)
    np.testing.assert_allclose(errors.layer, norm(behind(change), axis=-1), rtol=1e-9)
    np.testing.assert_allclose(errors.layer_output_norm, norm(behind(full), axis=-1), rtol=1e-9)
    assert errors.mean_relative() == pytest.approx(norm(behind(change)) / norm(behind(full)), rel=1e-9)
    ratios = norm(behind(change), axis=-1) / norm(behind(full), axis=-1)
    assert errors.worst_relative() == pytest.approx(ratios.max(), rel=1e-9)
    evicted = ~np.repeat(kept.mask(96), 4 // kept.heads, 1)
    np.testing.assert_allclose(errors.evicted_mass, (shares * evicted[:, :, None]).sum(-1), rtol=1e-7)
    if with_w_o:
        heads = w_o.astype(np.float64).reshape(-1, 4, 16)
        projected = np.stack([change[:, h] @ heads[:, h].T for h in range(4)], 1)
        np.testing.assert_allclose(errors.head_projected, norm(projected, axis=-1), rtol=1e-9)
        same = restkv.output_error(kept, query, key, value, metric=restkv.Metric(w_o, 4))
        assert same.mean_relative() == pytest.approx(errors.mean_relative(), rel=1e-9)
    else:
        assert errors.head_projected is None
    last = restkv.output_error(kept, query, key, value, queries=3)
    np.testing.assert_allclose(last.head, errors.head[:, :, -3:], rtol=1e-12)


def test_nothing_evicted_costs_nothing():
    query, key, value = random_layer(queries=8)
    kept = restkv.select(restkv.policy("full_cache"), query, key, value)
    errors = restkv.output_error(kept, query, key, value)
    assert errors.mean_relative() == errors.worst_relative() == 0 and errors.greedy_ratio() == 1


@pytest.mark.parametrize("path", [path for path in GOLDEN if "set-error" in path.name], ids=lambda path: path.stem)
def test_golden_case(path):
    case = read(path)
    window = case.case["window"]
    kept = restkv.Kept.from_mask(case.tensors["expected.keep"][None])
    errors = restkv.output_error(kept, *case.layer(), w_o=case.tensors["wo"], queries=window)
    np.testing.assert_allclose(errors.head[0], case.tensors["expected.value_error"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(errors.head_projected[0], case.tensors["expected.output_error_per_head"], rtol=2e-5)
    np.testing.assert_allclose(errors.layer[0], case.tensors["expected.output_error_layer"], rtol=2e-5)


def test_errors():
    query, key, value = random_layer(queries=8)
    kept = restkv.select(restkv.policy("snap_kv", 40, window=8), query, key, value)
    for arguments, text in [
        ({"queries": 0}, "queries is 0"),
        ({"queries": 9}, "9"),
        ({"w_o": random_w_o()[:, :-1]}, "63"),
        ({"metric": restkv.Metric(random_w_o(2, 32), 2)}, "2 query heads"),
        ({"w_o": random_w_o(), "metric": restkv.Metric(random_w_o(), 4)}, "exclude"),
    ]:
        with pytest.raises(restkv.Error, match=text):
            restkv.output_error(kept, query, key, value, **arguments)
    with pytest.raises(restkv.Error, match="value is None"):
        restkv.output_error(kept, query, key, None)
    value[0, 0, 0, 0] = np.inf
    with pytest.raises(restkv.Error, match="inf"):
        restkv.output_error(kept, query, key, value)
    with pytest.raises(restkv.Error, match="0 to 95|tokens"):
        restkv.output_error(kept, query, key[:, :, :50], value[:, :, :50])
