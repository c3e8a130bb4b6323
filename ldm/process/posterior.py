"""The Gaussians of diffusion: forward steps, posterior q(x_{t-1} | x_t, x0), model p(x_{t-1} | x_t).

`alpha_bar` belongs to x_t and `alpha_bar_prev` to x_{t-1}. The two need not be neighbours in the trained
table: for a sampler that leaves out steps, beta_t = 1 - alpha_bar / alpha_bar_prev is the noise of the whole
jump (Nichol & Dhariwal 2021, eq. 19). All coefficients broadcast over x.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.process.prediction import check_choice

ModelVariance = Literal["fixed_small", "fixed_large"]
MODEL_VARIANCES: tuple[ModelVariance, ...] = get_args(ModelVariance)
"""The smallest and the largest that the exact reverse step can have (Ho et al. 2020, section 3.2)."""


def q_sample(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t ~ q(x_t | x0) for eps ~ N(0, I): alpha·x0 + sigma·eps (Ho et al. 2020, eq. 4)."""
    return alpha * x0 + sigma * eps


def q_step(x_prev: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta)·x_{t-1}, beta·I), eps ~ N(0, I) (Ho et al. 2020, eq. 2)."""
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * eps


def posterior_mean(x0: Tensor, x_t: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """mu-tilde, the mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
    alpha_t = alpha_bar / alpha_bar_prev
    of_x0 = alpha_bar_prev.sqrt() * (1 - alpha_t) / (1 - alpha_bar)
    of_x_t = alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return of_x0 * x0 + of_x_t * x_t


def posterior_variance(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """beta-tilde, the variance of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)


def p_mean_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """mu_theta, the mean of p(x_{t-1} | x_t) from noise; needs alpha_bar > 0 (Ho et al. 2020, eq. 11)."""
    alpha_t = alpha_bar / alpha_bar_prev
    return (x_t - (1 - alpha_t) / (1 - alpha_bar).sqrt() * eps) / alpha_t.sqrt()


def eps_error_weight(alpha_bar: Tensor, alpha_bar_prev: Tensor, variance: Tensor) -> Tensor:
    """The factor of |eps - eps_theta|² in the bound's L_{t-1} in nats, beta²/(2·sigma_t²·alpha_t·(1 - alpha_bar)).

    Ho et al. 2020, eq. 12, for p(x_{t-1} | x_t) of the given `variance` sigma_t²; L_simple (eq. 14) leaves it out.
    """
    alpha_t = alpha_bar / alpha_bar_prev
    return (1 - alpha_t) ** 2 / (2 * variance * alpha_t * (1 - alpha_bar))


def interpolated_log_variance(raw: Tensor, log_small: Tensor, log_large: Tensor) -> Tensor:
    """log sigma_t² of p(x_{t-1} | x_t) that a network chooses: v·log beta + (1 - v)·log beta-tilde.

    Nichol & Dhariwal 2021, eq. 15, with v = (raw + 1)/2, so that an output of 0 is the middle and [-1, 1] the range
    between the bounds; raw itself is not bounded. `log_small` and `log_large` broadcast to it.
    """
    return torch.lerp(log_small, log_large, (raw + 1) / 2)


def log_variance_table(alphas_cumprod: Tensor, kind: ModelVariance) -> Tensor:
    """log sigma_t² of every step of a table of alpha_bar [T], like it.

    beta-tilde is 0 in the first step, which has no logarithm: its place takes the second step's, as in Improved
    DDPM, or beta where T = 1. Raises ValueError for another kind.
    """
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    variance = model_variance(alphas_cumprod, before, kind)
    if kind == "fixed_small":
        first = variance[1:2] if len(variance) > 1 else 1 - alphas_cumprod
        variance = torch.cat([first, variance[1:]])
    return variance.log()


def model_variance(alpha_bar: Tensor, alpha_bar_prev: Tensor, kind: ModelVariance) -> Tensor:
    """sigma_t² of p(x_{t-1} | x_t): beta-tilde or beta (Ho et al. 2020, section 3.2).

    "fixed_small" is beta-tilde, "fixed_large" is beta. These are variances: a sampling step multiplies unit
    noise by their square root. Raises ValueError for another kind.
    """
    check_choice("kind", kind, MODEL_VARIANCES)
    match kind:
        case "fixed_small":
            return posterior_variance(alpha_bar, alpha_bar_prev)
        case "fixed_large":
            return 1 - alpha_bar / alpha_bar_prev
