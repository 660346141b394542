# SPDX-License-Identifier: Apache-2.0
"""W_O of a model's attention layers, for policies that measure what an eviction does behind it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import restkv

NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What models call the output projection of an attention layer."""

_metrics: weakref.WeakKeyDictionary[nn.Module, tuple[object, restkv.Metric]] = weakref.WeakKeyDictionary()


def output_projection(attention: nn.Module) -> nn.Module:
    """The module behind an attention layer's heads. Raises `restkv.Error` where it has none of a known name."""
    for name in NAMES:
        projection = getattr(attention, name, None)
        if isinstance(projection, nn.Module):
            return projection
    raise restkv.Error(f"{type(attention).__name__} has no output projection: none of {', '.join(NAMES)}")


@torch.no_grad()
def weight_of(projection: nn.Module) -> torch.Tensor:
    """W_O [hidden, query_heads * head_dim] in float. A plain linear layer's own weight; anything else, such as a
    quantised layer or one with a LoRA adapter, is asked what it does to each unit vector: one pass of
    query_heads * head_dim rows, once a layer."""
    if type(projection) is nn.Linear:
        return projection.weight.detach().float()
    if type(projection) is Conv1D:  # of GPT-2: the transpose
        return projection.weight.detach().T.float()
    width = getattr(projection, "in_features", None)
    tensor = next(itertools.chain(projection.parameters(), projection.buffers()), None)
    if width is None or tensor is None:
        raise restkv.Error(f"the weight of a {type(projection).__name__} is not known: it has no in_features")
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.get_default_dtype()
    was_training = projection.training
    projection.eval()  # a LoRA adapter's dropout
    try:
        units = torch.eye(width, dtype=dtype, device=tensor.device)
        bias = projection(torch.zeros(1, width, dtype=dtype, device=tensor.device))
        return (projection(units) - bias).T.float()
    finally:
        projection.train(was_training)


def metric_of(attention: nn.Module, query_heads: int) -> restkv.Metric:
    """The metric of a layer, built at the first call and again when the weight was changed in place. Cost: a product
    of [head_dim, hidden] with its transpose for each query head."""
    projection = output_projection(attention)
    weight = getattr(projection, "weight", None)
    key: object = query_heads
    if isinstance(weight, torch.Tensor):
        key = (query_heads, weight.data_ptr(), None if weight.is_inference() else weight._version)
    built = _metrics.get(projection)
    if built is None or built[0] != key:
        built = (key, restkv.Metric(weight_of(projection).cpu().contiguous(), query_heads))
        _metrics[projection] = built
    return built[1]


def forget_metrics(model: nn.Module) -> None:
    """Drops the metrics of a model's layers, for weights that were changed where it cannot be seen: an adapter that was
    loaded, switched or trained."""
    for module in model.modules():
        _metrics.pop(module, None)


def attention_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that have an index of their layer and an output projection."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and any(hasattr(module, name) for name in NAMES):
            yield module
