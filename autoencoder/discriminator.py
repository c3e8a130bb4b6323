"""Discriminators with a logit for every patch: of pixels (Isola et al. 2017) or of an ImageNet network's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.utils.parametrizations import spectral_norm as with_spectral_norm

from autoencoder.perceptual import FeatureDistance

NORMS = ("batch", "group", "act", "none")


class ActNorm(nn.Module):
    """y = weight * x + bias per channel of [B, C, H, W] (Kingma & Dhariwal 2018, section 3.1).

    The first training batch sets weight and bias so that its outputs have zero mean and unit variance in each channel;
    from then on both are ordinary parameters. Under several processes the batch's sums are first added over all of
    them, so that every process starts from the same values. A batch that is not finite is passed over.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.initialised = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialised:
            self._initialise(x)
        return x * self.weight.view(1, -1, 1, 1).to(x) + self.bias.view(1, -1, 1, 1).to(x)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        values = x.detach().double().transpose(0, 1).flatten(1)
        sums = torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        count, total, square = sums
        mean = total / count
        std = (square / count - mean.square()).clamp(min=0).sqrt() + 1e-6
        if bool(torch.isfinite(std).all()):
            self.weight.copy_(1 / std)
            self.bias.copy_(-mean / std)
            self.initialised = True

    def get_extra_state(self) -> bool:
        return self.initialised

    def set_extra_state(self, state: Any) -> None:
        self.initialised = bool(state)


class PatchDiscriminator(nn.Module):
    """Images [B, in_channels, H, W] in [-1, 1] -> logits [B, 1, h, w], with h about H / 2^num_layers: a PatchGAN.

    4x4 convolutions: `num_layers` of stride two that double the width up to 8 * base_channels, one of stride
    one, and one to a single channel. Every layer but the first and last is normalised. Three layers see 70x70
    pixels. Weights start as N(0, 0.02) (Isola et al. 2017, section 6.2), norm scales as N(1, 0.02), biases as
    0; drawn from `generator` when one is given. The norm "act" starts from its first batch instead, see `ActNorm`.
    With `labels`, so many of them, the last layer has one more channel for each, see `conditioned`.

    Raises:
        ValueError: `norm` is none of batch, group, act, none, or `num_layers` is below one.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        norm: str = "batch",
        spectral_norm: bool = False,
        generator: torch.Generator | None = None,
        labels: int = 0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        widths = [base_channels * min(2**level, 8) for level in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            layers += _layer(widths[level - 1], widths[level], stride, norm)
        layers.append(nn.Conv2d(widths[-1], 1 + labels, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        self._initialise(generator)
        if spectral_norm:
            for conv in self._convolutions():
                _normalise(conv, generator)

    def _convolutions(self) -> Iterator[nn.Conv2d]:
        return (layer for layer in self.layers if isinstance(layer, nn.Conv2d))

    def _initialise(self, generator: torch.Generator | None) -> None:
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
                centre = 0.0 if isinstance(layer, nn.Conv2d) else 1.0
                nn.init.normal_(layer.weight, centre, 0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return conditioned(self.layers(x), label)


class ProjectedDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits [B, S, h, w], of the S stages of a frozen network's features.

    After Sauer et al. 2021, Projected GANs Converge Faster, section 3: a head for each stage. The heads are ours, two
    3x3 convolutions and a 1x1 with spectral norm, and there is no random mixing of channels and stages, which the paper
    needed lest the discriminator dominate; an autoencoder has its reconstruction loss besides. Each map is divided by
    its root mean square, and the logits are resampled to the size of the second stage, so that all stages weigh alike.
    Weights are uniform as PyTorch's, from `generator` when one is given, biases 0.

    Args:
        features: the frozen network; it is computed in float32 under autocast as well.
        width: channels of a head.
        labels: how many there are; a head has one more output for each, see `conditioned`.
    """

    def __init__(
        self,
        features: FeatureDistance,
        width: int = 64,
        generator: torch.Generator | None = None,
        labels: int = 0,
    ) -> None:
        super().__init__()
        self.features = features
        with torch.no_grad():
            channels = [maps.shape[1] for maps in features.stages(torch.zeros(1, 3, 64, 64))]
        self.heads = nn.ModuleList(_head(count, width, 1 + labels, generator) for count in channels)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            stages = self.features.stages(x.to(torch.promote_types(x.dtype, torch.float32)))
        scaled = [maps / (maps.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-6) for maps in stages]
        size = stages[min(1, len(stages) - 1)].shape[2:]
        logits = [conditioned(head(maps), label) for head, maps in zip(self.heads, scaled, strict=True)]
        return torch.cat([_resampled(stage, size) for stage in logits], 1)


def conditioned(maps: Tensor, label: Tensor | None) -> Tensor:
    """Logits [B, 1, h, w] of a last layer's maps [B, 1 + K, h, w]: the first, plus the one of the image's label.

    A projection discriminator (Miyato & Koyama 2018, eq. 3), whose inner product of features and label is here a map of
    the last layer's for each of the K labels.

    Args:
        label: int64 [B], each below K; an image has none where it is below 0, and no image has where it is None.
    """
    shared = maps[:, :1]
    if label is None:
        return shared
    rows = torch.arange(len(maps), device=maps.device)
    own = maps[rows, 1 + label.clamp(min=0)].unsqueeze(1)
    return shared + own * (label >= 0).view(-1, 1, 1, 1)


def _head(in_channels: int, width: int, out_channels: int, generator: torch.Generator | None) -> nn.Sequential:
    convolutions = [
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Conv2d(width, out_channels, 1),
    ]
    for conv in convolutions:
        nn.init.kaiming_uniform_(conv.weight, 5**0.5, generator=generator)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
        _normalise(conv, generator)
    first, second, last = convolutions
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last)


def _normalise(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    """Spectral norm, its power iteration started from `generator` when one is given."""
    with torch.random.fork_rng(devices=[], enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        with_spectral_norm(conv)


def _resampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, 1, h, w] averaged down or repeated up to `size`."""
    return F.interpolate(logits, list(size), mode="area" if logits.shape[2] > size[0] else "nearest")


def _layer(in_channels: int, out_channels: int, stride: int, norm: str) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=norm not in ("batch", "act"))
    norms: dict[str, list[nn.Module]] = {
        "batch": [nn.BatchNorm2d(out_channels)],
        "group": [nn.GroupNorm(gcd(32, out_channels), out_channels)],
        "act": [ActNorm(out_channels)],
        "none": [],
    }
    return [conv, *norms[norm], nn.LeakyReLU(0.2)]
