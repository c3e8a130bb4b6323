"""Stage one, what one training step computes: the losses of the autoencoder and of its discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoder import (
    DiscriminatorPenalties,
    LossState,
    LossWeights,
    discriminator_accuracy,
    discriminator_loss,
    generator_image_gradient,
    generator_loss,
    nll,
    r1_penalty,
)
from autoencoder.perceptual import FeatureDistance
from ldm.data.batches import PixelBatch
from ldm.seeds import generator
from ldm.tasks.bottleneck import Bottleneck
from ldm.tasks.labels import class_indices


class GeneratorLoss(NamedTuple):
    """A scalar to call backward on, the reconstructions without a graph [B, 3, H, W], and the terms to log.

    `fake_logits` [B, S, h, w] are the discriminator's of the reconstructions, None before it takes part; their graph
    ends at the reconstructions.
    """

    surrogate: Tensor
    image: Tensor
    terms: dict[str, Tensor]
    fake_logits: Tensor | None = None


@dataclass(frozen=True)
class AutoencoderTask:
    """The parts of stage one, built and placed.

    `model` and `discriminator` may be wrapped for distributed training. `state` is what the losses learn and remember,
    `bottleneck` the kind of latent space. `reduce_mean` averages a tensor over all processes. `labels` are the words in
    captions that the discriminator is told, or none.
    """

    model: nn.Module
    discriminator: nn.Module
    perceptual: FeatureDistance | None
    weights: LossWeights
    penalties: DiscriminatorPenalties
    state: LossState
    bottleneck: Bottleneck
    seed: int
    reduce_mean: Callable[[Tensor], Tensor]
    labels: tuple[str, ...] = ()

    def generator_loss(self, batch: PixelBatch, step: int) -> GeneratorLoss:
        """reconstruction + perceptual + the latents' regulariser; once its warm-up is over the adversary.

        The gradients of the image terms are taken once at the reconstruction; the adaptive weight (Esser et al. 2021,
        eq. 7) follows from them by one weight gradient of the last convolution, so the decoder is walked back only
        once. The surrogate <image, gradient> has exactly that gradient. A log-variance that is learnt gets the gradient
        of the nll. The discriminator's own gradients are left alone; what it says of the reconstructions serves its own
        loss as well, which must be taken before its weights change.
        """
        rows = [generator(self.seed, "latent", step, row) for row in batch.rows]
        out = self.bottleneck(self.model, batch, rows, step)
        leaf = precise(out.image.detach()).requires_grad_()
        distance = self._distance(leaf, batch.image)
        image_loss = nll(leaf, batch.image, distance, self.weights, self.state.logvar)
        surrogate = self._logvar_surrogate(image_loss)
        terms = {"nll": image_loss.detach(), "perceptual": distance.detach().mean(), **out.terms}
        terms["l1"] = (leaf - batch.image).detach().abs().mean()
        if self.state.logvar.requires_grad:
            terms["logvar"] = self.state.logvar.detach().clone()
        logits = None
        if self.weights.adversary_active(step):
            logits = precise(self.discriminator(leaf, self._label(batch)))
            g_loss = generator_loss(logits)
            gradient, adaptive = generator_image_gradient(
                image_loss,
                g_loss,
                leaf,
                precise(out.features),
                (leaf.shape[1], out.features.shape[1], 3, 3),
                self.weights.discriminator,
                self.reduce_mean,
                2.0 ** logits.numel().bit_length(),
            )
            terms |= {"generator": g_loss.detach(), "adaptive_weight": adaptive}
        else:
            (gradient,) = torch.autograd.grad(image_loss, leaf)
            if self.weights.discriminator_active(step):
                logits = precise(self.discriminator(leaf.detach(), self._label(batch)))
        surrogate = surrogate + (precise(out.image) * gradient).sum()
        if out.loss is not None:
            surrogate = surrogate + out.loss
        return GeneratorLoss(surrogate, leaf.detach(), terms, logits)

    def discriminator_loss(self, batch: PixelBatch, fake: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on real pictures and on reconstructions with logits `fake`, and the terms to log.

        The penalties are part of the loss, weighted, and logged without their weights.
        """
        r1_weight = self.penalties.r1_weight(step)
        pictures = batch.image.detach().requires_grad_(r1_weight > 0)
        label = self._label(batch)
        real = precise(self.discriminator(pictures, label))
        loss = discriminator_loss(real, fake, self.weights.discriminator_loss)
        terms = {
            "discriminator": loss.detach(),
            "discriminator_accuracy": discriminator_accuracy(real, fake),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
        if label is not None:
            terms["discriminator_labelled"] = (label >= 0).float().mean()
        if r1_weight > 0:
            r1 = r1_penalty(real, pictures)
            loss, terms["r1"] = loss + r1_weight * r1, r1.detach()
        if self.penalties.lecam > 0:
            lecam = self.state.lecam(real, fake)
            loss, terms["lecam"] = loss + self.penalties.lecam * lecam, lecam.detach()
        return loss, terms

    def remember(self, terms: Mapping[str, Tensor]) -> None:
        """Moves the averages of codebook and LeCam by one optimiser step, whose terms these are; in every process."""
        self.bottleneck.remember()
        if self.penalties.lecam > 0 and "logits_real" in terms:
            means = self.reduce_mean(torch.stack([terms["logits_real"], terms["logits_fake"]]))
            self.state.lecam.update(means[0], means[1])

    def _label(self, batch: PixelBatch) -> Tensor | None:
        """What the discriminator is told of the pictures, int64 [B]."""
        if not self.labels:
            return None
        return class_indices(batch.captions, self.labels).to(batch.image.device, non_blocking=True)

    def _logvar_surrogate(self, image_loss: Tensor) -> Tensor:
        """A scalar whose gradient at the log-variance is that of the nll, averaged over all processes; 0 where fixed.

        The log-variance is no part of the wrapped model, so nothing else would average its gradient.
        """
        logvar = self.state.logvar
        if not logvar.requires_grad:
            return logvar.new_zeros(())
        (gradient,) = torch.autograd.grad(image_loss, logvar, retain_graph=True)
        return logvar * self.reduce_mean(gradient)

    def _distance(self, image: Tensor, target: Tensor) -> Tensor:
        if self.perceptual is None or self.weights.perceptual == 0:
            return image.new_zeros(len(image))
        distance: Tensor = self.perceptual(image, target)
        return distance


def precise(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
