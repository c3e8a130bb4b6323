"""Timestep features and the two-layer networks that embed them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
}


def sinusoidal_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """Sines and cosines of `t` at geometric frequencies (Vaswani et al. 2017, section 3.5).

    frequency_i = 10000^(-i / (dim/2 - freq_shift)), i = 0 .. dim/2 - 1.

    Args:
        t: timesteps [N], any real values.
        dim: width of the result; an odd width ends in a zero column.
        flip_sin_to_cos: cosines first instead of sines first.
        freq_shift: 0 as in latent diffusion, 1 as in DDPM.

    Returns:
        float32 [N, dim] in [-1, 1].
    """
    half = dim // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.float()[:, None] * exponents.exp()[None, :]
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Linear, activation, linear; with `cond_features` a further condition is added to the input."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation = F.silu,
        cond_features: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)
        self.cond_proj = nn.Linear(cond_features, in_features, bias=False) if cond_features else None

    def forward(self, features: Tensor, cond: Tensor | None = None) -> Tensor:
        """Maps [B, in_features], and `cond` [B, cond_features], to [B, out_features]."""
        if self.cond_proj is not None and cond is not None:
            features = features + self.cond_proj(cond)
        features = self.activation(self.linear_1(features))
        features = self.linear_2(features)
        return features


def uncropped(rows: int, height: int, width: int) -> Tensor:
    """The six sizes [rows, 6] of SDXL for a whole picture: original size, crop corner 0, 0 and target size."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(rows, 6)


class AttentionPooling(nn.Module):
    """One vector from many: their mean, with a learnt offset, attends to itself and to all of them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.k_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps [B, L, dim] to [B, dim]; `mask` [B, 1, 1, L] is True for the tokens that count."""
        if mask is None:
            mean = tokens.mean(dim=1, keepdim=True)
        else:
            counts = mask.flatten(1)[..., None].to(tokens.dtype)
            mean = (tokens * counts).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True)
            mask = F.pad(mask, (1, 0), value=True)
        mean = mean + self.positional_embedding
        tokens = torch.cat([mean, tokens], dim=1)
        q, k, v = (
            projection.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        pooled: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1)
        return pooled


class TextEmbedding(nn.Module):
    """The pooled context, which every residual block then receives (Saharia et al. 2022, Imagen, section 2.5)."""

    def __init__(self, in_features: int, out_features: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_features)
        self.pool = AttentionPooling(in_features, heads)
        self.proj = nn.Linear(in_features, out_features)
        self.norm2 = nn.LayerNorm(out_features)

    def forward(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps context [B, L, D] to [B, out_features]; diffusers knows no `mask` [B, 1, 1, L] here."""
        features: Tensor = self.norm2(self.proj(self.pool(self.norm1(context), mask)))
        return features


class TextTimeEmbedding(nn.Module):
    """Pooled text beside the sinusoids of the six sizes (Podell et al. 2023, SDXL, section 2.2)."""

    def __init__(self, in_features: int, out_features: int, waves: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.waves = waves
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, pooled: Tensor, size_ids: Tensor) -> Tensor:
        """Maps pooled [B, P] and size_ids [B, 6] to [B, out_features]."""
        sizes = self.waves(size_ids.flatten()).reshape(len(size_ids), -1)
        features: Tensor = torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1)
        features = F.silu(self.linear_1(features))
        features = self.linear_2(features)
        return features
