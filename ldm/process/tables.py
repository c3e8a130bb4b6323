"""Tables over the trained timesteps, read between their entries and backwards."""

from __future__ import annotations

import torch
from torch import Tensor


def check_timesteps(t: Tensor, last: int) -> None:
    """Raise ValueError unless every t lies in [0, last]."""
    if ((t < 0) | (t > last)).any():
        raise ValueError(f"t is {t.tolist()}; accepted: 0 to {last}")


def value_at(table: Tensor, t: Tensor) -> Tensor:
    """`table` [T] at t in [0, T - 1], linear between the entries, of t's shape and the table's dtype."""
    low = t.double().floor()
    left = low.long()
    right = (left + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[left], table[right], t.to(table.dtype) - low)


def timestep_of(table: Tensor, value: Tensor) -> Tensor:
    """The inverse of `value_at` for a `table` [T], T > 1, that falls or stays: t in [0, T - 1], shaped as `value`.

    Values beyond the ends give the ends; where the table stays, the last index of the stretch.
    """
    rising, wanted = -table, -value.to(table)
    right = torch.searchsorted(rising, wanted, right=True).clamp(1, len(table) - 1)
    left = right - 1
    width = rising[right] - rising[left]
    part = torch.where(width > 0, (wanted - rising[left]) / width, 1.0)
    return left + part.clamp(0, 1)


def over(values: Tensor, like: Tensor) -> Tensor:
    """`values` [B] as [B, 1, ...], to broadcast over `like` [B, ...]; device and dtype stay."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
