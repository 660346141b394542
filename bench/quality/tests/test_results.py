# SPDX-License-Identifier: Apache-2.0
"""Records that survive being ended, statistics against known values, and the tables made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("pandas")

from quality.records import Records
from quality.statistics import mean, paired_difference

HEADER = {"model": "m", "dtype": "float32", "task": "niah/number", "metric": "match", "tokens": 1024}
HEADER |= {"question": "aware", "width": 5}


def line(sample: str, **scores: float) -> dict:
    results = {name: {"score": score, "bytes": 10, "kept": 0.5} for name, score in scores.items()}
    return {"sample": sample, "length": 1024, "results": results}


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "cell.jsonl"
    records = Records.open(path, HEADER)
    records.append(line("0", a=1.0))
    records.append(line("1", a=0.0))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        if cut <= len(json.dumps(HEADER)):
            continue  # nothing was written but a part of the header
        again = Records.open(path, HEADER)
        for sample, score in (("0", 1.0), ("1", 0.0)):
            if not again.has(sample, "a"):
                again.append(line(sample, a=score))
        assert Records.read(path).samples == records.samples


def test_a_cut_off_header_is_said(tmp_path):
    path = tmp_path / "cell.jsonl"
    path.write_text('{"model": "m', encoding="utf-8")
    with pytest.raises(ValueError, match="cell.jsonl"):
        Records.open(path, HEADER)


def test_results_of_another_run_are_not_mixed(tmp_path):
    path = tmp_path / "cell.jsonl"
    Records.open(path, HEADER).append(line("0", a=1.0))
    with pytest.raises(ValueError, match="width: 5 there, 21 now"):
        Records.open(path, HEADER | {"width": 21})


def test_results_that_come_later_join_their_sample(tmp_path):
    path = tmp_path / "cell.jsonl"
    records = Records.open(path, HEADER)
    records.append(line("0", a=1.0))
    records.append(line("0", b=0.5))
    read = Records.read(path)
    assert {name: r["score"] for name, r in read.samples["0"]["results"].items()} == {"a": 1.0, "b": 0.5}


def test_interval_of_a_proportion():
    values = np.array([1.0] * 60 + [0.0] * 40)
    found = mean(values)
    assert found.value == 0.6 and found.count == 100
    # 1.96 * sqrt(0.6 * 0.4 / 100) = 0.096
    assert found.low == pytest.approx(0.504, abs=0.02) and found.high == pytest.approx(0.696, abs=0.02)


def test_pairing_takes_out_what_samples_have_in_common():
    rng = np.random.default_rng(1)
    hard = rng.random(200)
    better, worse = hard + 0.05, hard + 0.01 * rng.random(200)
    paired = paired_difference(better, worse)
    assert paired.low > 0.03 and paired.high < 0.06
    apart = mean(better), mean(worse)
    assert apart[0].low < apart[1].high  # not told apart without pairing


def test_means_of_nothing_are_refused():
    with pytest.raises(ValueError, match="0 samples"):
        mean(np.array([]))
    with pytest.raises(ValueError, match="3 and 2 samples"):
        paired_difference(np.zeros(3), np.zeros(2))


def test_tables_take_only_samples_that_all_variants_answered(tmp_path):
    pytest.importorskip("tabulate")
    from quality.report import load, summary, write

    folder = tmp_path / "results"
    records = Records.open(folder / "cell.jsonl", HEADER)
    for i in range(10):
        depth = {"meta": {"depth": i % 5 / 4}}
        scores = {"full_cache": 1.0, "standard@64": float(i % 2), "tova@64": 0.0}
        if i == 9:
            del scores["tova@64"]
        records.append(line(str(i), **scores) | depth)
    table = summary(load(folder)).set_index("policy")
    assert table.loc["standard", "samples"] == 9
    assert table.loc["standard", "score"] == pytest.approx(4 / 9)
    assert table.loc["tova", "vs standard"] == pytest.approx(-4 / 9)
    assert table.loc["standard", "of full"] == pytest.approx(4 / 9)
    files = write(folder, tmp_path / "report")
    assert all(file.stat().st_size > 100 for file in files)
    assert sum(file.name.startswith("depth.niah.number.aware") for file in files) == 2  # a budget, and the full cache
    assert "| standard" in (tmp_path / "report" / "summary.md").read_text()


def test_a_folder_without_results_is_said(tmp_path):
    pytest.importorskip("pandas")
    from quality.report import load

    with pytest.raises(ValueError, match="no results"):
        load(tmp_path)
