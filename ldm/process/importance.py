"""Timesteps drawn where the variational bound's terms are large (Nichol & Dhariwal 2021, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 10
"""How many losses of each step are remembered, as in the paper."""


@dataclass(frozen=True, eq=False)
class LossHistory:
    """The last squared losses of each of T steps; the two tensors are all there is to save.

    `squares` float64 [T, HISTORY] and `counts` int64 [T], the losses seen, both on the CPU. `uniform_share` is the
    part of all draws that stays uniform, so that a step whose losses were 0 is seen again. Raises ValueError for
    tensors of another kind and for a share outside [0, 1].
    """

    squares: Tensor
    counts: Tensor
    uniform_share: float = 0.001

    def __post_init__(self) -> None:
        squares, counts = self.squares, self.counts
        if squares.dtype != torch.float64 or squares.ndim != 2 or squares.shape[1] != HISTORY:
            raise ValueError(f"squares is {squares.dtype} {list(squares.shape)}; accepted: float64 [T, {HISTORY}]")
        if counts.dtype != torch.int64 or counts.shape != squares.shape[:1]:
            raise ValueError(f"counts is {counts.dtype} {list(counts.shape)}; accepted: int64 [{len(squares)}]")
        if not 0 <= self.uniform_share <= 1:
            raise ValueError(f"uniform_share is {self.uniform_share}; accepted: 0 to 1")

    @classmethod
    def empty(cls, num_train_timesteps: int) -> LossHistory:
        """No losses yet, which draws uniformly."""
        steps = num_train_timesteps
        return cls(torch.zeros(steps, HISTORY, dtype=torch.float64), torch.zeros(steps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p_t proportional to sqrt(E[L_t²]) (eq. 18), uniform until every step has a full history: float64 [T]."""
        uniform = torch.full_like(self.squares[:, 0], 1 / len(self.squares))
        size = self.squares.mean(1).sqrt()
        if (self.counts < HISTORY).any() or size.sum() == 0:
            return uniform
        return torch.lerp(size / size.sum(), uniform, self.uniform_share)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The quantiles u [B] in [0, 1) of the distribution: t int64 [B] and weights 1 / (T·p_t), float32 [B].

        The mean of weight·L_t over draws is that of L_t over uniform t, with less variance (eq. 18).
        """
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.cpu().double(), right=True).clamp(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    def updated(self, t: Tensor, losses: Tensor) -> LossHistory:
        """With unweighted losses [B] at steps t [B] in the places of the oldest; this history does not change."""
        squares, counts = self.squares.clone(), self.counts.clone()
        for step, square in zip(t.tolist(), losses.detach().double().square().tolist(), strict=True):
            squares[step, counts[step] % HISTORY] = square
            counts[step] += 1
        return LossHistory(squares, counts, self.uniform_share)
