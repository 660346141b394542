# SPDX-License-Identifier: Apache-2.0
"""`RestKVCache`: a transformers `Cache` that evicts by a policy of restkv."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import restkv

from .attention import attach
from .layer import RestKVLayer, Settings, are_due
from .queries import QueryWindow
from .rows import write_row
from .selection import select_together


class RestKVCache(Cache):
    """A cache that keeps what a policy says.

        cache = RestKVCache(restkv.policy("standard", budget=512), model)
        model.generate(**inputs, past_key_values=cache)  # newer transformers also say cache=cache

    `policy`  what is kept; None: everything, until `evict` names one.
    `model`   the model (its attention is set to "restkv", see `attach`) or its configuration. Tells which layers have a
              sliding window: those are left alone, and stored as transformers does. Without it all layers are taken for
              layers with full attention, until they say otherwise; those that do then keep all their tokens.
    `when`    "prefill": after each forward of more than one token, layer by layer while the model runs: a prompt in
              one piece, each chunk of a prompt in chunks, each turn of a conversation. "decode": before the first
              single token, so that chunks of a prompt see each other whole. Both evict again while decoding. "manual":
              only when `evict` is called. A policy with `over_layers` evicts all layers at once, "prefill" when the
              last one has attended: until then the whole prompt is held.
    `slack`   tokens a head may grow beyond its budget, in the mean, before it is evicted while decoding.
    `window`  queries that are remembered for policies that `evict` will be given, or "all"; the policy's own window at
              least.
    `layout`  "padded": rows of a layer share one block, as long as the longest. "ragged": each row has its own length.
              "auto": padded where that takes no more than the share `padding` on top.
    `threads` of the selection; None: those of the library.

    Every sequence of a batch and every head has a length of its own. Positions are those of the tokens that came:
    `get_seq_length` counts evicted tokens too, so `generate` and `model.forward` need nothing else. Padding is masked
    while a prompt is read, and dropped with the first eviction. Of masks with four axes that a caller makes, the part
    about tokens of earlier forwards is not looked at after an eviction, and what the last query does not see of the new
    tokens is taken for padding: masks of trees are not for this cache.

    No gradients flow through the cache. Scores see logits without Gemma 2's soft cap; attention itself has it."""

    def __init__(
        self,
        policy: restkv.Policy | None = None,
        model: PreTrainedModel | PretrainedConfig | None = None,
        *,
        when: Literal["prefill", "decode", "manual"] = "prefill",
        slack: int = 64,
        window: int | Literal["all"] | None = None,
        layout: Literal["auto", "padded", "ragged"] = "auto",
        padding: float = 0.125,
        threads: int | None = None,
    ):
        if when not in ("prefill", "decode", "manual"):
            raise restkv.Error(f"when is {when!r}: 'prefill', 'decode' or 'manual' is needed")
        if layout not in ("auto", "padded", "ragged"):
            raise restkv.Error(f"layout is {layout!r}: 'auto', 'padded' or 'ragged' is needed")
        if slack < 1:
            raise restkv.Error(f"slack is {slack}, at least 1 is needed")
        check_when(policy, when)
        self.settings = Settings(policy, when, slack, queries_kept(policy, window), layout, padding, threads)
        if model is None:
            super().__init__(layer_class_to_replicate=self.make_layer)  # type: ignore[arg-type]
            return
        config = model if isinstance(model, PretrainedConfig) else attach(model).config
        layers = DynamicCache(config=config).layers
        super().__init__(
            layers=[
                RestKVLayer(self.settings, index) if type(layer) is DynamicLayer else layer
                for index, layer in enumerate(layers)
            ]
        )

    def make_layer(self) -> RestKVLayer:
        """The next layer of a cache that was not told its model."""
        return RestKVLayer(self.settings, len(self.layers))

    def __repr__(self) -> str:
        return f"RestKVCache({self.settings.policy!r}, {len(self.layers)} layers, {self.bytes()} bytes)"

    def evicting_layers(self) -> Iterator[RestKVLayer]:
        """The layers that a policy acts on."""
        return (layer for layer in self.layers if isinstance(layer, RestKVLayer) and not layer.left_alone)

    @property
    def policy(self) -> restkv.Policy | None:
        """What evicts; may be set: it acts from the next forward on."""
        return self.settings.policy

    @policy.setter
    def policy(self, policy: restkv.Policy | None) -> None:
        if policy is not None:
            self.check_queries(policy)
        check_when(policy, self.settings.when)
        self.settings.policy = policy

    def check_queries(self, policy: restkv.Policy) -> None:
        """Raises `restkv.Error` where a policy looks at more queries than are remembered."""
        needed, has = queries_kept(policy, 0), self.settings.window
        if has is not None and (needed is None or needed > has):
            wanted = "all" if needed is None else needed
            raise restkv.Error(
                f"the policy looks at {wanted} queries, the cache remembers {has}: make it with window={wanted!r}"
            )

    def evict(self, policy: restkv.Policy | None = None) -> RestKVCache:
        """Evicts all layers now, by the cache's policy or the given one; returns the cache. From a full cache the
        outcome is that of a prefill with this policy. Raises `restkv.Error` where the policy looks at more queries than
        are remembered."""
        chosen = policy or self.settings.policy
        if chosen is None:
            raise restkv.Error("the cache has no policy: name one")
        self.check_queries(chosen)
        if chosen.over_layers:
            self.evict_together(chosen)
        else:
            for layer in self.evicting_layers():
                layer.evict(chosen)
        return self

    @torch.no_grad()
    def evict_together(self, policy: restkv.Policy) -> None:
        """Evicts all layers by one choice over them."""
        layers = [layer for layer in self.evicting_layers() if not layer.is_empty]
        for layer in layers:
            layer.check_handed_over()
        if layers:
            for layer, chosen in zip(layers, select_together(policy, layers), strict=True):
                layer.keep(chosen)

    def evict_if_due(self, prefill: bool) -> None:
        """Evicts all layers where the policy's budget is one over them and they hold too much."""
        policy = self.settings.policy
        layers = [layer for layer in self.evicting_layers() if not layer.is_empty]
        if policy is not None and policy.over_layers and layers and are_due(layers, policy, prefill):
            self.evict_together(policy)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the keys and values of new tokens; see `RestKVLayer.update`. By the keys that come out, attention finds
        the cache."""
        first = next(self.evicting_layers(), None)
        begins = first is not None and first.index == layer_idx
        if first is not None and begins and self.settings.when == "decode" and key_states.shape[2] == 1:
            self.evict_if_due(prefill=not first.evicted)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(self.layers[layer_idx], RestKVLayer):
            keys.restkv_cache = self  # type: ignore[attr-defined]
        return keys, values

    def attended(self, layer: RestKVLayer, new: int) -> None:
        """Called when a layer has attended to `new` tokens: behind the last one, all layers can be chosen from."""
        if self.settings.when != "prefill" or layer.index != self.last_index(layer):
            return
        self.evict_if_due(prefill=new > 1)

    def last_index(self, layer: RestKVLayer) -> int:
        """The last layer that a policy may act on. A cache that was not told its model asks the layer's."""
        if self.layer_class_to_replicate is not None:
            return int(layer.module.config.num_hidden_layers) - 1
        return max(index for index, other in enumerate(self.layers) if isinstance(other, RestKVLayer))

    def fork(self) -> RestKVCache:
        """A cache with the same tokens that goes its own way. Costs nothing: memory is copied by whoever writes to it
        first, and an eviction writes to memory of its own."""
        twin = copy.copy(self)
        twin.settings = dataclasses.replace(self.settings, mask=None, valid=None)
        # transformers' layers replace their tensors, they do not write to them.
        twin.layers = [x.fork() if isinstance(x, RestKVLayer) else copy.copy(x) for x in self.layers]
        twin.adopt_layers()
        return twin

    def adopt_layers(self) -> None:
        """Makes layers that were copied from another cache this one's."""
        for layer in self.layers:
            if isinstance(layer, RestKVLayer):
                layer.settings = self.settings
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = self.make_layer  # type: ignore[assignment]

    @classmethod
    def stack(cls, caches: Sequence[RestKVCache]) -> RestKVCache:
        """One cache with the sequences of all given ones, which stay as they are: variants of a prompt, or different
        prompts, that are decoded as one batch. Where different numbers of tokens came, the shorter ones count as padded
        on the left: pass `attention_mask(n)` to the model. The first cache's settings act. Cost: a copy."""
        if not caches:
            raise restkv.Error("0 caches cannot be stacked")
        counts = {len(cache.layers) for cache in caches}
        if len(counts) > 1:
            raise restkv.Error(f"caches of {min(counts)} and of {max(counts)} layers cannot be stacked")
        stacked = copy.copy(caches[0])
        stacked.settings = dataclasses.replace(caches[0].settings, mask=None, valid=None)
        stacked.layers = [
            stack_layers(layers) if isinstance(layers[0], RestKVLayer) else stack_sliding(layers)
            for layers in zip(*(cache.layers for cache in caches), strict=True)
        ]
        stacked.adopt_layers()
        return stacked

    def bytes(self, allocated: bool = False) -> int:
        """Bytes of the keys and values that are attended to; with `allocated` those of the memory behind them."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, RestKVLayer):
                if not layer.is_empty:
                    total += layer.rows.allocated_bytes() if allocated else layer.rows.stored_bytes()
                continue
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                total += 0 if tensor is None else tensor.nbytes
        return total

    def kept(self, layer: int) -> list[list[torch.Tensor]]:
        """Positions of the tokens that a layer holds [batch][heads][length], ascending, counted from the first token
        of each sequence."""
        of = self.layers[layer]
        if not isinstance(of, RestKVLayer):
            raise restkv.Error(f"layer {layer} is a {type(of).__name__}: nothing is evicted from it")
        of.check_handed_over()
        if of.is_empty:
            return []
        positions = [[of.rows.row(b, h)[2].clone() for h in range(of.rows.heads)] for b in range(of.rows.batch)]
        if of.valid is not None:
            positions = [[row[of.valid[b]] for row in rows] for b, rows in enumerate(positions)]
        return positions

    def first_evicting_layer(self) -> RestKVLayer:
        layer = next(iter(self.evicting_layers()), None)
        if layer is None or layer.is_empty:
            raise restkv.Error("the cache is empty")
        return layer

    def next_positions(self, tokens: int = 1) -> torch.Tensor:
        """`position_ids` of the tokens that come next [batch, tokens]."""
        first = self.first_evicting_layer().next_position.long()
        return first[:, None] + torch.arange(tokens, device=first.device)

    def attention_mask(self, tokens: int = 1) -> torch.Tensor:
        """The mask [batch, get_seq_length() + tokens] to pass with the tokens that come next: zeros for the padding on
        the left of shorter sequences."""
        layer = self.first_evicting_layer()
        width = layer.seen + tokens
        begins = layer.seen - layer.next_position
        return (torch.arange(width, device=begins.device) >= begins[:, None]).long()


def check_when(policy: restkv.Policy | None, when: str) -> None:
    """Raises `restkv.Error` for a policy that can act once only where it would act again."""
    if policy is not None and when != "manual" and policy.keys()["spatial"] == "segments":
        raise restkv.Error(f"segments are those of a whole prompt: when is {when!r}, 'manual' is needed")


def queries_kept(policy: restkv.Policy | None, window: int | Literal["all"] | None) -> int | None:
    """Queries that are remembered for a policy, and for those to come; None: all."""
    least = 64 if policy is None else 0
    wanted = least if window is None else window
    if policy is None or "queries" not in policy.needs:
        return None if wanted == "all" else wanted
    if wanted == "all" or policy.needs_every_query:
        return None
    return max(wanted, policy.window)


def stack_layers(layers: Sequence[RestKVLayer]) -> RestKVLayer:
    """The sequences of all layers in one."""
    first = layers[0]
    stacked = copy.copy(first)
    for layer in layers:
        layer.check_handed_over()
    if first.is_empty:
        return stacked
    heads = {layer.rows.heads for layer in layers}
    if len(heads) > 1:
        raise restkv.Error(f"rows of {min(heads)} and of {max(heads)} heads cannot be stacked")
    sources = [(layer, b) for layer in layers for b in range(layer.rows.batch)]
    rows = first.settings.make_rows(
        [
            [n if layer.valid is None else int(layer.valid[b].sum()) for n in layer.rows.lengths[b]]
            for layer, b in sources
        ],
        (first.rows.key, first.rows.value),
    )
    for to, (layer, b) in enumerate(sources):
        index = None if layer.valid is None else layer.valid[b].nonzero().flatten()
        for h in range(rows.heads):
            write_row(rows, to, h, layer.rows.row(b, h), index)
    stacked.stored, stacked.valid, stacked.evicted = rows, None, True
    stacked.seen = max(layer.seen for layer in layers)
    stacked.counts = [count for layer in layers for count in layer.counts]
    stacked.length_after = [length for layer in layers for length in layer.length_after]
    stacked.next_position = torch.cat([layer.next_position for layer in layers])
    stacked.queries = stack_queries([layer.queries for layer in layers], first.queries.size)
    return stacked


def stack_queries(windows: Sequence[QueryWindow], size: int | None) -> QueryWindow:
    """The newest queries of all sequences; those with fewer begin with zeros that count as padding."""
    stacked = QueryWindow(size)
    views = [window.view() for window in windows if window.parts]
    if not views:
        return stacked
    most = max(view.shape[2] for view in views)
    parts, valid = [], []
    for window, view in zip(windows, views, strict=True):
        missing = most - view.shape[2]
        parts.append(torch.nn.functional.pad(view, (0, 0, missing, 0)))
        of = window.valid
        if of is None:
            of = torch.ones(view.shape[0], view.shape[2], dtype=torch.bool, device=view.device)
        valid.append(torch.nn.functional.pad(of, (missing, 0)))
    stacked.parts = [torch.cat(parts)]
    both = torch.cat(valid)
    stacked.valid = None if bool(both.all()) else both
    return stacked


def stack_sliding(layers: Sequence[DynamicSlidingWindowLayer]) -> DynamicSlidingWindowLayer:
    """transformers' layers with a sliding window: only of the same number of tokens."""
    seen = {layer.get_seq_length() for layer in layers}
    if len(seen) > 1:
        raise restkv.Error(f"layers with a sliding window after {min(seen)} and {max(seen)} tokens cannot be stacked")
    stacked = copy.copy(layers[0])
    if stacked.keys is not None and stacked.values is not None:
        stacked.keys = torch.cat([layer.keys for layer in layers if layer.keys is not None])
        stacked.values = torch.cat([layer.values for layer in layers if layer.values is not None])
    return stacked
