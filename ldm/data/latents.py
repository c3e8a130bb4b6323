"""The latent cache: a data set encoded once, as posterior moments before scaling, in shards with a manifest.

    latents/settings.json            what the entries depend on, written first
    latents/shard_00000.safetensors  moments, names and captions, see `ldm.data.latent_shards`
    latents/shard_00000.json         how many were read and kept, which could not be used, size and hash of the file
    latents/manifest.json            all of that for every shard, written last

`ldm.data.latent_writing` makes it. With `random_flip`, every picture is followed by its mirror image. Reading maps the
shards into memory and keeps no entry in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.buckets import Buckets
from ldm.data.cache_files import compare_settings, file_hash, read_json
from ldm.data.latent_shards import Shape, Shard

FORMAT = 2
PAGES_OF_A_READ = 1 << 16
"""Bytes that the system maps around each byte that is asked for."""
HELD_BYTES = 128 << 20
"""Bytes of mapped pages after which a reader lets go of them."""


@dataclass(frozen=True)
class CacheSettings:
    """What the entries depend on; a cache made with other settings is refused.

    `source` is for the reader of a message; what is compared is the `fingerprint` of its contents. The bucket settings
    are those of `ldm.data.buckets.Buckets`.
    """

    source: str
    fingerprint: str
    resolution: int
    center_crop: bool
    random_flip: bool
    autoencoder: str
    dtype: str
    bucket_step: int = 64
    bucket_max_aspect_ratio: float = 1.0
    format: int = FORMAT

    @property
    def buckets(self) -> Buckets:
        """The picture sizes that pictures are fitted to."""
        return Buckets(self.resolution, self.bucket_step, self.bucket_max_aspect_ratio)


@dataclass(frozen=True)
class LatentBatch:
    """moments [B, 2C, h, w]; one caption a row; where each row stands in the global batch.

    `weights` is how much a row's loss counts, `prior` whether it is one of the class pictures; None means one and none.
    """

    moments: Tensor
    captions: tuple[str, ...]
    rows: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    prior: tuple[bool, ...] | None = None

    def to(self, device: torch.device) -> LatentBatch:
        return replace(self, moments=self.moments.to(device, non_blocking=True))


def is_complete(folder: Path) -> bool:
    """True when the manifest, written last, is there."""
    return (folder / "manifest.json").exists()


class LatentCache:
    """Random access to cached moments and captions; the shards are mapped into memory when they are first used."""

    def __init__(self, folder: Path, settings: CacheSettings | None = None) -> None:
        """Opens a complete cache and checks names and sizes of its files; `verify_cache` reads every byte.

        Args:
            settings: what it must have been made with; None takes it as it is.

        Raises:
            StaleCache: when it was made with other settings.
            ValueError: naming the file that is missing or damaged.
        """
        self.folder, self.manifest = folder, _manifest(folder)
        compare_settings(self.manifest["settings"], asdict(settings) if settings else {"format": FORMAT}, folder)
        self.starts = [0]
        for shard in self.manifest["shards"]:
            _check_size(folder, shard)
            self.starts.append(self.starts[-1] + shard["count"])
        self.captions = CaptionTable(self)
        self._shards: dict[int, Shard] = {}
        self._touched = 0

    @classmethod
    def open(cls, folder: Path, autoencoder: str) -> LatentCache:
        """Opens a complete cache with whatever settings it was made, as long as that autoencoder made it.

        Raises:
            StaleCache: when another autoencoder did.
            ValueError: naming the folder that is no complete cache, or the shard that is missing or damaged.
        """
        if not is_complete(folder):
            raise ValueError(f"{folder} is not a complete latent cache; it is `latents/` in a finished stage-two run")
        compare_settings(_manifest(folder)["settings"], {"format": FORMAT}, folder)
        return cls(folder, CacheSettings(**{**_manifest(folder)["settings"], "autoencoder": autoencoder}))

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def read(self) -> int:
        """How many samples of the source were read, those that could not be used included."""
        return sum(shard["read"] for shard in self.manifest["shards"])

    @property
    def skipped(self) -> tuple[str, ...]:
        """The samples that could not be used, each with its reason."""
        return tuple(name for shard in self.manifest["shards"] for name in shard["skipped"])

    def gather(self, indices: Sequence[int]) -> Tensor:
        """Moments float32 [B, 2C, h, w] of the given entries, which must be of one shape."""
        rows = []
        for index in indices:
            shard, local = self.find(index)
            rows.append(torch.from_numpy(shard.row(local).astype(np.float32)))
            self._touched += PAGES_OF_A_READ + rows[-1].nbytes
        self._release()
        return torch.stack(rows)

    def shapes(self) -> tuple[list[Shape], NDArray[np.int64]]:
        """The shapes (h, w) of latents, sorted, and for each entry which of them it has."""
        found = sorted({_shape(name) for shard in self.manifest["shards"] for name in shard["shapes"]})
        if len(found) <= 1:
            return found, np.zeros(len(self), np.int64)
        kinds = [self._kinds(number, found) for number in range(len(self.manifest["shards"]))]
        return found, np.concatenate(kinds)

    def key(self, index: int) -> str:
        """The name of an entry."""
        shard, local = self.find(index)
        return shard.key(local)

    def find(self, index: int) -> tuple[Shard, int]:
        """The shard of an entry, and the entry's number there.

        Raises:
            IndexError: outside 0 <= index < len.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} is outside a cache of {len(self)}")
        number = bisect_right(self.starts, index) - 1
        return self._shard(number), index - self.starts[number]

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = _open_shard(self.folder, self.manifest["shards"][number])
        return self._shards[number]

    def _kinds(self, number: int, found: list[Shape]) -> NDArray[np.int64]:
        shard = self._shard(number)
        order = np.array([found.index(shape) for shape in shard.shapes], np.int64)
        return order[shard.place[:, 0]] if len(shard) else np.zeros(0, np.int64)

    def _release(self) -> None:
        """Keeps the mapped pages, which count as this process's memory, below `HELD_BYTES`."""
        if self._touched > HELD_BYTES:
            for shard in self._shards.values():
                shard.file.release()
            self._touched = 0


