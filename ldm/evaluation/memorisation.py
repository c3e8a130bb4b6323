"""Whether generated pictures are copies of training pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ldm.data.transforms import to_images
from ldm.evaluation.distribution import nearest
from ldm.evaluation.grid import image_grid

QUANTILE = 0.05
"""The share of held-out pictures that count as near-duplicates of a training picture: what chance alone gives."""


@dataclass(frozen=True)
class Neighbours:
    """Distance to the nearest training picture, and which that is, of every picture: [N] and int64 [N]."""

    distances: Tensor
    indices: Tensor

    @classmethod
    def of(cls, features: Tensor, training: Tensor) -> Neighbours:
        """Euclidean distances between features [N, D] and those of the training pictures [M, D]."""
        return cls(*nearest(features, training))


def threshold(held_out: Neighbours) -> float:
    """The distance below which a picture counts as a near-duplicate: `QUANTILE` of held-out pictures lie below it."""
    return float(torch.quantile(held_out.distances, QUANTILE))


def near_duplicates(generated: Neighbours, held_out: Neighbours) -> Tensor:
    """Which generated pictures are nearer to a training picture than all but `QUANTILE` of held-out ones: bool [N].

    A model that copies has a larger share of them than `QUANTILE`; one that draws as new pictures as the held-out ones
    are has about that share.
    """
    return generated.distances < threshold(held_out)


def nearest_pairs(images: Tensor, originals: Tensor, distances: Tensor, limit: float) -> Image.Image:
    """Generated pictures [K, 3, H, W] above their nearest training pictures, the distances beside the threshold."""
    labels = ["generated"] * len(images) + [f"training, {d:.2f} ({limit:.2f})" for d in distances.tolist()]
    return image_grid(to_images(images) + to_images(originals), len(images), labels, min_side=96)
