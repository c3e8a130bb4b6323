"""Ways between two noises and between two conditions."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.sampling.denoiser import Conditioning


def slerp(first: Tensor, second: Tensor, parts: Tensor) -> Tensor:
    """Spherical interpolation of two noises [C, ...] at `parts` [N] in [0, 1]: [N, C, ...] (Shoemake 1985).

    Gaussian noise of many dimensions lies near a sphere; on a straight line its middle would be too small to be noise
    (White 2016). Nearly parallel or opposite vectors are interpolated linearly.
    """
    a, b = first.flatten().double(), second.flatten().double()
    part = parts.to(a)[:, None]
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-6:
        mixed = torch.lerp(a, b, part)
    else:
        mixed = (((1 - part) * angle).sin() * a + (part * angle).sin() * b) / angle.sin()
    return mixed.reshape(-1, *first.shape).to(first)


def lerp_conditions(first: Conditioning, second: Conditioning, parts: Tensor) -> dict[str, Tensor | None]:
    """Linear interpolation of two conditions of one row at `parts` [N] in [0, 1]: N rows.

    A mask is the union of both. Raises ValueError for conditions of other shapes, such as prompts of which one is
    longer than the context window.
    """
    return {name: _lerp_value(name, first[name], second[name], parts) for name in first}


def _lerp_value(name: str, first: Tensor | None, second: Tensor | None, parts: Tensor) -> Tensor | None:
    if first is None or second is None:
        return None
    if first.shape != second.shape:
        raise ValueError(f"{name} has shapes {list(first.shape)} and {list(second.shape)}; accepted: twice the same")
    if not first.is_floating_point():
        return (first | second).expand(len(parts), *first.shape[1:])
    return torch.lerp(first, second, parts.to(first).reshape(-1, *[1] * (first.ndim - 1)))
