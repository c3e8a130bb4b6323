"""The two ways in which a level attends: the spatial transformer, and attention to text and pixels at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHORT = 256
"""Keys up to which attention in bf16 on a CPU is written out: torch's kernel takes up to five times as long there."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v (Vaswani et al. 2017, equation 1).

    Args:
        q, k, v: [B, heads, N, d], [B, heads, L, d] twice.
        mask: bool, broadcast to [B, heads, N, L]; True where a query sees a key, once in every row at least.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    mixed: Tensor = scores.softmax(dim=-1) @ v
    return mixed


class Attention(nn.Module):
    """Multi-head attention and an output projection."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from `x` [B, N, dim] to `context` [B, L, context_dim], to tokens whose `mask` is True.

        `mask` is [B, 1, 1, L], with a True in every row.
        """
        q, k, v = (_split_heads(a, self.heads) for a in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out: Tensor = self.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class JointAttention(nn.Module):
    """Every pixel attends to the text and to all pixels in one softmax, added to the input (Nichol et al. 2022, GLIDE).

    Diffusers' Attention with "added" keys and values.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, norm_num_groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(norm_num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.add_k_proj = nn.Linear(context_dim, channels)
        self.add_v_proj = nn.Linear(context_dim, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H, W]; `context` [B, L, D], `mask` [B, 1, 1, L] or None hides text only."""
        pixels = _tokens(self.group_norm(x))
        keys = torch.cat([self.add_k_proj(context), self.to_k(pixels)], dim=1)
        values = torch.cat([self.add_v_proj(context), self.to_v(pixels)], dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, pixels.shape[1]), value=True)
        q, k, v = (_split_heads(a, self.heads) for a in (self.to_q(pixels), keys, values))
        x = _pixels(self.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2)), x.shape[-2:]) + x
        return x


class GEGLU(nn.Module):
    """x W + b gated by GELU(x V + c) (Shazeer 2020, equation 6)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., dim] to [..., inner_dim]."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., dim] to [..., dim]."""
        x = self.net(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Pre-norm residual self-attention, cross-attention and feed-forward."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Maps tokens [B, N, dim] to [B, N, dim]."""
        normed = self.norm1(x)
        x = self.attn1(normed, normed) + x
        x = self.attn2(self.norm2(x), context, mask) + x
        x = self.ff(self.norm3(x)) + x
        return x


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, between 1x1 projections, added to the input.

    The spatial transformer of Rombach et al. 2022, section 3.3.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_dim: int,
        norm_num_groups: int,
        linear_projection: bool,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=1e-6)
        self.proj_in = _projection(channels, linear_projection)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = _projection(channels, linear_projection)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [B, C, H, W] to [B, C, H, W]; `context` [B, L, D], `mask` [B, 1, 1, L] or None."""
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear_projection else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        size = x.shape[-2:]
        h = _pixels(self.proj_out(h), size) if self.linear_projection else self.proj_out(_pixels(h, size))
        x = h + x
        return x


def _split_heads(a: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] as [B, heads, N, d]."""
    return a.view(*a.shape[:2], heads, -1).transpose(1, 2)


def _projection(channels: int, linear: bool) -> nn.Linear | nn.Conv2d:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, kernel_size=1)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _pixels(tokens: Tensor, size: torch.Size) -> Tensor:
    """[B, N, C] as [B, C, H, W], laid out plane by plane: any other layout would spread through the network, whose
    convolutions would then copy their weights at every call."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size).contiguous()
