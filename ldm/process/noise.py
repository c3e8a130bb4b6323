"""Changes to the noise of training: pure functions on eps ~ N(0, I), one generator a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        eps = _rows(torch.empty(tuple(shape)), tuple(shape[1:]), generators)
        if self.offset > 0:
            eps = offset_noise(eps, self.offset, generators)
        return eps, perturbed_noise(eps, self.perturbation, generators) if self.perturbation > 0 else eps


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
