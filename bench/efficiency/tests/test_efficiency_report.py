# SPDX-License-Identifier: Apache-2.0
"""Tables from stored figures."""

from __future__ import annotations

import json

import pytest
from efficiency import report

HEADER = {
    "model": "m",
    "dtype": "float32",
    "layers": None,
    "device": "a processor",
    "threads": 1,
    "clock": "wall",
    "tokens": 4096,
    "budget": 256,
    "decode": 64,
    "lead": 8,
    "torch": "2",
    "restkv": "0",
}
MIB = 2**20


def figures(ttft: float, decode: float, **changes) -> dict:
    return {
        "ttft": ttft,
        "evicting": 0.25 * ttft,
        "decode": decode,
        "decode_evicting": 0.0,
        "attended_bytes": 3 * MIB,
        "cache_bytes": 4 * MIB,
        "cache_bytes_end": 5 * MIB,
        "weight_bytes": 90 * MIB,
        "loaded": None,
        "peak_prefill": None,
        "after_prefill": None,
        "peak_decode": None,
        **changes,
    }


def store(folder, samples: dict[str, dict], **changes) -> None:
    folder.mkdir(exist_ok=True)
    header = HEADER | changes
    lines = [header, *({"sample": name, "results": results} for name, results in samples.items())]
    (folder / f"{header['tokens']}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "results"
    store(
        folder,
        {
            "0": {"slow": figures(2, 0.8), "tuned": figures(1, 0.2), "r": figures(4, 0.1)},
            "1": {"slow": figures(4, 1.6), "tuned": figures(2, 0.6), "r": figures(2, 0.2), "bad": {"error": "E: no"}},
            "2": {"slow": figures(3, 0.9), "tuned": figures(1, 0.3)},  # cut short
            "memory": {
                "tuned": {"loaded": 100 * MIB, "peak_prefill": 300 * MIB, "after_prefill": 0, "peak_decode": 400 * MIB},
                "r": {"loaded": 100 * MIB, "peak_prefill": 260 * MIB, "after_prefill": 0, "peak_decode": 200 * MIB},
            },
        },
    )
    return folder


def entry(folder, row: str) -> dict:
    measured, _, _ = report.load(folder)
    return next(entry for entry in report.summary(measured) if entry["row"] == row)


def test_ratios_are_taken_within_rounds(folder):
    of = entry(folder, "r")
    assert of["rounds"] == 2
    assert of["decode"]["median"] == pytest.approx(0.15)
    assert of["decode_vs_tuned"] == {"median": 2.5, "low": 2.0, "high": pytest.approx(3.0), "rounds": 2}
    assert of["decode_vs_slow"] == {"median": 8.0, "low": 8.0, "high": 8.0, "rounds": 2}
    assert of["ttft_vs_tuned"] == {"median": 0.625, "low": 0.25, "high": 1.0, "rounds": 2}
    assert of["evicting_share"] == 0.25


def test_memory_is_that_of_processes(folder):
    of = entry(folder, "r")
    assert of["peak"] == 260 * MIB
    assert of["peak_vs_tuned"] == pytest.approx(260 / 400 - 1)
    assert "peak_vs_slow" not in of
    assert entry(folder, "slow")["peak"] is None


def test_memory_of_a_gpu(tmp_path):
    full = figures(1, 1, loaded=10 * MIB, peak_prefill=50 * MIB, after_prefill=30 * MIB, peak_decode=40 * MIB)
    less = figures(1, 1, loaded=10 * MIB, peak_prefill=32 * MIB, after_prefill=12 * MIB, peak_decode=20 * MIB)
    store(tmp_path, {"0": {"slow": full, "tuned": full, "r": less}})
    assert entry(tmp_path, "r")["peak_vs_slow"] == pytest.approx(-0.36)


def test_the_report_from_stored_results(folder, tmp_path):
    store(folder, {"0": {"tuned": figures(9, 0.4)}}, tokens=8192)
    files = report.write(folder, tmp_path / "out")
    assert {file.name for file in files} == {
        *("efficiency.md", "efficiency.json", "decode.svg", "ttft.svg", "peak.svg", "cache.svg")
    }
    assert all(file.stat().st_size for file in files)
    table = files[0].read_text()
    assert table.index("## 4096 tokens") < table.index("## 8192 tokens")
    assert "on a processor (1 threads, wall time)" in table
    assert "Weights: 90.00 MiB" in table
    line = next(line for line in table.splitlines() if line.startswith("| r "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        *("r", "3.000", "0.62 [0.25, 1.00]", "25.0", "6.67", "8.00 [8.00, 8.00]", "2.50 [2.00, 3.00]"),
        *("3.00", "4.00", "160", "-100.00", "260", "", "-35.0%", "2"),
    ]
    assert "* `bad` has no figures: E: no" in table
    stored = json.loads(files[1].read_text())
    assert {of["row"] for of in stored["rows"]} == {"slow", "tuned", "r"}
    assert stored["failed"] == [{"tokens": 4096, "row": "bad", "error": "E: no"}]


def test_only_failures_make_a_report_too(tmp_path):
    store(tmp_path, {"0": {"bad": {"error": "E: no"}}})
    files = report.write(tmp_path, tmp_path)
    assert "* `bad` has no figures: E: no" in files[0].read_text()


def test_what_is_no_folder_of_results(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        report.load(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"task": "niah"}\n')
    with pytest.raises(ValueError, match="is not a file of these benchmarks"):
        report.load(tmp_path)
