#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The table of the README's section "Measured" is what `restkv compare` measures.

readme_figures.py RESTKV README TRACE
"""
import json
import pathlib
import subprocess
import sys

# Rows of the table and policies of the comparison. A row that is not here is an error.
POLICIES = {
    "`standard`": "standard",
    "`lowest_error`": "lowest_error",
    "… for anticipated queries, values fitted": "anticipated_fitted",
    "… and the set refined for its joint error": "set_error_fitted",
    "ReST-KV as released, per query head": "rest_kv_released",
    "ReST-KV as in the paper, per query head": "rest_kv_paper",
    "ReST-KV's released score, per KV head": "rest_kv_released_kv_heads",
    "SnapKV, per query head": "snap_kv_query_heads",
    "SnapKV, per KV head": "snap_kv_kv_heads",
    "StreamingLLM, per KV head": "streaming_llm_kv_heads",
    "random, per KV head (mean of 3 seeds)": "random_kv_heads",
}


def table_of(readme):
    section = readme.split("\n## Measured\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    budgets = [int(cell) for cell in rows[0][1:]]
    return budgets, {row[0]: [float(cell) for cell in row[1:]] for row in rows[2:]}


def main():
    program, readme, trace = sys.argv[1:]
    budgets, rows = table_of(pathlib.Path(readme).read_text(encoding="utf-8"))
    unknown = set(rows) ^ set(POLICIES)
    if unknown or not budgets:
        sys.exit(f"rows of the table that are not compared, or the other way round: {sorted(unknown)}")
    done = subprocess.run([program, "compare", trace, "--json", "--quiet", "--budgets", ",".join(map(str, budgets)),
                           "--policies", ",".join(POLICIES.values())], check=True, capture_output=True, text=True)
    measured = {(r["policy"], r["budget"]): r["mean"] for r in json.loads(done.stdout)["results"]}
    wrong = 0
    for label, figures in rows.items():
        for budget, figure in zip(budgets, figures, strict=True):
            mean = measured[POLICIES[label], budget]
            # One unit of the last digit: two tokens that nearly tie may change places on another machine.
            if abs(mean - figure) > 1.0e-4:
                print(f"{label}, {budget} tokens: the README says {figure:.4f}, measured is {mean:.4f}")
                wrong += 1
    print(f"{len(measured)} figures compared, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
