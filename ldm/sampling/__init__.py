"""Samplers: from noise to latents, given a denoiser."""

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
from ldm.sampling.denoiser import Callback, Denoiser, Sampler, network_denoiser
from ldm.sampling.diffusers_adapter import PREFIX, diffusers_sampler
from ldm.sampling.guidance import (
    classifier_guided_denoiser,
    guided_denoiser,
    interval_denoiser,
    thresholded_denoiser,
)
from ldm.sampling.noise import randn_rows
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


def named_sampler(name: str) -> Sampler:
    """One of `SAMPLERS`, or a scheduler of diffusers as "diffusers:CLASS". Raises ValueError for another name."""
    if name.startswith(PREFIX):
        return diffusers_sampler(name)
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; accepted: {', '.join(SAMPLERS)}, and {PREFIX}CLASS")
    return SAMPLERS[name]


__all__ = [
    "SAMPLERS",
    "SIGMA_SPACINGS",
    "Callback",
    "Denoiser",
    "Sampler",
    "SigmaSpacing",
    "classifier_guided_denoiser",
    "diffusers_sampler",
    "guided_denoiser",
    "interval_denoiser",
    "named_sampler",
    "network_denoiser",
    "randn_rows",
    "sigma_spaced_timesteps",
    "thresholded_denoiser",
]
