#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws kept.svg: which positions each policy keeps of the bundled trace. Needs matplotlib.

    restkv compare examples/data/trace-2k.safetensors --budgets 128 --seeds 1 --json --kept \\
        | python3 docs/figures/kept.py docs/figures/kept.svg
"""
import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

LAYER = 10
BUDGET = 128
BINS = 256  # tokens in a row share a bar


def kept_per_bin(heads, tokens):
    """The part of the tokens of each bin that is kept, mean of the heads."""
    parts = [0.0] * BINS
    width = tokens / BINS
    for runs in heads:
        at = 0
        for i, run in enumerate(runs):
            if i % 2 == 1:
                for n in range(at, at + run):
                    parts[min(BINS - 1, int(n / width))] += 1
            at += run
    return [part / width / len(heads) for part in parts]


def main() -> None:
    comparison = json.load(sys.stdin)
    tokens = comparison["trace"]["tokens"]
    titles = {group["name"]: group["title"] for group in comparison["groups"]}
    kept = {entry["policy"]: entry["heads"] for entry in comparison["kept"]
            if (entry["layer"], entry["budget"]) == (LAYER, BUDGET)}
    policies = [policy for policy in comparison["policies"] if policy["name"] in kept and policy["group"] != "full"]
    plt.rcParams.update({
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 8,
        "svg.fonttype": "none",
        "svg.hashsalt": "restkv",
    })
    names, rows, headings = [], [], {}
    for policy in policies:
        if policy["group"] not in headings:
            headings[policy["group"]] = len(rows)
            names.append(titles[policy["group"]])
            rows.append(None)
        names.append(policy["name"])
        rows.append(kept_per_bin(kept[policy["name"]], tokens))
    figure, axes = plt.subplots(figsize=(9, 0.19 * len(rows) + 0.8))
    figure.patch.set_facecolor("white")
    image = [[float("nan")] * BINS if row is None else row for row in rows]
    axes.pcolormesh([i * tokens / BINS for i in range(BINS + 1)], range(len(rows) + 1), image, cmap="Greens", vmin=0,
                    vmax=1, rasterized=True)
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(rows))], names)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row is None:
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("token")
    axes.set_title(f"Part of the tokens kept in layer {LAYER}, mean of the heads; {BUDGET} tokens per query head",
                   loc="left", fontsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=150, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
