"""Samplers: from noise to latents, given a denoiser."""

from ldm.sampling import ddim, ddpm, dpmpp, euler, heun
from ldm.sampling.denoiser import Callback, Denoiser, Sampler, network_denoiser
from ldm.sampling.guidance import guided_denoiser
from ldm.sampling.noise import randn_rows

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim.sample,
    "ddpm": ddpm.sample,
    "euler": euler.sample,
    "heun": heun.sample,
    "dpmpp_2m": dpmpp.sample,
}

__all__ = [
    "SAMPLERS",
    "Callback",
    "Denoiser",
    "Sampler",
    "guided_denoiser",
    "network_denoiser",
    "randn_rows",
]
