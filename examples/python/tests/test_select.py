# SPDX-License-Identifier: Apache-2.0
"""Kept sets: those of the golden cases and of the program, whatever arrays they come from."""

import json
import pickle
import subprocess

import numpy as np
import pytest
import restkv
from case_layers import GOLDEN, program, random_layer, random_w_o, read
from safetensors import safe_open
from safetensors.numpy import save_file

OF_A_LAYER = [name for name in restkv.policies() if not restkv.policy(name).over_layers]


def select(case, **more):
    policy = restkv.policy(**case.case)
    return policy, restkv.select(policy, *case.layer(), w_o=case.tensors["wo"], **more)


def check_head_lengths(case, policy, kept):
    """Ada-KV's release rounds each head's share on its own, which misses the total; a floor of 0 shows what it rounds."""
    floor, window = policy.keys()["floor"], policy.window
    free = policy.budget - window
    unfloored = restkv.select(policy.replace(floor=0.0), *case.layer())
    shares = (unfloored.lengths[0] - window) * (1 - floor)
    released = np.rint(shares + np.floor(free * floor)) + window
    assert released.tolist() == case.tensors["expected.head_lengths"].tolist()
    assert abs(kept.lengths[0] - (shares + free * floor + window)).max() < 1
    assert kept.total == kept.heads * policy.budget


def past_of(case, policy):
    return case.tensors["k"].shape[1] - policy.window


@pytest.mark.parametrize("path", [path for path in GOLDEN if "set-error" not in path.name], ids=lambda path: path.stem)
def test_golden_case(path):
    case = read(path)
    policy, kept = select(case)
    for head, expected in enumerate(case.tensors.get("expected.indices", ())):
        row = kept[0, head]
        row = row[row < past_of(case, policy)]
        if policy.keys()["spatial"] == "maxpool":  # neighbours are alike, and any of them may be kept
            scores = case.tensors["expected.smoothed"][head]
            np.testing.assert_allclose(np.sort(scores[row]), np.sort(scores[expected]), rtol=1e-5)
        else:
            assert row.tolist() == expected.tolist()
    if "expected.head_lengths" in case.tensors:
        check_head_lengths(case, policy, kept)
    scores = case.tensors.get("expected.smoothed", case.tensors.get("expected.score"))
    if scores is None or scores.shape[0] != kept.heads or policy.keys()["rescoring"] != "none":
        return
    keys = policy.keys()
    spatial = keys["spatial"] if "expected.smoothed" not in case.tensors else "none"
    if spatial != "none" or keys["shared"] or keys["unit"] > 1:
        return
    for head, row in enumerate(scores):  # whatever is kept scores at least what is not
        mask = kept.mask(case.tensors["k"].shape[1])[0, head, : len(row)].copy()
        protected = np.zeros_like(mask)
        protected[: keys["n_sink"]] = True
        newest = max(keys["recent"], keys["window"] if keys["method"] == "h2o" else 0)
        protected[case.tensors["k"].shape[1] - newest :] = True
        lowest = row[mask & ~protected].min(initial=np.inf)
        highest = row[~mask].max(initial=-np.inf)
        assert lowest >= highest - 1e-5 * abs(row[np.isfinite(row)]).max()


@pytest.mark.parametrize("name", [name for name in OF_A_LAYER if name != "full_cache"])
def test_the_program_keeps_the_same(name, tmp_path):
    query, key, value = random_layer(batch=1, tokens=150, queries=64)
    w_o = random_w_o()
    layer = {"layer_index": 1, "layer_count": 3}
    policy = restkv.policy(name, budget=48, window=8).replace(seed=5, **layer)
    tensors = {"q": query[0], "k": key[0], "v": value[0], "wo": w_o}
    save_file(tensors, tmp_path / "case.safetensors", {"case": json.dumps(policy.keys())})
    subprocess.run(
        [program(), "select", tmp_path / "case.safetensors", "-o", tmp_path / "out.safetensors", "--quiet"], check=True
    )
    kept = restkv.select(policy, query, key, value, metric=restkv.Metric(w_o, 4))
    with safe_open(tmp_path / "out.safetensors", "np") as out:
        past = (
            150
            - json.loads(
                subprocess.run(
                    [program(), "select", tmp_path / "case.safetensors", "-o", tmp_path / "out.safetensors", "--json"],
                    check=True,
                    capture_output=True,
                ).stdout
            )["window"]
        )
        assert kept.lengths[0].tolist() == out.get_tensor("head_lengths").tolist()
        for head, row in enumerate(out.get_tensor("indices")):
            ours = kept[0, head]
            assert ours[ours < past].tolist() == row[row >= 0].tolist()


