from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from PIL import Image

from ldm.data.batches import PixelBatch, SkipCounter, TooManyBadSamples, Transform, pixel_batches
from ldm.data.order import BatchPlan, slots
from ldm.data.pixels import stacked
from ldm.data.sources import Example
from ldm.data.transforms import BadImage, to_tensor


class Ramps:
    """Numbered pictures with a horizontal ramp; some of them cannot be read."""

    name = "ramps"

    def __init__(self, count: int, bad: Sequence[int] = ()) -> None:
        self.count, self.bad = count, frozenset(bad)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if index in self.bad:
            raise BadImage(f"sample {index}: damaged")
        image = Image.new("RGB", (12, 8), (index, 0, 0))
        image.putdata([(index, 20 * x, 20 * y) for y in range(8) for x in range(12)])
        return Example(image, (f"caption {index}",), f"key {index}")

    def size(self, index: int) -> tuple[int, int]:
        return 12, 8

    def fingerprint(self) -> str:
        return f"ramps {self.count}"


def same(a: PixelBatch, b: PixelBatch) -> bool:
    named = all(getattr(a, name) == getattr(b, name) for name in ("keys", "rows", "skipped", "captions"))
    return named and torch.equal(a.image, b.image)


AUGMENTED = Transform(8, center_crop=False, random_flip=True, seed=1)


def test_workers_change_nothing() -> None:
    plan, source = BatchPlan(4, accumulation=2, world=2, rank=1), Ramps(30, bad=[7, 8])
    alone = list(pixel_batches(source, AUGMENTED, plan, 3, 0, 4))
    helped = list(pixel_batches(source, AUGMENTED, plan, 3, 0, 4, workers=2))
    assert len(alone) == len(helped) == 8
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_resumed_iterator_is_the_tail_of_an_undisturbed_one() -> None:
    plan, source = BatchPlan(4), Ramps(10, bad=[2])
    whole = list(pixel_batches(source, AUGMENTED, plan, 3, 0, 9))
    tail = list(pixel_batches(source, AUGMENTED, plan, 3, 5, 9))
    assert len(whole) == 9 and all(same(a, b) for a, b in zip(whole[5:], tail, strict=True))
    interrupted = pixel_batches(source, AUGMENTED, plan, 3, 0, 9)
    assert all(same(a, b) for a, b in zip(whole[:3], islice(interrupted, 3), strict=True))


def test_rows_follow_the_order_of_slots() -> None:
    plan = BatchPlan(3)
    planned = list(slots(plan, 10, 0, 0, 5))
    for batch, rows in zip(pixel_batches(Ramps(10), Transform(8), plan, 0, 0, 5), planned, strict=True):
        assert batch.keys == tuple(f"key {slot.index}" for slot in rows)
        assert batch.rows == (0, 1, 2) and batch.image.shape == (3, 3, 8, 8)
        levels = (batch.image[:, 0, 0, 0] + 1) * 127.5
        assert levels.round().int().tolist() == [slot.index for slot in rows]


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    example = Ramps(3)[0]
    drawn = {(s, e, i): Transform(8, False, True, s)(example, e, i) for s in (0, 1) for e in range(8) for i in range(3)}
    for (s, e, i), x in drawn.items():
        assert torch.equal(Transform(8, False, True, s)(example, e, i), x)
    assert len({tuple(x.flatten().tolist()) for x in drawn.values()}) > 5
    flips = [Transform(8, True, True)(example, e, 0) for e in range(64)]
    plain = Transform(8)(example, 0, 0)
    mirrored = sum(torch.equal(x, plain.flip(-1)) for x in flips)
    assert 16 < mirrored < 48 and sum(torch.equal(x, plain) for x in flips) == 64 - mirrored


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_by_its_successor_and_named(workers: int) -> None:
    source, plan = Ramps(10, bad=[4, 5, 9]), BatchPlan(10)
    batch = next(pixel_batches(source, Transform(8), plan, 0, 0, 1, workers))
    order = [slot.index for slot in next(slots(plan, 10, 0, 0, 1))]
    successor = {4: 6, 5: 6, 9: 0}
    assert batch.keys == tuple(f"key {successor.get(i, i)}" for i in order)
    assert set(batch.skipped) == {f"sample {i}: damaged" for i in (4, 5, 9)}


def test_no_usable_sample_at_all_ends() -> None:
    with pytest.raises(TooManyBadSamples, match=r"none of the 3 samples .* sample"):
        next(pixel_batches(Ramps(3, bad=range(3)), Transform(8), BatchPlan(2), 0, 0, 1))


def test_too_many_bad_samples_end_the_run_and_are_named() -> None:
    counter = SkipCounter(0.02)
    counter.add(10, ("a: damaged", "b: damaged"))
    with pytest.raises(
        TooManyBadSamples, match=r"3 of 20 .*data\.max_bad_fraction 0\.02 .*a: damaged; b: damaged; c: damaged"
    ):
        counter.add(10, ("c: damaged",))


def test_the_share_is_judged_against_the_samples_seen_and_names_count_once() -> None:
    counter = SkipCounter(0.01)
    counter.add(1000, tuple(f"{i}" for i in range(10)))
    for _ in range(5):
        counter.add(100, ("3", "4"))
    assert len(counter.names) == 10 and counter.seen == 1500
    with pytest.raises(TooManyBadSamples, match="16 of 1500"):
        counter.add(0, tuple(f"more {i}" for i in range(6)))


@pytest.mark.parametrize(("fraction", "bad"), [(0.0, 1), (1.0, 0)])
def test_the_extreme_fractions(fraction: float, bad: int) -> None:
    counter = SkipCounter(fraction)
    if bad:
        with pytest.raises(TooManyBadSamples):
            counter.add(5, ("a",))
    else:
        counter.add(200, tuple(map(str, range(200))))


def test_stacked_takes_the_first_readable_pictures() -> None:
    x = stacked(Ramps(6, bad=[0, 2]), Transform(8), 3)
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == [1, 3, 4]
    assert len(stacked(Ramps(6, bad=[0, 2]), Transform(8))) == 4
    with pytest.raises(ValueError, match="ramps has no readable picture"):
        stacked(Ramps(2, bad=[0, 1]), Transform(8))


def test_a_row_bears_the_caption_of_its_picture() -> None:
    batch = next(pixel_batches(Ramps(10, bad=[2]), AUGMENTED, BatchPlan(4), 3, 0, 1))
    assert batch.captions == tuple(key.replace("key", "caption") for key in batch.keys)


def test_a_batch_moves_whole() -> None:
    x = to_tensor(Ramps(1)[0].image)[None]
    moved = PixelBatch(x, ("a",), (0,), ("b",), ("c",)).to(torch.device("cpu"))
    assert same(moved, PixelBatch(x, ("a",), (0,), ("b",), ("c",)))
