"""Pictures of latents without the decoder: one linear map from a latent's channels to red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.codec import LatentCodec


@dataclass(frozen=True, eq=False)
class LinearPreview:
    """rgb = weight·z + bias at every position; `weight` [3, C], `bias` [3]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pictures [B, 3, h, w] in [-1, 1], on the device and in the dtype of z."""
        rgb = torch.einsum("kc,bchw->bkhw", self.weight.to(z), z) + self.bias.to(z)[:, None, None]
        return rgb.clamp(-1, 1)

    @classmethod
    def fit(cls, z: Tensor, images: Tensor) -> LinearPreview:
        """The least-squares map from latents [N, C, h, w] to their pictures [N, 3, H, W], averaged to h x w."""
        height, width = z.shape[-2:]
        target = F.adaptive_avg_pool2d(images.double(), (height, width)).movedim(1, -1).flatten(0, -2)
        channels = z.double().movedim(1, -1).flatten(0, -2)
        ones = torch.ones_like(channels[:, :1])
        solution = torch.linalg.lstsq(torch.cat([channels, ones], dim=1), target).solution.float()
        return cls(solution[:-1].T.contiguous(), solution[-1])

    @classmethod
    @torch.no_grad()
    def of_decoder(
        cls, codec: LatentCodec, generator: torch.Generator, count: int = 32, side: int = 8
    ) -> LinearPreview:
        """The map that comes nearest to a decoder on `count` random smooth latents of `side` positions."""
        z = smooth_latents(count, codec.vae.config.latent_channels, side, generator).to(codec.vae.last_layer)
        return cls.fit(z.cpu(), torch.cat([codec.decode(row) for row in torch.split(z, 1)]).cpu())


def smooth_latents(count: int, channels: int, side: int, generator: torch.Generator) -> Tensor:
    """Latents [count, channels, side, side], N(0, 1) at their four corners and bilinear between them.

    A decoder has only seen latents whose neighbours agree, so white noise would say little about its colours.
    """
    corners = torch.randn(count, channels, 2, 2, generator=generator)
    return F.interpolate(corners, size=side, mode="bilinear", align_corners=True)
