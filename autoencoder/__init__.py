"""Stage one of latent diffusion: images to a small latent space and back.

The perceptual losses load their backbones' packages only when one is constructed.
"""

from __future__ import annotations

from autoencoder.codec import LatentCodec, LatentStatistics, fold_into_convolutions
from autoencoder.config import AutoencoderConfig
from autoencoder.discriminator import PatchDiscriminator
from autoencoder.gaussian import DiagonalGaussian
from autoencoder.losses import (
    LossWeights,
    adaptive_weight,
    discriminator_loss,
    generator_image_gradient,
    generator_loss,
    hinge_d_loss,
    last_layer_gradient,
    nll,
    reconstruction,
    vanilla_d_loss,
)
from autoencoder.model import AutoencoderKL, Reconstruction
from autoencoder.perceptual import LPIPS, EfficientNetFeatureDistance, PerceptualLoss

__all__ = [
    "LPIPS",
    "AutoencoderConfig",
    "AutoencoderKL",
    "DiagonalGaussian",
    "EfficientNetFeatureDistance",
    "LatentCodec",
    "LatentStatistics",
    "LossWeights",
    "PatchDiscriminator",
    "PerceptualLoss",
    "Reconstruction",
    "adaptive_weight",
    "discriminator_loss",
    "fold_into_convolutions",
    "generator_image_gradient",
    "generator_loss",
    "hinge_d_loss",
    "last_layer_gradient",
    "nll",
    "reconstruction",
    "vanilla_d_loss",
]
