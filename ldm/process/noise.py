"""Changes to the noise of training: pure functions on eps ~ N(0, I), one generator a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def offset_noise(eps: Tensor, strength: float, generators: Sequence[torch.Generator]) -> Tensor:
    """eps [B, C, ...] plus strength·n, n ~ N(0, 1) one number for each image and channel: like eps.

    Lets a model learn mean brightness, which the last noise level of most schedules does not hide; diffusers calls
    the strength `noise_offset`. Row i draws from `generators[i]`, on the CPU. Raises ValueError unless there are B.
    """
    one_a_channel = (*eps.shape[1:2], *[1] * (eps.ndim - 2))
    return eps + strength * _rows(eps, one_a_channel, generators)


def perturbed_noise(eps: Tensor, strength: float, generators: Sequence[torch.Generator]) -> Tensor:
    """eps [B, ...] plus strength·n, n ~ N(0, I): like eps, the noise of x_t while the target keeps eps.

    Input perturbation (Ning et al. 2023, algorithm 1; strength 0.1 there): `Objective.noise_at` takes it as
    `input_eps`. Generators as in `offset_noise`.
    """
    return eps + strength * _rows(eps, tuple(eps.shape[1:]), generators)


def _rows(eps: Tensor, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    if len(generators) != len(eps):
        raise ValueError(f"{len(generators)} generators for a batch of {len(eps)}; accepted: one an image")
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(eps)
