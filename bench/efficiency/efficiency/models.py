# SPDX-License-Identifier: Apache-2.0
"""Models and prompts: a real model with a real text, or the geometry of one with random weights and random tokens."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from quality import model as real
from transformers import AutoModelForCausalLM, LlamaConfig

RANDOM = "random:"

GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "mistral-7b": {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}


def check_name(name: str) -> None:
    """Raises ValueError for a geometry that is not known."""
    if name.startswith(RANDOM) and name.removeprefix(RANDOM) not in GEOMETRIES:
        raise ValueError(f"there is no geometry {name.removeprefix(RANDOM)!r}: {', '.join(GEOMETRIES)}")


def load(name: str, *, dtype: str, device: str, layers: int | None = None) -> Any:
    """The model of `name`: "random:GEOMETRY", or what `quality.model` loads; its first `layers` layers."""
    check_name(name)
    if not name.startswith(RANDOM):
        model = real.load_model(name, dtype=dtype, device=device)
        if layers is not None:
            check_layers(layers, len(model.model.layers))
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
            if getattr(model.config, "layer_types", None) is not None:
                model.config.layer_types = model.config.layer_types[:layers]
        return model
    geometry = dict(GEOMETRIES[name.removeprefix(RANDOM)])
    if layers is not None:
        check_layers(layers, geometry["num_hidden_layers"])
        geometry["num_hidden_layers"] = layers
    config = LlamaConfig(
        **geometry,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=geometry["hidden_size"] ** -0.5,  # a matrix keeps the size of what it multiplies
    )
    torch.manual_seed(0)
    with torch.device(device):  # made where it lies: 16 GB would take long to fill on the host
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def check_layers(wanted: int, there: int) -> None:
    """Raises ValueError for layers that a model does not have."""
    if not 1 <= wanted <= there:
        raise ValueError(f"--layers {wanted}: the model has {there}")


def prompt(name: str, model: Any, tokens: int) -> torch.Tensor:
    """So many tokens [1, tokens], on the model's device: of licence texts, over again if they are too short; random
    ones where the weights are random. Raises ValueError for more than the model was made for."""
    most = model.config.max_position_embeddings
    if tokens > most:
        raise ValueError(f"{tokens} tokens are more than the model's {most}")
    if name.startswith(RANDOM):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    else:
        of_text = text_of(name)
        ids = of_text.repeat(-(-tokens // len(of_text)))[None, :tokens]
    return ids.to(model.device)


@cache
def text_of(name: str) -> torch.Tensor:
    """The licence texts in a model's tokens [count]."""
    from quality.tasks import text  # brings all of the tasks

    return torch.tensor(real.load_tokenizer(name).encode(text.load().text, add_special_tokens=False))


def cache_argument(model: Any) -> str:
    """What a model calls its cache: transformers renamed it in its fifth major version."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters; what is shared counts once."""
    return sum(parameter.nbytes for parameter in model.parameters())
