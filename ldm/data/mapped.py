"""Safetensors files by memory map: nothing is read before it is asked for, and what was read can be let go of."""

from __future__ import annotations

import json
import mmap
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}
"""The safetensors types that are used here, as numpy's."""
HEADER_SIZE = 8
MAX_HEADER = 100_000_000


class MappedTensors:
    """The tensors of one file as read-only arrays that page in from disk.

    The safetensors library maps files too, but keeps the map to itself, so that pages once touched count as this
    process's memory until the file is closed.
    """

    def __init__(self, path: Path) -> None:
        """Maps a file and reads its header.

        Raises:
            ValueError: when it is not a safetensors file, or one whose tensors lie outside of it.
            OSError: when it cannot be opened.
        """
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self.map.madvise(mmap.MADV_RANDOM)  # entries are drawn in a random order: reading ahead would be in vain
        size = int.from_bytes(self.map[:HEADER_SIZE], "little")
        if size > min(len(self.map) - HEADER_SIZE, MAX_HEADER):
            raise ValueError(f"{path} is not a safetensors file")
        self.start = HEADER_SIZE + size
        self.header: dict[str, Any] = json.loads(self.map[HEADER_SIZE : self.start])
        if not isinstance(self.header, dict):
            raise ValueError(f"{path} is not a safetensors file")
        self.header.pop("__metadata__", None)
        for name, entry in self.header.items():
            if not self._fits(entry):
                raise ValueError(f"{path}: tensor {name!r} does not fit into the file")

    def _fits(self, entry: Any) -> bool:
        """Whether a header's entry describes bytes that are there."""
        try:
            first, end = entry["data_offsets"]
            size = prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]]).itemsize
            return bool(0 <= first <= end <= len(self.map) - self.start and size == end - first)
        except (KeyError, TypeError, ValueError):
            return False

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self.header[name]
        kind, offset = np.dtype(DTYPES[entry["dtype"]]), self.start + entry["data_offsets"][0]
        flat = np.frombuffer(self.map, kind, prod(entry["shape"]), offset)
        return flat.reshape(entry["shape"])

    def release(self) -> None:
        """Lets go of the pages that were touched; they stay in the system's cache and come back when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
