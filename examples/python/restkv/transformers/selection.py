# SPDX-License-Identifier: Apache-2.0
"""Asks the library what layers keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import restkv

from .projections import metric_of

if TYPE_CHECKING:
    from .layer import RestKVLayer

Entries = list[list[torch.Tensor]]
"""Which entries of its rows a layer keeps [sequences][heads][length], ascending. `heads` are those of the cache, or the
query heads where the policy keeps a set for each."""


@dataclasses.dataclass
class Request:
    """Sequences of one layer that are selected from together."""

    budget: int
    arguments: dict[str, Any]  # of `restkv.select`
    entries: Callable[[Entries], Entries]  # from positions in `key` to entries of the rows


def select_kept(policy: restkv.Policy, layer: RestKVLayer) -> Entries:
    """What one layer keeps."""
    place = {"layer_index": layer.index, "layer_count": getattr(layer.module.config, "num_hidden_layers", 1)}
    chosen: Entries = []
    for request in requests(policy, layer):
        kept = select(
            policy.replace(budget=request.budget), **request.arguments, **place, threads=layer.settings.threads
        )
        chosen += request.entries(positions_of(kept, layer.device))
    return chosen


def select_together(policy: restkv.Policy, layers: Sequence[RestKVLayer]) -> list[Entries]:
    """What each of the layers keeps under a budget that they share."""
    asked = [requests(policy, layer) for layer in layers]
    if len({len(of_layer) for of_layer in asked}) > 1:
        raise restkv.Error("some layers were evicted by themselves: they cannot share a budget with the others")
    chosen: list[Entries] = [[] for _ in layers]
    for i, first in enumerate(asked[0]):
        # A budget is cut to the length of the first layer that comes in: the longest one.
        lengths = [of_layer[i].arguments["key"].shape[2] for of_layer in asked]
        order = sorted(range(len(layers)), key=lambda n: lengths[n], reverse=True)
        model = restkv.ModelSelection(
            policy.replace(budget=first.budget), len(layers), threads=layers[0].settings.threads
        )
        for n in order:
            model.add(**{name: on_host(value) for name, value in asked[n][i].arguments.items()})
        for came, n in enumerate(order):
            chosen[n] += asked[n][i].entries(positions_of(model.kept(came), layers[n].device))
    return chosen


def requests(policy: restkv.Policy, layer: RestKVLayer) -> list[Request]:
    """What is asked about a layer."""
    queries = layer.queries.view() if layer.queries.parts else None
    facts: dict[str, Any] = {}
    if policy.needs_w_o:
        module = layer.module
        facts["metric"] = metric_of(module, module.config.num_attention_heads if queries is None else queries.shape[1])
    if not layer.evicted:
        return of_prompt(policy, layer, queries, facts)
    return [of_sequence(policy, layer, b, queries, facts) for b in range(layer.rows.batch)]


def of_prompt(
    policy: restkv.Policy, layer: RestKVLayer, queries: torch.Tensor | None, facts: dict[str, Any]
) -> list[Request]:
    """From a prompt in one piece, all sequences at once. Padding stands before each sequence; where it does not,
    tokens are moved so first."""
    key, value = layer.prompt.dense()
    order: torch.Tensor | None = None
    if layer.valid is not None and not is_left_padding(layer.valid):
        order = layer.valid.to(torch.uint8).argsort(dim=1, stable=True)
        key, value = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (key, value))
    budgets = [budget_of(policy, count) for count in layer.counts]
    # Sequences are selected from together where they have the same budget.
    step = len(budgets) if len(set(budgets)) == 1 else 1
    asked = []
    for b in range(0, len(budgets), step):
        part = slice(b, b + step)
        if layer.valid is not None:
            facts = {**facts, "lengths": torch.tensor(layer.counts[part], dtype=torch.int32)}
        arguments = {
            "query": None if queries is None else queries[part],
            "key": key[part],
            "value": value[part],
            **facts,
        }
        asked.append(Request(budgets[b], arguments, partial(before_move, None if order is None else order[part])))
    return asked


def of_sequence(
    policy: restkv.Policy, layer: RestKVLayer, b: int, queries: torch.Tensor | None, facts: dict[str, Any]
) -> Request:
    """From what one sequence's heads have left, and what came since."""
    lengths = layer.rows.lengths[b]
    longest = max(lengths)
    key, value = layer.rows.side_by_side(b)
    if min(lengths) < longest:
        facts = {**facts, "head_lengths": torch.tensor([lengths], dtype=torch.int32)}
    # A share is one of the tokens that came, not of those that earlier evictions left.
    query = None if queries is None else queries[b : b + 1]
    arguments = {"query": query, "key": key, "value": value, **facts}
    return Request(budget_of(policy, layer.counts[b]), arguments, partial(in_rows, lengths))


def before_move(order: torch.Tensor | None, chosen: Entries) -> Entries:
    """Entries of tokens that were moved by `order` [sequences, tokens], where they lay before."""
    if order is None:
        return chosen
    return [[order[b][index] for index in of_sequence] for b, of_sequence in enumerate(chosen)]


def in_rows(lengths: list[int], chosen: Entries) -> Entries:
    """Entries of rows of these lengths, from positions in rows that end together."""
    longest, group = max(lengths), len(chosen[0]) // len(lengths)
    return [[index - (longest - lengths[h // group]) for h, index in enumerate(of)] for of in chosen]


def on_host(value: Any) -> Any:
    """A tensor in the host's memory; anything else as it is."""
    return value.cpu() if isinstance(value, torch.Tensor) else value


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
            query, key, value = on_host(query), key.cpu(), value.cpu()
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


def positions_of(kept: restkv.Kept, device: torch.device) -> Entries:
    """The kept positions of each head, as indices for PyTorch."""
    positions = torch.as_tensor(kept.positions).to(device, torch.int64)
    lengths = torch.as_tensor(kept.lengths).tolist()
    return [[positions[b, h, :n] for h, n in enumerate(of)] for b, of in enumerate(lengths)]
