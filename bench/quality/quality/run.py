# SPDX-License-Identifier: Apache-2.0
"""Runs tasks with every variant, and writes results sample by sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import restkv
from tqdm import tqdm

from . import presses, tasks
from .engine import Answer, Engine, Question
from .presses import PressVariant
from .records import Records
from .tasks.task import LikelihoodSample, Sample
from .variants import FULL_CACHE, Comparison, budgeted, variant


@dataclass(frozen=True)
class Run:
    """What is to be run: the product of all of it."""

    model: str
    dtype: str
    tasks: Sequence[str]
    tokens: Sequence[int]  # lengths of the prompts
    questions: Sequence[Question]
    policies: Sequence[str]
    budgets: Sequence[float]  # tokens a KV head; below 1, a part of the prompt's
    samples: int
    comparison: Comparison
    data: Path
    out: Path


def file_name(task: str, tokens: int, question: Question) -> str:
    """Where the results of a task lie in the folder of a run."""
    return f"{task.replace('/', '.')}.{tokens}.{question}.jsonl"


def run(engine: Engine, plan: Run) -> None:
    """Runs what has no result yet. Raises what tasks raise for data that is missing, before anything is computed."""
    cells = [(t, n, q) for t in plan.tasks for n in plan.tokens for q in plan.questions]
    for task, tokens, _ in cells:  # what is missing, or too long for a file, should not be found after hours
        next(iter(tasks.by_name(task, plan.data).samples(1, tokens, engine.tokenizer, plan.comparison.seed)))
    for task, tokens, question in cells:
        run_cell(engine, plan, task, tokens, question)


def header_of(plan: Run, task: str, metric: str, tokens: int, question: Question) -> dict[str, Any]:
    """What two runs must have in common to lie in one file."""
    return {
        "model": plan.model,
        "dtype": plan.dtype,
        "task": task,
        "metric": metric,
        "tokens": tokens,
        "question": question,
        "window": plan.comparison.window,
        "sinks": plan.comparison.sinks,
        "width": plan.comparison.width,
        "seed": plan.comparison.seed,
        "restkv": restkv.__version__,
    }


def run_cell(engine: Engine, plan: Run, task_name: str, tokens: int, question: Question) -> None:
    """One task at one length."""
    task = tasks.by_name(task_name, plan.data)
    header = header_of(plan, task_name, task.metric, tokens, question)
    records = Records.open(plan.out / file_name(task_name, tokens, question), header)
    samples = task.samples(plan.samples, tokens, engine.tokenizer, plan.comparison.seed)
    named = {
        name: presses.parsed(name, plan.comparison)
        if name.startswith(presses.PREFIX)
        else variant(name, plan.comparison)
        for name in plan.policies
    }
    for sample in tqdm(samples, total=plan.samples, desc=f"{task_name} {tokens} {question}", unit="sample"):
        length = engine.prompt(sample, question).before.shape[1]
        wanted: dict[str, restkv.Policy | PressVariant | None] = {FULL_CACHE: None}
        for budget in plan.budgets:
            kept = round(budget * length) if budget < 1 else int(budget)
            for name, policy in named.items():
                if isinstance(policy, PressVariant):
                    wanted[f"{name}@{budget:g}"] = replace(policy, budget=kept)
                elif policy is not None:
                    wanted[f"{name}@{budget:g}"] = budgeted(policy, kept, engine.query_heads, engine.kv_heads)
        missing = {name: policy for name, policy in wanted.items() if not records.has(sample.id, name)}
        if not missing:
            continue
        begin = time.perf_counter()
        answers = engine.answers(sample, missing, question)
        records.append(
            {
                "sample": sample.id,
                "length": length,
                "meta": dict(sample.meta),
                "seconds": round(time.perf_counter() - begin, 3),
                "results": {name: as_result(task, sample, answer) for name, answer in answers.items()},
            }
        )


def as_result(task: Any, sample: Sample | LikelihoodSample, answer: Answer) -> dict[str, Any]:
    """An answer with its score, or why there is none."""
    if answer.error:
        return {"error": answer.error}
    result: dict[str, Any] = {"bytes": answer.bytes, "kept": round(answer.kept, 6)}
    if isinstance(sample, Sample):
        return {"score": float(task.score(answer.text, sample)), **result, "text": answer.text}
    score = float(task.score_likelihoods(answer.log_likelihoods, sample))
    return {"score": score, **result, "log_likelihoods": [round(x, 6) for x in answer.log_likelihoods]}
