# SPDX-License-Identifier: Apache-2.0
"""A small model with random weights, and a prompt for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("restkv")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from efficiency import models
from efficiency.deadline import Deadline
from efficiency.run import Plan

TINY = "random:tiny"


@pytest.fixture(scope="module")
def model():
    return models.load(TINY, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prompt(model):
    return models.prompt(TINY, model, 300)


@pytest.fixture
def plan(tmp_path):
    """A plan of two rows at one length, without processes for memory."""
    return Plan(
        model=TINY,
        dtype="float32",
        device="cpu",
        layers=1,
        lengths=[200],
        rows=["tuned", "standard/ragged"],
        budget=64,
        decode=4,
        lead=1,
        repeats=2,
        threads=None,
        clock="wall",
        memory=False,
        out=tmp_path / "results",
        deadline=Deadline(None),
    )
