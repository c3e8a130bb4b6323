"""Samplers: from noise to latents, given a denoiser."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.posterior import ModelVariance
from ldm.process.schedule import VariancePreserving
from ldm.sampling import (
    ddim,
    ddpm,
    dpmpp,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    langevin,
    predictor_corrector,
    unipc,
)
from ldm.sampling.denoiser import Callback, Denoiser, Sampler, network_denoiser, unit_variance_denoiser
from ldm.sampling.diffusers_adapter import PREFIX, diffusers_sampler
from ldm.sampling.guidance import (
    ClassifierGuidance,
    Guidance,
    LogProb,
    classifier_gradient,
    classifier_guided_denoiser,
    guided_denoiser,
    interval_denoiser,
    thresholded_denoiser,
)
from ldm.sampling.interpolate import lerp_conditions, slerp
from ldm.sampling.spacing import SIGMA_SPACINGS, SigmaSpacing, sigma_spaced_timesteps

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim.sample,
    "ddpm": ddpm.sample,
    "euler": euler.sample,
    "heun": heun.sample,
    "dpmpp_2m": dpmpp.sample,
    "dpmpp_2m_sde": dpmpp_sde.sample,
    "euler_a": euler_ancestral.sample,
    "unipc": unipc.sample,
    "langevin": langevin.sample,
    "predictor_corrector": predictor_corrector.sample,
}


def named_sampler(
    name: str,
    *,
    eta: float | None = None,
    kind: ModelVariance = "fixed_small",
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Sampler:
    """One of `SAMPLERS`, or a scheduler of diffusers as "diffusers:CLASS", with what it has to know.

    `eta` belongs to "ddim"; "ddpm" takes the variance `kind` and a classifier's `gradient` into its step, and for the
    others the gradient moves what they are told (see `classifier_guided_denoiser`). Raises ValueError for another name,
    and for an eta with another sampler.
    """
    if eta is not None and name != "ddim":
        raise ValueError(f"eta is {eta} with sampler {name!r}; only ddim has it")
    if name == "ddpm" and (kind != "fixed_small" or gradient is not None):
        return partial(ddpm.sample, kind=kind, gradient=gradient)
    if name.startswith(PREFIX):
        sampler = diffusers_sampler(name)
    elif name in SAMPLERS:
        sampler = SAMPLERS[name] if eta is None else partial(ddim.sample, eta=eta)
    else:
        raise ValueError(f"sampler is {name!r}; accepted: {', '.join(SAMPLERS)}, and {PREFIX}CLASS")
    return sampler if gradient is None else _with_gradient(sampler, gradient)


def _with_gradient(sampler: Sampler, gradient: Callable[[Tensor, Tensor], Tensor]) -> Sampler:
    def sample(
        denoise: Denoiser,
        x: Tensor,
        schedule: VariancePreserving,
        timesteps: Tensor,
        rng: Sequence[torch.Generator],
        callback: Callback | None = None,
    ) -> Tensor:
        return sampler(classifier_guided_denoiser(denoise, gradient, schedule), x, schedule, timesteps, rng, callback)

    return sample


__all__ = [
    "SAMPLERS",
    "SIGMA_SPACINGS",
    "Callback",
    "ClassifierGuidance",
    "Denoiser",
    "Guidance",
    "LogProb",
    "Sampler",
    "SigmaSpacing",
    "classifier_gradient",
    "classifier_guided_denoiser",
    "diffusers_sampler",
    "guided_denoiser",
    "interval_denoiser",
    "lerp_conditions",
    "named_sampler",
    "network_denoiser",
    "randn_rows",
    "sigma_spaced_timesteps",
    "slerp",
    "thresholded_denoiser",
    "unit_variance_denoiser",
]
