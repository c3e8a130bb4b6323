from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldm.data.batches import SkipCounter, TooManyBadSamples
from ldm.data.cache_files import StaleCache, check_settings
from ldm.data.latent_batches import latent_batches
from ldm.data.latent_writing import build_cache, finish_cache, shard_count
from ldm.data.latents import CacheSettings, LatentCache, is_complete, verify_cache
from ldm.data.order import BatchPlan, slots
from ldm.data.sources import Example
from ldm.data.transforms import BadImage, to_tensor


class Pictures:
    """Numbered pictures that are not symmetric; it counts how often each is read."""

    name = "pictures"

    def __init__(self, count: int, bad: Sequence[int] = ()) -> None:
        self.count, self.bad, self.read = count, frozenset(bad), list[int]()

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        image = Image.new("RGB", (4, 4), (index, 0, 0))
        image.putpixel((0, 1), (9, 200, 7))
        return image

    def __getitem__(self, index: int) -> Example:
        self.read.append(index)
        if index in self.bad:
            raise BadImage(f"sample {index}: damaged")
        return Example(self.image(index), (f"{index} a", f"{index} b"), f"key {index}")

    def size(self, index: int) -> tuple[int, int]:
        return 4, 4

    def fingerprint(self) -> str:
        return f"pictures {self.count}"


def encode(x: Tensor) -> Tensor:
    """Stands for an encoder: a linear map to 2 channels at half the size."""
    return torch.nn.functional.avg_pool2d(torch.stack([x.sum(1), x[:, 0] - x[:, 1]], 1), 2)


def moments_of(source: Pictures, index: int, flip: bool = False) -> Tensor:
    x = to_tensor(source.image(index))[None]
    return encode(x.flip(-1) if flip else x)[0]


def keys(cache: LatentCache) -> list[str]:
    return [cache.key(i) for i in range(len(cache))]


def settings(size: int, **changes: object) -> CacheSettings:
    base = CacheSettings("pictures", f"pictures {size}", 4, True, False, "abc", "float32")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def build(
    folder: Path, source: Pictures, chosen: CacheSettings, shard_size: int = 4, rank: int = 0, world: int = 1
) -> None:
    build_cache(folder, source, chosen, encode, 3, shard_size, SkipCounter(1.0), rank, world)


def finish(folder: Path, source: Pictures, chosen: CacheSettings, shard_size: int = 4) -> LatentCache:
    finish_cache(folder, shard_count(len(source), shard_size))
    return LatentCache(folder, chosen)


@pytest.mark.parametrize("shard_size", [1, 4, 5, 10, 99])
def test_a_cache_holds_what_the_encoder_gives(tmp_path: Path, shard_size: int) -> None:
    source, chosen = Pictures(10), settings(10)
    build(tmp_path, source, chosen, shard_size)
    assert not is_complete(tmp_path)
    cache = finish(tmp_path, source, chosen, shard_size)
    assert is_complete(tmp_path) and len(cache) == 10
    order = [9, 0, 3, 3, 4, 8]
    torch.testing.assert_close(
        cache.gather(order), torch.stack([moments_of(source, i) for i in order]), atol=1e-6, rtol=0
    )
    assert list(cache.captions) == [[f"{i} a", f"{i} b"] for i in range(10)] and cache.key(7) == "key 7"
    assert verify_cache(tmp_path) == []
    assert not list(tmp_path.glob("*.tmp"))


def test_half_precision_is_stored_and_float_is_given(tmp_path: Path) -> None:
    source, chosen = Pictures(3), settings(3, dtype="float16")
    build(tmp_path, source, chosen)
    cache = finish(tmp_path, source, chosen)
    assert load_file(tmp_path / "shard_00000.safetensors")["moments_2x2"].dtype == torch.float16
    assert cache.gather([1]).dtype == torch.float32
    assert torch.equal(cache.gather([2])[0], moments_of(source, 2).half().float())


def test_mirror_images_follow_their_pictures(tmp_path: Path) -> None:
    source, chosen = Pictures(5, bad=[1]), settings(5, random_flip=True)
    build(tmp_path, source, chosen, shard_size=2)
    cache = finish(tmp_path, source, chosen, shard_size=2)
    assert keys(cache) == [f"key {i}" for i in (0, 0, 2, 2, 3, 3, 4, 4)]
    expected = [moments_of(source, i, flip) for i in (0, 2, 3, 4) for flip in (False, True)]
    torch.testing.assert_close(cache.gather(range(8)), torch.stack(expected), atol=1e-6, rtol=0)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("lost", ["shard_00001.json", "shard_00001.safetensors"])
def test_building_goes_on_with_the_missing_shard_only(tmp_path: Path, lost: str) -> None:
    source, chosen = Pictures(10), settings(10)
    build(tmp_path, source, chosen)
    (tmp_path / lost).unlink()
    source.read.clear()
    build(tmp_path, source, chosen)
    assert source.read == [4, 5, 6, 7]
    assert torch.equal(finish(tmp_path, source, chosen).gather([5])[0], moments_of(source, 5))


