# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from a folder of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .records import Records
from .statistics import Mean, mean, paired_difference
from .variants import FULL_CACHE

NOT_A_SCORE = {"nll"}  # lower is better, and without a bound: in no average over tasks


def load(folder: Path) -> pd.DataFrame:
    """One row a sample, policy and budget: model, task, metric, tokens, question, sample, policy, budget (NaN: the full
    cache), score, bytes, kept. Raises ValueError for a folder without results."""
    rows = []
    for path in sorted(folder.rglob("*.jsonl")):
        records = Records.read(path)
        common = {key: records.header[key] for key in ("model", "task", "metric", "tokens", "question", "width")}
        for sample in records.samples.values():
            for name, result in sample["results"].items():
                if "error" in result:
                    continue  # the policy has no set of so few bytes
                policy, _, budget = name.rpartition("@")
                rows.append(
                    {
                        **common,
                        "sample": sample["sample"],
                        "depth": sample.get("meta", {}).get("depth", np.nan),
                        "policy": policy or name,
                        "budget": float(budget) if policy else np.nan,
                        "score": result["score"],
                        "bytes": result["bytes"],
                        "kept": result["kept"],
                    }
                )
    if not rows:
        raise ValueError(f"{folder} holds no results")
    return pd.DataFrame(rows)


def common_samples(cell: pd.DataFrame) -> pd.DataFrame:
    """Scores [sample, (policy, budget)] of the samples that every variant of a cell has answered."""
    table = cell.pivot_table(
        index=["task", "tokens", "sample"], columns=["policy", "budget"], values="score", dropna=False
    )
    table = table.dropna(axis=1, how="all")
    return table.dropna(axis=0, how="any")


def with_full(results: pd.DataFrame) -> pd.DataFrame:
    """The same with the full cache's budget as infinity, so that it can be a column."""
    return results.assign(budget=results["budget"].fillna(np.inf))


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean, interval, difference from the full cache and from `standard`, samples, bytes: one row a policy and budget,
    over all the tasks of a question mode together. Only samples that every variant answered count."""
    rows = []
    for question, cell in with_full(results).groupby("question"):
        scores = common_samples(cell)
        if scores.empty:
            continue
        full = scores.get((FULL_CACHE, np.inf))
        sizes = cell.groupby(["policy", "budget"])[["bytes", "kept"]].mean()
        for (policy, budget), values in scores.items():
            own: Mean = mean(values.to_numpy())
            row = {"question": question, "policy": policy, "budget": budget, "score": own.value}
            row |= {"low": own.low, "high": own.high, "samples": own.count}
            if full is not None:
                row["of full"] = own.value / full.mean() if full.mean() else np.nan
            reference = scores.get(("standard", budget))
            if reference is not None and policy != "standard":
                difference = paired_difference(values.to_numpy(), reference.to_numpy())
                row |= {"vs standard": difference.value, "vs low": difference.low, "vs high": difference.high}
            rows.append(row | sizes.loc[(policy, budget)].to_dict())
    return pd.DataFrame(rows).sort_values(["question", "budget", "score"], ascending=[True, True, False])


def markdown(table: pd.DataFrame, order: Sequence[str] = ()) -> str:
    """A table a question mode: policies by budgets, each cell the mean and its interval."""
    parts = []
    for question, cell in table.groupby("question"):
        wide = cell.assign(
            text=[f"{r.score:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in cell.itertuples()],
            column=["full cache" if np.isinf(b) else f"{b:g}" for b in cell["budget"]],
        )
        ranking = cell.groupby("policy")["score"].mean().sort_values(ascending=False).index
        rows = [*(p for p in order if p in set(ranking)), *(p for p in ranking if p not in order)]
        columns = sorted(set(wide["column"]), key=lambda c: np.inf if c == "full cache" else float(c))
        body = wide.pivot(index="policy", columns="column", values="text").reindex(index=rows, columns=columns)
        count = int(cell["samples"].min())
        parts.append(
            f"Question {question} of the eviction, {count} samples a cell\n\n{body.fillna('').to_markdown()}\n"
        )
    return "\n".join(parts)


def write(folder: Path, out: Path) -> list[Path]:
    """`summary.json`, `summary.md`, one table a task, and the plots, in the folder `out`. Returns the files."""
    from . import plots

    results = load(folder)
    out.mkdir(parents=True, exist_ok=True)
    scores = results[~results["metric"].isin(NOT_A_SCORE)]
    table = summary(scores if not scores.empty else results)
    files = [out / "summary.json", out / "summary.md"]
    files[0].write_text(table.to_json(orient="records", indent=1), encoding="utf-8")
    sections = ["# All tasks\n", markdown(table)]
    for (task, tokens), cell in results.groupby(["task", "tokens"]):
        sections += [f"# {task}, {tokens} tokens ({cell['metric'].iloc[0]})\n", markdown(summary(cell))]
    files[1].write_text("\n".join(sections), encoding="utf-8")
    return files + plots.draw(results, table, out)
