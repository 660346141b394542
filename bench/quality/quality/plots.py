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
    needles = results[results["depth"].notna()]
    for (task, question, budget), cell in needles.groupby(["task", "question", needles["budget"].fillna(0)]):
        if cell["depth"].nunique() > 1:
            files.append(depth_by_length(cell, f"{task}, question {question}", float(budget), out))
    return files


def depth_by_length(cell: pd.DataFrame, title: str, budget: float, out: Path) -> Path:
    """A heat map a policy: the score of needles by the length of the text and the depth they lie at."""
    policies = sorted(cell["policy"].unique(), key=lambda p: (-cell.loc[cell["policy"] == p, "score"].mean(), p))
    columns = min(4, len(policies))
    rows = -(-len(policies) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns, 2.6 * rows + 0.5),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes, policy in zip(grid.flat, policies, strict=False):
        table = cell[cell["policy"] == policy].pivot_table(index="depth", columns="tokens", values="score")
        image = axes.imshow(table.to_numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{policy} {np.nanmean(table.to_numpy()):.2f}", fontsize=7)
        axes.set_xticks(range(table.shape[1]), [f"{tokens:g}" for tokens in table.columns], fontsize=6, rotation=45)
        axes.set_yticks(range(table.shape[0]), [f"{depth:.0%}" for depth in table.index], fontsize=6)
    for axes in grid.flat[len(policies) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, shrink=0.6)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("depth", fontsize=8)
    kept = f", {budget:g} tokens a head" if budget >= 1 else f", {budget:.0%} kept" if budget > 0 else ", full cache"
    figure.suptitle(title + kept, fontsize=9)
    name = title.replace("/", ".").replace(", question ", ".")
    path = out / f"depth.{name}.{budget:g}.svg"
    figure.savefig(path)
    plt.close(figure)
    return path


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
