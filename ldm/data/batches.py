"""From slots (which sample at which row of which step) to batches of pixels."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.buckets import BucketOrder, Buckets, kinds_of
from ldm.data.order import BatchPlan, Order, ShuffledOrder, Slot, ordered_slots
from ldm.data.sources import Example, Source, Stream
from ldm.data.transforms import BadImage, resize_and_crop, to_tensor
from ldm.seeds import seed_of


@dataclass(frozen=True)
class PixelBatch:
    """image float32 [B, 3, H, W] in [-1, 1]; names of the samples; where each row stands in the global batch.

    `captions` holds the first one of each sample.
    """

    image: Tensor
    keys: tuple[str, ...]
    rows: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    def to(self, device: torch.device) -> PixelBatch:
        return replace(self, image=self.image.to(device, non_blocking=True))


class TooManyBadSamples(ValueError):  # noqa: N818
    """More unreadable samples than `data.max_bad_fraction` allows; the message counts and names them."""


class SkipCounter:
    """Counts unreadable samples by name and ends the run when their share of the samples seen is too large."""

    def __init__(self, max_fraction: float, grace: int = 100) -> None:
        self.max_fraction, self.grace = max_fraction, grace
        self.seen = 0
        self.names: dict[str, None] = {}

    def add(self, seen: int, skipped: tuple[str, ...]) -> None:
        """Records one batch.

        Raises:
            TooManyBadSamples: when the share of bad ones exceeds the limit; at least `grace` samples are counted.
        """
        self.seen += seen
        self.names.update(dict.fromkeys(skipped))
        if len(self.names) > self.max_fraction * max(self.seen, self.grace):
            listed = "; ".join(list(self.names)[:5])
            raise TooManyBadSamples(
                f"{len(self.names)} of {self.seen} samples could not be used, more than data.max_bad_fraction "
                f"{self.max_fraction} allows: {listed}"
            )

    def summary(self) -> str:
        """How many samples could not be used, and each of them on a line of its own."""
        count = f"{len(self.names)} samples could not be used"
        return "\n  ".join([count + ":" * bool(self.names), *self.names])


@dataclass(frozen=True)
class Transform:
    """Resize, crop and flip; the random choices are functions of (seed, epoch, sample).

    Where `min_crop` is below one, crops are of many sizes: the side of each, as a fraction of the picture's shorter
    side, is drawn uniformly from [min_crop, 1]. No crop is smaller than `resolution` unless the picture is.

    `buckets` fits every picture to the nearest of its sizes instead of the square of side `resolution`.
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0
    min_crop: float = 1.0
    buckets: Buckets | None = None

    def __call__(self, example: Example, epoch: int, index: int) -> Tensor:
        rng = random.Random(seed_of(self.seed, "augment", epoch, index))
        flip = self.random_flip and rng.random() < 0.5
        crop = rng.uniform(self.min_crop, 1.0) if self.min_crop < 1 else 1.0
        size = self.buckets.fit(*example.image.size) if self.buckets else self.resolution
        return to_tensor(resize_and_crop(example.image, size, self.center_crop, flip, rng, crop))


class SlotDataset(Dataset[dict[str, Any]]):
    """`dataset[slot]`: the transformed sample; an unreadable one is replaced by its successor and named."""

    def __init__(self, source: Source, transform: Transform, order: Order) -> None:
        self.source, self.transform, self.order = source, transform, order

    def __getitem__(self, slot: Slot) -> dict[str, Any]:
        skipped: list[str] = []
        for offset in range(len(self.source)):
            index = self.order.successor(slot.index, offset)
            try:
                example = self.source[index]
            except BadImage as error:
                skipped.append(str(error))
                continue
            return row_of(example, self.transform(example, slot.epoch, index), slot.row, skipped)
        raise TooManyBadSamples(f"none of the {len(self.source)} samples could be used: {skipped[0]}")


def row_of(example: Example, image: Tensor, row: int, skipped: list[str]) -> dict[str, Any]:
    """One row of a batch, and the names of the unreadable samples before it."""
    return {"image": image, "key": example.key, "row": row, "skipped": skipped, "caption": example.captions[0]}


def collate(samples: list[dict[str, Any]]) -> PixelBatch:
    """Stacks the samples of one micro-batch."""
    return PixelBatch(
        torch.stack([s["image"] for s in samples]),
        tuple(s["key"] for s in samples),
        tuple(s["row"] for s in samples),
        tuple(name for s in samples for name in s["skipped"]),
        tuple(s["caption"] for s in samples),
    )


def leave_signals_to_parent(worker: int) -> None:
    """In a loading worker: only the main process may end it, which needs it to finish the step before it saves.

    A terminal and a batch system signal every process of a job. SIGTERM is still obeyed when the parent sends it, which
    is how it ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)


def pixel_batches(
    source: Source, transform: Transform, plan: BatchPlan, seed: int, first_step: int, last_step: int, workers: int = 0
) -> Iterator[PixelBatch]:
    """This process's micro-batches for the given optimiser steps, in order, whatever the number of workers.

    With buckets, all pictures of an optimiser step are of one size; every picture's header is read first.
    """
    order: Order = ShuffledOrder(len(source), seed)
    if transform.buckets:
        order = BucketOrder(kinds_of(source, transform.buckets), seed)
    loader = DataLoader(
        SlotDataset(source, transform, order),
        batch_sampler=ordered_slots(plan, order, first_step, last_step),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def stream_batches(
    stream: Stream, transform: Transform, plan: BatchPlan, first_step: int, last_step: int
) -> Iterator[PixelBatch]:
    """The same for a stream: global rows are dealt in the order in which the stream gives readable samples.

    An unreadable sample is named by the process whose row it would have filled, in the run that reaches it first.
    """
    mine = {row for micro in range(plan.accumulation) for row in plan.rows(micro)}
    samples: list[dict[str, Any]] = []
    skipped: list[str] = []
    for count, epoch, position, item in _endless(stream, last_step * plan.global_size):
        row = count % plan.global_size
        if count < first_step * plan.global_size or row not in mine:
            continue
        if isinstance(item, BadImage):
            skipped.append(str(item))
            continue
        samples.append(row_of(item, transform(item, epoch, position), row, skipped))
        skipped = []
        if len(samples) == plan.size:
            yield collate(samples)
            samples = []


def _endless(stream: Stream, end: int) -> Iterator[tuple[int, int, int, Example | BadImage]]:
    """(readable samples before it, epoch, position, item), epoch after epoch, until `end` readable ones were given."""
    count, epoch = 0, 0
    while count < end:
        before, bad = count, "it is empty"
        for position, item in stream.examples(epoch):
            yield count, epoch, position, item
            count, bad = (count, str(item)) if isinstance(item, BadImage) else (count + 1, bad)
            if count == end:
                return
        if count == before:
            raise TooManyBadSamples(f"none of the samples of {stream.name} could be used: {bad}")
        epoch += 1
