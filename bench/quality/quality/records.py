# SPDX-License-Identifier: Apache-2.0
"""What a run writes: one line of JSON a sample, so that it can be ended at any time and goes on where it was.

    {"sample": "3", "answers": [...], "tokens": 2031, "results": {"snap_kv_kv_heads@128": {"score": 1.0, "bytes": ...}}}

The file's first line says what was run; lines that do not fit it are refused, and a line that was cut off is dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Records:
    """A file of results. `header` names the model, the task, the length and so on."""

    path: Path
    header: dict[str, Any]
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> Records:
        """Reads the file where there is one. Raises ValueError where it is of another run."""
        records = cls(path, header)
        if path.exists():
            read = cls.read(path)
            if read.header != header:
                different = {k for k in header | read.header if header.get(k) != read.header.get(k)}
                told = ", ".join(f"{k}: {read.header.get(k)!r} there, {header.get(k)!r} now" for k in sorted(different))
                raise ValueError(f"{path} is of another run ({told}): name another folder")
            records.samples = read.samples
        return records

    @classmethod
    def read(cls, path: Path) -> Records:
        """A file as it is."""
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what has no end was cut off while it was written
        try:
            parsed = [json.loads(line) for line in lines]
            header, samples = parsed[0], parsed[1:]
            records = cls(path, header)
            for sample in samples:
                records.merge(sample)
        except (json.JSONDecodeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of results: {error}") from error
        return records

    def merge(self, sample: dict[str, Any]) -> None:
        """Adds results to a sample's."""
        known = self.samples.setdefault(sample["sample"], {**sample, "results": {}})
        known["results"] |= sample["results"]

    def has(self, sample: str, variant: str) -> bool:
        """Whether a result is there."""
        return variant in self.samples.get(sample, {}).get("results", {})

    def append(self, sample: dict[str, Any]) -> None:
        """Writes a sample's new results at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.write_text(json.dumps(self.header, ensure_ascii=False) + "\n", encoding="utf-8")
        elif self.cut_off():
            self.rewrite()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self.merge(sample)

    def cut_off(self) -> bool:
        """Whether the last line has no end."""
        with self.path.open("rb") as file:
            file.seek(0, 2)
            if file.tell() == 0:
                return True
            file.seek(-1, 2)
            return file.read(1) != b"\n"

    def rewrite(self) -> None:
        """The whole file anew, by another name first."""
        new = self.path.with_suffix(".new")
        lines = [self.header, *self.samples.values()]
        new.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        new.replace(self.path)
