"""What one training step of a classifier of noisy latents computes (Dhariwal & Nichol 2021, section 4.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import LatentCodec
from ldm.data.latents import LatentBatch
from ldm.process import Objective
from ldm.sampling import randn_rows
from ldm.seeds import generator

UNLABELLED = -100
"""In the place of a class: the row does not count."""


def class_indices(captions: Sequence[str], labels: Sequence[str]) -> Tensor:
    """The class that each caption names in whole words, int64 [B]; `UNLABELLED` where it names none or several."""
    words = [re.compile(rf"\b{re.escape(label)}\b", re.IGNORECASE) for label in labels]
    named = [[index for index, word in enumerate(words) if word.search(caption)] for caption in captions]
    return torch.tensor([found[0] if len(found) == 1 else UNLABELLED for found in named])


@dataclass(frozen=True)
class ClassifierTask:
    """The parts of a classifier's training, built and placed; only `objective`'s noising is used."""

    model: nn.Module
    codec: LatentCodec
    objective: Objective
    labels: tuple[str, ...]
    seed: int

    def loss(self, batch: LatentBatch, step: int, global_size: int) -> dict[str, Tensor]:
        """Cross-entropy of the class that the caption names, and the accuracy, over the rows that have one.

        Noise and timesteps are drawn as in stage two: one generator a row, timesteps stratified over the global batch.
        """
        rows = [generator(self.seed, "noise", step, row) for row in batch.rows]
        x0 = self.codec.from_moments(batch.moments)
        offset = torch.rand((), generator=generator(self.seed, "timestep", step))
        u = (offset + torch.tensor(batch.rows) / global_size) % 1.0
        noised = self.objective.noise(x0, randn_rows(x0.shape, rows).to(x0), u)
        target = class_indices(batch.captions, self.labels).to(x0.device)
        logits = self.model(noised.x_t, noised.t).float()
        count = (target != UNLABELLED).sum().clamp(min=1)
        loss = F.cross_entropy(logits, target, ignore_index=UNLABELLED, reduction="sum") / count
        return {"loss": loss, "accuracy": (logits.detach().argmax(1) == target).sum() / count}
