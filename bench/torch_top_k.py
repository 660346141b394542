#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""PyTorch's top-k beside the library's: adds a row top_k/torch for every row top_k/radix of a report of bench/gpu_bench.

    bench/torch_top_k.py REPORT.json

The same rows of as many keys (normal numbers, float32), the same k, and the same way to take time: events around each pass,
the second-level cache flushed before it, the median of three repetitions. torch.topk(sorted=False) returns positions in no
order and breaks ties in a way that it does not promise; the library's rows are ascending positions with ties to the smaller.

Exit status 77, and the report as it was, without PyTorch or without a device that it can use.
"""

import json
import pathlib
import re
import statistics
import sys

BUDGET = 1024  # as in gpu_bench.cu
SECONDS = 0.05  # of a repetition, at least
REPETITIONS = 3
FLUSHED_BYTES = 256 << 20


def time_top_k(torch, rows, tokens):
    """Seconds of a pass, one number a repetition."""
    torch.manual_seed(3)
    keys = torch.randn(rows, tokens, device="cuda")
    other = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run_pass():
        other.zero_()
        begin.record()
        torch.topk(keys, min(BUDGET, tokens), dim=1, sorted=False)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    for _ in range(3):
        run_pass()
    times = []
    for _ in range(REPETITIONS):
        spent = []
        while sum(spent) < SECONDS:
            spent.append(run_pass())
        times.append(statistics.mean(spent))
    return times


def main():
    path = pathlib.Path(sys.argv[1])
    try:
        import torch

        usable = torch.cuda.is_available()
    except ImportError:
        usable = False
    if not usable:
        print("PyTorch with a CUDA device was not found: the table has no rows top_k/torch", file=sys.stderr)
        return 77
    report = json.loads(path.read_text())
    bandwidth = float(report["context"]["copy_bandwidth_GB_per_s"]) * 1e9
    report["context"]["torch"] = str(torch.__version__)
    merged = []
    for row in report["benchmarks"]:
        merged.append(row)
        size = re.match(r"top_k/radix/rows:(\d+)/tokens:(\d+)/", row["run_name"])
        if size is None or row.get("aggregate_name") != "median":
            continue
        rows, tokens = map(int, size.groups())
        seconds = statistics.median(time_top_k(torch, rows, tokens))
        merged.append(
            {
                "name": row["name"].replace("radix", "torch"),
                "run_name": row["run_name"].replace("radix", "torch"),
                "run_type": "aggregate",
                "aggregate_name": "median",
                "repetitions": REPETITIONS,
                "real_time": seconds * 1e6,
                "time_unit": "us",
                "bytes": 4.0 * rows * tokens,
                "of_copy": 4.0 * rows * tokens / bandwidth / seconds,
            }
        )
    report["benchmarks"] = merged
    path.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
