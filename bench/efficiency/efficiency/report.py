# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from a folder of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from quality.records import Records

from .rows import SLOW, TUNED
from .run import MEMORY, rounds

MIB = 2**20
BYTES = (
    "attended_bytes",
    "cache_bytes",
    "cache_bytes_end",
    "weight_bytes",
    "loaded",
    "peak_prefill",
    "after_prefill",
    "peak_decode",
)


def load(folder: Path) -> tuple[pd.DataFrame, list[dict[str, Any]], list[dict[str, Any]]]:
    """One line a measurement: tokens, row, round and the fields of `Measurement`, its memory that of processes where
    there is no GPU. Then the rows that failed: tokens, row, error. Then the headers. Raises ValueError for a folder
    without results."""
    lines: list[dict[str, Any]] = []
    failed: dict[tuple[int, str, str], None] = {}
    headers = []
    files = (Records.read(path) for path in folder.glob("*.jsonl"))
    for records in sorted(files, key=lambda records: records.header.get("tokens", 0)):
        if not {"tokens", "device", "budget"} <= records.header.keys():
            raise ValueError(f"{records.path} is not a file of these benchmarks")
        tokens = records.header["tokens"]
        headers.append(records.header)
        of_process = records.samples.get(MEMORY, {}).get("results", {})
        failed |= {(tokens, name, figures["error"]): None for name, figures in of_process.items() if "error" in figures}
        for turn, results in rounds(records).items():
            for name, result in results.items():
                if "error" in result:
                    failed[tokens, name, result["error"]] = None
                    continue
                peaks = {} if "error" in of_process.get(name, {}) else of_process.get(name, {})
                lines.append({"tokens": tokens, "row": name, "round": turn, **result, **peaks})
    if not headers:
        raise ValueError(f"{folder} holds no results")
    return pd.DataFrame(lines), [dict(zip(("tokens", "row", "error"), key, strict=True)) for key in failed], headers


def spread(values: pd.Series) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": float(values.median()), "low": float(values.min()), "high": float(values.max())}


def summary(measured: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry a length and row: medians over rounds, and what a row is against each baseline: the median, the least
    and the greatest of the ratios within rounds. Rows in the order they were measured in."""
    entries = []
    for (tokens, name), of_row in measured.groupby(["tokens", "row"], sort=False):
        of_row = of_row.set_index("round")
        entry: dict[str, Any] = {"tokens": int(tokens), "row": name, "rounds": len(of_row)}
        for field in ("ttft", "decode"):
            entry[field] = spread(of_row[field])
        entry["evicting_share"] = float((of_row["evicting"] / of_row["ttft"]).median())
        entry["decode_evicting_share"] = float((of_row["decode_evicting"] / of_row["decode"]).median())
        for field in BYTES:
            value = pd.to_numeric(of_row[field]).max()
            entry[field] = None if pd.isna(value) else int(value)
        peaks = [entry[field] for field in ("peak_prefill", "peak_decode") if entry[field] is not None]
        entry["peak"] = max(peaks, default=None)
        for baseline in (SLOW, TUNED):
            other = measured[(measured["tokens"] == tokens) & (measured["row"] == baseline)].set_index("round")
            for field in ("ttft", "decode"):
                ratios = (other[field] / of_row[field]).dropna()
                if len(ratios):
                    entry[f"{field}_vs_{baseline}"] = {**spread(ratios), "rounds": len(ratios)}
        entries.append(entry)
    for entry in entries:
        for baseline in (SLOW, TUNED):
            other = next((e for e in entries if (e["tokens"], e["row"]) == (entry["tokens"], baseline)), None)
            if other is not None and other["peak"] and entry["peak"]:
                entry[f"peak_vs_{baseline}"] = entry["peak"] / other["peak"] - 1
    return entries


def factor(entry: dict[str, Any], name: str) -> str:
    """A ratio with the least and the greatest."""
    ratio = entry.get(name)
    if ratio is None:
        return ""
    if ratio["rounds"] == 1:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def mebibytes(value: int | None, less: int | None = 0) -> str:
    """What is more than `less`, with three digits at least."""
    if value is None or less is None:
        return ""
    return f"{(value - less) / MIB:.{0 if value - less >= 100 * MIB else 2}f}"


def change(entry: dict[str, Any], name: str) -> str:
    """A part more or less."""
    return f"{entry[name]:+.1%}" if name in entry else ""


def markdown(entries: list[dict[str, Any]], failed: list[dict[str, Any]], headers: list[dict[str, Any]]) -> str:
    """A table a length, the errors of rows behind it."""
    parts = []
    for header in headers:
        tokens = header["tokens"]
        of_length = [entry for entry in entries if entry["tokens"] == tokens]
        weights = max((entry["weight_bytes"] for entry in of_length), default=None)
        layers = "" if header["layers"] is None else f" (its first {header['layers']} layers)"
        parts.append(
            f"## {tokens} tokens\n\n{header['model']}{layers}, {header['dtype']}, budget {header['budget']:g}, on "
            f"{header['device']} ({header['threads']} threads, {header['clock']} time), PyTorch {header['torch']}, "
            f"restkv {header['restkv']}. {header['decode']} tokens decoded. Weights: {mebibytes(weights)} MiB.\n"
        )
        table = pd.DataFrame(
            {
                "row": entry["row"],
                "TTFT s": f"{entry['ttft']['median']:.3f}",
                "TTFT x tuned": factor(entry, f"ttft_vs_{TUNED}"),
                "evicting %": f"{100 * entry['evicting_share']:.1f}",
                "tokens/s": f"{1 / entry['decode']['median']:.2f}",
                "decode x slow": factor(entry, f"decode_vs_{SLOW}"),
                "decode x tuned": factor(entry, f"decode_vs_{TUNED}"),
                "cache MiB": mebibytes(entry["attended_bytes"]),
                "allocated MiB": mebibytes(entry["cache_bytes"]),
                "prompt adds MiB": mebibytes(entry["peak_prefill"], entry["loaded"]),
                "leaves MiB": mebibytes(entry["after_prefill"], entry["loaded"]),
                "peak MiB": mebibytes(entry["peak"]),
                "peak vs slow": change(entry, f"peak_vs_{SLOW}"),
                "peak vs tuned": change(entry, f"peak_vs_{TUNED}"),
                "rounds": entry["rounds"],
            }
            for entry in of_length
        )
        if of_length:
            parts.append(table.to_markdown(index=False, disable_numparse=True) + "\n")
        parts += [f"* `{f['row']}` has no figures: {f['error']}" for f in failed if f["tokens"] == tokens]
        parts.append("")
    return "\n".join(parts)


def write(folder: Path, out: Path) -> list[Path]:
    """`efficiency.md`, `efficiency.json` and the plots, in the folder `out`. Returns the files, the tables first."""
    from . import plots

    measured, failed, headers = load(folder)
    entries = summary(measured) if len(measured) else []
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "efficiency.md", out / "efficiency.json"]
    files[0].write_text(markdown(entries, failed, headers), encoding="utf-8")
    text = json.dumps({"runs": headers, "rows": entries, "failed": failed}, indent=1)
    files[1].write_text(text, encoding="utf-8")
    return files + (plots.draw(entries, out) if entries else [])
