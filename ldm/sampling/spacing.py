"""Timesteps spaced in the solver's own terms, the noise level sigma / alpha."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.process.prediction import check_choice
from ldm.process.schedule import VariancePreserving

SigmaSpacing = Literal["karras", "exponential"]
SIGMA_SPACINGS: tuple[SigmaSpacing, ...] = get_args(SigmaSpacing)


def sigma_spaced_timesteps(
    schedule: VariancePreserving, num_steps: int, kind: SigmaSpacing, rho: float = 7.0
) -> Tensor:
    """Continuous timesteps, float32 [num_steps], falling between the schedule's `ends`, for any sampler.

    With s = sigma / alpha, "exponential" spaces log s evenly, "karras" s^(1/rho) (Karras et al. 2022, eq. 5). At
    zero terminal SNR, where s is infinite, s starts from its finite stand-in. `ldm.process.timesteps` has the
    spacings that are even in t. Raises ValueError for another kind, for num_steps < 1 and for rho <= 0.
    """
    check_choice("kind", kind, SIGMA_SPACINGS)
    if num_steps < 1 or rho <= 0:
        raise ValueError(f"num_steps is {num_steps} and rho {rho}; accepted: at least 1, and above 0")
    first, last = schedule.log_snr(torch.tensor(schedule.ends, dtype=torch.float64), torch.float64) / -2
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    match kind:
        case "exponential":
            wanted = torch.lerp(first, last, ramp)
        case "karras":
            wanted = rho * torch.lerp((first / rho).exp(), (last / rho).exp(), ramp).log()
    return schedule.timestep_of_log_snr(-2 * wanted).float()
