"""Labels that captions name, such as a class or a style."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder import label_logits

UNLABELLED = -100
"""In the place of a class: the row does not count."""


def named_classes(captions: Sequence[str], labels: Sequence[str]) -> list[int]:
    """The class that each caption names in whole words; `UNLABELLED` where it names none or several."""
    words = [re.compile(rf"(?<!\w){re.escape(label)}(?!\w)", re.IGNORECASE) for label in labels]
    named = [[index for index, word in enumerate(words) if word.search(caption)] for caption in captions]
    return [found[0] if len(found) == 1 else UNLABELLED for found in named]


def class_indices(captions: Sequence[str], labels: Sequence[str]) -> Tensor:
    """`named_classes` as int64 [B]."""
    return torch.tensor(named_classes(captions, labels), dtype=torch.int64)


class Judged(NamedTuple):
    """Scalars over the rows of a batch: the cross-entropy of those that have a class, how many are right, how many
    have one."""

    loss: Tensor
    right: Tensor
    labelled: Tensor


def judged(logits: Tensor, target: Tensor) -> Judged:
    """Sums over logits [B, K] and classes [B], `UNLABELLED` among them; all 0 where no row has a class."""
    loss = F.cross_entropy(logits, target, ignore_index=UNLABELLED, reduction="sum")
    return Judged(loss, (logits.detach().argmax(1) == target).sum(), (target != UNLABELLED).sum())


@dataclass(frozen=True)
class LatentLabels:
    """Labels that a caption names and that the latents are to tell; `temperature` in units of the raw latents."""

    names: tuple[str, ...]
    weight: float
    temperature: float

    def loss(self, mean: Tensor, captions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted cross-entropy (`autoencoder.label_logits`) of posterior means [B, C, h, w], and what to log.

        A picture without a label counts as zero, so that the loss is the same however a batch is cut. Logged are the
        cross-entropy, the share of pictures whose latents tell their label, and the share of those that have one.
        """
        target = class_indices(captions, self.names).to(mean.device, non_blocking=True)
        found = judged(label_logits(mean.float(), len(self.names), self.temperature), target)
        loss, right, labelled = (value / len(mean) for value in found)
        return self.weight * loss, {"label": loss.detach(), "label_right": right, "labelled": labelled}
