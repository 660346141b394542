# SPDX-License-Identifier: Apache-2.0
"""Speed and memory against the length of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MIB = 2**20

# File: what is drawn, from an entry of the summary; None is left out.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "decode": ("tokens decoded a second", lambda entry: 1 / entry["decode"]["median"]),
    "ttft": ("seconds to the first token", lambda entry: entry["ttft"]["median"]),
    "peak": ("peak memory, MiB", lambda entry: None if entry["peak"] is None else entry["peak"] / MIB),
    "cache": ("keys and values after the prompt, MiB", lambda entry: entry["attended_bytes"] / MIB),
}


def draw(entries: list[dict[str, Any]], out: Path) -> list[Path]:
    """A figure of each kind that the results have; returns the files."""
    return [path for name in FIGURES if (path := figure(name, entries, out)) is not None]


def figure(name: str, entries: list[dict[str, Any]], out: Path) -> Path | None:
    """One line a row over lengths, or bars where there is one length."""
    label, value = FIGURES[name]
    points = [(entry["row"], entry["tokens"], drawn) for entry in entries if (drawn := value(entry)) is not None]
    if not points:
        return None
    rows = list(dict.fromkeys(row for row, _, _ in points))
    lengths = sorted({tokens for _, tokens, _ in points})
    fig, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    if len(lengths) == 1:
        axes.barh([row for row, _, _ in points], [drawn for _, _, drawn in points], color="tab:blue")
        axes.invert_yaxis()
        axes.set_xlabel(f"{label} ({lengths[0]} tokens)")
    else:
        marks = "osv^D<>Ph*Xd"
        for i, row in enumerate(rows):
            line = sorted((tokens, drawn) for of, tokens, drawn in points if of == row)
            style = "--" if row in ("slow", "tuned", "untouched") else "-"
            axes.plot(*zip(*line, strict=True), style, marker=marks[i % len(marks)], markersize=4, label=row)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    path = out / f"{name}.svg"
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    return path
