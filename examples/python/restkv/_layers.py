# SPDX-License-Identifier: Apache-2.0
"""`select_layers`: the tokens that all layers of a model keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ._restkv import Error, Kept, Metric, ModelSelection, Policy, select


def select_layers(
    policy: Policy, layers: Sequence[Mapping[str, Any] | Sequence[Any]], *, threads: int | None = None, **shared: Any
) -> list[Kept]:
    """Chooses the tokens of all layers of a model that each head keeps: one `Kept` a layer.

        kept = restkv.select_layers(restkv.policy("lava_layers", budget=512), [(query, key, value), ...])

    With a policy that has `over_layers`, one budget is shared by all layers: `policy.budget` tokens a head in the mean
    of the model. With any other each layer is selected by itself, `layer_index` and `layer_count` set.

    layers: from the first to the last, each (query, key, value), (query, key, value, metric or w_o), or a mapping with
    arguments of `select`. shared: arguments that are the same for all layers, such as `lengths` or `keep_mask`.
    threads: of the call.

    Raises Error as `select` does, and for layers that are neither; nothing is copied but what `select` copies. Layers
    that do not lie in memory together are for `ModelSelection`."""
    calls = [{**shared, **arguments_of(index, layer)} for index, layer in enumerate(layers)]
    if not policy.over_layers:
        return [
            select(policy, **{"layer_index": index, "layer_count": len(calls), "threads": threads, **call})
            for index, call in enumerate(calls)
        ]
    if not calls:
        return []
    tokens = max(tokens_of(index, call) for index, call in enumerate(calls))
    model = ModelSelection(policy, len(calls), tokens=tokens, threads=threads)
    for call in calls:
        model.add(**call)
    return [model.kept(index) for index in range(len(calls))]


def arguments_of(index: int, layer: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """A layer as arguments of `select`."""
    if isinstance(layer, Mapping):
        given = dict(layer)
        given.setdefault("query", None)
        given.setdefault("value", None)
        if "key" not in given:
            raise Error(f"layer {index} has no key, only {', '.join(map(repr, layer))}")
        return given
    if len(layer) not in (3, 4):
        raise Error(f"layer {index} is a sequence of {len(layer)}: (query, key, value) or one more, a metric or w_o")
    given = dict(zip(("query", "key", "value"), layer, strict=False))
    if len(layer) == 4:
        given["metric" if isinstance(layer[3], Metric) else "w_o"] = layer[3]
    return given


def tokens_of(index: int, call: Mapping[str, Any]) -> int:
    """The length of a layer's token axis."""
    shape = getattr(call["key"], "shape", ())
    if len(shape) != 4:
        raise Error(f"layer {index}: key has {len(shape)} axes, must have 4: [batch, kv_heads, tokens, head_dim]")
    return int(shape[2])
