"""One shard of a latent cache: moments, names and captions of some thousand pictures in one safetensors file.

moments_16x16   [n, 2C, 16, 16]   one such tensor for each shape of latents in the shard
place           int32 [N, 2]      of each entry: which of the sorted shapes, and which row there
keys            uint8             UTF-8, the names one after another; key_ends int64 [N]
captions        uint8             UTF-8, the captions likewise; caption_ends int64 [M]
caption_range   int64 [N, 2]      of each entry: its first caption and the one behind its last
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.mapped import MappedTensors

Shape = tuple[int, int]


class ShardBuffer:
    """Collects the entries of a shard in memory, in their order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.moments: dict[Shape, list[Tensor]] = {}
        self.places: list[tuple[Shape, int]] = []
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.ranges: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, moments: Sequence[Tensor], key: str, captions: Sequence[str]) -> None:
        """Adds one picture: the moments [2C, h, w] of itself and, where there is one, of its mirror image."""
        span = len(self.captions), len(self.captions) + len(captions)
        self.captions.extend(captions)
        for entry in moments:
            shape = int(entry.shape[-2]), int(entry.shape[-1])
            rows = self.moments.setdefault(shape, [])
            self.places.append((shape, len(rows)))
            rows.append(entry.to("cpu", self.dtype))
            self.keys.append(key)
            self.ranges.append(span)

    @property
    def shapes(self) -> dict[str, int]:
        """How many entries there are of each shape, such as `{"16x16": 8192}`."""
        return {_name(shape): len(self.moments[shape]) for shape in sorted(self.moments)}

    def tensors(self) -> dict[str, Tensor]:
        """The file's contents; gives the moments away, so call it last."""
        number = {shape: n for n, shape in enumerate(sorted(self.moments))}
        places = [[number[shape], row] for shape, row in self.places]
        keys, key_ends = _packed(self.keys)
        captions, caption_ends = _packed(self.captions)
        found = {f"moments_{_name(shape)}": torch.stack(self.moments.pop(shape)) for shape in sorted(self.moments)}
        return found | {
            "place": torch.tensor(places, dtype=torch.int32).view(-1, 2),
            "keys": keys,
            "key_ends": key_ends,
            "captions": captions,
            "caption_ends": caption_ends,
            "caption_range": torch.tensor(self.ranges, dtype=torch.int64).view(-1, 2),
        }


def _name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _packed(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as one run of bytes, and where each ends."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()), torch.from_numpy(ends)


class Shard:
    """A shard on disk, by memory map."""

    def __init__(self, path: Path) -> None:
        """Maps the file.

        Raises:
            ValueError: when it is not such a shard.
            OSError: when it cannot be opened.
        """
        self.file = MappedTensors(path)
        try:
            self.moments = [self.file[f"moments_{_name(shape)}"] for shape in self.shapes]
            self.place, self.span = self.file["place"], self.file["caption_range"]
            self.key_ends, self.caption_ends = self.file["key_ends"], self.file["caption_ends"]
        except KeyError as error:
            raise ValueError(f"{path} has no tensor {error}") from error

    def __len__(self) -> int:
        return len(self.place)

    @property
    def shapes(self) -> list[Shape]:
        """The shapes (h, w) of latents in the shard, sorted."""
        matches = (re.fullmatch(r"moments_(\d+)x(\d+)", name) for name in self.file.header)
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def row(self, index: int) -> NDArray[Any]:
        """The moments [2C, h, w] of an entry, still on disk."""
        kind, row = self.place[index]
        found: NDArray[Any] = self.moments[kind][row]
        return found

    def key(self, index: int) -> str:
        """The name of an entry."""
        return self._text("keys", self.key_ends, index)

    def captions(self, index: int) -> list[str]:
        """The captions of an entry."""
        first, end = self.span[index].tolist()
        return [self._text("captions", self.caption_ends, number) for number in range(first, end)]

    def _text(self, name: str, ends: NDArray[Any], number: int) -> str:
        start = int(ends[number - 1]) if number else 0
        return self.file[name][start : int(ends[number])].tobytes().decode()
