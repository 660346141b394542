# SPDX-License-Identifier: Apache-2.0
"""One layer of a `RestKVCache`: stores, evicts, and attends to what it kept."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

import restkv

from .attend import Logits, has_varlen
from .prompts import attend_prompt
from .queries import QueryWindow
from .rows import PaddedRows, RaggedRows, Rows, write_row
from .selection import Entries, budget_of, select_kept

NOT_HANDED_OVER = (
    "keys came to layer {0} whose queries did not: the model's attention must be 'restkv' (pass the model to "
    "RestKVCache, call restkv.transformers.attach(model), or load it with attn_implementation='restkv')"
)


@dataclasses.dataclass
class Settings:
    """What the layers of a cache have in common."""

    policy: restkv.Policy | None
    when: Literal["prefill", "decode", "manual"] = "prefill"
    slack: int = 64
    window: int | None = 64
    layout: Literal["auto", "padded", "ragged"] = "auto"
    padding: float = 0.125
    threads: int | None = None
    # The last mask that was looked at, and what it says of new tokens: the layers of a model share it.
    mask: weakref.ref[torch.Tensor] | None = None
    valid: torch.Tensor | None = None

    def valid_tokens(self, mask: torch.Tensor | None, batch: int, new: int) -> torch.Tensor | None:
        """Which of the new tokens are no padding [batch, new], as the last query's row of a mask
        [batch, 1, new, tokens] tells; None: all of them."""
        if mask is None or mask.dtype != torch.bool:
            return None
        if self.mask is None or self.mask() is not mask:
            valid = mask[:, 0, -1, -new:].expand(batch, -1)
            self.valid = None if bool(valid.all()) else valid
            self.mask = weakref.ref(mask)
        return self.valid

    def make_rows(self, lengths: list[list[int]], like: tuple[torch.Tensor, torch.Tensor]) -> Rows:
        """Empty rows of these lengths: padded where that costs no more than the share `padding` of what is stored."""
        layout = self.layout
        if layout == "auto":
            longest = max(map(max, lengths))
            places = longest * sum(map(len, lengths))
            fits = places <= (1 + self.padding) * sum(map(sum, lengths))
            ragged_is_slow = like[0].is_cuda and not has_varlen()
            layout = "padded" if fits or ragged_is_slow else "ragged"
        return (PaddedRows if layout == "padded" else RaggedRows)(lengths, like)


class RestKVLayer(CacheLayerMixin):
    """Keys, values and the newest queries of one attention layer.

    Until the first eviction it is what `DynamicLayer` is, padding included. From then on it holds what the policy
    kept, no padding, and whatever came since; new tokens see all of it. `get_seq_length` goes on counting the tokens
    that came, so that positions stay true."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, settings: Settings, index: int):
        super().__init__()
        self.settings = settings
        self.index = index
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens, and frees their memory."""
        self.stored: Rows | None = None
        self.queries = QueryWindow(self.settings.window)
        self.seen = 0  # tokens that came, padding included: what masks are made for
        self.counts: list[int] = []  # tokens that came, of each sequence
        self.next_position = torch.zeros(0, dtype=torch.int32)  # the same [batch], on the device
        self.valid: torch.Tensor | None = None  # [batch, seen] until the first eviction; None: no padding
        self.evicted = False
        self.evictions = 0
        self.length_after: list[float] = []  # mean row length of each sequence after the last eviction
        self.left_alone = False  # a sliding window's layer, found late
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self.attention: weakref.ref[nn.Module] | None = None
        self.is_initialized = False

    @property
    def is_empty(self) -> bool:
        """Whether no token was stored yet."""
        return self.stored is None

    @property
    def rows(self) -> Rows:
        """Keys and values. Raises `restkv.Error` where there are none."""
        if self.stored is None:
            raise restkv.Error(f"layer {self.index} of the cache is empty")
        return self.stored

    @property
    def prompt(self) -> PaddedRows:
        """The rows as long as nothing was evicted."""
        assert isinstance(self.stored, PaddedRows) and not self.evicted
        return self.stored

    def __repr__(self) -> str:
        held = "empty"
        if not self.is_empty:
            held = f"{self.rows.stored_tokens / self.rows.heads:g} of {sum(self.counts)} tokens a head"
        return f"RestKVLayer({self.index}: {held})"

    # What transformers asks for.

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return -1 if self.is_empty else self.rows.batch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is allocated before there are tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes new tokens [batch, kv_heads, n, head_dim]. What it returns is for the attention function "restkv",
        which finds this layer by it; they are the new keys and values alone."""
        self.check_handed_over()
        if not self.is_empty and key_states.shape[0] != self.rows.batch:
            raise restkv.Error(f"the cache holds {self.rows.batch} sequences, {key_states.shape[0]} come")
        self.lazy_initialization(key_states, value_states)
        if self.settings.when == "decode" and key_states.shape[2] == 1 and self.is_due(prefill=not self.evicted):
            self.evict()
        self.pending = key_states, value_states
        self.seen += key_states.shape[2]
        # A view: the tensor itself is the model's, which may hand it to someone else.
        marked = key_states.view_as(key_states)
        marked.restkv_layer = self  # type: ignore[attr-defined]
        return marked, value_states

    def get_seq_length(self) -> int:
        """Tokens that came, evicted ones included."""
        return self.seen

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Masks are made for all tokens that came; of evicted ones nothing is looked at."""
        if isinstance(query_length, torch.Tensor):  # transformers 5.2 hands over the positions
            query_length = query_length.shape[0]
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.2

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was evicted for tokens that are taken back cannot return. Ask a `fork` instead."""
        if tokens_to_remove != 0:
            raise restkv.Error(f"a RestKVCache cannot be cropped by {abs(tokens_to_remove)} tokens: use fork() before")

    def offload(self) -> None:
        raise restkv.Error("a RestKVCache is not offloaded: it is small")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequences in another order: the beams that go on."""
        self.take_sequences(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the named sequences."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.take_sequences(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self.take_sequences([b for b in range(max(0, self.batch_size)) for _ in range(repeats)])

    def take_sequences(self, index: list[int]) -> None:
        """The named sequences in that order, copied."""
        if self.is_empty:
            return
        self.check_handed_over()
        chosen = torch.tensor(index, device=self.device)
        self.stored = self.rows.take_sequences(index)
        self.queries = self.queries.take_sequences(index)
        self.counts = [self.counts[b] for b in index]
        self.length_after = [self.length_after[b] for b in index]
        self.next_position = self.next_position.index_select(0, chosen)
        self.valid = None if self.valid is None else self.valid.index_select(0, chosen)

    # Attention.

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None,
        softcap: float | None,
        sliding_window: int | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Stores the tokens that `update` took, attends to them and to what is kept, and evicts where that is due.
        `query` is [batch, query_heads, n, head_dim]; returns [batch, n, query_heads, value_dim]."""
        if self.pending is None:
            raise restkv.Error(f"keys of layer {self.index} are read a second time: layers cannot share keys")
        key, value = self.pending
        self.pending = None
        self.attention = weakref.ref(module)
        self.left_alone |= sliding_window is not None
        batch, _, new, head_dim = query.shape
        logits = Logits.of(scaling, softcap, head_dim)
        valid = self.settings.valid_tokens(mask, batch, new)
        positions = self.take_positions(batch, new, valid)
        if not self.evicted:
            keys, values = self.store_prompt(key, value, positions, valid)
            output = attend_prompt(
                module,
                query,
                keys,
                values,
                mask,
                scaling=scaling,
                softcap=softcap,
                sliding_window=sliding_window,
                **kwargs,
            )
        else:
            if mask is not None and mask.dtype != torch.bool:
                raise restkv.Error(f"after an eviction a mask must be bool, this one is {mask.dtype}")
            self.store(key.detach(), value.detach(), positions, valid)
            block = None if mask is None or new == 1 else mask[..., -new:]
            output = self.rows.attend(query, block, valid, logits).transpose(1, 2).contiguous()
        self.keep_queries(query, logits.scale * head_dim**0.5, valid)
        if self.settings.when == "prefill" and self.is_due(prefill=new > 1):
            self.evict()
        return output

    def take_positions(self, batch: int, new: int, valid: torch.Tensor | None) -> torch.Tensor:
        """Positions of new tokens in their sequences [batch, new]; those of padding mean nothing."""
        if not self.counts:
            self.next_position = torch.zeros(batch, dtype=torch.int32, device=self.device)
            self.counts, self.length_after = [0] * batch, [0.0] * batch
        if valid is None:
            more: list[int] = [new] * batch
            positions = self.next_position[:, None]
            if new > 1:
                positions = positions + torch.arange(new, dtype=torch.int32, device=self.device)
            self.next_position = self.next_position + new
        else:
            steps = valid.cumsum(1, dtype=torch.int32)
            more = steps[:, -1].tolist()
            positions = self.next_position[:, None] + (steps - 1).clamp(min=0)
            self.next_position = self.next_position + steps[:, -1]
        self.counts = [count + n for count, n in zip(self.counts, more, strict=True)]
        return positions

    def store_prompt(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens, padding included, while nothing was evicted; all keys and values so far."""
        before = self.seen - key.shape[2]
        if valid is not None or self.valid is not None:
            old = self.valid
            if old is None:
                old = torch.ones(key.shape[0], before, dtype=torch.bool, device=key.device)
            if valid is None:
                valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
            self.valid = torch.cat([old, valid], dim=1)
        if self.is_empty:
            self.stored = PaddedRows.of_prompt(key.detach(), value.detach(), positions)
            return key, value
        self.prompt.append(key.detach(), value.detach(), positions)
        return self.prompt.dense()

    def store(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None
    ) -> None:
        """Adds tokens behind what was kept."""
        repeats = self.rows.heads // key.shape[1]
        if repeats > 1:  # one kept set for each query head
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        if valid is None:
            self.rows.append(key, value, positions)
            return
        rows = self.rows
        if not isinstance(rows, RaggedRows):
            rows = RaggedRows([list(of) for of in rows.lengths], (key, value), key.shape[2])
            for b in range(rows.batch):
                for h in range(rows.heads):
                    write_row(rows, b, h, self.rows.row(b, h), None)
            self.stored = rows
        rows.append_some(key, value, positions, valid)

    def keep_queries(self, query: torch.Tensor, factor: float, valid: torch.Tensor | None) -> None:
        """Remembers the newest queries. Policies divide logits by sqrt(head_dim): a model that scales them otherwise
        (Gemma 2) is met by a factor."""
        size = self.queries.size
        if size is not None and valid is None:
            query = query[:, :, max(0, query.shape[2] - size) :]
        query = query.detach()
        self.queries.append(query if abs(factor - 1) < 1e-6 else query * factor, valid)

    # Eviction.

    @property
    def module(self) -> nn.Module:
        """The attention layer that filled this one. Raises `restkv.Error` where it is gone."""
        module = self.attention() if self.attention is not None else None
        if module is None:
            raise restkv.Error(f"the model that filled layer {self.index} is gone")
        return module

    def is_due(self, prefill: bool) -> bool:
        """Whether this layer is to be evicted now, by itself."""
        policy = self.settings.policy
        if policy is None or policy.over_layers or self.left_alone or self.is_empty:
            return False
        return are_due([self], policy, prefill)

    @torch.no_grad()
    def evict(self, policy: restkv.Policy | None = None) -> None:
        """Evicts now, by the cache's policy or another. Nothing happens to a layer that is left alone."""
        self.check_handed_over()
        policy = policy or self.settings.policy
        if policy is None:
            raise restkv.Error("the cache has no policy: name one")
        if not self.is_empty and not self.left_alone:
            self.keep(select_kept(policy, self))

    def keep(self, chosen: Entries) -> None:
        """Drops all entries of the rows but those."""
        lengths = [[len(index) for index in of_sequence] for of_sequence in chosen]
        rows = self.settings.make_rows(lengths, (self.rows.key, self.rows.value))
        group = rows.heads // self.rows.heads
        for b, of_sequence in enumerate(chosen):
            for h, index in enumerate(of_sequence):
                write_row(rows, b, h, self.rows.row(b, h // group), index)
        self.stored, self.valid, self.evicted = rows, None, True
        self.evictions += 1
        self.length_after = [sum(of_sequence) / len(of_sequence) for of_sequence in lengths]

    def check_handed_over(self) -> None:
        """Raises `restkv.Error` where the model's attention did not hand over its queries."""
        if self.pending is not None:
            raise restkv.Error(NOT_HANDED_OVER.format(self.index))

    # Copies.

    def fork(self) -> RestKVLayer:
        """The same tokens again; memory is copied by whoever writes first."""
        self.check_handed_over()
        twin = copy.copy(self)
        twin.queries = self.queries.fork()
        twin.stored = None if self.stored is None else self.stored.fork()
        return twin


def are_due(layers: Sequence[RestKVLayer], policy: restkv.Policy, prefill: bool) -> bool:
    """Whether layers that share a budget are to be evicted: after a prompt where a sequence holds more than the budget,
    or padding; while decoding where it grew `slack` beyond."""
    if prefill and any(layer.valid is not None for layer in layers):
        return True
    slack = 0 if prefill else layers[0].settings.slack
    for b, count in enumerate(layers[0].counts):
        lengths = [n for layer in layers for n in layer.rows.lengths[b]]
        mean = sum(lengths) / len(lengths)
        after = sum(layer.length_after[b] for layer in layers) / len(layers)
        if mean > budget_of(policy, count) + slack and mean - after >= slack:
            return True
    return False
