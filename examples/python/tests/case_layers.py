# SPDX-License-Identifier: Apache-2.0
"""The layers that tests run on: golden case files, and random ones."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[3]
TRACE = ROOT / "examples" / "data" / "trace-2k.safetensors"
GOLDEN = sorted((ROOT / "tests" / "data" / "golden").glob("*.safetensors"))


@dataclass
class CaseFile:
    """A case file: tensors with a batch of 1 in front, and its configuration."""

    path: Path
    case: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def layer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query, key, value), [1, heads, tokens, head_dim] each."""
        return tuple(self.tensors[name][None] for name in ("q", "k", "v"))


def read(path: Path) -> CaseFile:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
    return CaseFile(path, json.loads(metadata["case"]), tensors)


def random_layer(
    batch: int = 2, query_heads: int = 4, kv_heads: int = 2, tokens: int = 96, head_dim: int = 16, queries: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(query, key, value) of float32; a query for each token where their number is 0."""
    source = np.random.default_rng(tokens + head_dim)

    def draw(heads: int, count: int) -> np.ndarray:
        return source.standard_normal((batch, heads, count, head_dim), dtype=np.float32)

    return draw(query_heads, queries or tokens), draw(kv_heads, tokens), draw(kv_heads, tokens)


def random_w_o(query_heads: int = 4, head_dim: int = 16, hidden: int = 40) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((hidden, query_heads * head_dim), dtype=np.float32)


def trace_layers(indices: list[int]) -> list[dict[str, np.ndarray]]:
    """Layers of the bundled trace, as arguments of `restkv.select`."""
    layers = []
    with safe_open(TRACE, "np") as file:
        for index in indices:
            tensors = {name: file.get_tensor(f"layers.{index}.{name}") for name in ("q", "k", "v", "wo")}
            layers.append({"query": tensors["q"][None], "key": tensors["k"][None], "value": tensors["v"][None]})
            layers[-1]["w_o"] = tensors["wo"]
    return layers


def program() -> Path:
    """The program `restkv` of a build of this tree; skips without one."""
    places = [Path(os.environ["RESTKV_PROGRAM"])] if "RESTKV_PROGRAM" in os.environ else []
    places += sorted((ROOT / "build").glob("*/examples/cli/restkv"))
    for place in places:
        if place.is_file():
            return place
    pytest.skip("there is no program restkv: build it, or name it in RESTKV_PROGRAM")
