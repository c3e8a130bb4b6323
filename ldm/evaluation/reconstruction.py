"""How well an autoencoder gives pictures back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from autoencoder import AutoencoderKL


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images [B, 3, H, W] in [-1, 1], whose peak is 2: [B]."""
    mse = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / mse)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, reconstructions) of every batch: the posterior's mode, decoded and clamped to [-1, 1]."""
    for x in batches:
        yield x, vae.decode(vae.encode(x).mode()).float().clamp(-1, 1)


def mean_psnr(vae: AutoencoderKL, batches: Iterable[Tensor]) -> float:
    """Mean over images of the PSNR in dB."""
    return float(torch.cat([psnr(x, y) for x, y in reconstruct(vae, batches)]).mean())
