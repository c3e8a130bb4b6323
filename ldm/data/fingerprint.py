"""What a data set is, as a hash: equal for a copy of it elsewhere, another one when pictures or captions change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

EDGE = 1 << 16
"""Bytes at either end of a large file that are read; a parquet file's index stands at its end."""


def of_values(values: Iterable[object]) -> str:
    """SHA-256 over the values' representations."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def of_files(files: Sequence[str]) -> str:
    """SHA-256 over names, sizes and both ends of archives, in their order."""
    return of_values((Path(file).name, Path(file).stat().st_size, *_ends(file)) for file in files)


def _ends(file: str) -> tuple[str, str]:
    with open(file, "rb") as handle:
        first = handle.read(EDGE)
        handle.seek(max(0, Path(file).stat().st_size - EDGE))
        last = handle.read(EDGE)
    return hashlib.sha256(first).hexdigest(), hashlib.sha256(last).hexdigest()
