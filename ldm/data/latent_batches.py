"""Training batches from the latent cache: moments by position, one caption drawn for each use of a picture."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ldm.data.buckets import BucketOrder
from ldm.data.latents import LatentBatch, LatentCache
from ldm.data.order import BatchPlan, Order, ShuffledOrder, Slot, ordered_slots
from ldm.seeds import seed_of


def latent_batches(
    cache: LatentCache, plan: BatchPlan, seed: int, first_step: int, last_step: int
) -> Iterator[LatentBatch]:
    """This process's micro-batches for the given optimiser steps, in order; latents of several shapes never mix."""
    for batch in ordered_slots(plan, order_of(cache, seed), first_step, last_step):
        captions = tuple(draw_caption(cache.captions[slot.index], seed, slot) for slot in batch)
        yield LatentBatch(cache.gather([s.index for s in batch]), captions, tuple(s.row for s in batch))


def order_of(cache: LatentCache, seed: int) -> Order:
    """The order of a cache's entries: by buckets where their shapes differ."""
    shapes, kinds = cache.shapes()
    return BucketOrder(kinds, seed) if len(shapes) > 1 else ShuffledOrder(len(cache), seed)


def draw_caption(captions: list[str], seed: int, slot: Slot) -> str:
    """One of the picture's captions, a function of (seed, epoch, sample)."""
    return random.Random(seed_of(seed, "caption", slot.epoch, slot.index)).choice(captions)