@pytest.mark.parametrize("name", OF_A_LAYER)
def test_a_policy_looks_at_no_more_than_it_says(name):
    query, key, value = random_layer(tokens=120, queries=40)
    w_o = random_w_o()
    policy = restkv.policy(name, budget=40, window=8, lag_size=16, mass=0.3)
    layer = {"layer_index": 2, "layer_count": 4}
    kept = restkv.select(policy, query, key, value, w_o=w_o, **layer)
    assert kept.total < kept.batch * kept.heads * 120 or name == "full_cache"
    needs = policy.needs
    if "queries" not in needs:
        without = restkv.select(policy, None, key, value, w_o=w_o, **layer)
        # Without queries the heads are the KV heads, and each random score is one draw, not the mean of a group's.
        assert without == kept or policy.per_query_head or policy.keys()["method"] == "random"
        assert (without.heads, without.total) == (2, kept.total * 2 // kept.heads)
    if "values" not in needs:
        assert restkv.select(policy, query, key, None, **layer) == kept
    else:
        with pytest.raises(restkv.Error, match="value"):
            restkv.select(policy, query, key, None, w_o=w_o, **layer)
        other = value * np.exp(3 * np.random.default_rng(1).standard_normal((2, 2, 120, 1), dtype=np.float32))
        assert restkv.select(policy, query, key, other, w_o=w_o, **layer) != kept
    if "keys" not in needs:
        assert restkv.select(policy, query, np.full_like(key, np.nan), value, w_o=w_o, **layer) == kept
    if policy.needs_w_o:
        with pytest.raises(restkv.Error, match="W_O") as caught:
            restkv.select(policy, query, key, value, **layer)
        assert caught.value.code == "missing_input"
    elif not policy.needs_every_query and "queries" in needs:
        window = policy.window
        assert restkv.select(policy, query[:, :, -window:], key, value, **layer) == kept


def test_each_sequence_of_a_batch_is_selected_by_itself():
    w_o = random_w_o()
    query, key, value = random_layer(batch=3, queries=32)
    for name in OF_A_LAYER:
        policy = restkv.policy(name, 40, window=8)
        layer = {"layer_index": 2, "layer_count": 4}
        together = restkv.select(policy, query, key, value, w_o=w_o, **layer)
        for b in range(3):
            if policy.keys()["method"] in ("random", "keyformer", "leverage", "qfilter"):
                continue  # draws by the sequence, or takes all of them together
            alone = restkv.select(policy, query[b : b + 1], key[b : b + 1], value[b : b + 1], w_o=w_o, **layer)
            for h in range(alone.heads):
                assert together[b, h].tolist() == alone[0, h].tolist(), name


def test_metric_and_w_o_are_the_same():
    query, key, value = random_layer()
    w_o = random_w_o()
    for name in ("standard", "critical_kv", "la_prox", "defensive_kv"):
        policy = restkv.policy(name, 40)
        metric = restkv.Metric(w_o, 4)
        assert restkv.select(policy, query, key, value, metric=metric) == restkv.select(
            policy, query, key, value, w_o=w_o
        )
    assert (metric.query_heads, metric.head_dim) == (4, 16)


def test_strides_do_not_matter():
    query, key, value = random_layer()
    w_o = random_w_o()
    policy = restkv.policy("standard", 40)
    kept = restkv.select(policy, query, key, value, w_o=w_o)

    def tokens_first(array):
        return np.ascontiguousarray(array.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def with_gaps(array):
        wide = np.full((*array.shape[:3], 2 * array.shape[3]), np.nan, array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]

    def backwards(array):
        return np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1]

    for change in (tokens_first, with_gaps, backwards, np.asfortranarray):
        changed = [change(array) for array in (query, key, value)]
        assert restkv.select(policy, *changed, w_o=np.asfortranarray(w_o)) == kept, change
    assert restkv.select(policy, *(x.astype(np.float64) for x in (query, key, value)), w_o=w_o.astype(float)) == kept


def test_threads_do_not_matter():
    query, key, value = random_layer()
    policy = restkv.policy("standard", 40)
    kept = [restkv.select(policy, query, key, value, w_o=random_w_o(), threads=n) for n in (None, 1, 3)]
    assert kept[0] == kept[1] == kept[2]


def test_padding_is_never_kept():
    query, key, value = random_layer(batch=2, tokens=96)
    w_o = random_w_o()
    lengths = np.array([96, 60])
    for name in ("standard", "h2o", "key_diff", "random"):
        policy = restkv.policy(name, 48, window=8)
        alone = restkv.select(policy, query[1:, :, -60:], key[1:, :, -60:], value[1:, :, -60:], w_o=w_o)
        for dtype in (np.int32, np.int64, np.uint8):
            left = restkv.select(policy, query, key, value, w_o=w_o, lengths=lengths.astype(dtype))
            rows = [left[1, h] for h in range(left.heads)]
            assert all(row.min() >= 36 for row in rows)
            if name != "random":
                assert [row.tolist() for row in rows] == [(alone[0, h] + 36).tolist() for h in range(alone.heads)]
        right = restkv.select(policy, query, key, value, w_o=w_o, lengths=lengths, padding="right")
        assert all(right[1, h].max() < 60 for h in range(right.heads))


def test_right_padded_queries_lie_at_their_tokens():
    query, key, value = random_layer(batch=1, tokens=96)
    policy = restkv.policy("snap_kv", 32, window=8)
    lengths = np.array([60])
    whole = restkv.select(policy, query, key, value, lengths=lengths, padding="right")
    cut = restkv.select(policy, query[:, :, :60], key[:, :, :60], value[:, :, :60])
    assert whole == cut


def test_heads_of_different_lengths_and_tokens_that_stay():
    query, key, value = random_layer(batch=2, tokens=96)
    policy = restkv.policy("snap_kv", 32, window=8)
    head_lengths = np.array([[96, 50], [40, 96]])
    kept = restkv.select(policy, query[:, :, -8:], key, value, head_lengths=head_lengths)
    assert all(kept[b, h].min() >= 96 - head_lengths[b, h] for b in range(2) for h in range(2))
    plain = restkv.select(policy, query, key, value)
    evicted = np.flatnonzero(~plain.mask(96)[0].any(0))[[1, 5]]
    mask = np.zeros((2, 96), bool)
    mask[0, evicted] = True
    kept = restkv.select(policy, query, key, value, keep_mask=mask)
    assert kept.mask(96)[0][:, evicted].all() and kept.total == plain.total
    assert kept[1, 0].tolist() == plain[1, 0].tolist()


def test_kept_sets():
    query, key, value = random_layer()
    policy = restkv.policy("standard", 40)
    kept = restkv.select(policy, query, key, value, w_o=random_w_o())
    assert (kept.batch, kept.heads) == (2, 2) and len(kept) == 4 and len(list(kept)) == 4
    assert kept.positions.dtype == np.int32 and kept.positions.shape == (2, 2, kept.capacity)
    assert kept.capacity == kept.lengths.max() and kept.total == kept.lengths.sum() == 2 * 2 * 40
    for b in range(2):
        for h in range(2):
            row = kept[b, h]
            assert row.tolist() == kept.positions[b, h, : kept.lengths[b, h]].tolist() == sorted(set(row.tolist()))
            assert (kept.positions[b, h, kept.lengths[b, h] :] == -1).all()
            assert np.flatnonzero(kept.mask(96)[b, h]).tolist() == row.tolist()
    assert kept[-1, -1].tolist() == kept[1, 1].tolist()
    assert restkv.Kept.from_mask(kept.mask(96)) == kept == restkv.Kept(kept.positions, kept.lengths)
    assert pickle.loads(pickle.dumps(kept)) == kept and kept != 3
    assert kept.mask(500).shape == (2, 2, 500)
    for wrong in ((2, 0), (0, 2), (-3, 0)):
        with pytest.raises(IndexError):
            kept[wrong]
    with pytest.raises(restkv.Error, match="95"):
        kept.mask(95)
    with pytest.raises(restkv.Error, match="must be above"):
        restkv.Kept(np.array([[[3, 2]]]), np.array([[2]]))
    with pytest.raises(restkv.Error, match="capacity is 2"):
        restkv.Kept(np.array([[[3, 2]]]), np.array([[3]]))
    with pytest.raises(restkv.Error, match=r"\[1, 2\]"):
        restkv.Kept(np.array([[[3, 2]]]), np.array([[1, 1]]))


def test_arrays_outlive_what_they_came_from():
    query, key, value = random_layer()
    kept = restkv.select(restkv.policy("snap_kv", 40), query, key, value)
    positions, row = kept.positions, kept[1, 1]
    assert np.shares_memory(positions, row)
    before = positions.copy()
    del kept
    for _ in range(20):
        restkv.select(restkv.policy("random", 40), query, key, value)
    assert (positions == before).all()


def test_no_tokens_and_no_sequences():
    policy = restkv.policy("snap_kv", 40)
    for batch, tokens in ((0, 10), (2, 0)):
        empty = np.zeros((batch, 2, tokens, 8), np.float32)
        kept = restkv.select(policy, empty, empty, empty)
        assert (kept.batch, kept.capacity, kept.total) == (batch, 0, 0)
        key, value = restkv.compact(kept, empty, empty)
        assert key.shape == value.shape == (batch, 2, 0, 8)
        ragged = restkv.compact(kept, empty, empty, layout="ragged")
        assert ragged[0].shape == (0, 8) and ragged[2].tolist() == [0] * (batch * 2 + 1)
        assert kept.mask(tokens).shape == (batch, 2, tokens)
