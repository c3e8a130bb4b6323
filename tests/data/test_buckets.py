from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.batches import SkipCounter, Transform, pixel_batches
from ldm.data.buckets import BucketOrder, Buckets, kinds_of
from ldm.data.latent_batches import latent_batches
from ldm.data.latent_writing import build_cache, finish_cache
from ldm.data.latents import CacheSettings, LatentCache
from ldm.data.order import BatchPlan, ordered_slots
from ldm.data.sources import Example
from ldm.data.transforms import BadImage

KINDS = np.array([0] * 7 + [1] * 2 + [2] * 11)[np.random.default_rng(0).permutation(20)]


class Mixed:
    """Tall, wide and square pictures in one colour each, their number; some cannot be read."""

    name = "mixed"
    shapes = ((8, 16), (16, 8), (12, 12))

    def __init__(self, count: int = 20, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def size(self, index: int) -> tuple[int, int]:
        return self.shapes[index % 3]

    def fingerprint(self) -> str:
        return f"mixed {self.count}"

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise BadImage(f"sample {index}: damaged")
        return Example(Image.new("RGB", self.size(index), (index, 0, 0)), (f"caption {index}",), f"key {index}")


@pytest.mark.parametrize(("resolution", "step", "ratio"), [(512, 64, 2.0), (64, 8, 3.0), (96, 32, 4.0), (40, 8, 1.5)])
def test_sizes_are_multiples_of_bounded_area_and_ratio(resolution: int, step: int, ratio: float) -> None:
    sizes = Buckets(resolution, step, ratio).sizes
    assert (resolution, resolution) in sizes and len(sizes) == len(set(sizes)) > 1
    for width, height in set(sizes) - {(resolution, resolution)}:
        assert width % step == height % step == 0 and width * height <= resolution**2
        assert max(width, height) <= ratio * min(width, height)
        assert (min(width, height) * (max(width, height) + step)) > resolution**2
    assert {(h, w) for w, h in sizes} == set(sizes)


def test_a_ratio_of_one_is_the_square() -> None:
    assert Buckets(48, 64, 1.0).sizes == [(48, 48)]
    assert Buckets(48, 64, 1.0).fit(1000, 10) == (48, 48)


def test_pictures_go_to_the_nearest_ratio() -> None:
    buckets = Buckets(512, 64, 2.0)
    assert buckets.fit(*(512, 512)) == (512, 512)
    for width, height in buckets.sizes:
        assert buckets.fit(3 * width, 3 * height) == (width, height)
    assert buckets.fit(10_000, 10) == buckets.sizes[-1] and buckets.fit(10, 10_000) == buckets.sizes[0]


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_a_batch_is_of_one_bucket_and_nothing_is_left_out(size: int) -> None:
    order, seen = BucketOrder(KINDS, 3), list[tuple[int, int]]()
    for batch in ordered_slots(BatchPlan(size), order, 0, len(KINDS)):
        assert len({KINDS[slot.index] for slot in batch}) == 1
        seen += [(slot.epoch, slot.index) for slot in batch]
    assert Counter(index for _, index in seen) == dict.fromkeys(range(len(KINDS)), size)
    assert set(seen) == {(epoch, index) for epoch in range(size) for index in range(len(KINDS))}


def test_each_step_can_be_computed_alone_and_the_seed_changes_it() -> None:
    order = BucketOrder(KINDS, 3)
    whole = [[order.slot(step, row, 4) for row in range(4)] for step in range(60)]
    for step in (59, 17, 0, 41):
        assert [BucketOrder(KINDS, 3).slot(step, row, 4) for row in range(4)] == whole[step]
    other = [[BucketOrder(KINDS, 4).slot(step, row, 4) for row in range(4)] for step in range(60)]
    assert other != whole and whole[:20] != whole[20:40]


def test_processes_and_accumulation_share_the_order() -> None:
    def rows(*plans: BatchPlan) -> set[tuple[int, int, int, int]]:
        slots = (s for plan in plans for batch in ordered_slots(plan, BucketOrder(KINDS, 3), 0, 25) for s in batch)
        return {(s.step, s.row, s.epoch, s.index) for s in slots}

    alone = rows(BatchPlan(8))
    assert alone == rows(BatchPlan(4, world=2, rank=0), BatchPlan(4, world=2, rank=1))
    assert alone == rows(BatchPlan(2, accumulation=4)) and len(alone) == 200


@pytest.mark.parametrize("workers", [0, 2])
def test_pixel_batches_have_the_shape_of_their_bucket(workers: int) -> None:
    source, buckets = Mixed(bad=(4, 7)), Buckets(16, 4, 2.0)
    transform = Transform(16, center_crop=False, random_flip=True, seed=1, buckets=buckets)
    batches = list(pixel_batches(source, transform, BatchPlan(4), 0, 0, 10, workers))
    shapes = {tuple(batch.image.shape[1:]) for batch in batches}
    assert shapes <= {(3, h, w) for w, h in buckets.sizes} and len(shapes) > 1
    for batch in batches:
        height, width = batch.image.shape[2:]
        numbers = [int(key.split()[1]) for key in batch.keys]
        assert all(buckets.fit(*source.size(n)) == (width, height) for n in numbers)
        assert torch.equal(batch.image[:, 0, 0, 0], torch.tensor(numbers) / 127.5 - 1)
    assert {name for batch in batches for name in batch.skipped} == {"sample 4: damaged", "sample 7: damaged"}


def test_a_header_that_cannot_be_read_counts_as_a_square() -> None:
    class Headless(Mixed):
        def size(self, index: int) -> tuple[int, int]:
            raise BadImage(f"sample {index}: damaged")

    buckets = Buckets(16, 4, 2.0)
    assert [buckets.sizes[kind] for kind in kinds_of(Headless(2), buckets)] == [(16, 16)] * 2


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_keep_the_shape_of_their_bucket(tmp_path: Path, flip: bool) -> None:
    source = Mixed(bad=(5,))
    settings = CacheSettings("mixed", "m", 16, True, flip, "abc", "float32", 4, 2.0)
    shards = build_cache(tmp_path, source, settings, lambda x: x[:, :2, ::2, ::2], 6, 7, SkipCounter(1.0))
    finish_cache(tmp_path, shards)
    cache = LatentCache(tmp_path, settings)
    shapes, kinds = cache.shapes()
    assert len(cache) == 19 * (1 + flip) and len(shapes) == 3
    for index in range(len(cache)):
        number = int(cache.key(index).split()[1])
        width, height = settings.buckets.fit(*source.size(number))
        moments = cache.gather([index])
        assert moments.shape == (1, 2, height // 2, width // 2) and shapes[kinds[index]] == (height // 2, width // 2)
        assert torch.allclose(moments[0, 0], torch.tensor(number / 127.5 - 1)) and cache.captions[index] == [
            f"caption {number}"
        ]
    for batch in latent_batches(cache, BatchPlan(4), 0, 0, 12):
        numbers = [int(caption.split()[1]) for caption in batch.captions]
        assert torch.allclose(batch.moments[:, 0, 0, 0], torch.tensor(numbers) / 127.5 - 1)
