# SPDX-License-Identifier: Apache-2.0
"""Arrays on a device: `select`, `compact` and `output_error` by a GPU's kernels, against the CPU's.

Every test runs twice. "kernels": the bodies of the kernels on the CPU, in the library that `ninja host_kernels` makes
(RESTKV_HOST_KERNELS names it), with arrays of the host taken for a device's. "cuda": on a GPU."""

import importlib.util
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import restkv
from case_layers import ROOT, random_layer, random_w_o
from restkv import _restkv

torch = pytest.importorskip("torch")

OF_A_LAYER = [name for name in restkv.policies() if not restkv.policy(name).over_layers]
# What no kernel does: rescorings, and scores of whole heads.
ON_THE_CPU = {
    *("critical_kv", "critical_ada_kv", "snap_kv_caote", "h2o_caote", "defensive_kv", "lava", "r_kv"),
    *("knorm", "key_diff", "lag_kv", "cur_dkv", "leverage_score", "key_redundancy", "value_range", "la_cache"),
    *("expected_attention", "q_filter", "cap_kv"),
}
HOST = 1  # DLPack's kind of device


def host_kernels() -> object:
    """The library of the kernels on the CPU."""
    places = [Path(os.environ["RESTKV_HOST_KERNELS"])] if "RESTKV_HOST_KERNELS" in os.environ else []
    places += sorted((ROOT / "build").glob("*/examples/python/_restkv_host_kernels*.so"))
    places += sorted((ROOT / "build" / "python" / "meson").glob("examples/python/_restkv_host_kernels*.so"))
    for place in places:
        if place.is_file():
            spec = importlib.util.spec_from_file_location("_restkv_host_kernels", place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.library
    pytest.skip("there are no host kernels: build them by `ninja host_kernels`, or name them in RESTKV_HOST_KERNELS")


class Place:
    """Where a test's arrays lie."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, *arrays: np.ndarray | None) -> tuple:
        """Tensors of the same elements."""
        return tuple(None if x is None else torch.as_tensor(x).to(self.device) for x in arrays)

    def on_cpu(self, call, *arguments, **keywords):
        """What the CPU makes of the same."""
        with self.by_cpu():
            return call(*arguments, **keywords)

    def by_cpu(self):
        return off() if self.device == "cpu" else pytest.MonkeyPatch.context()


class off:
    """Arrays of the host are the CPU's again, within a block."""

    def __enter__(self):
        _restkv._forget_devices(HOST)

    def __exit__(self, *_):
        _restkv._use_devices(host_kernels())


@pytest.fixture(params=["kernels", "cuda"])
def place(request) -> Iterator[Place]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        if "NVIDIA GPUs" not in _restkv._devices():
            pytest.skip("the module was built without CUDA")
        with torch.cuda.stream(torch.cuda.Stream()):
            yield Place("cuda")
        return
    _restkv._use_devices(host_kernels())
    yield Place("cpu")
    _restkv._forget_devices(HOST)


def rows(kept: restkv.Kept) -> list[list[int]]:
    return [row.tolist() for row in kept]


@pytest.mark.parametrize("name", OF_A_LAYER)
def test_every_policy_keeps_what_the_cpu_keeps(place, name):
    query, key, value = random_layer(batch=2, tokens=120, queries=48)
    metric = restkv.Metric(random_w_o(), 4)
    policy = restkv.policy(name, 40, window=8)
    layer = {"metric": metric, "layer_index": 1, "layer_count": 4}
    if name in ON_THE_CPU:
        with pytest.raises(restkv.Error, match="CPU alone") as caught:
            restkv.select(policy, *place(query, key, value), **layer)
        assert caught.value.code == "unsupported"
        return
    expected = place.on_cpu(restkv.select, policy, query, key, value, **layer)
    kept = restkv.select(policy, *place(query, key, value), **layer)
    assert rows(kept) == rows(expected)
    assert kept == expected and kept.total == expected.total


@pytest.mark.parametrize("change", ["padding", "mask", "heads", "queries", "strides", "half"])
def test_layers_of_all_kinds(place, change):
    query, key, value = random_layer(batch=2, tokens=100)
    more = {}
    if change == "padding":
        more = {"lengths": np.array([100, 61]), "padding": "right"}
    elif change == "mask":
        more = {"keep_mask": np.arange(200).reshape(2, 100) % 17 == 3}
    elif change == "heads":
        more = {"head_lengths": np.array([[100, 50], [70, 100]])}
    elif change == "strides":
        query, key, value = (
            np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (query, key, value)
        )
    elif change == "half":
        query, key, value = (x.astype(np.float16) for x in (query, key, value))
    for name in ("standard", "snap_kv_query_heads", "rest_kv_released"):
        policy = restkv.policy(name, 40, window=8)
        asked = query if change != "queries" else query[:, :, -8:]
        expected = place.on_cpu(restkv.select, policy, asked, key, value, w_o=random_w_o(), **more)
        kept = restkv.select(policy, *place(asked, key, value), w_o=random_w_o(), **more)
        assert rows(kept) == rows(expected), name


def test_the_kept_set(place):
    query, key, value = random_layer()
    policy = restkv.policy("standard", 30, window=8)
    metric = restkv.Metric(random_w_o(), 4)
    expected = place.on_cpu(restkv.select, policy, query, key, value, metric=metric)
    kept = restkv.select(policy, *place(query, key, value), metric=metric)
    assert kept.lengths.device.type == kept.positions.device.type == place.device
    assert (kept.batch, kept.heads, kept.capacity) == (2, 2, expected.capacity)
    np.testing.assert_array_equal(kept.positions.cpu(), expected.positions)
    np.testing.assert_array_equal(kept.lengths.cpu(), expected.lengths)
    mask = kept.mask(96)
    assert mask.device.type == place.device and mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.cpu(), expected.mask(96))
    assert kept[1, -1].tolist() == expected[1, -1].tolist()
    assert pickle.loads(pickle.dumps(kept)) == kept == expected
    assert repr(kept) == repr(expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float64"])
@pytest.mark.parametrize("of_the_cpu", [False, True])
def test_compaction(place, dtype, of_the_cpu):
    query, key, value = random_layer()
    policy = restkv.policy("ada_kv", 30, window=8)
    expected_set = place.on_cpu(restkv.select, policy, query, key, value)
    kept = expected_set if of_the_cpu else restkv.select(policy, *place(query, key, value))
    assert len({len(row) for row in kept}) > 1
    key, value = ((10 * x).astype(dtype) for x in (key, value))
    expected = place.on_cpu(restkv.compact, expected_set, key, value)
    dense = restkv.compact(kept, *place(key, value))
    for ours, theirs in zip(dense, expected, strict=True):
        assert ours.device.type == place.device
        np.testing.assert_array_equal(ours.cpu(), theirs)
    expected_rows = place.on_cpu(restkv.compact, expected_set, key, value, layout="ragged")
    ragged = restkv.compact(kept, *place(key, value), layout="ragged")
    for ours, theirs in zip(ragged, expected_rows, strict=True):
        np.testing.assert_array_equal(ours.cpu(), theirs)
    assert ragged[2].dtype == torch.int32

    out = place(*(np.full_like(x, 3) for x in expected))
    assert restkv.compact(kept, *place(key, value), out=out)[0] is out[0]
    np.testing.assert_array_equal(out[1].cpu(), expected[1])
    own = place(key.copy(), value.copy())
    front = restkv.compact(kept, *own, in_place=True)
    for ours, theirs in zip(front, expected, strict=True):
        for b, h in ((0, 0), (1, 1)):
            length = expected_set.lengths[b, h]
            np.testing.assert_array_equal(ours[b, h, :length].cpu(), theirs[b, h, :length])


@pytest.mark.parametrize("of_the_cpu", [False, True])
@pytest.mark.parametrize("behind", ["nothing", "metric", "w_o"])
def test_output_errors(place, behind, of_the_cpu):
    query, key, value = random_layer(queries=20)
    w_o = random_w_o()
    more = {"nothing": {}, "metric": {"metric": restkv.Metric(w_o, 4)}, "w_o": {"w_o": w_o}}[behind]
    more["lengths"] = np.array([96, 70])
    policy = restkv.policy("snap_kv", 30, window=8)
    expected_set = place.on_cpu(restkv.select, policy, query, key, value, lengths=more["lengths"])
    kept = expected_set if of_the_cpu else restkv.select(policy, *place(query, key, value), lengths=more["lengths"])
    expected = place.on_cpu(restkv.output_error, expected_set, query, key, value, queries=12, **more)
    errors = restkv.output_error(kept, *place(query, key, value), queries=12, **more)
    for name in ("head", "head_output_norm", "evicted_mass", "layer", "layer_output_norm", "head_predicted"):
        ours, theirs = getattr(errors, name), getattr(expected, name)
        assert ours.device.type == place.device
        np.testing.assert_allclose(ours.cpu(), theirs, rtol=1e-6, err_msg=name)
    assert (errors.head_projected is None) == (expected.head_projected is None)
    for name in ("mean_relative", "worst_relative", "greedy_ratio"):
        assert getattr(errors, name)() == pytest.approx(getattr(expected, name)(), rel=1e-6)
    assert errors.projected == expected.projected == (behind != "nothing")
    assert errors.layer.shape == expected.layer.shape  # fetched by now


def test_what_is_refused(place):
    query, key, value = random_layer()
    policy = restkv.policy("snap_kv", 30, window=8)
    with pytest.raises(restkv.Error, match="key has elements of type float32, query of float16"):
        restkv.select(policy, *place(query.astype(np.float16), key, value))
    with pytest.raises(restkv.Error, match="float64, must be float32"):
        restkv.select(policy, *place(*(x.astype(np.float64) for x in (query, key, value))))
    kept = restkv.select(policy, *place(query, key, value))
    with pytest.raises(restkv.Error, match="of a cache of 96 tokens, this one has 95"):
        restkv.compact(kept, *place(key[:, :, :95], value[:, :, :95]))
    with pytest.raises(restkv.Error, match="of a cache of 96 tokens, this one has 95"):
        restkv.output_error(kept, *place(query[:, :, :8], key[:, :, :95], value[:, :, :95]))
    far = restkv.Kept(np.array([[[1, 95]]] * 2), np.array([[2]] * 2))
    with pytest.raises(restkv.Error, match="95"):
        restkv.compact(far, *place(key[:, :1, :95], value[:, :1, :95]))
    with pytest.raises(restkv.Error, match="budget"):
        restkv.select(policy.replace(budget=4), *place(query, key, value))
    with pytest.raises(restkv.Error, match="2, 4 or 8"):
        restkv.compact(kept, *place(key.astype(np.complex128), value.astype(np.complex128)))


def test_no_tokens_and_no_sequences(place):
    policy = restkv.policy("snap_kv", 30, window=8)
    for batch, tokens in ((0, 10), (2, 0)):
        empty = np.zeros((batch, 2, tokens, 16), np.float32)
        kept = restkv.select(policy, *place(empty, empty, empty))
        assert (kept.batch, kept.capacity, kept.total) == (batch, 0, 0)
        key, value = restkv.compact(kept, *place(empty, empty))
        assert key.shape == value.shape == (batch, 2, 0, 16)


def test_numpy_arrays_by_the_kernels():
    _restkv._use_devices(host_kernels())
    try:
        query, key, value = random_layer()
        kept = restkv.select(restkv.policy("snap_kv", 30, window=8), query, key, value)
        assert isinstance(kept.positions, np.ndarray)
        assert isinstance(restkv.compact(kept, key, value)[0], np.ndarray)
    finally:
        _restkv._forget_devices(HOST)


def test_a_library_of_another_version_is_refused():
    with pytest.raises(TypeError):
        _restkv._use_devices(3)
    import datetime  # has a capsule of its own

    with pytest.raises(restkv.Error, match="datetime"):
        _restkv._use_devices(datetime.datetime_CAPI)
