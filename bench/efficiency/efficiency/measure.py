# SPDX-License-Identifier: Apache-2.0
"""One measurement of one row: a prompt, and tokens behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from restkv.transformers import RestKVCache, attach
from transformers import Cache, DynamicCache

from . import attention, sparse
from .caches import counted_bytes, filled_cache, full_layers
from .clock import Clock, PeakMemory, Stopwatch, free
from .models import cache_argument, weight_bytes
from .rows import SLOW, TUNED, Row


@dataclass(frozen=True)
class Load:
    """What every row does."""

    tokens: int  # of the prompt
    decode: int  # tokens that are timed
    lead: int  # tokens before them, which are not
    budget: float  # tokens a KV head, or below 1 a part of the prompt's
    threads: int | None = None
    of_process: bool = False  # times are those that the processor spent on this process

    @property
    def all_tokens(self) -> int:
        """The first token comes from the prompt; each forward adds one."""
        return self.tokens + self.lead + self.decode


@dataclass(frozen=True)
class Measurement:
    """What came out. Bytes of memory are those of a GPU, None on the CPU."""

    ttft: float  # seconds until the first token is known, evictions included
    evicting: float  # seconds of these that evictions took
    decode: float  # seconds a token
    decode_evicting: float  # seconds a token of these that evictions took
    attended_bytes: int  # of keys and values, after the prompt
    cache_bytes: int  # of the memory behind them
    cache_bytes_end: int  # the same after the last token
    weight_bytes: int  # of the model's parameters
    loaded: int | None  # what lies in memory before the prompt comes: the weights
    peak_prefill: int | None  # the most while it is read
    after_prefill: int | None
    peak_decode: int | None


def make_cache(model: Any, row: Row, load: Load) -> Cache:
    """The row's cache, and the model's attention set for it. Raises ValueError for models not measured here."""
    config = model.config
    full_layers(config)
    if row.cache in (SLOW, TUNED):
        attention.register()
        model.set_attn_implementation(attention.SLOW if row.cache == SLOW else attention.TUNED)
        return DynamicCache(config=config) if row.cache == SLOW else filled_cache(config, load.all_tokens)
    policy = row.budgeted(load.budget, load.tokens, config.num_attention_heads, config.num_key_value_heads)
    # An untouched cache remembers no queries: it has no policy to come.
    window = 0 if policy is None else None
    return RestKVCache(policy, attach(model), layout=row.layout, window=window, threads=load.threads)  # type: ignore[arg-type]


class Reader:
    """A row at work: reads the prompt, then token by token."""

    def __init__(self, model: Any, row: Row, load: Load):
        self.model, self.row = model, row
        self.named = cache_argument(model)
        self.sparse = sparse.reader(row.prefill, str(model.device))
        self.cache = make_cache(model, row, load)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next token [1, 1], left on the device."""
        output = self.model(tokens, **{self.named: self.cache}, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        with attention.prompts_read_by(self.sparse):
            return self.forward(prompt)


def time_evictions(cache: RestKVCache, stopwatch: Stopwatch) -> None:
    """Has a stopwatch on every eviction: of a layer by itself, and of all layers by a budget that they share."""
    for layer in cache.evicting_layers():
        layer.evict = stopwatch.timed(layer.evict)  # type: ignore[method-assign]
    cache.evict_together = stopwatch.timed(cache.evict_together)  # type: ignore[method-assign]


@torch.inference_mode()
def measure(model: Any, row: Row, prompt: torch.Tensor, load: Load) -> Measurement:
    """One measurement with `prompt` [1, load.tokens]. Raises what the row raises: memory that is not there, a library
    that is missing, a policy that refuses the prompt."""
    clock = Clock(model.device, load.of_process)
    free(clock)
    memory = PeakMemory(clock)
    evictions = Stopwatch(clock)
    reader = Reader(model, row, load)
    if isinstance(reader.cache, RestKVCache):
        time_evictions(reader.cache, evictions)
    memory.begin()
    loaded = memory.now()
    begin = clock.now()
    token = reader.prefill(prompt)
    ttft = clock.now() - begin
    evicting = evictions.take()
    peak_prefill, after_prefill = memory.peak(), memory.now()
    attended_bytes, cache_bytes = counted_bytes(reader.cache)
    memory.begin()
    for _ in range(load.lead):
        token = reader.forward(token)
    begin = clock.now()
    evictions.take()
    for _ in range(load.decode):
        token = reader.forward(token)
    decode = (clock.now() - begin) / load.decode
    return Measurement(
        ttft=ttft,
        evicting=evicting,
        decode=decode,
        decode_evicting=evictions.take() / load.decode,
        attended_bytes=attended_bytes,
        cache_bytes=cache_bytes,
        cache_bytes_end=counted_bytes(reader.cache)[1],
        weight_bytes=weight_bytes(model),
        loaded=loaded,
        peak_prefill=peak_prefill,
        after_prefill=after_prefill,
        peak_decode=memory.peak(),
    )
