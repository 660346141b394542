# SPDX-License-Identifier: Apache-2.0
"""The attention functions that hand queries to a `RestKVCache`, and how a model gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import restkv

from .layer import RestKVLayer
from .prompts import attend_prompt

if TYPE_CHECKING:
    from .cache import RestKVCache

NAMES = {"restkv": False, "restkv_fa2": True}
"""The registered functions, and whether they read prompts by the package flash_attn. None is called "flash": then
transformers would make its masks for FlashAttention, and decoding needs others."""


def attention_of(flash: bool) -> Any:
    """An attention function of transformers' interface."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,  # by position from kvpress, which wraps every registered function
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        for name in ("s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                raise restkv.Error(f"attention with {name} is not known: {type(module).__name__} needs another cache")
        facts: dict[str, Any] = {"flash": flash, "scaling": scaling, "softcap": softcap, "dropout": dropout, **kwargs}
        facts["sliding_window"] = sliding_window
        layer: RestKVLayer | None = getattr(key, "restkv_layer", None)
        if layer is None:
            return attend_prompt(module, query, key, value, attention_mask, **facts), None
        output = layer.attend(module, query, attention_mask, **facts)
        cache: RestKVCache | None = getattr(key, "restkv_cache", None)
        if cache is not None:
            cache.attended(layer, query.shape[2])
        return output, None

    return attention


def register() -> None:
    """Makes "restkv" (prompts by sdpa) and "restkv_fa2" (prompts by FlashAttention 2) known to transformers. Importing
    the package does it."""
    for name, flash in NAMES.items():
        AttentionInterface.register(name, attention_of(flash))
        AttentionMaskInterface.register(name, sdpa_mask)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model's attention go through this package, whatever cache it is used with; returns the model. No module
    is changed: it is `model.set_attn_implementation`. A model that runs FlashAttention 2 keeps it for prompts. Other
    caches go on working, with sdpa (or FlashAttention) as before."""
    current = model.config.get_text_config(decoder=True)._attn_implementation
    if current in NAMES:
        return model
    name = "restkv_fa2" if current == "flash_attention_2" else "restkv"
    model.set_attn_implementation(name)
    if model.config.get_text_config(decoder=True)._attn_implementation != name:
        raise restkv.Error(f"{type(model).__name__} does not use transformers' attention interface")
    return model
