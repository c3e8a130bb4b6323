"""The optimiser, the learning rate as a function of the step, and the guard in front of every update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ldm.config import OptimizerConfig


def adamw(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    learning_rate: float,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW in its fused form, which is several times faster than the default one on CPU and GPU alike.

    Frozen parameters are left out; `undecayed` are trained without weight decay.
    """
    optimizer = torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    free = [p for p in undecayed if p.requires_grad]
    if free:
        optimizer.add_param_group({"params": free, "weight_decay": 0.0})
    return optimizer


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
