# SPDX-License-Identifier: Apache-2.0
"""Tensors of PyTorch: element types, devices, gradients, and that nothing is copied."""

import numpy as np
import pytest
import restkv
from case_layers import random_layer, random_w_o

torch = pytest.importorskip("torch", reason="needs PyTorch")


def tensors(dtype=torch.float32, **sizes):
    return [torch.from_numpy(array).to(dtype) for array in random_layer(**sizes)]


def test_tensors_give_tensors():
    query, key, value = tensors()
    w_o = torch.from_numpy(random_w_o())
    kept = restkv.select(restkv.policy("standard", 40), query, key, value, w_o=w_o)
    plain = restkv.select(restkv.policy("standard", 40), *random_layer(), w_o=random_w_o())
    assert kept == plain
    packed = restkv.compact(kept, key, value)
    ragged = restkv.compact(kept, key, value, layout="ragged")
    errors = restkv.output_error(kept, query, key, value)
    made = [kept.positions, kept.lengths, kept.mask(96), kept[0, 1], *packed, *ragged, errors.head, errors.layer]
    assert all(isinstance(array, torch.Tensor) for array in made)
    assert kept.positions.dtype == torch.int32 and kept.mask(96).dtype == torch.bool
    assert errors.head.dtype == torch.float64 and ragged[2].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_element_types(dtype):
    """Elements of 16 bits are widened exactly, so the float32 of the same numbers gives the same."""
    query, key, value = tensors(dtype)
    w_o = torch.from_numpy(random_w_o()).to(dtype)
    for name in ("standard", "snap_kv", "key_diff", "expected_attention", "critical_kv"):
        policy = restkv.policy(name, 40)
        kept = restkv.select(policy, query, key, value, w_o=w_o)
        wide = restkv.select(policy, query.float(), key.float(), value.float(), w_o=w_o.float())
        assert kept == wide
    packed = restkv.compact(kept, key, value)
    assert packed[0].dtype == dtype
    rows = kept.positions.clamp(min=0).long()[..., None].expand(-1, -1, -1, 16)
    valid = (kept.positions >= 0)[..., None]
    for cache, made in zip((key, value), packed):
        assert torch.equal(made, torch.gather(cache, 2, rows) * valid)
    one = restkv.output_error(kept, query, key, value, w_o=w_o).mean_relative()
    two = restkv.output_error(kept, query.float(), key.float(), value.float(), w_o=w_o.float()).mean_relative()
    assert one == two > 0


def test_types_may_be_mixed():
    query, key, value = tensors(torch.bfloat16)
    policy = restkv.policy("standard", 40)
    w_o = random_w_o()
    kept = restkv.select(policy, query.float().numpy(), key, value.double(), w_o=w_o)
    assert kept == restkv.select(policy, query, key, value, w_o=w_o)
    assert isinstance(kept.positions, torch.Tensor)  # the key's


def test_a_transposed_cache_is_read_in_place():
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors())
    assert not key.is_contiguous()
    kept = restkv.select(restkv.policy("snap_kv", 40), query, key, value)
    assert kept == restkv.select(restkv.policy("snap_kv", 40), *random_layer())


def test_weights_may_require_grad():
    query, key, value = tensors()
    o_proj = torch.nn.Linear(64, 40, bias=False)
    metric = restkv.Metric(o_proj.weight, 4)
    kept = restkv.select(restkv.policy("standard", 40), query, key, value, metric=metric)
    assert kept == restkv.select(restkv.policy("standard", 40), query, key, value, w_o=o_proj.weight.detach())


def test_results_share_memory():
    query, key, value = tensors()
    kept = restkv.select(restkv.policy("snap_kv", 40), query, key, value)
    assert kept.positions.data_ptr() == kept.positions.data_ptr() == kept[0, 0].data_ptr()
    moved = restkv.compact(kept, key, value, in_place=True)
    assert moved[0].data_ptr() == key.data_ptr() and moved[0].shape[2] == kept.capacity
    out = torch.empty(2, 2, kept.capacity, 16), torch.empty(2, 2, kept.capacity, 16)
    pointers = [tensor.data_ptr() for tensor in out]
    made = restkv.compact(kept, key, value, out=out)
    assert [tensor.data_ptr() for tensor in made] == pointers
    view = kept.positions
    del kept
    assert view.sum() > 0


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_cannot_be_taken_is_named(name):
    layer = dict(zip(("query", "key", "value"), tensors()))
    policy = restkv.policy("caote", 40)

    def attempt(change):
        restkv.select(policy, *({**layer, name: change(layer[name])}.values()))

    for change, text, code in [
        (lambda x: x.clone().requires_grad_(), "requires grad", "invalid_argument"),
        (lambda x: x.to("meta"), "meta", "invalid_argument"),
        (lambda x: x.to_sparse(), "sparse", "unsupported"),
        (lambda x: x.to(torch.int32), "int32", "invalid_argument"),
        (lambda x: x.to(torch.complex64), "complex64", "invalid_argument"),
        (lambda x: x.to(torch.float8_e5m2), "float8|opaque8|DLPack", "invalid_argument"),
        (lambda x: x[0], "3 axes", "shape_mismatch"),
        (lambda x: x[..., :7], "7", "shape_mismatch"),
        (lambda x: x[:1], "1", "shape_mismatch"),
        (lambda x: x.tolist(), "list", "invalid_argument"),
        (lambda x: None, "None", "missing_input"),
        (lambda x: "text", "str", "invalid_argument"),
    ]:
        with pytest.raises(restkv.Error, match=text) as caught:
            attempt(change)
        assert caught.value.code == code and name in str(caught.value), str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_a_gpu_are_refused():
    query, key, value = (x.cuda() for x in tensors())
    with pytest.raises(restkv.Error, match="cuda:0") as caught:
        restkv.select(restkv.policy("snap_kv", 40), query, key, value)
    assert caught.value.code == "unsupported"


def test_a_subclass_of_a_tensor_is_a_tensor():
    class Named(torch.Tensor):
        pass

    query, key, value = tensors()
    kept = restkv.select(restkv.policy("snap_kv", 40), query, key.as_subclass(Named), value)
    assert isinstance(kept.positions, torch.Tensor)
    assert kept == restkv.select(restkv.policy("snap_kv", 40), *random_layer())


def test_other_libraries_by_dlpack():
    class Wrapped:
        """An array of a library that nobody knows."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **keys):
            return self.array.__dlpack__(**keys)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    query, key, value = (Wrapped(x) for x in random_layer())
    kept = restkv.select(restkv.policy("snap_kv", 40), query, key, value)
    assert isinstance(kept.positions, np.ndarray)
    assert kept == restkv.select(restkv.policy("snap_kv", 40), *random_layer())
