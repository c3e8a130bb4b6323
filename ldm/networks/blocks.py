"""Residual blocks and the levels of the U-Net: resnets, transformers after them, a resampler at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import JointAttention, Transformer2DModel
from .config import Level, UNetConfig
from .embeddings import ACTIVATIONS

Resample = Callable[[Tensor], Tensor]
"""[B, C, H, W] to another height and width."""


class ResnetBlock2D(nn.Module):
    """GroupNorm, activation, convolution, twice, with the time embedding between, added to the input.

    With "scale_shift" the embedding modulates the second norm (Dhariwal & Nichol 2021, section 3, AdaGN).
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, output_scale: float = 1.0) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.act_fn]
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.output_scale = output_scale
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_embed_dim, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor, resample: Resample | None = None) -> Tensor:
        """Maps [B, in, H, W] to [B, out, H, W]; `emb` [B, E] is the time embedding after its activation.

        `resample` changes the size of both branches, in the residual one before its first convolution (Brock et al.
        2019, BigGAN, appendix B; Song et al. 2021b, appendix H).
        """
        h = self.activation(self.norm1(x))
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        time = self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(self.activation(self._modulated_norm(h, time)))
        x = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return x if self.output_scale == 1 else x / self.output_scale

    def _modulated_norm(self, h: Tensor, time: Tensor) -> Tensor:
        if not self.scale_shift:
            h = self.norm2(h + time)
            return h
        scale, shift = time.chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return h


class Downsample2D(nn.Module):
    """Halves the resolution by a strided convolution; padding 0 pads right and below only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = (0, 1, 0, 1) if padding == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to [B, C, ceil(H/2), ceil(W/2)] (floor where padding is 0)."""
        x = self.conv(x if self.pad is None else F.pad(x, self.pad))
        return x


class Upsample2D(nn.Module):
    """Nearest-neighbour enlargement, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps [B, C, h, w] to [B, C, *size]."""
        x = self.conv(_enlarged(x, size))
        return x


class Stage(nn.Module):
    """Resnets of the given input widths and, where the level attends, `attentions` layers of attention after them.

    With `gradient_checkpointing` the backward pass recomputes what is inside a layer (Chen et al. 2016).
    """

    def __init__(
        self, config: UNetConfig, level: Level, inputs: list[int], attentions: int, output_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.biggan = level.biggan
        self.resnets = nn.ModuleList(ResnetBlock2D(config, width, level.channels, output_scale) for width in inputs)
        self.attentions = nn.ModuleList(_attention(config, level) for _ in range(attentions if level.depth > 0 else 0))

    def run_layer(self, index: int, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Resnet `index`, then attention `index` if there is one: [B, in, H, W] to [B, C, H, W]."""
        return self.run(self._layer, index, x, emb, context, mask)

    def run(self, layer: Callable[..., Tensor], *inputs: object) -> Tensor:
        """`layer(*inputs)`, recomputed in the backward pass where the stage checkpoints."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
            return x
        return layer(*inputs)

    def _layer(self, index: int, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.resnets[index](x, emb)
        return self.attentions[index](x, context, mask) if index < len(self.attentions) else x


class DownBlock2D(Stage):
    """One level of the contracting path.

    Diffusers' DownBlock2D and CrossAttnDownBlock2D, or ResnetDownsampleBlock2D and SimpleCrossAttnDownBlock2D.
    """

    def __init__(self, config: UNetConfig, level: Level, in_channels: int, downsample: bool) -> None:
        inputs = [in_channels] + [level.channels] * (level.layers - 1)
        super().__init__(config, level, inputs, attentions=level.layers)
        self.downsamplers = nn.ModuleList(
            ResnetBlock2D(config, level.channels, level.channels)
            if level.biggan
            else Downsample2D(level.channels, config.downsample_padding)
            for _ in range(downsample)
        )

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the last feature map and every feature map of the level, for the skip connections."""
        skips: list[Tensor] = []
        for index in range(len(self.resnets)):
            x = self.run_layer(index, x, emb, context, mask)
            skips.append(x)
        for downsample in self.downsamplers:
            x = self.run(downsample, x, emb, _halved) if self.biggan else downsample(x)
            skips.append(x)
        return x, skips


class MidBlock2D(Stage):
    """The bottleneck: resnet, attention, resnet, or one resnet alone.

    Diffusers' UNetMidBlock2DCrossAttn or UNetMidBlock2DSimpleCrossAttn, and UNetMidBlock2D.
    """

    def __init__(self, config: UNetConfig, level: Level) -> None:
        inputs = [level.channels] * (2 if level.depth > 0 else 1)
        super().__init__(config, level, inputs, attentions=1, output_scale=config.mid_block_scale_factor)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H, W]."""
        for index in range(len(self.resnets)):
            x = self.run_layer(index, x, emb, context, mask)
        return x


class UpBlock2D(Stage):
    """One level of the expanding path.

    Diffusers' UpBlock2D and CrossAttnUpBlock2D, or ResnetUpsampleBlock2D and SimpleCrossAttnUpBlock2D.
    `in_channels` is the width of what comes from below, `skip_channels` that of the next finer level.
    """

    def __init__(self, config: UNetConfig, level: Level, in_channels: int, skip_channels: int, upsample: bool) -> None:
        below = [in_channels] + [level.channels] * level.layers
        skips = [level.channels] * level.layers + [skip_channels]
        inputs = [a + b for a, b in zip(below, skips, strict=True)]
        super().__init__(config, level, inputs, attentions=len(inputs))
        self.upsamplers = nn.ModuleList(
            ResnetBlock2D(config, level.channels, level.channels) if level.biggan else Upsample2D(level.channels)
            for _ in range(upsample)
        )

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Pops its skips off the end of `skips` and enlarges to the size of the next one left."""
        for index in range(len(self.resnets)):
            x = self.run_layer(index, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
        for upsample in self.upsamplers:
            height, width = skips[-1].shape[-2:]
            enlarge = partial(_enlarged, size=(height, width))
            x = self.run(upsample, x, emb, enlarge) if self.biggan else upsample(x, (height, width))
        return x


def _halved(x: Tensor) -> Tensor:
    """The means of blocks of 2 x 2: [B, C, H, W] to [B, C, floor(H/2), floor(W/2)]."""
    return F.avg_pool2d(x, 2)


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbours: [B, C, h, w] to [B, C, *size]."""
    return F.interpolate(x, size=size, mode="nearest")


def _attention(config: UNetConfig, level: Level) -> Transformer2DModel | JointAttention:
    if level.biggan:
        return JointAttention(level.channels, level.heads, level.context_dim, config.norm_num_groups)
    return Transformer2DModel(
        level.channels,
        level.heads,
        level.depth,
        level.context_dim,
        config.norm_num_groups,
        config.use_linear_projection,
    )
