"""The encoder's posterior q(z | x): a Gaussian with a diagonal covariance."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) from moments [B, 2C, h, w]: C channels of means, then C of log-variances.

    The log-variance is clamped to [-30, 20] as in latent-diffusion, so that exp stays finite.

    Raises:
        ValueError: the channels are not an even number.
    """

    def __init__(self, moments: Tensor) -> None:
        if moments.ndim < 2 or moments.shape[1] % 2:
            raise ValueError(
                f"moments must be [B, 2C, ...] with an even channel count, got shape {tuple(moments.shape)}"
            )
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(self, noise: Tensor | None) -> Tensor:
        """mean + std * noise [B, C, h, w] for standard normal noise of that shape; without noise the mode."""
        return self.mean if noise is None else self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The most probable z, which is the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over all dimensions of an example: [B].

        Kingma & Welling 2014, appendix B: -KL = 1/2 sum(1 + log var - mean^2 - var).
        """
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).flatten(1).sum(1)
