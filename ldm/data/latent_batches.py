"""Training batches from the latent cache: moments by position, one caption drawn for each use of a picture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

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


def batches_with_prior(
    cache: LatentCache,
    prior: LatentCache,
    prior_loss_weight: float,
    plan: BatchPlan,
    seed: int,
    first_step: int,
    last_step: int,
) -> Iterator[LatentBatch]:
    """The same, every second row from `prior`, weighted so that the mean over all rows is the sum of both means.

    That is the loss of DreamBooth (Ruiz et al. 2023, equation 2): L(instances) + lambda · L(prior).
    """
    half = replace(plan, size=plan.size // 2)
    pairs = [latent_batches(source, half, seed, first_step, last_step) for source in (cache, prior)]
    for one, other in zip(*pairs, strict=True):
        moments = torch.stack([one.moments, other.moments], dim=1).flatten(0, 1)
        captions = tuple(text for pair in zip(one.captions, other.captions, strict=True) for text in pair)
        rows = tuple(2 * row + side for row in one.rows for side in (0, 1))
        weights, kinds = (2.0, 2.0 * prior_loss_weight), (False, True)
        yield LatentBatch(moments, captions, rows, weights * len(one.rows), kinds * len(one.rows))


def order_of(cache: LatentCache, seed: int) -> Order:
    """The order of a cache's entries: by buckets where their shapes differ."""
    shapes, kinds = cache.shapes()
    return BucketOrder(kinds, seed) if len(shapes) > 1 else ShuffledOrder(len(cache), seed)


def draw_caption(captions: list[str], seed: int, slot: Slot) -> str:
    """One of the picture's captions, a function of (seed, epoch, sample)."""
    return random.Random(seed_of(seed, "caption", slot.epoch, slot.index)).choice(captions)
