"""Stage two, what one training step computes: the denoising loss on cached latents under a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoder import LatentCodec
from conditioning import Conditioning, TextEncoder
from ldm.data.latents import LatentBatch
from ldm.networks import UNet, uncropped
from ldm.process import NoisedExample, Objective, TrainingNoise, hybrid_loss
from ldm.sampling import randn_rows
from ldm.seeds import generator, row_uniform
from ldm.tasks.captions import Captions
from ldm.tasks.timesteps import TimestepDraw


class DenoisingLoss(NamedTuple):
    """The mean to call backward on; the loss of every example [B] before its weight in it, and its timestep [B]."""

    loss: Tensor
    rows: Tensor
    t: Tensor


class ConditionedUNet(nn.Module):
    """Text encoder and U-Net as one module, which is what a distributed wrapper and the optimiser see."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder, downsample_factor: int = 8) -> None:
        super().__init__()
        self.adapter: nn.Module | None = None  # its parameters are trained with the others, whatever it acts on
        self.unet, self.text_encoder, self.downsample_factor = unet, text_encoder, downsample_factor
        self.reads_pooled = unet.config.addition_embed_type == "text_time"
        for unread in [] if self.reads_pooled else text_encoder.beyond_context():
            unread.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, text: Tensor | Conditioning) -> Tensor:
        """Raw network output [B, C, h, w] for noisy latents x and timesteps t [B].

        `text` is token rows [B, ...], or the conditions that a frozen encoder made of them. The sizes that an SDXL
        network asks for are those of whole pictures.
        """
        condition = text if isinstance(text, Conditioning) else self._encode(text)
        told = {"context": condition.context, "context_mask": condition.context_mask}
        if self.reads_pooled:
            height, width = (side * self.downsample_factor for side in x.shape[2:])
            told |= {"pooled": condition.pooled, "size_ids": uncropped(len(x), height, width).to(x.device)}
        raw: Tensor = self.unet(x, t, **told)
        return raw

    def _encode(self, tokens: Tensor) -> Conditioning:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder.trainable):
            return self.text_encoder.encode(tokens)


@dataclass(frozen=True)
class TextToImageTask:
    """The parts of stage two, built and placed.

    `vlb_weight` is the bound's part in the loss of a network that learns its variance, None for a fixed variance.
    `teacher`, where there is one, is the model before this training, which says what to predict for class pictures.
    """

    model: nn.Module
    captions: Captions
    codec: LatentCodec
    objective: Objective
    noise: TrainingNoise
    timesteps: TimestepDraw
    vlb_weight: float | None
    proportion_empty_prompts: float
    sample_posterior: bool
    seed: int
    teacher: ConditionedUNet | None = None

    def loss(self, batch: LatentBatch, step: int, global_size: int) -> DenoisingLoss:
        """DDPM's Algorithm 1 (Ho et al. 2020) with captions dropped for classifier-free guidance (Ho & Salimans 2022).

        Every row draws from its own generator, keyed by (seed, step, row), so the draws do not depend on how rows are
        spread over processes. Timesteps are stratified over the global batch: u = frac(u_0 + row / B) (Kingma et al.
        2021, app. I.1).
        """
        rows = [generator(self.seed, "noise", step, row) for row in batch.rows]
        noise = randn_rows(_latent_shape(batch), rows) if self.sample_posterior else None
        eps, input_eps = self.noise.draw(_latent_shape(batch), rows)
        offset = torch.rand((), generator=generator(self.seed, "timestep", step))
        u = (offset + torch.tensor(batch.rows) / global_size) % 1.0
        t, weight = self.timesteps.draw(u, step)
        uniform = row_uniform(rows)
        if batch.prior is not None:
            uniform[~torch.tensor(batch.prior)] = 1.0  # the subject keeps its caption
        text = self.captions(batch.captions, self.proportion_empty_prompts, uniform)
        losses, t = self._denoising(batch, noise, eps, input_eps, t, text)
        self.timesteps.learn(batch.rows, t, losses)
        if batch.weights is not None:
            weight = weight * torch.tensor(batch.weights)
        return DenoisingLoss((losses * weight.to(losses)).mean(), losses.detach(), t)

    @torch.no_grad()
    def validation_loss(self, batch: LatentBatch, count: int) -> DenoisingLoss:
        """The loss on fixed examples under fixed noise: the same draws each time, captions kept, posterior means.

        Row r of `count` has its own noise and the middle of the r-th part of the noise levels.
        """
        eps = randn_rows(_latent_shape(batch), [generator(self.seed, "validation", row) for row in batch.rows])
        u = (torch.tensor(batch.rows) + 0.5) / count
        t = self.objective.timesteps(u)
        text = self.captions(batch.captions, 0.0, torch.zeros(len(batch.rows)))
        losses, t = self._denoising(batch, None, eps, eps, t, text)
        return DenoisingLoss(losses.mean(), losses, t)

    def _denoising(
        self,
        batch: LatentBatch,
        noise: Tensor | None,
        eps: Tensor,
        input_eps: Tensor,
        t: Tensor,
        text: Tensor | Conditioning,
    ) -> tuple[Tensor, Tensor]:
        """The loss of every example [B], not yet weighted for how t was drawn, and t [B] on its device."""
        device = batch.moments.device
        x0 = self.codec.from_moments(batch.moments, None if noise is None else noise.to(device))
        noised, text = self.objective.noise_at(x0, eps.to(device), t, input_eps.to(device)), text.to(device)
        if self.teacher is not None and batch.prior is not None:
            noised = noised._replace(target=self._taught(self.teacher, noised, text, batch.prior))
        raw = self.model(noised.x_t, noised.t, text).float()
        if self.vlb_weight is None:
            return self.objective.loss(raw, noised), noised.t
        return hybrid_loss(self.objective, raw, x0, noised, levels=None, vlb_weight=self.vlb_weight), noised.t

    @torch.no_grad()
    def _taught(
        self, teacher: ConditionedUNet, noised: NoisedExample, text: Tensor | Conditioning, prior: tuple[bool, ...]
    ) -> Tensor:
        """The targets [B, C, h, w], of class pictures what the teacher predicts under the same caption."""
        rows = torch.tensor(prior, device=noised.x_t.device)
        said = text.index(rows) if isinstance(text, Conditioning) else text[rows]
        target = noised.target.clone()
        target[rows] = teacher(noised.x_t[rows], noised.t[rows], said)[:, : target.shape[1]].to(target)
        return target


def _latent_shape(batch: LatentBatch) -> tuple[int, ...]:
    return (len(batch.rows), batch.moments.shape[1] // 2, *batch.moments.shape[2:])
