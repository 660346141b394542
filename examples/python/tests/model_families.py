# SPDX-License-Identifier: Apache-2.0
"""Models with random weights for tests, in the true geometry of a layer, and attention restricted to given tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.masking_utils import AttentionMaskInterface, eager_mask

VOCABULARY = 512
SMALL = {"vocab_size": VOCABULARY, "intermediate_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

GROUPED = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}

ROPE_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

FAMILIES: dict[str, Any] = {
    "llama-2-7b": lambda: transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=2, **SMALL
    ),
    "llama-3-8b": lambda: transformers.LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=2,
        rope_parameters=ROPE_LLAMA_3,
        max_position_embeddings=131072,
        **SMALL,
    ),
    "llama-3-70b": lambda: transformers.LlamaConfig(
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **SMALL,
    ),
    "mistral-7b-v0.3": lambda: transformers.MistralConfig(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        sliding_window=None,
        **SMALL,
    ),
    "qwen2.5-7b": lambda: transformers.Qwen2Config(
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        **SMALL,
    ),
    "gemma-7b": lambda: transformers.GemmaConfig(
        hidden_size=3072, num_attention_heads=16, num_key_value_heads=16, head_dim=256, num_hidden_layers=2, **SMALL
    ),
    # A sliding layer and a full one; logits are capped, and not scaled by sqrt(head_dim).
    "gemma-2-small": lambda: transformers.Gemma2Config(
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_hidden_layers=2,
        sliding_window=24,
        query_pre_attn_scalar=144,
        attn_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
        **SMALL,
    ),
    "gemma-3-small": lambda: transformers.Gemma3TextConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        num_hidden_layers=3,
        sliding_window=24,
        query_pre_attn_scalar=168,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **SMALL,
    ),
    # Others with the standard interface: one projection for query, key and value; normalised queries and keys; biases,
    # and a part of the channels rotated; logits scaled otherwise; learned positions, and weights the other way round.
    "phi-3-small": lambda: transformers.Phi3Config(**GROUPED, **SMALL),
    "qwen3-small": lambda: transformers.Qwen3Config(head_dim=64, **GROUPED, **SMALL),
    "gpt-neox-small": lambda: transformers.GPTNeoXConfig(
        hidden_size=256, num_attention_heads=8, num_hidden_layers=2, **SMALL
    ),
    "granite-small": lambda: transformers.GraniteConfig(attention_multiplier=0.1, **GROUPED, **SMALL),
    "gpt-2-small": lambda: transformers.GPT2Config(n_embd=256, n_head=8, n_layer=2, **SMALL),
    "llama-small": lambda: transformers.LlamaConfig(
        hidden_size=192, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3, **SMALL
    ),
}


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of the family whose attention is not flat. Weights are one block of random numbers over and over, shifted
    from matrix to matrix, which is much faster than billions of them."""
    config = FAMILIES[family]()
    config.tie_word_embeddings = False
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1_000_003, generator=generator)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if name.endswith("norm.weight"):
                parameter.fill_(0.0 if "gemma" in family else 1.0)
                continue
            if parameter.dim() < 2:
                parameter.copy_(block[number : number + parameter.numel()] * 0.1)
                continue
            # Sharper queries and keys, so that heads attend to few tokens, and each to others.
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            row = block.roll(number * 7919) * (gain * parameter.shape[-1] ** -0.5)
            if "embed" in name:
                row = block.roll(number * 7919)
            flat = parameter.view(-1)
            for begin in range(0, flat.numel(), row.numel()):
                piece = flat[begin : begin + row.numel()]
                piece.copy_(row[: piece.numel()])
    return model


def prompt(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch, tokens], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


VISIBLE: dict[int, torch.Tensor] = {}
"""For attention "restricted": tokens [batch, heads, first tokens of the axis] that later queries see, by layer."""


def restricted_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in plain operations over the full cache; what `VISIBLE` hides is masked."""
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1).double() for x in (key, value))
    logits = query.double() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is not None:
        logits = logits + attention_mask.double()
    visible = VISIBLE.get(module.layer_idx)
    if visible is not None and key.shape[2] > visible.shape[2]:
        visible = visible.repeat_interleave(heads // visible.shape[1], dim=1)
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        hidden[..., : visible.shape[2]] = ~visible[:, :, None]
        logits = logits.masked_fill(hidden, -1e30)
    return (torch.softmax(logits, dim=-1) @ value).to(query.dtype).transpose(1, 2), None


AttentionInterface.register("restricted", restricted_attention)
AttentionMaskInterface.register("restricted", eager_mask)


@contextlib.contextmanager
def restricted(model: PreTrainedModel, visible: dict[int, torch.Tensor]) -> Iterator[PreTrainedModel]:
    """The model with attention "restricted" to `visible` (see `VISIBLE`)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("restricted")
    VISIBLE.update(visible)
    try:
        yield model
    finally:
        VISIBLE.clear()
        model.set_attn_implementation(before)
