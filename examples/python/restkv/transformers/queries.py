# SPDX-License-Identifier: Apache-2.0
"""The newest queries of a layer, by which a policy scores its tokens."""

from __future__ import annotations

import copy

import torch


class QueryWindow:
    """The last `size` queries of each sequence, without those of padding; all of them where `size` is None. Memory:
    at most 2 * size queries a head, or every query."""

    def __init__(self, size: int | None):
        self.size = size
        self.parts: list[torch.Tensor] = []  # [batch, query_heads, n, head_dim], oldest first
        self.valid: torch.Tensor | None = None  # [batch, count]: which are no padding; None: all

    @property
    def count(self) -> int:
        return sum(part.shape[2] for part in self.parts)

    def append(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Adds queries [batch, query_heads, n, head_dim]; `valid` [batch, n] excludes padding, None: there is none."""
        if self.size == 0:
            return
        if valid is not None or self.valid is not None:
            self.append_padded(query, valid)
            return
        if self.size is not None and query.shape[2] >= self.size:
            # A copy, so that the queries of the whole prompt can go.
            self.parts = [query[:, :, query.shape[2] - self.size :].clone()]
            return
        self.parts.append(query if self.size is None else query.clone())
        if self.size is not None and self.count >= 2 * self.size:
            self.parts = [self.view()]

    def append_padded(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """The same where sequences have padding: their queries are moved to the end, one behind the other."""
        old = self.valid
        if old is None:
            old = torch.ones(query.shape[0], self.count, dtype=torch.bool, device=query.device)
        if valid is None:
            valid = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        both = torch.cat([old, valid], dim=1)
        queries = torch.cat([*self.parts, query], dim=2)
        order = both.to(torch.uint8).argsort(dim=1, stable=True)
        if self.size is not None:
            order = order[:, -self.size :]
        index = order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        self.parts = [queries.gather(2, index)]
        self.valid = both.gather(1, order)

    def view(self) -> torch.Tensor:
        """The queries [batch, query_heads, count, head_dim], oldest first. A sequence with fewer begins with queries of
        padding, which nothing may look at."""
        queries = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=2)
        if self.size is not None and queries.shape[2] > self.size:
            queries = queries[:, :, queries.shape[2] - self.size :].contiguous()
            if self.valid is not None:
                self.valid = self.valid[:, -self.size :]
        self.parts = [queries]
        return queries

    def fork(self) -> QueryWindow:
        """The same queries again. Nothing is copied: parts are never written to."""
        twin = copy.copy(self)
        twin.parts = list(self.parts)
        return twin

    def take_sequences(self, index: list[int]) -> QueryWindow:
        """Those of the named sequences, in that order."""
        taken = QueryWindow(self.size)
        if self.parts:
            chosen = torch.tensor(index, device=self.parts[0].device)
            taken.parts = [part.index_select(0, chosen) for part in self.parts]
            taken.valid = None if self.valid is None else self.valid.index_select(0, chosen)
        return taken
