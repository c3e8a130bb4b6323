"""Which of the trained timesteps a sampler visits (Lin et al. 2024, table 2)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ldm.process.prediction import check_choice

TimestepSpacing = Literal["leading", "trailing", "linspace"]
TIMESTEP_SPACINGS: tuple[TimestepSpacing, ...] = get_args(TimestepSpacing)


def timesteps(num_steps: int, num_train_timesteps: int, spacing: TimestepSpacing, steps_offset: int = 0) -> Tensor:
    """`num_steps` indices of the trained table, int64 [num_steps], falling, in [0, num_train_timesteps - 1].

    "leading" counts up from `steps_offset` in equal strides, "trailing" down from the last index; "linspace"
    includes both ends. Only "leading" reads `steps_offset`, and no more of it than keeps the first index
    inside the table, so that num_steps = num_train_timesteps visits every step. Raises ValueError for another
    spacing or number of steps.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps is {num_steps}; accepted: 1 to {num_train_timesteps}, the trained timesteps")
    check_choice("spacing", spacing, TIMESTEP_SPACINGS)
    match spacing:
        case "leading":
            rising = np.arange(num_steps) * float(num_train_timesteps // num_steps)
            falling = (rising + min(steps_offset, num_train_timesteps - 1 - rising[-1]))[::-1]
        case "trailing":
            stride = num_train_timesteps / num_steps
            falling = np.arange(num_train_timesteps, 0, -stride)[:num_steps].round() - 1
        case "linspace":
            falling = np.linspace(0, num_train_timesteps - 1, num_steps).round()[::-1]
    return torch.from_numpy(falling.astype(np.int64))
