# SPDX-License-Identifier: Apache-2.0
"""What is compared: policies by name, made alike in all but what they are about.

Two kinds of rows:

    NAME            the policy's score, reduction and budget with the comparison's window, protection and pooling width,
                    so that scores are compared and not widths
    published/NAME  the policy as its authors run it
    kvpress/NAME    a class of kvpress, run by kvpress (`presses`)

`full_cache` keeps everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import restkv

FULL_CACHE = "full_cache"
PUBLISHED = "published/"

# The rows of a table that nobody asked to choose.
DEFAULT = (
    "standard",
    "lowest_error",
    "published/rest_kv_released",
    "published/rest_kv_paper",
    "rest_kv_released_kv_heads",
    "snap_kv_kv_heads",
    "ada_kv",
    "critical_ada_kv",
    "caote",
    "tova",
    "h2o",
    "key_diff",
    "expected_attention",
    "streaming_llm_kv_heads",
    "random_kv_heads",
)


@dataclass(frozen=True)
class Comparison:
    """What all compared policies have in common."""

    window: int = 32  # queries that are observed, and newest tokens that are kept
    sinks: int = 4  # first tokens that are kept
    width: int = 5  # tokens that scores are pooled over; 1: not at all
    seed: int = 0  # of policies that draw


def variant(name: str, comparison: Comparison) -> restkv.Policy | None:
    """The policy of a row, its budget to be set; None for the full cache. Raises `restkv.Error` for unknown names."""
    if name == FULL_CACHE:
        return None
    if name.startswith(PUBLISHED):
        return restkv.policy(name.removeprefix(PUBLISHED))
    # "NAME:key=value,key=value" changes single keys of a row.
    name, _, changes = name.partition(":")
    policy = restkv.policy(name)
    keys = policy.keys()
    alike = {"window": comparison.window, "n_sink": comparison.sinks, "recent": comparison.window}
    if keys.get("method") not in ("streaming_llm", "streamingllm", "random"):
        if comparison.width == 1:
            alike["spatial"] = "none"
        else:
            pool = keys.get("spatial", "none")
            alike |= {"spatial": "avgpool" if pool == "none" else pool, "kernel": comparison.width}
    if "seed" in keys:
        alike["seed"] = comparison.seed
    return policy.replace(**(alike | parsed(changes)))


def parsed(changes: str) -> dict[str, object]:
    """`key=value,...` as keys of a policy."""
    result: dict[str, object] = {}
    for change in filter(None, changes.split(",")):
        key, equals, text = change.partition("=")
        if not equals:
            raise restkv.Error(f"'{change}' is not of the form key=value")
        result[key] = typed(text)
    return result


def typed(text: str) -> object:
    """A key's value from its text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def budgeted(policy: restkv.Policy | None, tokens: int, query_heads: int, kv_heads: int) -> restkv.Policy | None:
    """The policy with the bytes of `tokens` tokens per KV head. One that keeps a set per query head stores each KV head
    once for each of its query heads, and gets so many fewer tokens."""
    if policy is None:
        return None
    if policy.keys().get("group") == "none":
        tokens = tokens * kv_heads // query_heads
    return policy.replace(budget=tokens)
