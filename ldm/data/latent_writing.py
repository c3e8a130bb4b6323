"""Writing a latent cache: pictures are read, fitted, encoded and stored shard by shard; see `ldm.data.latents`.

A killed run goes on with the first shard that is missing. A source is read by number, or as a stream in its order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.data.batches import SkipCounter
from ldm.data.cache_files import check_settings, read_json, write_tensors, write_text
from ldm.data.latent_shards import ShardBuffer
from ldm.data.latents import CacheSettings
from ldm.data.sources import Example, Source, Stream
from ldm.data.transforms import BadImage, resize_and_crop, to_tensor


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


def finish_cache(folder: Path, num_shards: int) -> None:
    """Writes the manifest once every shard is there; call in one process only."""
    shards = [{"name": _name(number), **_record(folder, number)} for number in range(num_shards)]
    write_text(
        folder / "manifest.json",
        json.dumps({"settings": read_json(folder / "settings.json"), "shards": shards}, indent=1),
    )


def shard_count(num_samples: int, shard_size: int) -> int:
    """How many shards a data set fills."""
    return -(-num_samples // shard_size)


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
    return read_json(folder / f"{_name(number)}.json")


def _name(number: int) -> str:
    return f"shard_{number:05d}"
