"""Aspect-ratio buckets: picture sizes of about one area, and an order of the data with one size a batch.

After NovelAI's aspect-ratio bucketing as SDXL uses it (Podell et al. 2023, section 2.3): instead of cutting a square
from every picture, each is fitted to the size whose ratio is nearest to its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.data.order import Slot, permutation
from ldm.data.sources import Source
from ldm.data.transforms import BadImage
from ldm.seeds import generator, seed_of


@dataclass(frozen=True)
class Buckets:
    """Sizes (width, height) in multiples of `step` with at most `resolution`^2 pixels and a bounded ratio.

    `max_aspect_ratio` 1 leaves the square alone, whatever the step.
    """

    resolution: int
    step: int = 64
    max_aspect_ratio: float = 1.0

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """All sizes, from tall to wide; for every width and for every height the largest that fits."""
        square = (self.resolution, self.resolution)
        if self.max_aspect_ratio == 1:
            return [square]
        found = {square}
        for short in range(self.step, self.resolution + 1, self.step):
            long = self.resolution**2 // short // self.step * self.step
            if short < long <= self.max_aspect_ratio * short:
                found |= {(short, long), (long, short)}
        return sorted(found, key=lambda size: size[0] / size[1])

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """The size whose logarithm of the ratio is nearest to that of a picture."""
        return self.sizes[self.number(width, height)]

    def number(self, width: int, height: int) -> int:
        """Which of the sizes `fit` gives."""
        wanted = math.log(width / height)
        return min(range(len(self.sizes)), key=lambda i: abs(math.log(self.sizes[i][0] / self.sizes[i][1]) - wanted))


def kinds_of(source: Source, buckets: Buckets) -> NDArray[np.int64]:
    """Which of the sizes each picture of a source is fitted to, int64 [N], from the pictures' headers.

    One whose header cannot be read counts as a square; it is named when it is drawn.
    """
    return np.array([_kind(source, index, buckets) for index in range(len(source))], np.int64)


def _kind(source: Source, index: int, buckets: Buckets) -> int:
    try:
        return buckets.number(*source.size(index))
    except BadImage:
        return buckets.number(1, 1)


class BucketOrder:
    """The order of bucketed data: every global batch comes from one bucket.

    Which bucket step k takes is that of the sample at place k of a permutation of all samples, so over as many steps as
    there are samples each bucket is taken exactly as often as it has samples. A bucket's own samples follow one another
    in permutations of their own, epoch after epoch without a gap, so none is left out, however small its bucket. All of
    it is a function of (seed, step) and the size of the global batch.
    """

    def __init__(self, kinds: NDArray[np.int64], seed: int) -> None:
        """Args: kinds: [N], the bucket of each sample."""
        self.kinds, self.seed = kinds, seed
        self.members = {int(kind): np.flatnonzero(kinds == kind) for kind in np.unique(kinds)}
        self._cycle = lru_cache(maxsize=2)(self._draw_cycle)

    def slot(self, step: int, row: int, global_size: int) -> Slot:
        """The sample at `row` of optimiser step `step`; the slot's epoch is that of its bucket."""
        kind, turn = self.turn(step)
        members = self.members[kind]
        epoch, position = divmod(turn * global_size + row, len(members))
        order = permutation(len(members), seed_of(self.seed, "bucket", kind), epoch)
        return Slot(step, row, epoch, int(members[int(order[position])]))

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps before it had the same one."""
        cycle, place = divmod(step, len(self.kinds))
        kinds, ranks = self._cycle(cycle)
        kind = int(kinds[place])
        return kind, cycle * len(self.members[kind]) + int(ranks[place])

    def successor(self, index: int, offset: int) -> int:
        """The sample `offset` places behind another in the same bucket, which replaces one that cannot be used."""
        members = self.members[int(self.kinds[index])]
        return int(members[(int(np.searchsorted(members, index)) + offset) % len(members)])

    def _draw_cycle(self, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bucket of every step of a cycle, and its rank among the steps of the same bucket."""
        order = torch.randperm(len(self.kinds), generator=generator(self.seed, "buckets", cycle)).numpy()
        kinds, ranks = self.kinds[order], np.empty(len(order), np.int64)
        for kind, members in self.members.items():
            ranks[kinds == kind] = np.arange(len(members))
        return kinds, ranks
