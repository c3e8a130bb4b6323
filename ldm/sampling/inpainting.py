"""Redrawing a part of a picture: wrappers that keep the rest, for any model and for an inpainting U-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.process.prediction import Prediction
from ldm.process.schedule import VariancePreserving
from ldm.sampling.denoiser import Denoiser, Network


def inpainting_denoiser(denoise: Denoiser, schedule: VariancePreserving, start: Tensor, keep: Tensor) -> Denoiser:
    """The same denoiser, sure of the kept part: x0 there is the given picture's (Song et al. 2021, app. I.2).

    `start` [1, C, h, w] is the picture's latents, `keep` [1, 1, h, w] is 1 where they stay and 0 where they are drawn.
    """

    def masked(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        prediction = denoise(x, t)
        x0 = torch.lerp(prediction.x0, start.expand_as(x), keep)
        return prediction._replace(x0=x0, eps=(x - alpha * x0) / sigma)

    return masked


def with_channels(net: Network, channels: Tensor) -> Network:
    """The same network with further input channels [1, C, h, w] behind those of x."""

    def run(x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        return net(torch.cat([x, channels.to(x).expand(len(x), -1, -1, -1)], dim=1), t, **condition)

    return run
