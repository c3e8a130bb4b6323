"""Encoder and decoder of the autoencoder; attributes carry diffusers' names, so state dicts match."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoencoder.config import BlocksConfig

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), 1x1 shortcut if C is not D: [B, C, H, W] -> [B, D, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, act_fn: str) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.nonlinearity = ACTIVATIONS[act_fn]()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out: Tensor = self.to_out[0](mixed).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + out


class Downsample(nn.Module):
    """Stride-two convolution, padded on the right and bottom only: [B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution: [B, C, H, W] -> [B, C, 2H, 2W].

    On a CPU both are one transposed convolution, which multiplies 4 numbers for each 9 of the convolution after the
    doubling and is twice as fast forwards and backwards, with the same result up to rounding. A convolution
    with another padding mode or with hooks, such as an adapter's, or one of another class, is run as it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not conv._forward_hooks
        if x.device.type == "cpu" and plain:
            return F.conv_transpose2d(x, doubling_kernel(conv.weight), conv.bias, stride=2, padding=1)
        out: Tensor = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def doubling_kernel(weight: Tensor) -> Tensor:
    """Kernel [C, D, 4, 4] that does with stride 2 and padding 1, transposed, what `weight` does to a doubled picture.

    Doubling is the transposed convolution of stride 2 with the 2x2 kernel of ones, so the two in a row are one with
    that kernel convolved with the mirrored weight: along a side (w0, w1, w2) becomes (w2, w2 + w1, w1 + w0, w0).

    Args:
        weight: of a 3x3 convolution with padding 1, [D, C, 3, 3].
    """
    mirrored = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    rows = mirrored[:, :, 1:] + mirrored[:, :, :-1]
    return rows[..., 1:] + rows[..., :-1]


class MidBlock(nn.Module):
    """Residual block, attention (where wanted), residual block, all at the deepest width."""

    def __init__(self, channels: int, config: BlocksConfig) -> None:
        super().__init__()
        groups, act_fn = config.norm_num_groups, config.act_fn
        depth = 1 if config.mid_block_add_attention else 0
        self.attentions = nn.ModuleList(Attention(channels, groups) for _ in range(depth))
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, act_fn) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where wanted."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, attend: bool, config: BlocksConfig) -> None:
        super().__init__()
        groups = config.norm_num_groups
        widths = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList(ResnetBlock(width, out_channels, groups, config.act_fn) for width in widths)
        self.attentions = nn.ModuleList(Attention(out_channels, groups) for _ in range(layers if attend else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class DownLevel(Level):
    """A `Level` that halves the resolution at its end, except for the last one."""

    def __init__(self, index: int, config: BlocksConfig) -> None:
        widths = config.block_out_channels
        attend = config.down_block_types[index].startswith("Attn")
        super().__init__(widths[max(index - 1, 0)], widths[index], config.layers_per_block, attend, config)
        halvings = 0 if index == len(widths) - 1 else 1
        self.downsamplers = nn.ModuleList(Downsample(widths[index]) for _ in range(halvings))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpLevel(Level):
    """A `Level`, one block longer than its mirror image, that doubles the resolution unless it is last."""

    def __init__(self, index: int, config: BlocksConfig) -> None:
        widths = config.block_out_channels[::-1]
        attend = config.up_block_types[index].startswith("Attn")
        super().__init__(widths[max(index - 1, 0)], widths[index], config.layers_per_block + 1, attend, config)
        doublings = 0 if index == len(widths) - 1 else 1
        self.upsamplers = nn.ModuleList(Upsample(widths[index]) for _ in range(doublings))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


def _run(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """block(x); with `recompute`, activations inside the block are computed again in the backward pass."""
    out: Tensor = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
    return out


class Encoder(nn.Module):
    """Image [B, in_channels, H, W] -> moments before quant_conv [B, 2 * latent_channels, H/f, W/f]."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = conv3x3(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(DownLevel(index, config) for index in range(len(widths)))
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = group_norm(config.norm_num_groups, widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            h = _run(block, h, self.gradient_checkpointing)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out


class Decoder(nn.Module):
    """Latent after post_quant_conv [B, latent_channels, h, w] -> image [B, out_channels, f*h, f*w]."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = conv3x3(config.latent_channels, widths[-1])
        self.mid_block = MidBlock(widths[-1], config)
        self.up_blocks = nn.ModuleList(UpLevel(index, config) for index in range(len(widths)))
        self.conv_norm_out = group_norm(config.norm_num_groups, widths[0])
        self.conv_out = conv3x3(widths[0], config.out_channels)
        self.gradient_checkpointing = False

    def features(self, z: Tensor) -> Tensor:
        """What goes into conv_out: [B, block_out_channels[0], f*h, f*w]."""
        h = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            h = _run(block, h, self.gradient_checkpointing)
        return F.silu(self.conv_norm_out(h))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.features(z))
        return out
