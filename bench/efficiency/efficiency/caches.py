# SPDX-License-Identifier: Apache-2.0
"""The cache of the tuned baseline, and the bytes of any cache."""

from __future__ import annotations

from typing import Any

import torch
from restkv.transformers import RestKVCache
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class FilledLayer(CacheLayerMixin):
    """Keys and values in memory that is allocated once, of which attention sees the filled part alone: no mask is
    needed, so that a GPU's fastest kernels apply (transformers' `StaticCache` hands over all of it and a mask)."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.filled = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates [batch, kv_heads, capacity, head_dim] twice."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_empty(*x.shape[:2], self.capacity, x.shape[-1]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens [batch, kv_heads, n, head_dim]; all there are: a first prompt as it came, later views of the
        memory. Raises ValueError for more than fit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.filled = self.filled, self.filled + key_states.shape[2]
        if self.filled > self.capacity:
            raise ValueError(f"{self.filled} tokens do not fit into a cache of {self.capacity}")
        assert self.keys is not None and self.values is not None
        self.keys[:, :, begin : self.filled] = key_states
        self.values[:, :, begin : self.filled] = value_states
        if begin == 0:
            return key_states, value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name in transformers 5.2


def filled_cache(config: PretrainedConfig, capacity: int) -> Cache:
    """A cache of `FilledLayer`. Raises ValueError for models with layers of another kind."""
    return Cache(layers=[FilledLayer(capacity) for _ in range(full_layers(config))])


def full_layers(config: PretrainedConfig) -> int:
    """How many layers of full attention a model has. Raises ValueError where some have a sliding window or a state instead."""
    layers = DynamicCache(config=config).layers
    others = sum(type(layer) is not DynamicLayer for layer in layers)
    if others or not layers:
        raise ValueError(f"{others} of {len(layers)} layers have no full attention: such models are not measured here")
    return len(layers)


def counted_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of keys and values that are attended to, and of the memory behind them."""
    if isinstance(cache, RestKVCache):
        return cache.bytes(), cache.bytes(allocated=True)
    attended, storages = 0, {}
    layers: list[Any] = cache.layers
    for layer in layers:
        filled = layer.get_seq_length()
        for tensor in (layer.keys, layer.values):
            attended += tensor[:, :, :filled].nbytes
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return attended, sum(storages.values())
