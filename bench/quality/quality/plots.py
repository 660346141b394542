# SPDX-License-Identifier: Apache-2.0
"""Quality against bytes, and heat maps of depth and length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from .variants import FULL_CACHE


def draw(results: pd.DataFrame, table: pd.DataFrame, out: Path) -> list[Path]:
    """Draws what the results have; returns the files."""
    files = [quality_against_bytes(cell, str(question), out) for question, cell in table.groupby("question")]
    return files


def quality_against_bytes(table: pd.DataFrame, question: str, out: Path) -> Path:
    """A line a policy: its mean score by the share of the cache's bytes that it keeps."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    full = table[table["policy"] == FULL_CACHE]
    for number, (policy, cell) in enumerate(table[table["policy"] != FULL_CACHE].groupby("policy")):
        cell = cell.sort_values("kept")
        style = {"linewidth": 2.5, "zorder": 3} if policy == "standard" else {"linewidth": 1}
        (line,) = axes.plot(100 * cell["kept"], cell["score"], marker="osv^Dx"[number % 6], label=policy, **style)
        axes.fill_between(100 * cell["kept"], cell["low"], cell["high"], color=line.get_color(), alpha=0.08)
    if not full.empty:
        axes.axhline(float(full["score"].iloc[0]), color="black", linestyle="--", linewidth=1, label="full cache")
    axes.set_xscale("log")
    ticks = sorted(set(np.round(100 * table.loc[table["policy"] != FULL_CACHE, "kept"], 0)))
    axes.set_xticks([t for t in ticks if t > 0], [f"{t:g} %" for t in ticks if t > 0])
    axes.minorticks_off()
    axes.set_xlabel("bytes of keys and values kept")
    axes.set_ylabel("score")
    axes.set_title(f"Question {question} of the eviction")
    axes.legend(fontsize=7, ncols=2)
    path = out / f"quality_{question}.svg"
    figure.savefig(path)
    plt.close(figure)
    return path