class CaptionTable(Sequence[list[str]]):
    """The captions of every entry, read from the shards when they are asked for."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, local = self.cache.find(index)
        return shard.captions(local)


def _shape(name: str) -> Shape:
    height, width = name.split("x")
    return int(height), int(width)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a complete latent cache: it has no manifest.json")
    manifest = read_json(path)
    if not isinstance(manifest.get("settings"), dict) or not isinstance(manifest.get("shards"), list):
        raise ValueError(f"{path} is not the manifest of a latent cache")
    return manifest


def _check_size(folder: Path, shard: dict[str, Any]) -> None:
    path = folder / f"{shard['name']}.safetensors"
    if not path.is_file():
        raise ValueError(f"{path} is missing; delete {folder} to encode the data again")
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(f"{path} is damaged; delete {folder} to encode the data again")


def _open_shard(folder: Path, shard: dict[str, Any]) -> Shard:
    path = folder / f"{shard['name']}.safetensors"
    try:
        opened = Shard(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete {folder} to encode the data again") from error
    if len(opened) != shard["count"]:
        raise ValueError(f"{path} is damaged; delete {folder} to encode the data again")
    return opened


def verify_cache(folder: Path, progress: Callable[[int], object] = lambda n: None) -> list[str]:
    """Reads every byte of a cache; a sentence for each damaged shard.

    Raises:
        ValueError: when the folder is not a complete cache of this format.
    """
    manifest = _manifest(folder)
    compare_settings(manifest["settings"], {"format": FORMAT}, folder)
    problems = []
    for shard in manifest["shards"]:
        problem = _problem(folder, shard)
        problems += [problem] if problem else []
        progress(1)
    return problems


def _problem(folder: Path, shard: dict[str, Any]) -> str | None:
    path = folder / f"{shard['name']}.safetensors"
    try:
        _check_size(folder, shard)
        if file_hash(path) != shard["sha256"]:
            return f"{path} differs from its hash"
        opened = _open_shard(folder, shard)
    except ValueError as error:
        return str(error)
    broken = sum(int((~np.isfinite(block)).any((1, 2, 3)).sum()) for block in opened.moments)
    return f"{path} holds {broken} entries that are not finite" if broken else None
