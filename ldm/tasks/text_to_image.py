"""Stage two, what one training step computes: the denoising loss on cached latents under a caption."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder import LatentCodec
from conditioning import ClipTextEncoder, drop_captions
from ldm.data.latents import LatentBatch
from ldm.networks import UNet
from ldm.process import Objective
from ldm.sampling import randn_rows
from ldm.seeds import generator, row_uniform


class ConditionedUNet(nn.Module):
    """Text encoder and U-Net as one module, which is what a distributed wrapper and the optimiser see."""

    def __init__(self, unet: UNet, text_encoder: ClipTextEncoder) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Raw network output [B, C, h, w] for noisy latents x, timesteps t [B] and token ids [B, L]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.text_encoder.trainable):
            condition = self.text_encoder.encode(ids)
        raw: Tensor = self.unet(x, t, condition.context, context_mask=condition.context_mask)
        return raw


@dataclass(frozen=True)
class TextToImageTask:
    """The parts of stage two, built and placed; `null_ids` [L] are the tokens of the empty prompt."""

    model: nn.Module
    text_encoder: ClipTextEncoder
    codec: LatentCodec
    objective: Objective
    null_ids: Tensor
    proportion_empty_prompts: float
    sample_posterior: bool
    seed: int

    def loss(self, batch: LatentBatch, step: int, global_size: int) -> dict[str, Tensor]:
        """DDPM's Algorithm 1 (Ho et al. 2020) with captions dropped for classifier-free guidance (Ho & Salimans 2022).

        Every row draws from its own generator, keyed by (seed, step, row), so the draws do not depend on how rows are
        spread over processes. Timesteps are stratified over the global batch: u = frac(u_0 + row / B) (Kingma et al.
        2021, app. I.1).
        """
        device = batch.moments.device
        rows = [generator(self.seed, "noise", step, row) for row in batch.rows]
        shape = (len(rows), batch.moments.shape[1] // 2, *batch.moments.shape[2:])
        noise = randn_rows(shape, rows).to(device) if self.sample_posterior else None
        x0 = self.codec.from_moments(batch.moments, noise)
        eps = randn_rows(shape, rows).to(device)
        offset = torch.rand((), generator=generator(self.seed, "timestep", step))
        u = (offset + torch.tensor(batch.rows) / global_size) % 1.0
        noised = self.objective.noise(x0, eps, u)
        ids = drop_captions(
            self.text_encoder.tokenize(batch.captions), self.null_ids, self.proportion_empty_prompts, row_uniform(rows)
        )
        raw = self.model(noised.x_t, noised.t, ids.to(device))
        return {"loss": self.objective.loss(raw.float(), noised).mean()}
