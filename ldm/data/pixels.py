"""A fixed set of pictures as one tensor, for validation and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.data.batches import Transform
from ldm.data.sources import Source
from ldm.data.transforms import BadImage


def stacked(source: Source, transform: Transform, count: int | None = None) -> Tensor:
    """The first `count` readable pictures (None: all) as float32 [N, 3, R, R] in [-1, 1].

    Raises:
        ValueError: when none can be read.
    """
    images: list[Tensor] = []
    for index in range(len(source)):
        if count is not None and len(images) == count:
            break
        try:
            images.append(transform(source[index], 0, index))
        except BadImage:
            continue
    if not images:
        raise ValueError(f"{source.name} has no readable picture")
    return torch.stack(images)
