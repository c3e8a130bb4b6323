"""Noise with one generator an image, so that an image never depends on its place in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def randn_rows(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, I) of `shape` [B, ...]: row i is drawn in float32 on the CPU from `generators[i]`, then moved.

    Raises ValueError unless there are B generators.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}; accepted: one an image")
    rows = [torch.randn(tuple(shape[1:]), generator=generator) for generator in generators]
    return torch.stack(rows).to(device, dtype)
