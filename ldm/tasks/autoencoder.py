"""Stage one, what one training step computes: the losses of the autoencoder and of its discriminator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoder import (
    LossWeights,
    Reconstruction,
    discriminator_loss,
    generator_image_gradient,
    generator_loss,
    nll,
)
from autoencoder.perceptual import FeatureDistance
from ldm.data.batches import PixelBatch
from ldm.sampling import randn_rows
from ldm.seeds import generator


class GeneratorLoss(NamedTuple):
    """A scalar to call backward on, the reconstructions without a graph [B, 3, H, W], and the terms to log."""

    surrogate: Tensor
    image: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class AutoencoderTask:
    """The parts of stage one, built and placed.

    `model` and `discriminator` may be wrapped for distributed training; `bare_discriminator` is the same network
    without its wrapper, for the pass in which it takes no gradient. `reduce_mean` averages a tensor over all
    processes.
    """

    model: nn.Module
    discriminator: nn.Module
    bare_discriminator: nn.Module
    perceptual: FeatureDistance | None
    weights: LossWeights
    latent_shape: tuple[int, ...]
    seed: int
    reduce_mean: Callable[[Tensor], Tensor]

    def generator_loss(self, batch: PixelBatch, step: int) -> GeneratorLoss:
        """reconstruction + perceptual + KL, and the adversarial term from `discriminator_start` on.

        The gradients of the image terms are taken once at the reconstruction; the adaptive weight (Esser et al. 2021,
        eq. 7) follows from them by one weight gradient of the last convolution, so the decoder is walked back only
        once. The surrogate <image, gradient> has exactly that gradient. The discriminator's own gradients are left
        alone.
        """
        rows = [generator(self.seed, "latent", step, row) for row in batch.rows]
        noise = randn_rows((len(rows), *self.latent_shape), rows)
        out: Reconstruction = self.model(batch.image, noise.to(batch.image.device))
        leaf = out.image.detach().float().requires_grad_()
        distance = self._distance(leaf, batch.image)
        image_loss = nll(leaf, batch.image, distance, self.weights)
        kl = out.posterior.kl().mean()
        terms = {"nll": image_loss.detach(), "perceptual": distance.detach().mean(), "kl": kl.detach()}
        terms["l1"] = (leaf - batch.image).detach().abs().mean()
        if self.weights.discriminator_active(step):
            g_loss = generator_loss(self.bare_discriminator(leaf).float())
            shape = (leaf.shape[1], out.features.shape[1], 3, 3)
            gradient, adaptive = generator_image_gradient(
                image_loss, g_loss, leaf, out.features.float(), shape, self.weights.discriminator, self.reduce_mean
            )
            terms |= {"generator": g_loss.detach(), "adaptive_weight": adaptive}
        else:
            (gradient,) = torch.autograd.grad(image_loss, leaf)
        surrogate = (out.image.float() * gradient).sum() + self.weights.kl * kl
        return GeneratorLoss(surrogate, leaf.detach(), terms)

    def discriminator_loss(self, batch: PixelBatch, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on real pictures and detached reconstructions, and its mean logits."""
        real, fake = self.discriminator(batch.image), self.discriminator(image)
        loss = discriminator_loss(real.float(), fake.float(), self.weights.discriminator_loss)
        return loss, {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }

    def _distance(self, image: Tensor, target: Tensor) -> Tensor:
        if self.perceptual is None or self.weights.perceptual == 0:
            return image.new_zeros(len(image))
        distance: Tensor = self.perceptual(image, target)
        return distance
