"""The latent cache: a data set encoded once, as posterior moments before scaling, in shards with a manifest.

    latents/settings.json            what the entries depend on, written first
    latents/shard_00000.safetensors  moments, names and captions, see `ldm.data.latent_shards`
    latents/shard_00000.json         how many were read and kept, which could not be used, size and hash of the file
    latents/manifest.json            all of that for every shard, written last

Shards are written to a temporary name, flushed and renamed; a killed run goes on with the first missing one. With
`random_flip`, every picture is followed by its mirror image. A source is read by number, or as a stream in its order,
so it may be larger than memory; reading the cache maps the shards into memory and keeps no entry in it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from ldm.data.batches import SkipCounter
from ldm.data.buckets import Buckets
from ldm.data.latent_shards import Shape, Shard, ShardBuffer
from ldm.data.sources import Example, Source, Stream
from ldm.data.transforms import BadImage, resize_and_crop, to_tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 2
PAGES_OF_A_READ = 1 << 16
"""Bytes that the system maps around each byte that is asked for."""
HELD_BYTES = 128 << 20
"""Bytes of mapped pages after which a reader lets go of them."""


class StaleCache(ValueError):  # noqa: N818
    """A cache made from other data, settings or weights; the message lists what differs."""


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
    """moments [B, 2C, h, w]; one caption a row; where each row stands in the global batch; how much its loss counts."""

    moments: Tensor
    captions: tuple[str, ...]
    rows: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def to(self, device: torch.device) -> LatentBatch:
        return replace(self, moments=self.moments.to(device, non_blocking=True))


def build_cache(
    folder: Path,
    source: Source | Stream,
    settings: CacheSettings,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    shard_size: int,
    skips: SkipCounter,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] = lambda n: None,
) -> int:
    """Encodes this process's shards that are not there yet; returns how many shards there are in all.

    Args:
        encode: pixels [B, 3, H, W] -> moments [B, 2C, h, w].
        progress: called with the number of pictures just encoded or found encoded.

    Raises:
        StaleCache: when the folder holds entries of other settings.
        TooManyBadSamples: when more pictures than allowed cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, settings)

    def wanted(number: int) -> bool:
        return number % world == rank and not _holds(folder, number, shard_size)

    total = 0
    for number, items in _blocks(source, shard_size, wanted):
        total = number + 1
        if items is not None:
            _write_shard(folder, number, items, settings, encode, batch_size, shard_size, skips, progress)
        elif number % world == rank:
            record = _record(folder, number)
            skips.add(record["read"], tuple(record["skipped"]))
            progress(record["read"])
    return total


Item = Example | BadImage


def _blocks(
    source: Source | Stream, size: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Iterable[Item] | None]]:
    """Number and items of every block of `size` samples; None in place of the items where they are not wanted."""
    if isinstance(source, Stream):
        yield from _stream_blocks(source, size, wanted)
        return
    for number in range(shard_count(len(source), size)):
        indices = range(number * size, min((number + 1) * size, len(source)))
        yield number, (_read(source, index) for index in indices) if wanted(number) else None


def _stream_blocks(
    stream: Stream, size: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, Iterable[Item] | None]]:
    """The same for a stream in its unshuffled order; what is not wanted is passed over without decoding."""
    rows = enumerate(stream.rows)
    for number in itertools.count():
        block = itertools.islice(rows, size)
        first = next(block, None)
        if first is None:
            return
        whole = itertools.chain([first], block)
        yield number, (stream.decoded(*row) for row in whole) if wanted(number) else None
        for _ in block:
            pass


def _read(source: Source, index: int) -> Item:
    try:
        return source[index]
    except BadImage as error:
        return error


