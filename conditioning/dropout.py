"""Random replacement of captions by the null prompt, which trains classifier-free guidance.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1, line 2: the condition of an example is
discarded with probability p_uncond, so that one network learns the conditional and the unconditional score.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dropped_rows(probability: float, uniform: Tensor) -> Tensor:
    """Which rows [B] (bool) lose their caption: each with `probability`, decided by its number in [0, 1).

    Raises:
        ValueError: `probability` outside [0, 1].
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability is {probability}, expected a number in [0, 1]")
    return uniform < probability


def drop_captions(tokens: Tensor, null_tokens: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Replace whole captions by the null prompt before they are encoded.

    Args:
        tokens: [B, ...] long token rows.
        null_tokens: [...] the token row of the null prompt, the empty string for CLIP.
        probability: chance of each row to be replaced, in [0, 1].
        uniform: [B] numbers drawn from [0, 1), one for each row.

    Returns:
        [B, ...] token rows; the input is left as it was.

    Raises:
        ValueError: `probability` outside [0, 1], or `null_tokens` of another shape than a row.
    """
    if null_tokens.shape != tokens.shape[1:]:
        raise ValueError(f"null_tokens has shape {tuple(null_tokens.shape)}, expected {tuple(tokens.shape[1:])}")
    dropped = dropped_rows(probability, uniform).to(tokens.device)
    return torch.where(dropped.reshape(-1, *[1] * (tokens.ndim - 1)), null_tokens.to(tokens), tokens)
