"""The latent scale and shift that stage one writes into its model's config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from autoencoder import Autoencoder, LatentStatistics, VQModel, fold_into_convolutions
from ldm.config import AutoencoderTraining


def latent_scale(vae: Autoencoder, moments: Iterable[Tensor], config: AutoencoderTraining) -> dict[str, Any]:
    """Fields to replace in the model's config: none with a frozen encoder, the given scale, or what is measured.

    The measured channel means are folded into the 1x1 convolutions where there are any, because the diffusers pipeline
    knows no shift; the scale is then one over the standard deviation around them.

    Args:
        moments: batches [B, 2C, h, w] over the training data, at least one; read only where they are measured.
    """
    if config.freeze_encoder:
        return {}
    if config.scaling_factor is not None:
        return {"scaling_factor": config.scaling_factor}
    parts = [LatentStatistics.of(batch) for batch in moments]
    statistics = sum(parts[1:], parts[0])
    if vae.quant_conv is None or vae.post_quant_conv is None:
        scale, shift = statistics.scale, statistics.shift
        return {"scaling_factor": scale, "shift_factor": shift, "latents_mean": None, "latents_std": None}
    fold_into_convolutions(vae, statistics.channel_mean)
    std = statistics.channel_std
    scale = float(std.square().mean() ** -0.5)
    if isinstance(vae, VQModel):
        return {"scaling_factor": scale}
    return {
        "scaling_factor": scale,
        "shift_factor": None,
        "latents_mean": (0.0,) * len(std),
        "latents_std": tuple(std.tolist()),
    }
