"""The latent cache: a data set encoded once, as posterior moments before scaling, in shards with a manifest.

    latents/manifest.json          what was encoded, with what, how many, and the hash of every shard
    latents/shard_00000.safetensors  moments [n, 2C, h, w]
    latents/shard_00000.json         keys and captions of the same n entries

Shards are written to a temporary name, flushed and renamed; a killed run goes on with the first missing one. With
`random_flip`, every picture is followed by its mirror image.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.data.batches import SkipCounter
from ldm.data.sources import Example, Source
from ldm.data.transforms import BadImage, resize_and_crop, to_tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1


class StaleCache(ValueError):  # noqa: N818
    """A cache made from other data, settings or weights; the message lists what differs."""


@dataclass(frozen=True)
class CacheSettings:
    """What the entries depend on; a cache made with other settings is refused."""

    source: str
    num_samples: int
    resolution: int
    center_crop: bool
    random_flip: bool
    autoencoder: str
    dtype: str
    format: int = FORMAT


@dataclass(frozen=True)
class LatentBatch:
    """moments [B, 2C, h, w]; one caption a row; where each row stands in the global batch."""

    moments: Tensor
    captions: tuple[str, ...]
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> LatentBatch:
        return LatentBatch(self.moments.to(device, non_blocking=True), self.captions, self.rows)


def build_cache(
    folder: Path,
    source: Source,
    settings: CacheSettings,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    shard_size: int,
    skips: SkipCounter,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Encodes this process's shards that are not there yet.

    Args:
        encode: pixels [B, 3, H, W] -> moments [B, 2C, h, w].
        progress: called with the number of pictures just encoded.

    Raises:
        StaleCache: when the folder holds entries of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, settings)
    starts = range(0, len(source), shard_size)
    for number in range(rank, len(starts), world):
        indices = range(starts[number], min(starts[number] + shard_size, len(source)))
        if not _holds(folder / f"{_name(number)}.json", indices):
            _write_shard(folder, number, source, indices, settings, encode, batch_size, skips, progress)


def check_settings(folder: Path, settings: DataclassInstance) -> None:
    """Writes `settings.json` into a new folder; compares it in a used one.

    Raises:
        StaleCache: listing the settings that differ.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(asdict(settings), indent=1))
    _compare(json.loads(path.read_text()), asdict(settings), folder)


def _compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    changed = [f"{k} was {found.get(k)!r}, is now {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if changed:
        raise StaleCache(
            f"The latents in {folder} were made from something else ({'; '.join(changed)}); delete that folder or "
            "set latents.folder to another one"
        )


def finish_cache(folder: Path, num_shards: int) -> None:
    """Writes the manifest once every shard is there; call in one process only."""
    shards = []
    for number in range(num_shards):
        entries = json.loads((folder / f"{_name(number)}.json").read_text())
        shards.append({"name": _name(number), "count": len(entries["keys"]), "sha256": entries["sha256"]})
    manifest = {"settings": json.loads((folder / "settings.json").read_text()), "shards": shards}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))


