"""Which sample stands where: the global order of the data as a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from ldm.seeds import generator


@dataclass(frozen=True)
class Slot:
    """One row of one optimiser step: which sample, in which epoch, at which row of the global batch."""

    step: int
    row: int
    epoch: int
    index: int


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is dealt to processes and micro-batches.

    Row `r` of the global batch belongs to micro-batch `r // (world * size)` and process `(r // size) % world`, so the
    set of samples of a step does not change when processes are traded for accumulation.
    """

    size: int
    accumulation: int = 1
    world: int = 1
    rank: int = 0

    @property
    def global_size(self) -> int:
        return self.size * self.accumulation * self.world

    def rows(self, micro: int) -> range:
        """Rows of the global batch that this process handles in micro-batch `micro`."""
        start = (micro * self.world + self.rank) * self.size
        return range(start, start + self.size)


class Order(Protocol):
    """Which sample stands at which row of which step."""

    def slot(self, step: int, row: int, global_size: int) -> Slot:
        """The sample at `row` of optimiser step `step`."""
        ...

    def successor(self, index: int, offset: int) -> int:
        """The sample that replaces another, which cannot be used, at the `offset`-th try."""
        ...


@dataclass(frozen=True)
class ShuffledOrder:
    """Epoch after epoch without a gap, each a permutation of all samples."""

    num_samples: int
    seed: int

    def slot(self, step: int, row: int, global_size: int) -> Slot:
        return slot(step, row, global_size, self.num_samples, self.seed)

    def successor(self, index: int, offset: int) -> int:
        return (index + offset) % self.num_samples


def slots(plan: BatchPlan, num_samples: int, seed: int, first_step: int, last_step: int) -> Iterator[list[Slot]]:
    """One list of slots per micro-batch of this process, for optimiser steps `first_step` to `last_step - 1`."""
    return ordered_slots(plan, ShuffledOrder(num_samples, seed), first_step, last_step)


def ordered_slots(plan: BatchPlan, order: Order, first_step: int, last_step: int) -> Iterator[list[Slot]]:
    """The same for any order."""
    for step in range(first_step, last_step):
        for micro in range(plan.accumulation):
            yield [order.slot(step, row, plan.global_size) for row in plan.rows(micro)]


def slot(step: int, row: int, global_size: int, num_samples: int, seed: int) -> Slot:
    """The sample at `row` of optimiser step `step`; epochs follow one another without a gap."""
    epoch, position = divmod(step * global_size + row, num_samples)
    return Slot(step, row, epoch, int(permutation(num_samples, seed, epoch)[position]))


@lru_cache(maxsize=2)
def permutation(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of one epoch: a permutation of range(num_samples)."""
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))
