# SPDX-License-Identifier: Apache-2.0
"""restkv's policies as presses of NVIDIA's kvpress, for its pipeline and its benchmarks.

from restkv.kvpress import RestKVPress

press = RestKVPress(restkv.policy("standard"), compression_ratio=0.8)
pipe(context, question=question, press=press)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from kvpress import BasePress
from kvpress.utils import compute_n_kept, get_prerope_query_states

import restkv

from .transformers.projections import metric_of
from .transformers.selection import positions_of, select


@dataclasses.dataclass
class RestKVPress(BasePress):
    """Any policy that keeps a set for each KV head, at a share `compression_ratio` that is evicted. As with kvpress's
    own presses, `max(1, int(tokens * (1 - compression_ratio)))` tokens a head stay, in the mean where heads compete;
    the policy's own budget does not act.

    Heads with equal budgets are compacted. Where heads compete nothing is freed: like kvpress's AdaKVPress the press
    names the evicted entries, and attention is patched to pass over them."""

    policy: restkv.Policy = dataclasses.field(default_factory=lambda: restkv.policy("standard"))
    compression_ratio: float = 0.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.compression_ratio < 1:
            raise restkv.Error(f"compression_ratio is {self.compression_ratio}: at least 0 and below 1 is needed")
        if self.policy.over_layers:
            raise restkv.Error("the policy chooses from all layers at once, a press sees one after the other")
        if self.policy.per_query_head:
            raise restkv.Error("the policy keeps a set for each query head, kvpress's cache one for each KV head")

    def compress(
        self,
        module: Any,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor,
        kwargs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called behind a layer's attention. Cost: the queries of the window once more, and the selection."""
        if self.compression_ratio == 0:
            return keys, values
        batch, heads, tokens, _ = keys.shape
        budget = compute_n_kept(tokens, self.compression_ratio)
        policy = self.policy.replace(budget=budget)
        queries = None
        if "queries" in policy.needs:
            rows = hidden_states.shape[1] if policy.needs_every_query else policy.window
            queries = newest_queries(module, hidden_states, kwargs["position_embeddings"], rows)
        facts: dict[str, Any] = {}
        if policy.needs_w_o:
            facts["metric"] = metric_of(module, module.config.num_attention_heads)
        with torch.no_grad():
            kept = select(
                policy,
                None if queries is None else queries.detach(),
                keys.detach(),
                values.detach(),
                layer_index=module.layer_idx,
                layer_count=module.config.num_hidden_layers,
                threads=self.threads,
                **facts,
            )
        chosen = positions_of(kept, keys.device)
        if len({len(index) for of_sequence in chosen for index in of_sequence}) == 1:
            index = torch.stack([torch.stack(of_sequence) for of_sequence in chosen])[..., None]
            keys, values = (x.gather(2, index.expand(-1, -1, -1, x.shape[-1])).contiguous() for x in (keys, values))
            return keys, values
        evicted = torch.ones(batch, heads, tokens, dtype=torch.bool, device=keys.device)
        for b, of_sequence in enumerate(chosen):
            for h, index in enumerate(of_sequence):
                evicted[b, h, index] = False
        module.masked_key_indices = evicted.nonzero(as_tuple=True)
        return keys, values


def newest_queries(
    module: Any, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], rows: int
) -> torch.Tensor:
    """The last `rows` queries [batch, query_heads, rows, head_dim] of an attention layer after RoPE, scaled so that a
    logit is query . key / sqrt(head_dim)."""
    queries = get_prerope_query_states(module, hidden_states[:, -rows:])
    cos, sin = (x[:, None, -rows:] for x in position_embeddings)
    first, second = queries.chunk(2, dim=-1)
    queries = queries * cos + torch.cat((-second, first), dim=-1) * sin
    return queries * (module.scaling * module.head_dim**0.5)


def with_current_transformers(press: BasePress) -> BasePress:
    """Lets a press of kvpress 0.5 run under transformers newer than it supports (5.3 and later), where the cache is
    called `cache` and no `cache_position` is handed to attention; returns the press. Does nothing under older ones."""
    hook: Callable = press.forward_hook

    def forward_hook(module: Any, inputs: list, kwargs: dict, output: list) -> list:
        if "past_key_values" not in kwargs:
            cache = kwargs["cache"]
            new = kwargs["hidden_states"].shape[1]
            seen = kwargs["position_ids"][:1, -new:].flatten()
            kwargs = {**kwargs, "past_key_values": cache, "cache_position": seen}
        return hook(module, inputs, kwargs, output)

    press.forward_hook = forward_hook
    return press
