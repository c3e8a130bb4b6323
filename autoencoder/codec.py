"""Pixels to the denoiser's latents and back: the only place that knows scale and shift."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder.gaussian import DiagonalGaussian
from autoencoder.vq import Autoencoder, VQModel

Decode = Callable[[Autoencoder, Tensor], Tensor]
"""(autoencoder, raw latents [B, C, h, w]) -> images [B, 3, f*h, f*w]; `strip_decode` and `tiled_decode` are two."""


def whole_decode(vae: Autoencoder, z: Tensor) -> Tensor:
    """Images [B, 3, f*h, f*w] of raw latents z [B, C, h, w], all at once."""
    return vae.decode(z)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and spread of sampled latents over a data set, from sums that add up over batches and ranks.

    Attributes:
        sums: float64 [3, C]: positions seen, sum of posterior means, sum of mean^2 + var.
    """

    sums: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> LatentStatistics:
        """Statistics of one batch of moments [B, 2C, h, w]."""
        posterior = DiagonalGaussian(moments.double())
        total = posterior.mean.sum((0, 2, 3))
        square = (posterior.mean.square() + posterior.var).sum((0, 2, 3))
        count = torch.full_like(total, posterior.mean[:, 0].numel())
        return cls(torch.stack([count, total, square]))

    def __add__(self, other: LatentStatistics) -> LatentStatistics:
        return LatentStatistics(self.sums + other.sums)

    @property
    def shift(self) -> float:
        """Mean over all positions and channels."""
        count, total, _ = self.sums.sum(1).tolist()
        return float(total / count)

    @property
    def scale(self) -> float:
        """One over the standard deviation of samples over all positions and channels.

        Law of total variance: var(z) = var(mean) + mean(var of the posterior).
        """
        count, total, square = self.sums.sum(1).tolist()
        return float((square / count - (total / count) ** 2) ** -0.5)

    @property
    def channel_mean(self) -> Tensor:
        """Mean of each channel, float64 [C]; the config's `latents_mean`."""
        return self.sums[1] / self.sums[0]

    @property
    def channel_std(self) -> Tensor:
        """Standard deviation of each channel's samples, float64 [C]; the config's `latents_std`."""
        return (self.sums[2] / self.sums[0] - self.channel_mean.square()).sqrt()


class LatentCodec:
    """Images [B, 3, H, W] in [-1, 1] <-> latents z [B, C, H/f, W/f] of about unit variance.

    z = (raw - shift) * scale, raw being what the autoencoder encodes to and decodes from.

    Args:
        vae: the autoencoder.
        scale: a positive number, or a tensor [C] for a factor per channel.
        shift: a number, or a tensor [C].

    Raises:
        ValueError: scale is not positive, or a tensor has not C entries.
    """

    def __init__(self, vae: Autoencoder, scale: Tensor | float, shift: Tensor | float = 0.0) -> None:
        self.vae = vae
        self.scale = self._per_channel("scale", scale)
        self.shift = self._per_channel("shift", shift)
        if not bool((self.scale > 0).all()):
            raise ValueError(f"scale must be positive, got {scale!r}")

    @classmethod
    def from_config(cls, vae: Autoencoder) -> LatentCodec:
        """Scale and shift as diffusers reads them: `scaling_factor`, and `shift_factor` (0 where it is null).

        `latents_mean` and `latents_std` are not applied; pass them to the constructor as tensors.
        """
        shift = None if isinstance(vae, VQModel) else vae.config.shift_factor
        return cls(vae, vae.config.scaling_factor, shift or 0.0)

    @staticmethod
    def measure(moments: Iterable[Tensor]) -> tuple[float, float]:
        """(scale, shift) over a data set, from its batches of moments [B, 2C, h, w]; sums run in float64.

        Raises:
            ValueError: there is no batch.
        """
        total: LatentStatistics | None = None
        for batch in moments:
            statistics = LatentStatistics.of(batch)
            total = statistics if total is None else total + statistics
        if total is None:
            raise ValueError("measuring the latent scale needs at least one batch of moments, got none")
        return total.scale, total.shift

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents z of images: the sample that standard normal `noise` [B, C, h, w] picks, or the mode without."""
        return self.from_moments(self.vae.moments(x.to(self.vae.dtype)), noise)

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents z from stored moments [B, 2C, h, w]: a sample, or the mode without noise."""
        raw = DiagonalGaussian(moments.float()).sample(noise)
        return (raw - self.shift.to(raw)) * self.scale.to(raw)

    def decode(self, z: Tensor, network: Decode = whole_decode) -> Tensor:
        """Images in [-1, 1], float32, from latents z; those of a `VQModel` are put on the codebook first.

        What is infinite becomes NaN, not white or black.
        """
        raw = self.vae.project((z / self.scale.to(z) + self.shift.to(z)).to(self.vae.dtype))
        image = network(self.vae, raw).float()
        return image.masked_fill(image.isinf(), torch.nan).clamp(-1.0, 1.0)

    def _per_channel(self, name: str, value: Tensor | float) -> Tensor:
        """`value` shaped to broadcast against [B, C, h, w]."""
        tensor = torch.as_tensor(value, dtype=torch.float32).flatten()
        if tensor.numel() not in (1, self.vae.latent_channels):
            raise ValueError(f"{name} needs 1 or {self.vae.latent_channels} values, got {tensor.numel()}")
        return tensor.view(1, -1, 1, 1)


@torch.no_grad()
def fold_into_convolutions(vae: Autoencoder, mean: Tensor, std: Tensor | None = None) -> None:
    """Changes the raw latents to (raw - mean) / std per channel without changing any image.

    Both 1x1 convolutions around the latent space are linear, so the shift and scale are absorbed exactly. Tools that
    know one scalar scale only, and no shift, then get centred latents. A codebook moves with its latents, by the mean
    only: another spread in each channel would change which code is nearest.

    Args:
        mean, std: [C]; no std leaves the spread as it is.

    Raises:
        ValueError: the autoencoder lacks one of the two convolutions, or std is given for a codebook.
    """
    if isinstance(vae, VQModel):
        if std is not None:
            raise ValueError("the latents of a codebook can be shifted, but not scaled channel by channel")
        vae.quantize.embedding.weight -= mean.to(vae.quantize.embedding.weight)
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError("folding a latent shift needs an autoencoder with use_quant_conv and use_post_quant_conv")
    mean = mean.to(vae.last_layer)
    std = torch.ones_like(mean) if std is None else std.to(vae.last_layer)
    quant, post = vae.quant_conv, vae.post_quant_conv
    bias, post_bias = _bias(quant), _bias(post)
    channels = len(mean)
    post_bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    if len(bias) > channels:
        bias[channels:] -= 2 * std.log()


def _bias(convolution: nn.Conv2d) -> Tensor:
    if convolution.bias is None:
        raise ValueError("the 1x1 convolutions around the latents need a bias")
    return convolution.bias
