# SPDX-License-Identifier: Apache-2.0
"""The attention functions of the two baselines with a full cache, for transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SLOW, TUNED = "efficiency_slow", "efficiency_tuned"


def slow(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [batch, n, query_heads, head_dim] with keys and values repeated for each query head. Decoding is by
    plain operations; a prompt by a fused kernel, since the logits of 131072 tokens would take 1 TB."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] > 1:
        check_whole(query, key, attention_mask)
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    else:
        logits = torch.matmul(query, key.transpose(-2, -1)) * scaling
        output = torch.matmul(torch.softmax(logits, dim=-1, dtype=torch.float32).to(value.dtype), value)
    return output.transpose(1, 2).contiguous(), None


def tuned(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The same without a copy of a key: a prompt by transformers' "sdpa" (`enable_gqa`), or what stands in for it, and
    decoding with the query heads of a group side by side, which fused kernels read as one head's queries."""
    if query.shape[2] > 1:
        check_whole(query, key, attention_mask)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, query_heads, _, head_dim = query.shape
    packed = query.reshape(batch, key.shape[1], query_heads // key.shape[1], head_dim)
    output = functional.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return output.reshape(batch, 1, query_heads, value.shape[-1]), None


def check_whole(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Prompts come in one piece and without padding; anything else would be computed wrong."""
    if mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries to {key.shape[2]} keys: the prompt must come in one piece, unmasked"
        )


def register() -> None:
    """Makes both known to transformers."""
    for name, function in ((SLOW, slow), (TUNED, tuned)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


@contextmanager
def prompts_read_by(function: Callable | None) -> Iterator[None]:
    """Lets `function` stand in for transformers' "sdpa" where there are several queries: `tuned` and the adapter read
    prompts by that. None: nothing is changed."""
    if function is None:
        yield
        return
    dense = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        return (function if query.shape[2] > 1 else dense)(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = dense