def check_settings(folder: Path, settings: DataclassInstance) -> None:
    """Writes `settings.json` into a new folder; compares it in a used one.

    Raises:
        StaleCache: listing the settings that differ.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(asdict(settings), indent=1))
    _compare(_read_json(path), asdict(settings), folder)


def _compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    changed = [f"{k} was {found.get(k)!r}, is now {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if "fingerprint" in wanted:
        changed = [line for line in changed if not line.startswith(("source ", "fingerprint "))]
        if found.get("fingerprint") != wanted["fingerprint"]:
            changed.insert(0, _data_changed(found.get("source"), wanted["source"]))
    if changed:
        raise StaleCache(
            f"The latents in {folder} were made from something else ({'; '.join(changed)}); delete that folder or "
            "choose another one (latents.folder)"
        )


def _data_changed(found: str | None, wanted: str) -> str:
    if found == wanted:
        return f"the pictures or captions of {wanted!r} have changed"
    return f"the data were those of {found!r}, are now those of {wanted!r}"


def finish_cache(folder: Path, num_shards: int) -> None:
    """Writes the manifest once every shard is there; call in one process only."""
    shards = [{"name": _name(number), **_record(folder, number)} for number in range(num_shards)]
    write_text(
        folder / "manifest.json",
        json.dumps({"settings": _read_json(folder / "settings.json"), "shards": shards}, indent=1),
    )


def shard_count(num_samples: int, shard_size: int) -> int:
    """How many shards a data set fills."""
    return -(-num_samples // shard_size)


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
        _compare(self.manifest["settings"], asdict(settings) if settings else {"format": FORMAT}, folder)
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
        _compare(_manifest(folder)["settings"], {"format": FORMAT}, folder)
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
    manifest = _read_json(path)
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
    _compare(manifest["settings"], {"format": FORMAT}, folder)
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


def _write_shard(
    folder: Path,
    number: int,
    items: Iterable[Item],
    settings: CacheSettings,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    shard_size: int,
    skips: SkipCounter,
    progress: Callable[[int], object],
) -> None:
    buffer, skipped, read = ShardBuffer(getattr(torch, settings.dtype)), list[str](), 0
    items = iter(items)
    while batch := list(itertools.islice(items, batch_size)):
        bad = [str(item) for item in batch if isinstance(item, BadImage)]
        skips.add(len(batch), tuple(bad))
        skipped += bad
        read += len(batch)
        _encode([item for item in batch if isinstance(item, Example)], settings, encode, buffer)
        progress(len(batch))
    count, shapes = len(buffer), buffer.shapes
    path = folder / f"{_name(number)}.safetensors"
    digest = write_tensors(path, buffer.tensors())
    record = {"read": read, "count": count, "shapes": shapes, "bytes": path.stat().st_size, "sha256": digest}
    write_text(path.with_suffix(".json"), json.dumps({**record, "shard_size": shard_size, "skipped": skipped}))


def _encode(
    examples: Sequence[Example], settings: CacheSettings, encode: Callable[[Tensor], Tensor], buffer: ShardBuffer
) -> None:
    """Encodes a batch, pictures of the same bucket together, and adds it in its own order."""
    sizes = [settings.buckets.fit(*example.image.size) for example in examples]
    moments: dict[int, list[Tensor]] = {}
    for size in dict.fromkeys(sizes):
        members = [i for i, other in enumerate(sizes) if other == size]
        pixels = [_pixels(examples[i].image, size, settings.random_flip) for i in members]
        encoded = encode(torch.cat(pixels))
        moments |= zip(members, _grouped(encoded, 2 if settings.random_flip else 1), strict=True)
    for i, example in enumerate(examples):
        buffer.add(moments[i], example.key, example.captions)


def _grouped(moments: Tensor, copies: int) -> list[list[Tensor]]:
    return [list(moments[start : start + copies]) for start in range(0, len(moments), copies)]


def _pixels(image: Image.Image, size: tuple[int, int], mirror: bool) -> Tensor:
    """[1 or 2, 3, H, W]: the picture, and its mirror image."""
    image = resize_and_crop(image, size)
    return torch.stack([to_tensor(copy) for copy in ([image, ImageOps.mirror(image)] if mirror else [image])])


def _holds(folder: Path, number: int, shard_size: int) -> bool:
    """Whether a shard of this many samples was written whole."""
    path = folder / f"{_name(number)}.safetensors"
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return False
    record = _record(folder, number)
    return record.get("shard_size") == shard_size and record.get("bytes") == path.stat().st_size


def _record(folder: Path, number: int) -> dict[str, Any]:
    return _read_json(folder / f"{_name(number)}.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete {path.parent} to encode the data again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged; delete {path.parent} to encode the data again")
    return tree


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
