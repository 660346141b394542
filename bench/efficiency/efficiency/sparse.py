# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention of a prompt, to be combined with an eviction behind it.

    flex         PyTorch's flex_attention with a block mask. Blocks are chosen by the query-aware pattern of FlexPrefill
                 (arXiv 2502.20766): of each block of queries, the fewest blocks of keys whose estimated share of the
                 attention reaches `gamma`
    minference   FlexPrefill as the package minference has it, its vertical and slanted patterns included

flex is compiled when it is first used: on the CPU, where it saves work but its kernel is slower than the dense one, it
needs a C++ compiler. minference needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .attention import check_whole

BLOCK = 128
GAMMA = 0.9


def reader(name: str, device: str, gamma: float = GAMMA) -> Callable | None:
    """The attention function for prompts; None for "dense". Raises RuntimeError where something it needs is missing."""
    if name == "dense":
        return None
    if name == "flex":
        return flex_reader(gamma, compiled())
    if torch.device(device).type != "cuda":
        raise RuntimeError(f"minference needs a GPU, the device is {device}")
    if find_spec("minference") is None:
        raise RuntimeError("the package minference is not installed")
    return minference_reader(gamma)


@cache
def compiled() -> Callable:
    """flex_attention as one kernel; for each length anew."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def of_interface(attend: Callable) -> Callable:
    """`attend(query, key, value, scaling)`, which returns [batch, tokens, query_heads, head_dim], as an attention
    function of transformers'. It raises ValueError for anything but whole prompts without a mask."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_whole(query, key, attention_mask)
        return attend(query, key, value, scaling), None

    return attention


def flex_reader(gamma: float, flex_attention: Callable) -> Callable:
    """Blocks by `chosen_blocks`, read by flex_attention, compiled or not."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
        mask = block_mask(chosen_blocks(query, key, gamma, scaling), query.shape[2])
        output = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous()

    return of_interface(attend)


def chosen_blocks(query: torch.Tensor, key: torch.Tensor, gamma: float, scale: float | None = None) -> torch.Tensor:
    """Which blocks of keys each block of queries sees [batch, query_heads, blocks, blocks], of `query`
    [batch, query_heads, tokens, head_dim] and `key` [batch, kv_heads, tokens, head_dim]. The share of a block is the
    softmax of the product of mean query and mean key. The first and the newest two blocks are always there. Cost: a
    product of all blocks with all, and a sort of it."""
    pooled_query, pooled_key = pooled(query), pooled(key)
    pooled_key = pooled_key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(pooled_query, pooled_key.transpose(-2, -1)) * scale
    blocks = logits.shape[-1]
    causal = torch.ones(blocks, blocks, dtype=torch.bool, device=query.device).tril()
    shares = torch.softmax(logits.masked_fill(~causal, -math.inf), dim=-1)
    ordered, order = shares.sort(dim=-1, descending=True)
    needed = ordered.cumsum(-1) - ordered < gamma  # what stands before a block does not reach gamma yet
    chosen = torch.zeros_like(needed).scatter_(-1, order, needed)
    chosen[..., 0] = True
    chosen |= causal.triu(-1)
    return chosen & causal


def pooled(states: torch.Tensor) -> torch.Tensor:
    """Means of blocks [batch, heads, blocks, head_dim] in float; the last block may be shorter."""
    whole = states.shape[2] // BLOCK * BLOCK
    parts = [states[:, :, :whole].unflatten(2, (-1, BLOCK)).mean(3, dtype=torch.float32)]
    if whole < states.shape[2]:
        parts.append(states[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, dim=2)


def block_mask(chosen: torch.Tensor, tokens: int) -> Any:
    """flex_attention's form of `chosen`: blocks on the diagonal are cut by causality, others seen whole. `seen` says
    the same of single tokens, for where no kernel goes by blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return chosen[batch, head, query // BLOCK, key // BLOCK] & (query >= key)

    on_diagonal = torch.eye(chosen.shape[-1], dtype=torch.bool, device=chosen.device).expand_as(chosen)
    return BlockMask.from_kv_blocks(
        *as_lists(chosen & on_diagonal),
        *as_lists(chosen & ~on_diagonal),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,  # for gradients
    )


def as_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each block of queries sees, and which, those first."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def minference_reader(gamma: float) -> Callable:
    """FlexPrefill of the package minference, its threshold between patterns as in the paper."""
    from minference.modules.flexprefill import flex_prefill_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
        states = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return flex_prefill_attention(*states, gamma, 0.1, softmax_scale=scaling, block_size=BLOCK)

    return of_interface(attend)
