"""Decoding in horizontal strips: the picture of a whole decode, up to rounding, in less memory.

Tiles that are decoded one by one normalise with their own statistics, so colours drift between them. Here every layer
runs over the whole picture before the next one starts: the statistics of group normalisation are those of all
positions and attention sees all of them. Only the temporaries of a layer, the normalised and activated input of a
convolution and what the convolution itself needs, are cut into strips. What is left are two or three feature maps at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.blocks import Decoder, MidBlock, ResnetBlock, UpLevel, Upsample

Rows = Callable[[int, int], Tensor]
"""(first, last) -> rows first to last - 1 of a convolution's input [B, C, last - first, W]."""


class ConvolutionalDecoder(Protocol):
    """`AutoencoderKL` or `VQModel`."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def post_quant_conv(self) -> nn.Conv2d | None: ...


@torch.no_grad()
def strip_decode(vae: ConvolutionalDecoder, z: Tensor, rows: int = 64) -> Tensor:
    """Images [B, 3, f*h, f*w] of raw latents z [B, C, h, w], equal to `vae.decode(z)` up to rounding.

    Memory peaks at two feature maps of the widest level and grows with the picture; `tiled_decode` does not grow, and
    approximates.

    Args:
        rows: height of a strip, in positions of the layer at hand.

    Raises:
        ValueError: rows is below one, or z is not [B, C, h, w].
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if z.ndim != 4:
        raise ValueError(f"decoding in strips needs latents [B, C, h, w], got shape {tuple(z.shape)}")
    decoder = vae.decoder
    x = decoder.conv_in(z if vae.post_quant_conv is None else vae.post_quant_conv(z))
    x = _mid(decoder.mid_block, x, rows)
    for level in decoder.up_blocks:
        assert isinstance(level, UpLevel)
        x = _level(level, x, rows)
    return _normed_convolution(decoder.conv_norm_out, nn.SiLU(), decoder.conv_out, x, rows)


def _mid(block: MidBlock, x: Tensor, rows: int) -> Tensor:
    first, second = block.resnets
    x = _resnet(first, x, rows)
    for attention in block.attentions:
        x = attention(x)
    return _resnet(second, x, rows)


def _level(level: UpLevel, x: Tensor, rows: int) -> Tensor:
    for index, resnet in enumerate(level.resnets):
        x = _resnet(resnet, x, rows)
        if level.attentions:
            x = level.attentions[index](x)
    for upsample in level.upsamplers:
        assert isinstance(upsample, Upsample)
        x = _doubled_convolution(upsample.conv, x, rows)
    return x


def _resnet(block: nn.Module, x: Tensor, rows: int) -> Tensor:
    assert isinstance(block, ResnetBlock)
    h = _normed_convolution(block.norm1, block.nonlinearity, block.conv1, x, rows)
    h = _normed_convolution(block.norm2, block.nonlinearity, block.conv2, h, rows)
    for strip in _strips(x.shape[2], rows):
        part = x[:, :, strip]
        h[:, :, strip] += part if block.conv_shortcut is None else block.conv_shortcut(part)
    return h


def _normed_convolution(norm: nn.GroupNorm, act: nn.Module, conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    """conv(act(norm(x))) with the group statistics of all of x."""
    scale, shift = _affine(norm, x)

    def activated(first: int, last: int) -> Tensor:
        out: Tensor = act(torch.addcmul(shift, x[:, :, first:last], scale))
        return out

    return _convolution(conv, activated, x.shape[2], x.shape[3], rows)


def _affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Group normalisation of x [B, C, H, W] as x * scale + shift, both [B, C, 1, 1]; statistics in float32."""
    groups = x.view(len(x), norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    inverse = torch.rsqrt(variance.float() + norm.eps)
    per_group = x.shape[1] // norm.num_groups
    inverse, mean = (value.repeat_interleave(per_group, 1) for value in (inverse, mean.float()))
    scale = norm.weight.float() * inverse
    shift = norm.bias.float() - mean * scale
    return scale[:, :, None, None].to(x), shift[:, :, None, None].to(x)


def _doubled_convolution(conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    """conv of x with every position doubled in both directions."""

    def doubled(first: int, last: int) -> Tensor:
        part = x[:, :, first // 2 : (last + 1) // 2]
        wide = F.interpolate(part, scale_factor=2.0, mode="nearest")
        return wide[:, :, first % 2 : first % 2 + last - first]

    return _convolution(conv, doubled, 2 * x.shape[2], 2 * x.shape[3], rows)


def _convolution(conv: nn.Conv2d, source: Rows, height: int, width: int, rows: int) -> Tensor:
    """The 3x3 convolution, zero-padded by one, of an input that is made strip by strip: [B, D, height, width]."""
    out: Tensor | None = None
    for strip in _strips(height, rows):
        first, last = max(strip.start - 1, 0), min(strip.stop + 1, height)
        zeros = (0, 0, int(strip.start == 0), int(strip.stop == height))
        part = conv(F.pad(source(first, last), zeros))[:, :, 1:-1]
        if out is None:
            out = part.new_empty(len(part), conv.out_channels, height, width)
        out[:, :, strip] = part
    assert out is not None
    return out


def _strips(height: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))
