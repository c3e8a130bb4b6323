"""Stage one of latent diffusion: images to a small latent space and back.

The perceptual losses load their backbones' packages only when one is constructed.
"""

from __future__ import annotations

from autoencoder.codec import Decode, LatentCodec, LatentStatistics, fold_into_convolutions
from autoencoder.config import AutoencoderConfig, VQConfig
from autoencoder.discriminator import ActNorm, PatchDiscriminator, ProjectedDiscriminator
from autoencoder.gaussian import DiagonalGaussian
from autoencoder.losses import (
    DiscriminatorPenalties,
    LeCam,
    LossState,
    LossWeights,
    adaptive_weight,
    discriminator_accuracy,
    discriminator_loss,
    generator_image_gradient,
    generator_loss,
    hinge_d_loss,
    label_logits,
    last_layer_gradient,
    nll,
    r1_penalty,
    reconstruction,
    vanilla_d_loss,
)
from autoencoder.model import AutoencoderKL, Reconstruction
from autoencoder.perceptual import LPIPS, EfficientNetFeatureDistance, PerceptualLoss
from autoencoder.strips import strip_decode
from autoencoder.tiling import sliced_decode, tiled_decode, tiled_encode
from autoencoder.vq import Autoencoder, CodebookUpdate, Quantized, VQModel, VQReconstruction, code_statistics

__all__ = [
    "LPIPS",
    "ActNorm",
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderKL",
    "CodebookUpdate",
    "Decode",
    "DiagonalGaussian",
    "DiscriminatorPenalties",
    "EfficientNetFeatureDistance",
    "LatentCodec",
    "LatentStatistics",
    "LeCam",
    "LossState",
    "LossWeights",
    "PatchDiscriminator",
    "PerceptualLoss",
    "ProjectedDiscriminator",
    "Quantized",
    "Reconstruction",
    "VQConfig",
    "VQModel",
    "VQReconstruction",
    "adaptive_weight",
    "code_statistics",
    "discriminator_accuracy",
    "discriminator_loss",
    "fold_into_convolutions",
    "generator_image_gradient",
    "generator_loss",
    "hinge_d_loss",
    "label_logits",
    "last_layer_gradient",
    "nll",
    "r1_penalty",
    "reconstruction",
    "sliced_decode",
    "strip_decode",
    "tiled_decode",
    "tiled_encode",
    "vanilla_d_loss",
]
