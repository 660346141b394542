# SPDX-License-Identifier: Apache-2.0
"""Reads the files that benchmarks are published in, and says which one is missing and what it should hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Samples made for this project, in the layout and the formats of the published files.
OWN_DATA = Path(__file__).resolve().parent.parent / "data"


class DataFileError(Exception):
    """A published file is missing, or is not what it should be."""


def find(directory: Path, names: Iterable[str], what: str) -> Path:
    """The first of the named files [alternatives] that lies in the directory.

    `what` says in words where the file comes from and what its rows hold. Raises DataFileError with all of that.
    """
    names = list(names)
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise DataFileError(f"none of {', '.join(names)} is in {directory}: {what}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl, .json (a list), .parquet, or gzipped .jsonl.gz or .json.gz file.

    Raises DataFileError for another ending, for a line that is no JSON object and for an empty file.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix in (".jsonl", ".json", ".parquet", ".gz")]
    kind = suffixes[0] if suffixes else path.suffix
    if kind == ".parquet":
        rows = _read_parquet(path)
    elif kind == ".jsonl":
        rows = [
            _parse(line, f"{path}, line {number}")
            for number, line in enumerate(_read_text(path).splitlines(), 1)
            if line.strip()
        ]
    elif kind == ".json":
        rows = read_json(path)
        if not isinstance(rows, list):
            raise DataFileError(f"{path} should hold a list of rows, it holds a {type(rows).__name__}")
    else:
        raise DataFileError(f"{path} should end in .jsonl, .json, .jsonl.gz, .json.gz or .parquet")
    if not rows:
        raise DataFileError(f"{path} holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataFileError(f"{path}: row {number} should be an object, it is a {type(row).__name__}")
    return rows


def read_json(path: Path) -> Any:
    """What a .json or .json.gz file holds. Raises DataFileError where that is no JSON."""
    return _parse(_read_text(path), str(path))


def require(row: dict[str, Any], fields: Iterable[str], where: str) -> None:
    """Raises DataFileError unless a row has all the fields."""
    missing = [field for field in fields if field not in row]
    if missing:
        raise DataFileError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(row))}")


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataFileError(f"{where} is not JSON: {error}") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataFileError(f"{path} needs pyarrow to be read; install it, or convert the file to .jsonl") from error
    return parquet.read_table(path).to_pylist()
