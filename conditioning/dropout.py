"""Random replacement of captions by the null prompt, which trains classifier-free guidance.

Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1, line 2: the condition of an example is
discarded with probability p_uncond, so that one network learns the conditional and the unconditional score.
"""

from __future__ import annotations

import torch
from torch import Tensor


def drop_captions(ids: Tensor, null_ids: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Replace whole captions by the null prompt before they are encoded.

    Args:
        ids: [B, L] long token ids.
        null_ids: [L] token ids of the null prompt, the empty string for CLIP.
        probability: chance of each row to be replaced, in [0, 1].
        uniform: [B] numbers drawn from [0, 1), one for each row.

    Returns:
        [B, L] ids; the input is left as it was.

    Raises:
        ValueError: `probability` outside [0, 1], or `null_ids` of another length than a row.
    """
    if null_ids.shape != ids.shape[1:]:
        raise ValueError(f"null_ids has shape {tuple(null_ids.shape)}, expected {tuple(ids.shape[1:])}")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability is {probability}, expected a number in [0, 1]")
    dropped = (uniform < probability).to(ids.device)
    return torch.where(dropped[:, None], null_ids.to(ids), ids)
