# SPDX-License-Identifier: Apache-2.0
"""Compaction is indexing, bit by bit."""

import numpy as np
import pytest
import restkv
from case_layers import random_layer, random_w_o


@pytest.fixture(params=["standard", "snap_kv", "rest_kv_paper"])
def selected(request):
    query, key, value = random_layer()
    kept = restkv.select(restkv.policy(request.param, 40), query, key, value, w_o=random_w_o())
    return kept, key, value


def rows_of(kept, cache):
    group = kept.heads // cache.shape[1]
    return [cache[b, h // group][kept[b, h]] for b in range(kept.batch) for h in range(kept.heads)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.uint16])
def test_dense_and_ragged(selected, dtype):
    kept, key, value = selected
    key, value = (100 * key).astype(dtype), (100 * value).astype(dtype)
    dense = restkv.compact(kept, key, value)
    ragged = restkv.compact(kept, key, value, layout="ragged")
    begins = ragged[2]
    assert begins.dtype == np.int32 and begins.tolist() == [0, *np.cumsum(kept.lengths.ravel()).tolist()]
    for cache, packed, flat in zip((key, value), dense, ragged[:2]):
        assert packed.dtype == flat.dtype == dtype
        assert packed.shape == (2, kept.heads, kept.capacity, 16) and flat.shape == (kept.total, 16)
        for i, rows in enumerate(rows_of(kept, cache)):
            slots = packed[i // kept.heads, i % kept.heads]
            assert slots[: len(rows)].tobytes() == rows.tobytes()
            assert not slots[len(rows) :].any()
            assert flat[begins[i] : begins[i + 1]].tobytes() == rows.tobytes()


def test_keys_and_values_may_have_other_channels_and_strides(selected):
    kept, key, value = selected
    narrow = np.asfortranarray(value[..., :5])
    packed = restkv.compact(kept, key[:, :, :, ::-1], narrow)
    plain = restkv.compact(kept, key, value)
    assert (packed[0] == plain[0][..., ::-1]).all() and (packed[1] == plain[1][..., :5]).all()


def test_into_arrays_of_the_caller(selected):
    kept, key, value = selected
    plain = restkv.compact(kept, key, value)
    shape = (2, kept.heads, kept.capacity, 32)
    out = np.full(shape, np.nan, np.float32)[..., ::2], np.full(shape, np.nan, np.float32)[..., :16]
    made = restkv.compact(kept, key, value, out=out)
    assert made[0] is out[0] and made[1] is out[1]
    assert (out[0] == plain[0]).all() and (out[1] == plain[1]).all()
    flat = np.empty((kept.total, 16), np.float32), np.empty((kept.total, 16), np.float32)
    ragged = restkv.compact(kept, key, value, layout="ragged", out=flat)
    assert ragged[0] is flat[0] and (flat[1] == restkv.compact(kept, key, value, layout="ragged")[1]).all()


def test_in_place():
    query, key, value = random_layer()
    kept = restkv.select(restkv.policy("standard", 40), query, key, value, w_o=random_w_o())
    plain = restkv.compact(kept, key, value)
    moved = restkv.compact(kept, key, value, in_place=True)
    for before, cache, expected in zip(moved, (key, value), plain):
        assert np.shares_memory(before, cache) and before.shape == expected.shape
        for b in range(2):
            for h in range(2):
                n = kept.lengths[b, h]
                assert (before[b, h, :n] == expected[b, h, :n]).all()


def test_what_does_not_fit_is_refused(selected):
    kept, key, value = selected
    heads, room = kept.heads, kept.capacity

    def out(*shape, dtype=np.float32):
        return np.zeros(shape, dtype)

    fine = out(2, heads, room, 16)
    locked = fine.copy()
    locked.flags.writeable = False
    frozen = key.copy()
    frozen.flags.writeable = False
    for arguments, text, code in [
        ({"layout": "paged"}, "paged", "invalid_argument"),
        ({"out": fine}, "pair", "invalid_argument") if fine.shape[0] != 2 else ({"out": 3}, "pair", "invalid_argument"),
        ({"out": (fine, locked)}, "read-only", "invalid_argument"),
        ({"out": (fine, out(2, heads, room + 1, 16))}, f"{room + 1}.*{room}", "shape_mismatch"),
        ({"out": (fine, out(2, heads, room, 16, dtype=np.int32))}, "type", "invalid_argument"),
        ({"out": (fine, fine)}, "overlap", "aliasing"),
        ({"layout": "ragged", "out": (fine, fine)}, "4 axes", "shape_mismatch"),
        ({"layout": "ragged", "in_place": True}, "in_place", "invalid_argument"),
        ({"threads": 0}, "threads is 0", "invalid_argument"),
    ]:
        with pytest.raises(restkv.Error, match=text) as caught:
            restkv.compact(kept, key, value, **arguments)
        assert caught.value.code == code, arguments
    for wrong, text in [
        ((frozen, value, True), "read-only"),
        ((key, value[:, :, :50], False), "50"),
        ((key, value[:1], False), "1"),
        ((key, value.astype(np.float16), False), "alike"),
        ((key.astype(np.complex128), value, False), "16 bytes"),
        ((key, np.array([["a"]]), False), "value"),
    ]:
        with pytest.raises(restkv.Error, match=text):
            restkv.compact(kept, wrong[0], wrong[1], in_place=wrong[2])
