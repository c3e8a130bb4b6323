"""The optimiser, the learning rate as a function of the step, and the guard in front of every update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.config import OptimizerConfig


def adamw(parameters: Iterable[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW in its fused form, which is several times faster than the default one on CPU and GPU alike."""
    return torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up to `learning_rate`, then constant, or a cosine or straight line down to 0 at step `total`."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    done = min(1.0, (step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps))
    match config.lr_scheduler:
        case "constant":
            return config.learning_rate
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return config.learning_rate * (1 - done)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class NonFiniteGuard:
    """Counts updates that were skipped because a loss or gradient was not finite; stops after `limit` in a row."""

    def __init__(self, limit: int = 10) -> None:
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def allows(self, norm: Tensor, where: str) -> bool:
        """True when the update may happen.

        Raises:
            FloatingPointError: after `limit` skipped updates in a row, naming the last batch.
        """
        if bool(torch.isfinite(norm)):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.limit} updates in a row had a non-finite loss or gradient, the last at {where}; "
                "lower optimizer.learning_rate or look at those samples"
            )
        return False
