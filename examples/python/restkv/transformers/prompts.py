# SPDX-License-Identifier: Apache-2.0
"""Attention of a prompt: to keys that are all there, under the model's own mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attend import Logits, attend_masked


def attend_prompt(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    flash: bool,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention [batch, n, query_heads, value_dim] as transformers' "sdpa" computes it; with `flash` by the package
    flash_attn where there is no mask and elements have 16 bits. A soft cap of logits goes by the latter or by plain
    operations."""
    if flash and mask is None and query.dtype in (torch.float16, torch.bfloat16):
        from flash_attn import flash_attn_func

        return flash_attn_func(
            *(x.transpose(1, 2) for x in (query, key, value)),
            dropout_p=kwargs.get("dropout", 0.0),
            softmax_scale=scaling,
            causal=True,  # the last query sees all keys, whatever there were before
            window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
            softcap=0.0 if softcap is None else softcap,
        )
    if softcap is not None:
        logits = Logits.of(scaling, softcap, query.shape[-1])
        return attend_masked(query, key, value, None, mask, logits).transpose(1, 2).contiguous()
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, mask, scaling=scaling, sliding_window=sliding_window, **{"dropout": 0.0, **kwargs}
    )
    return output
