# SPDX-License-Identifier: Apache-2.0
"""kvpress's own methods beside ours, run by kvpress itself: an independent check of our figures.

A row `kvpress/NAME` is the class `NAME` of kvpress at the share of tokens that the budget evicts, its window the comparison's
where it has one. Each takes a prefill of its own, for a press compresses while the model reads.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import restkv
import torch
from transformers import DynamicCache

from .variants import Comparison

PREFIX = "kvpress/"


@dataclass(frozen=True)
class PressVariant:
    """A press by its name, and the tokens it keeps of a prompt."""

    name: str
    comparison: Comparison
    budget: int = 0

    def press(self, tokens: int) -> Any:
        """The press for a prompt of so many tokens. Raises `restkv.Error` for names that kvpress does not have, and
        budgets beyond the prompt."""
        import kvpress
        from restkv.kvpress import with_current_transformers

        inner, _, outer = self.name.partition("+")
        made = None
        for name in filter(None, (inner, outer)):
            kind = getattr(kvpress, name, None)
            if kind is None:
                raise restkv.Error(f"kvpress has no {name}")
            takes = inspect.signature(kind).parameters
            settings: dict[str, Any] = {} if made is None else {"press": made}
            if "window_size" in takes:
                settings["window_size"] = self.comparison.window
            if "kernel_size" in takes:
                settings["kernel_size"] = self.comparison.width
            if made is None:
                # Half a token more than the budget, so that rounding down gives the budget.
                settings["compression_ratio"] = max(0.0, 1.0 - (self.budget + 0.5) / tokens)
            made = kind(**settings)
        return with_current_transformers(made)


def parsed(name: str, comparison: Comparison) -> PressVariant:
    """`kvpress/SnapKVPress`, or `kvpress/SnapKVPress+AdaKVPress` for a press around a press."""
    return PressVariant(name.removeprefix(PREFIX), comparison)


def compressed(
    model: Any, cache_argument: str, before: torch.Tensor, variant: PressVariant
) -> tuple[DynamicCache, int]:
    """The cache that a press leaves of a prompt [1, n], and the bytes of what it keeps. Heads that compete keep their
    evicted entries, which attention passes over: they are not counted."""
    press = variant.press(before.shape[1])
    model.set_attn_implementation("sdpa")
    cache = DynamicCache()
    with press(model):
        model.model(before, **{cache_argument: cache})
    stored = 0
    for layer, of in zip(model.model.layers, cache.layers, strict=True):
        evicted = getattr(layer.self_attn, "masked_key_indices", None)
        entries = of.keys.shape[0] * of.keys.shape[1] * of.keys.shape[2] - (0 if evicted is None else len(evicted[0]))
        stored += 2 * entries * of.keys.shape[3] * of.keys.element_size()
    return cache, stored