def shard_count(num_samples: int, shard_size: int) -> int:
    """How many shards a data set fills."""
    return -(-num_samples // shard_size)


def is_complete(folder: Path) -> bool:
    """True when the manifest, written last, is there."""
    return (folder / "manifest.json").exists()


class LatentCache:
    """Random access to cached moments and captions; shards are memory-mapped by safetensors."""

    def __init__(self, folder: Path, settings: CacheSettings) -> None:
        """Opens a complete cache.

        Raises:
            StaleCache: when it was made with other settings.
            ValueError: naming the shard that is missing or damaged.
        """
        manifest = json.loads((folder / "manifest.json").read_text())
        _compare(manifest["settings"], asdict(settings), folder)
        self.moments: list[Tensor] = []
        self.captions: list[list[str]] = []
        self.keys: list[str] = []
        for shard in manifest["shards"]:
            self._open_shard(folder, shard["name"], shard["count"], shard["sha256"])
        self.starts = [0]
        for block in self.moments:
            self.starts.append(self.starts[-1] + len(block))

    @classmethod
    def open(cls, folder: Path, autoencoder: str) -> LatentCache:
        """Opens a complete cache with whatever settings it was made, as long as that autoencoder made it.

        Raises:
            StaleCache: when another autoencoder did.
            ValueError: naming the folder that is no complete cache, or the shard that is missing or damaged.
        """
        if not is_complete(folder):
            raise ValueError(f"{folder} is not a complete latent cache; it is `latents/` in a finished stage-two run")
        stored = json.loads((folder / "manifest.json").read_text())["settings"]
        return cls(folder, CacheSettings(**{**stored, "autoencoder": autoencoder}))

    def _open_shard(self, folder: Path, name: str, count: int, sha256: str) -> None:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise ValueError(f"{path} is missing; delete {folder} to encode the data again")
        try:
            with safe_open(path, framework="pt") as file:
                block = file.get_tensor("moments")
            entries = json.loads(path.with_suffix(".json").read_text())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete {folder} to encode the data again") from error
        if len(block) != count or file_hash(path) != sha256:
            raise ValueError(f"{path} is damaged; delete {folder} to encode the data again")
        self.moments.append(block)
        self.captions.extend(entries["captions"])
        self.keys.extend(entries["keys"])

    def __len__(self) -> int:
        return self.starts[-1]

    def gather(self, indices: Sequence[int]) -> Tensor:
        """Moments float32 [B, 2C, h, w] of the given entries."""
        return torch.stack([self._row(i) for i in indices]).float()

    def _row(self, index: int) -> Tensor:
        shard = bisect_right(self.starts, index) - 1
        return self.moments[shard][index - self.starts[shard]]


def _write_shard(
    folder: Path,
    number: int,
    source: Source,
    indices: range,
    settings: CacheSettings,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    skips: SkipCounter,
    progress: Callable[[int], object],
) -> None:
    moments: list[Tensor] = []
    keys: list[str] = []
    captions: list[tuple[str, ...]] = []
    for start in range(0, len(indices), batch_size):
        examples = _readable(source, indices[start : start + batch_size], skips)
        for example in examples:
            copies = 2 if settings.random_flip else 1
            keys.extend([example.key] * copies)
            captions.extend([example.captions] * copies)
        if examples:
            moments.append(encode(_pixels(examples, settings)).to("cpu", getattr(torch, settings.dtype)))
        progress(len(indices[start : start + batch_size]))
    path = folder / f"{_name(number)}.safetensors"
    digest = write_tensors(path, {"moments": torch.cat(moments) if moments else torch.empty(0)})
    entries = {"range": [indices.start, indices.stop], "sha256": digest, "keys": keys, "captions": captions}
    write_text(path.with_suffix(".json"), json.dumps(entries))


def _holds(entries: Path, indices: range) -> bool:
    """Whether a shard is there and was made from these samples; another `shard_size` cuts them differently."""
    if not entries.exists() or not entries.with_suffix(".safetensors").exists():
        return False
    return bool(json.loads(entries.read_text()).get("range") == [indices.start, indices.stop])


def _readable(source: Source, indices: range, skips: SkipCounter) -> list[Example]:
    examples, bad = [], []
    for index in indices:
        try:
            examples.append(source[index])
        except BadImage as error:
            bad.append(str(error))
    skips.add(len(indices), tuple(bad))
    return examples


def _pixels(examples: list[Example], settings: CacheSettings) -> Tensor:
    images = []
    for example in examples:
        image = resize_and_crop(example.image, settings.resolution)
        images.extend([image, ImageOps.mirror(image)] if settings.random_flip else [image])
    return torch.stack([to_tensor(image) for image in images])


def _name(number: int) -> str:
    return f"shard_{number:05d}"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a safetensors file atomically and returns its hash."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    digest = file_hash(temporary)
    os.replace(temporary, path)
    return digest


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
