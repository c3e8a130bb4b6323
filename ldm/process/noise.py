"""Noise with one generator an image, and the changes that training makes to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def randn_rows(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, I) of `shape` [B, ...]: row i is drawn in float32 on the CPU from `generators[i]`, then moved.

    So an image never depends on its place in a batch. Raises ValueError unless there are B generators.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {shape[0]}; accepted: one an image")
    rows = [torch.randn(tuple(shape[1:]), generator=generator) for generator in generators]
    return torch.stack(rows).to(device, dtype)


@dataclass(frozen=True)
class TrainingNoise:
    """N(0, I), changed where asked: `offset` and `perturbation` are the strengths of the functions below, 0 is off.

    Raises ValueError for a negative strength.
    """

    offset: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offset", "perturbation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 0")

    def draw(self, shape: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The target's eps and the noise of x_t: float32 [B, C, ...] on the CPU, row i from `generators[i]`."""
        eps = randn_rows(shape, generators)
        if self.offset > 0:
            eps = offset_noise(eps, self.offset, generators)
        return eps, perturbed_noise(eps, self.perturbation, generators) if self.perturbation > 0 else eps


def offset_noise(eps: Tensor, strength: float, generators: Sequence[torch.Generator]) -> Tensor:
    """eps [B, C, ...] plus strength·n, n ~ N(0, 1) one number for each image and channel: like eps.

    Lets a model learn mean brightness, which the last noise level of most schedules does not hide; diffusers calls
    the strength `noise_offset`. Row i draws from `generators[i]`, on the CPU. Raises ValueError unless there are B.
    """
    one_a_channel = (*eps.shape[1:2], *[1] * (eps.ndim - 2))
    return eps + strength * randn_rows((len(eps), *one_a_channel), generators).to(eps)


def perturbed_noise(eps: Tensor, strength: float, generators: Sequence[torch.Generator]) -> Tensor:
    """eps [B, ...] plus strength·n, n ~ N(0, I): like eps, the noise of x_t while the target keeps eps.

    Input perturbation (Ning et al. 2023, algorithm 1; strength 0.1 there): `Objective.noise_at` takes it as
    `input_eps`. Generators as in `offset_noise`.
    """
    return eps + strength * randn_rows(eps.shape, generators).to(eps)
