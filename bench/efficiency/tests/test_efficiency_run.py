# SPDX-License-Identifier: Apache-2.0
"""Rounds, their files, and how a run goes on or ends."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace

import pytest
from efficiency import memory, run
from efficiency.deadline import Deadline
from quality.records import Records


def results(plan) -> dict[str, dict]:
    return {name: sample["results"] for name, sample in Records.read(plan.out / "200.jsonl").samples.items()}


def test_a_round_has_every_row_and_a_second_run_measures_nothing(plan, monkeypatch):
    assert run.run(plan)
    first = results(plan)
    assert [list(found) for found in first.values()] == [["tuned", "standard/ragged"]] * 2
    monkeypatch.setattr(run, "Session", None)  # no model is loaded
    assert run.run(plan)
    assert results(plan) == first


def test_more_rounds_are_added(plan):
    run.run(replace(plan, repeats=1))
    first = results(plan)["0"]
    run.run(plan)
    assert results(plan)["0"] == first
    assert list(results(plan)) == ["0", "1"]


def test_what_was_cut_off_is_measured_in_a_round_of_its_own(plan):
    run.run(replace(plan, repeats=1))
    path = plan.out / "200.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])  # a line without its end
    assert list(results(plan)["0"]) == ["tuned"]
    run.run(replace(plan, repeats=1))
    assert list(results(plan)["0"]) == ["tuned"]
    assert list(results(plan)["1"]) == ["tuned", "standard/ragged"]


def test_rows_with_the_fewest_results_come_first_behind_the_baselines(plan):
    run.run(replace(plan, repeats=1))
    run.run(replace(plan, repeats=1, rows=["standard/ragged", "snap_kv", "tuned"]))
    assert list(results(plan)["1"]) == ["tuned", "snap_kv", "standard/ragged"]


def test_a_row_that_fails_is_recorded_and_the_others_go_on(plan):
    per_query_head = "rest_kv_released:window=60"
    run.run(replace(plan, rows=["tuned", per_query_head, "tuned@minference", "standard/paged"]))
    for found in results(plan).values():
        assert found["tuned"]["ttft"] > 0
        # 64 tokens a KV head are 16 a query head.
        assert "the budget is 16 tokens per head, 60 are protected" in found[per_query_head]["error"]
        assert "needs a GPU" in found["tuned@minference"]["error"]
        assert "layout is 'paged'" in found["standard/paged"]["error"]


def test_results_of_another_run_are_refused(plan):
    run.run(replace(plan, repeats=1))
    with pytest.raises(ValueError, match=r"is of another run \(budget: 64 there, 32 now\)"):
        run.run(replace(plan, budget=32))


def test_lengths_the_model_cannot_read_are_refused_at_once(plan):
    with pytest.raises(ValueError, match="1048677 tokens are more than the model's 1048576"):
        run.run(replace(plan, lengths=[200, 2**20 + 96]))
    assert not plan.out.exists()


def test_the_deadline_ends_a_row_and_leaves_what_there_is(plan, monkeypatch, capsys):
    run.run(replace(plan, repeats=1))
    first = results(plan)

    def endless(*arguments):
        while True:
            with contextlib.suppress(Exception):  # what a library may do
                while True:
                    pass

    monkeypatch.setattr(run, "measure", endless)
    began = time.monotonic()
    assert not run.run(replace(plan, deadline=Deadline(2 / 60, started=began)))
    assert time.monotonic() - began < 3
    assert results(plan) == first
    assert "the time is up" in capsys.readouterr().err


def test_a_deadline_that_has_passed(plan):
    assert not run.run(replace(plan, deadline=Deadline(1, started=0)))


def test_a_process_tells_the_memory_of_a_row():
    tokens, cache = 8000, 8000 * 2 * 2 * 8 * 4
    figures = memory.of_process(model="random:tiny", dtype="float32", layers=1, row="tuned", tokens=tokens, budget=64)
    assert figures["peak_prefill"] - figures["loaded"] > cache
    assert figures["after_prefill"] - figures["loaded"] > 0.8 * cache
    assert figures["after_prefill"] < figures["peak_prefill"]


def test_a_process_a_row_but_for_those_that_failed(plan, monkeypatch):
    asked = []

    def of_process(**facts):
        asked.append(facts)
        return {"loaded": 1, "peak_prefill": 2, "after_prefill": 3, "peak_decode": 4}

    monkeypatch.setattr(memory, "of_process", of_process)
    plan = replace(plan, rows=["tuned", "standard/paged"], repeats=1, memory=True)
    for _ in range(2):  # the second run has nothing to do
        run.run(plan)
        facts = {"model": "random:tiny", "dtype": "float32", "layers": 1, "tokens": 200, "budget": 64}
        assert asked == [facts | {"row": "tuned"}]
    assert results(plan)[run.MEMORY] == {"tuned": of_process()}


def test_a_process_that_fails_tells_why():
    with pytest.raises(RuntimeError, match="missing 5 required positional arguments"):
        memory.of_process(model="random:tiny")


def test_figures_are_json(plan):
    run.run(replace(plan, repeats=1))
    lines = [json.loads(line) for line in (plan.out / "200.jsonl").read_text().splitlines()]
    assert lines[0]["budget"] == 64
    assert lines[0]["device"]
    assert lines[1]["results"]["tuned"]["attended_bytes"] == 200 * 2 * 2 * 8 * 4