def test_shards_of_another_size_are_made_again(tmp_path: Path) -> None:
    source, chosen = Pictures(10), settings(10)
    build_cache(tmp_path, source, chosen, encode, 3, 6, SkipCounter(1.0), rank=0, world=2)
    build(tmp_path, source, chosen, shard_size=4)
    assert keys(finish(tmp_path, source, chosen)) == [f"key {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"autoencoder": "def"}, "autoencoder was 'abc', is now 'def'"),
        ({"resolution": 8}, "resolution was 4, is now 8"),
        (
            {"source": "others", "fingerprint": "others 10"},
            "the data were those of 'pictures', are now those of 'others'",
        ),
    ],
)
def test_a_stale_cache_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    source = Pictures(10)
    build(tmp_path, source, settings(10))
    with pytest.raises(StaleCache, match=reason):
        build(tmp_path, source, settings(10, **changes))
    finish(tmp_path, source, settings(10))
    with pytest.raises(StaleCache, match=reason):
        LatentCache(tmp_path, settings(10, **changes))
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StaleCache, match=reason):
        LatentCache(tmp_path, settings(10, **changes))


@pytest.mark.parametrize("damage", ["missing", "truncated", "swapped"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    source, chosen = Pictures(10), settings(10)
    build(tmp_path, source, chosen)
    finish(tmp_path, source, chosen)
    shard = tmp_path / "shard_00002.safetensors"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        shard.write_bytes((tmp_path / "shard_00000.safetensors").read_bytes())
    assert len(verify_cache(tmp_path)) == 1 and "shard_00002" in verify_cache(tmp_path)[0]
    with pytest.raises(ValueError, match=r"shard_00002\.safetensors .*delete"):
        LatentCache(tmp_path, chosen)


def test_unreadable_pictures_are_left_out_and_a_shard_may_be_empty(tmp_path: Path) -> None:
    source, chosen = Pictures(9, bad=[0, 1, 2, 3, 6, 8]), settings(9)
    skips = SkipCounter(1.0)
    seen: list[int] = []
    build_cache(tmp_path, source, chosen, encode, 3, 4, skips, progress=seen.append)
    cache = finish(tmp_path, source, chosen)
    assert keys(cache) == ["key 4", "key 5", "key 7"] and cache.starts == [0, 0, 3, 3]
    assert (cache.read, cache.skipped) == (9, tuple(f"sample {i}: damaged" for i in (0, 1, 2, 3, 6, 8)))
    torch.testing.assert_close(
        cache.gather([2, 0]), torch.stack([moments_of(source, i) for i in (7, 4)]), atol=1e-6, rtol=0
    )
    assert sum(seen) == skips.seen == 9 and list(skips.names) == [f"sample {i}: damaged" for i in (0, 1, 2, 3, 6, 8)]


def test_too_many_unreadable_pictures_end_the_encoding(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadSamples):
        build_cache(tmp_path, Pictures(9, bad=[1, 2]), settings(9), encode, 3, 4, SkipCounter(0.01))


def test_two_ranks_fill_the_shards_together(tmp_path: Path) -> None:
    sources, chosen = [Pictures(10), Pictures(10)], settings(10)
    for rank in (1, 0):
        build(tmp_path, sources[rank], chosen, shard_size=3, rank=rank, world=2)
    assert sources[0].read == [0, 1, 2, 6, 7, 8] and sources[1].read == [3, 4, 5, 9]
    cache = finish(tmp_path, sources[0], chosen, shard_size=3)
    assert keys(cache) == [f"key {i}" for i in range(10)]
    torch.testing.assert_close(
        cache.gather(range(10)), torch.stack([moments_of(sources[0], i) for i in range(10)]), atol=1e-6, rtol=0
    )


def test_two_processes_may_write_the_settings_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process writes its settings whole between the first one's writing and renaming."""
    rename = os.replace

    def second_process_first(source: str, target: str) -> None:
        monkeypatch.setattr(os, "replace", rename)
        with monkeypatch.context() as second:
            second.setattr(os, "getpid", lambda: 1)
            second.setattr(Path, "exists", lambda path: False)
            check_settings(tmp_path, settings(10))
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_process_first)
    check_settings(tmp_path, settings(10))
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    assert json.loads((tmp_path / "settings.json").read_text())["autoencoder"] == "abc"


def test_batches_take_moments_by_position_and_draw_captions(tmp_path: Path) -> None:
    source, chosen = Pictures(10), settings(10)
    build(tmp_path, source, chosen)
    cache = finish(tmp_path, source, chosen)
    plan = BatchPlan(3, accumulation=2)
    batches = list(latent_batches(cache, plan, 5, 0, 20))
    for batch, rows in zip(batches, slots(plan, 10, 5, 0, 20), strict=True):
        assert torch.equal(batch.moments, cache.gather([slot.index for slot in rows]))
        assert batch.rows == tuple(slot.row for slot in rows)
        assert all(caption in cache.captions[s.index] for caption, s in zip(batch.captions, rows, strict=True))
    assert len({caption for batch in batches for caption in batch.captions}) == 20
    tail = list(latent_batches(cache, plan, 5, 7, 20))
    assert all(
        a.captions == b.captions and torch.equal(a.moments, b.moments) for a, b in zip(batches[14:], tail, strict=True)
    )


def test_captions_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    source, chosen = Pictures(10), settings(10)
    build(tmp_path, source, chosen)
    cache = finish(tmp_path, source, chosen)

    def rows(plans: Sequence[BatchPlan]) -> set[tuple[int, int, str]]:
        drawn = [enumerate(latent_batches(cache, plan, 5, 0, 6)) for plan in plans]
        return {(step, row, c) for part in drawn for step, b in part for row, c in zip(b.rows, b.captions, strict=True)}

    assert rows([BatchPlan(4)]) == rows([BatchPlan(2, world=2, rank=r) for r in range(2)])
