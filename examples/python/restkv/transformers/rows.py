# SPDX-License-Identifier: Apache-2.0
"""How a layer's keys and values lie in memory: a row for each head of each sequence.

`PaddedRows` is one dense block, rows end together, and what lies before a shorter row is masked: the prompt itself, and
heads whose lengths differ little. `RaggedRows` gives every row its own place in one flat block: heads that keep very
different numbers of tokens take no more than they need. Both have room behind each row, so that a token is appended
without moving the others; the room grows geometrically.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence

import torch

from .attend import Logits, attend_masked, attend_rows

LEAST_ROOM = 32
"""Tokens of room a row gets at least when its block is made."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that may be written to later, in inference mode or out of it."""
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=dtype, device=device)


def room_for(tokens: int) -> int:
    """Free places behind rows of so many tokens: copying for growth stays below 8 moves of a token."""
    return max(LEAST_ROOM, tokens // 8)


class Rows(abc.ABC):
    """Keys and values of `batch` x `heads` rows, each of its own length, and the position each token had in its
    sequence."""

    key: torch.Tensor
    value: torch.Tensor
    lengths: list[list[int]]  # [batch][heads]
    shared: bool = False  # another cache reads the same memory: copied before the first write

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def heads(self) -> int:
        return len(self.lengths[0])

    @property
    def stored_tokens(self) -> int:
        """Tokens in all rows together."""
        return sum(map(sum, self.lengths))

    def stored_bytes(self) -> int:
        """Bytes of the keys and values of tokens that are attended to."""
        return self.stored_tokens * (self.key.shape[-1] + self.value.shape[-1]) * self.key.element_size()

    def allocated_bytes(self) -> int:
        """Bytes of memory behind keys and values, with the room for growth."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (self.key, self.value)}
        return sum(storages.values())

    def fork(self) -> Rows:
        """The same rows again; memory is copied by whoever writes first."""
        self.shared = True
        twin = copy.copy(self)
        twin.lengths = [list(of_sequence) for of_sequence in self.lengths]
        return twin

    @abc.abstractmethod
    def row(self, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of one row: key [length, head_dim], value [length, value_dim], positions [length]."""

    @abc.abstractmethod
    def side_by_side(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence [1, heads, longest row, head_dim], rows end together: views where they lie
        so, otherwise a copy. What stands before a shorter row is finite and means nothing."""

    @abc.abstractmethod
    def append(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        """Puts tokens behind every row: key [batch, heads, n, head_dim], value likewise, positions [batch, n]."""

    @abc.abstractmethod
    def attend(
        self, query: torch.Tensor, block: torch.Tensor | None, valid: torch.Tensor | None, logits: Logits
    ) -> torch.Tensor:
        """Attention of queries [batch, query_heads, n, head_dim] to all rows, whose last tokens came with the queries:
        `block` [batch or 1, 1, n, n] says which of those a query sees, None: the causal ones; `valid` [batch, n] which
        of them are in the rows, None: all. Returns [batch, query_heads, n, value_dim]."""

    @abc.abstractmethod
    def take_sequences(self, index: list[int]) -> Rows:
        """Rows of the named sequences, in that order, in memory of their own."""


def write_row(rows: Rows, b: int, h: int, source: Sequence[torch.Tensor], index: torch.Tensor | None) -> None:
    """Fills a row with a source's (key, value, positions), or with the entries that `index` names."""
    for target, tensor in zip(rows.row(b, h), source, strict=True):
        if index is None:
            target.copy_(tensor)
        elif target.dtype == tensor.dtype:
            torch.index_select(tensor, 0, index, out=target)
        else:
            target.copy_(tensor.index_select(0, index))


class PaddedRows(Rows):
    """One block [batch, heads, capacity, head_dim]; rows end at `columns`, shorter ones begin later."""

    def __init__(self, lengths: list[list[int]], like: tuple[torch.Tensor, torch.Tensor], room: int | None = None):
        self.lengths = lengths
        self.columns = max(max(of_sequence) for of_sequence in lengths)
        capacity = self.columns + (room_for(self.columns) if room is None else room)
        shape = (len(lengths), len(lengths[0]), capacity)
        self.key, self.value = (empty((*shape, x.shape[-1]), x.dtype, x.device) for x in like)
        self.positions = empty(shape, torch.int32, like[0].device)
        self.visible = self.mask_of(self.columns)
        if self.visible is not None:  # what is masked is read all the same: let it be finite
            self.key.masked_fill_(~self.visible_at(capacity)[..., None], 0)
            self.value.masked_fill_(~self.visible_at(capacity)[..., None], 0)

    @classmethod
    def of_prompt(cls, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> PaddedRows:
        """Takes a prompt's keys and values [batch, heads, tokens, head_dim] as they are; positions [batch, tokens]."""
        rows = cls.__new__(cls)
        batch, heads, rows.columns = key.shape[:3]
        rows.lengths = [[rows.columns] * heads for _ in range(batch)]
        # A view into something larger, such as a fused projection, would keep all of it alive.
        rows.key, rows.value = (x if x.untyped_storage().nbytes() <= x.nbytes else x.clone() for x in (key, value))
        rows.positions = positions[:, None].expand(-1, heads, -1)
        rows.visible = None
        rows.shared = True  # the model's own tensors: the first append moves them
        return rows

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def rows_are_equal(self) -> bool:
        return self.visible is None

    def mask_of(self, columns: int) -> torch.Tensor | None:
        """Which of the first columns hold tokens [batch, heads, columns]; None where all do."""
        begins = torch.tensor(self.lengths, dtype=torch.int32).neg_().add_(columns)
        if not begins.any():
            return None
        return torch.arange(columns, device=self.key.device) >= begins.to(self.key.device)[..., None]

    def visible_at(self, columns: int) -> torch.Tensor:
        """The mask for so many columns: all that was appended is seen."""
        assert self.visible is not None
        missing = columns - self.visible.shape[-1]
        if missing > 0:
            self.visible = torch.nn.functional.pad(self.visible, (0, missing), value=True)
        return self.visible[..., :columns]

    def row(self, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        begin = self.columns - self.lengths[b][h]
        return (
            self.key[b, h, begin : self.columns],
            self.value[b, h, begin : self.columns],
            self.positions[b, h, begin : self.columns],
        )

    def side_by_side(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.columns - max(self.lengths[b])
        return self.key[b : b + 1, :, begin : self.columns], self.value[b : b + 1, :, begin : self.columns]

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all columns, as views."""
        return self.key[:, :, : self.columns], self.value[:, :, : self.columns]

    def append(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        end = self.columns + key.shape[2]
        if end > self.capacity or self.shared:
            self.grow(end)
        self.key[:, :, self.columns : end] = key
        self.value[:, :, self.columns : end] = value
        self.positions[:, :, self.columns : end] = positions[:, None]
        self.columns = end
        self.lengths = [[length + key.shape[2] for length in of_sequence] for of_sequence in self.lengths]

    def grow(self, columns: int) -> None:
        """Moves to a block of its own with room behind so many columns."""
        capacity = columns + room_for(columns)
        for name in ("key", "value", "positions"):
            old = getattr(self, name)
            grown = empty((*old.shape[:2], capacity, *old.shape[3:]), old.dtype, old.device)
            grown[:, :, : self.columns] = old[:, :, : self.columns]
            setattr(self, name, grown)
        self.shared = False

    def attend(
        self, query: torch.Tensor, block: torch.Tensor | None, valid: torch.Tensor | None, logits: Logits
    ) -> torch.Tensor:
        assert valid is None, "padding needs ragged rows"
        key, value = self.dense()
        past = None if self.visible is None else self.visible_at(self.columns)
        return attend_masked(query, key, value, past, block, logits)

    def take_sequences(self, index: list[int]) -> PaddedRows:
        taken = copy.copy(self)
        chosen = torch.tensor(index, device=self.key.device)
        for name in ("key", "value", "positions"):
            old = getattr(self, name)
            new = empty((len(index), *old.shape[1:]), old.dtype, old.device)
            new[:, :, : self.columns] = old[:, :, : self.columns].index_select(0, chosen)
            setattr(taken, name, new)
        if self.visible is not None:
            taken.visible = self.visible.index_select(0, chosen)
        taken.lengths = [list(self.lengths[b]) for b in index]
        taken.shared = False
        return taken


class RaggedRows(Rows):
    """One flat block [places, head_dim]; row (b, h) begins at starts[b][h] and has room up to the next row."""

    def __init__(self, lengths: list[list[int]], like: tuple[torch.Tensor, torch.Tensor], room: int | None = None):
        self.lengths = lengths
        self.starts: list[list[int]] = []
        place = 0
        longest = max(map(max, lengths))
        # Every row grows alike, so they all have the same room.
        self.room = room_for(longest) if room is None else room
        for of_sequence in lengths:
            self.starts.append([])
            for length in of_sequence:
                self.starts[-1].append(place)
                place += length + self.room
        self.key, self.value = (empty((place, x.shape[-1]), x.dtype, x.device) for x in like)
        self.positions = empty((place,), torch.int32, like[0].device)
        self.locate_appended()

    def locate_appended(self) -> None:
        """Says on the device where the next token of each row goes [batch, heads]."""
        ends = [
            [start + length for start, length in zip(*of_sequence, strict=True)]
            for of_sequence in zip(self.starts, self.lengths, strict=True)
        ]
        self.ends = torch.tensor(ends, device=self.key.device)
        begins = [start for of_sequence in self.starts for start in of_sequence]
        # A kernel's cu_seqlens: where rows begin, and the end of the last. [batch * heads + 1]
        self.begins = torch.tensor([*begins, self.key.shape[0]], dtype=torch.int32, device=self.key.device)

    def row(self, b: int, h: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        begin = self.starts[b][h]
        end = begin + self.lengths[b][h]
        return self.key[begin:end], self.value[begin:end], self.positions[begin:end]

    def side_by_side(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        gathered = PaddedRows([list(self.lengths[b])], (self.key, self.value), 0)
        for h in range(self.heads):
            write_row(gathered, 0, h, self.row(b, h), None)
        return gathered.dense()

    def append(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        self.append_some(key, value, positions, None)

    def append_some(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None
    ) -> None:
        """Like `append`, without the tokens that `valid` [batch, n] excludes: padding. Sequences grow differently
        then."""
        n = key.shape[2]
        if n > self.room or self.shared:
            self.grow(n)
        if valid is None:
            places = self.ends[..., None]
            if n > 1:
                places = places + torch.arange(n, device=key.device)
            places = places.flatten()
            self.key.index_copy_(0, places, key.flatten(0, 2))
            self.value.index_copy_(0, places, value.flatten(0, 2))
            self.positions.index_copy_(0, places, positions[:, None].expand(-1, self.heads, -1).flatten())
            self.room -= n
            self.lengths = [[length + n for length in of] for of in self.lengths]
            self.ends = self.ends + n
            return
        slots = valid.cumsum(-1) - 1  # [batch, n]
        chosen = valid[:, None].expand(-1, self.heads, -1)
        places = (self.ends[..., None] + slots[:, None])[chosen]
        self.key[places] = key[chosen]
        self.value[places] = value[chosen]
        self.positions[places] = positions[:, None].expand(-1, self.heads, -1)[chosen]
        counts = valid.sum(-1).tolist()
        self.room -= n
        self.lengths = [[length + more for length in of] for of, more in zip(self.lengths, counts, strict=True)]
        self.ends = self.ends + torch.tensor(counts, device=self.ends.device)[:, None]

    def grow(self, more: int) -> None:
        """Moves to a block of its own with room for `more` tokens a row and for further growth."""
        grown = RaggedRows(
            [list(of) for of in self.lengths],
            (self.key, self.value),
            more + room_for(max(map(max, self.lengths)) + more),
        )
        for b in range(self.batch):
            for h in range(self.heads):
                write_row(grown, b, h, self.row(b, h), None)
        self.__dict__.update(grown.__dict__, shared=False)

    def attend(
        self, query: torch.Tensor, block: torch.Tensor | None, valid: torch.Tensor | None, logits: Logits
    ) -> torch.Tensor:
        return attend_rows(query, self, block, valid, logits)

    def take_sequences(self, index: list[int]) -> RaggedRows:
        taken = RaggedRows([list(self.lengths[b]) for b in index], (self.key, self.value), self.room)
        for to, b in enumerate(index):
            for h in range(self.heads):
                write_row(taken, to, h, self.row(b, h), None)
        return taken
