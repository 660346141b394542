# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to a cache whose rows have lengths of their own.

The query heads of a KV head see the same keys. They stand where query tokens do, so keys are never repeated.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from .rows import RaggedRows

MASK_ELEMENTS = 2**24
"""Most elements of a mask, or of logits, that are made at a time: longer prompts go in blocks of queries."""


class Logits(NamedTuple):
    """What a model makes of query . key: times `scale`, and bounded by `softcap` where there is one."""

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, scaling: float | None, softcap: float | None, head_dim: int) -> Logits:
        """From what transformers hands to attention."""
        return cls(head_dim**-0.5 if scaling is None else scaling, softcap)


def attend_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: torch.Tensor | None,
    block: torch.Tensor | None,
    logits: Logits,
) -> torch.Tensor:
    """Attention [batch, query_heads, n, value_dim] of `query` [batch, query_heads, n, head_dim] to `key`
    [batch, heads, tokens, head_dim] and `value`. `past` [batch, heads, tokens] says which are there, None: all. Of the
    last tokens, which came with the queries, a query sees what `block` [batch or 1, 1, n, new] says; None: those up to
    its own. `block` may also be a mask of all tokens. Without a soft cap a query that sees nothing gets zeros."""
    batch, query_heads, n, _ = query.shape
    heads, tokens = key.shape[1:3]
    group = query_heads // heads
    if block is None and n == 1:
        return grouped(query, key, value, None if past is None else past[:, :, None], logits)
    if block is None:
        block = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()[None, None]
    elif block.dtype != torch.bool:
        block = block == 0  # a mask to be added
    output = query.new_empty(batch, query_heads, n, value.shape[-1])
    step = max(1, MASK_ELEMENTS // (batch * heads * group * tokens))
    for begin in range(0, n, step):
        chunk = slice(begin, min(n, begin + step))
        seen = block.new_ones(batch, heads, chunk.stop - begin, tokens)
        if past is not None:
            seen &= past[:, :, None]
        seen[..., tokens - block.shape[-1] :] &= block[:, :, chunk]
        output[:, :, chunk] = grouped(query[:, :, chunk], key, value, seen, logits)
    return output


def grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    logits: Logits,
) -> torch.Tensor:
    """Attention with the heads of a group side by side; `mask` [batch, heads, n or 1, tokens] is the group's."""
    batch, query_heads, n, head_dim = query.shape
    heads = key.shape[1]
    packed = query.reshape(batch, heads, query_heads // heads * n, head_dim)
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, None].expand(-1, -1, query_heads // heads, -1, -1).flatten(2, 3)
    if logits.softcap is None:
        output = functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=logits.scale)
    else:
        output = capped(packed, key, value, mask, logits.scale, logits.softcap)
    return output.reshape(batch, query_heads, n, value.shape[-1])


def capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """Attention with logits bounded by tanh, which PyTorch's fused kernels do not know."""
    logits = torch.matmul(query, key.transpose(-2, -1)) * scale
    logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


def attend_rows(
    query: torch.Tensor,
    rows: RaggedRows,
    block: torch.Tensor | None,
    valid: torch.Tensor | None,
    logits: Logits,
) -> torch.Tensor:
    """`Rows.attend` for ragged rows: on a GPU one call of a variable-length kernel where there is one, with a row as
    one sequence; otherwise one call for each row."""
    batch, query_heads, n, _ = query.shape
    group = query_heads // rows.heads
    if n == 1 and block is None and logits.softcap is None and query.is_cuda and has_varlen():
        return attend_varlen(query, rows, logits.scale)
    output = query.new_empty(batch, query_heads, n, rows.value.shape[-1])
    for b in range(batch):
        seen = None if block is None else block[min(b, block.shape[0] - 1)][None]
        if valid is not None and seen is not None:
            seen = seen[..., valid[b]]
        for h in range(rows.heads):
            key, value, _ = rows.row(b, h)
            of_group = query[b : b + 1, h * group : (h + 1) * group]
            output[b : b + 1, h * group : (h + 1) * group] = attend_masked(
                of_group, key[None, None], value[None, None], None, seen, logits
            )
    return output


def has_varlen() -> bool:
    """Whether this PyTorch has an attention for sequences of different lengths whose memory has room behind each."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"seqused_k", "scale", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def attend_varlen(query: torch.Tensor, rows: RaggedRows, scale: float) -> torch.Tensor:
    """One query token to all ragged rows in one call: a row is a sequence with one KV head, `group` query heads."""
    from torch.nn.attention.varlen import varlen_attn

    batch, query_heads, _, head_dim = query.shape
    count = batch * rows.heads
    queries = torch.arange(count + 1, dtype=torch.int32, device=query.device)
    output: Any = varlen_attn(
        query.reshape(count, query_heads // rows.heads, head_dim),
        rows.key[:, None],
        rows.value[:, None],
        queries,
        rows.begins,
        1,
        max(map(max, rows.lengths)) + rows.room,
        scale=scale,
        enable_gqa=True,
        seqused_k=(rows.ends.flatten() - rows.begins[:-1]).int(),
    )
    return output.reshape(batch, query_heads, 1, -1)
