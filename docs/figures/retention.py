#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws retention.svg: the error of each policy against the memory it keeps. Needs matplotlib.

    restkv compare examples/data/trace-2k.safetensors --budgets 48,64,96,128,192,256,384,512 --json \\
        | python3 docs/figures/retention.py docs/figures/retention.svg
"""
import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

# name in the comparison: (label, colour, height of the label's middle in points above the last mark)
POLICIES = {
    "random_kv_heads": ("random", "#8c8c8c", 8),
    "streaming_llm_kv_heads": ("StreamingLLM", "#b8860b", 3),
    "rest_kv_released": ("ReST-KV as released,\none set per query head", "#c2410c", -7),
    "snap_kv_kv_heads": ("SnapKV", "#2563eb", 3),
    "standard": ("restkv's default", "#15803d", 1),
    "lowest_error": ("… without pooling", "#65a30d", -1),
    "set_error_fitted": ("… a set for queries\nto come, fitted", "#7c3aed", -9),
}


def main() -> None:
    comparison = json.load(sys.stdin)
    plt.rcParams.update({
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "restkv",
        "axes.spines.top": False,
        "axes.spines.right": False,
    })
    figure, axes = plt.subplots(figsize=(8, 4.4))
    # A ground of its own, so that the figure can be read on light and on dark pages.
    figure.patch.set_facecolor("white")
    for name, (label, colour, above) in POLICIES.items():
        rows = sorted((r["bytes"], r["mean"]) for r in comparison["results"] if r["policy"] == name)
        x = [100 * kept / comparison["full_bytes"] for kept, _ in rows]
        y = [100 * error for _, error in rows]
        axes.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=2.4 if name == "standard" else 1.5)
        axes.annotate(label, (x[-1], y[-1]), xytext=(8, above), textcoords="offset points", color=colour, va="center")
    axes.set_yscale("log")
    axes.set_yticks([0.3, 1, 3, 10, 20], ["0.3 %", "1 %", "3 %", "10 %", "20 %"])
    axes.minorticks_off()
    axes.set_xlim(0, 76)
    axes.set_xticks(range(0, 80, 10), [f"{tick} %" for tick in range(0, 80, 10)])
    axes.grid(color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("memory kept, part of the full cache")
    axes.set_title("Error of the attention output for the tokens written after the prompt (lower is better)", loc="left", fontsize=11)
    trace = comparison["trace"]
    figure.text(0.012, 0.015, f"{trace['tokens']} tokens, {trace['future']} queries after them, "
                f"mean of layers {', '.join(str(layer) for layer in trace['layers'])} of SmolLM2-135M-Instruct",
                fontsize=8, color="#666666")
    figure.subplots_adjust(left=0.075, right=0.775, top=0.91, bottom=0.16)
    figure.savefig(sys.argv[1], metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
