# SPDX-License-Identifier: Apache-2.0
"""The rows of a table, by name.

slow                         the full cache as the paper's baseline has it: it grows by concatenation, and keys and
                             values are repeated for each query head
tuned                        the full cache in memory that is allocated once, KV heads never repeated
untouched                    the adapter's cache without a policy: what the adapter itself costs
POLICY[:key=value+...][/LAYOUT]    a policy of restkv, its rows padded, ragged, paged or (without /LAYOUT) as the
                             adapter chooses
...@flex, ...@minference     the same, the prompt's attention being block-sparse (`sparse`)
"""

from __future__ import annotations

from dataclasses import dataclass

import restkv
from quality.variants import budgeted, parsed

SLOW, TUNED, UNTOUCHED = "slow", "tuned", "untouched"
BASELINES = (SLOW, TUNED)
PREFILLS = ("dense", "flex", "minference")

DEFAULT = (
    SLOW,
    TUNED,
    UNTOUCHED,
    "standard:allocation=uniform/padded",
    "standard/padded",
    "standard/ragged",
    "standard/paged",
    "lowest_error/ragged",
    "snap_kv_kv_heads/padded",
    "rest_kv_released/padded",
    "tuned@flex",
    "standard/ragged@flex",
    "standard/ragged@minference",
)


@dataclass(frozen=True)
class Row:
    """One row: a cache, and how the prompt is read."""

    name: str
    cache: str  # SLOW, TUNED, UNTOUCHED or "policy"
    policy: restkv.Policy | None = None  # its budget to be set
    layout: str = "auto"
    prefill: str = "dense"

    def budgeted(self, budget: float, tokens: int, query_heads: int, kv_heads: int) -> restkv.Policy | None:
        """The policy with the bytes of `budget` tokens a KV head; below 1, of that share of `tokens`. A policy with a
        set for each query head gets so many fewer tokens."""
        kept = max(1, round(budget * tokens)) if budget < 1 else int(budget)
        return budgeted(self.policy, kept, query_heads, kv_heads)


def parsed_row(name: str) -> Row:
    """The row of a name. Raises ValueError (`restkv.Error` is one) for what is not known."""
    rest, at, prefill = name.partition("@")
    if at and prefill not in PREFILLS:
        raise ValueError(f"{name}: a prompt is read by {', '.join(PREFILLS)}, not by {prefill!r}")
    prefill = prefill or "dense"
    if rest in (SLOW, TUNED, UNTOUCHED):
        if rest == SLOW and prefill != "dense":
            raise ValueError(f"{name}: the slow baseline reads prompts by dense attention only")
        return Row(name, rest, prefill=prefill)
    rest, _, layout = rest.partition("/")
    policy, _, changes = rest.partition(":")
    chosen = restkv.policy(policy).replace(**parsed(changes.replace("+", ",")))
    return Row(name, "policy", chosen, layout or "auto", prefill)
