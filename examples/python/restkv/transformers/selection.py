# SPDX-License-Identifier: Apache-2.0
"""Asks the library what a layer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import restkv

from .projections import metric_of

if TYPE_CHECKING:
    from .layer import RestKVLayer


def select_kept(
    policy: restkv.Policy, layer: RestKVLayer, module: Any, queries: torch.Tensor | None
) -> list[list[torch.Tensor]]:
    """Which entries of its rows a layer keeps [batch][heads][length], ascending. `heads` are those of the cache, or the
    query heads where the policy keeps a set for each."""
    facts: dict[str, Any] = {
        "layer_index": layer.index,
        "layer_count": getattr(module.config, "num_hidden_layers", 1),
        "threads": layer.settings.threads,
    }
    if policy.needs_w_o:
        facts["metric"] = metric_of(module, module.config.num_attention_heads if queries is None else queries.shape[1])
    if not layer.evicted:
        return of_prompt(policy, layer, queries, facts)
    return [of_sequence(policy, layer, b, queries, facts) for b in range(layer.rows.batch)]


def of_prompt(
    policy: restkv.Policy, layer: RestKVLayer, queries: torch.Tensor | None, facts: dict[str, Any]
) -> list[list[torch.Tensor]]:
    """From a prompt in one piece, all sequences at once. Padding stands before each sequence; where it does not,
    tokens are moved so first."""
    key, value = layer.prompt.dense()
    order = None
    if layer.valid is not None and not is_left_padding(layer.valid):
        order = layer.valid.to(torch.uint8).argsort(dim=1, stable=True)
        key, value = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (key, value))
    budgets = [budget_of(policy, count) for count in layer.counts]
    # Sequences are selected from together where they have the same budget.
    step = len(budgets) if len(set(budgets)) == 1 else 1
    chosen = []
    for b in range(0, len(budgets), step):
        part = slice(b, b + step)
        if layer.valid is not None:
            facts = {**facts, "lengths": torch.tensor(layer.counts[part], dtype=torch.int32)}
        of_part = None if queries is None else queries[part]
        kept = select(policy.replace(budget=budgets[b]), of_part, key[part], value[part], **facts)
        chosen += entries(kept, key.device)
    if order is not None:
        chosen = [[order[b][index] for index in of_sequence] for b, of_sequence in enumerate(chosen)]
    return chosen


def of_sequence(
    policy: restkv.Policy, layer: RestKVLayer, b: int, queries: torch.Tensor | None, facts: dict[str, Any]
) -> list[torch.Tensor]:
    """From what one sequence's heads have left, and what came since."""
    lengths = layer.rows.lengths[b]
    longest = max(lengths)
    key, value = layer.rows.side_by_side(b)
    if min(lengths) < longest:
        facts = {**facts, "head_lengths": torch.tensor([lengths], dtype=torch.int32)}
    # A share is one of the tokens that came, not of those that earlier evictions left.
    policy = policy.replace(budget=budget_of(policy, layer.counts[b]))
    kept = select(policy, None if queries is None else queries[b : b + 1], key, value, **facts)
    chosen = entries(kept, key.device)[0]
    group = len(chosen) // len(lengths)
    return [index - (longest - lengths[h // group]) for h, index in enumerate(chosen)]


def select(
    policy: restkv.Policy,
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    **facts: Any,
) -> restkv.Kept:
    """`restkv.select`, on the device where the module can do this policy there, otherwise on the host: then keys and
    values are copied to it for the length of the call."""
    if key.device.type != "cpu":
        try:
            return restkv.select(policy, query, key, value, **facts)
        except restkv.Error:
            query, key, value = None if query is None else query.cpu(), key.cpu(), value.cpu()
    return restkv.select(policy, query, key, value, **facts)


def budget_of(policy: restkv.Policy, tokens: int) -> int:
    """Tokens a head keeps in the mean, of so many that came. A share of few tokens is no less than what the policy
    protects: short prompts are evicted less, not refused."""
    if policy.compression_ratio == 0:
        return policy.budget
    return max(int(tokens * (1.0 - policy.compression_ratio)), protected_by(policy))


def protected_by(policy: restkv.Policy) -> int:
    """Tokens that the policy never evicts."""
    keys = policy.keys()
    return max(1, int(keys["n_sink"]) + max(int(keys["window"]), int(keys["recent"])))


def is_left_padding(valid: torch.Tensor) -> bool:
    """Whether every row of `valid` [batch, tokens] is false first, then true."""
    return not bool((valid[:, :-1] & ~valid[:, 1:]).any())


def entries(kept: restkv.Kept, device: torch.device) -> list[list[torch.Tensor]]:
    """The kept positions of each head, as indices for PyTorch."""
    positions = torch.as_tensor(kept.positions).to(device, torch.int64)
    lengths = torch.as_tensor(kept.lengths).tolist()
    return [[positions[b, h, :n] for h, n in enumerate(of)] for b, of in enumerate(lengths)]
