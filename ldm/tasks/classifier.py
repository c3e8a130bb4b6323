"""What one training step of a classifier of noisy latents computes (Dhariwal & Nichol 2021, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoencoder import LatentCodec
from ldm.data.latents import LatentBatch
from ldm.process import Objective
from ldm.sampling import randn_rows
from ldm.seeds import generator
from ldm.tasks.labels import class_indices, judged


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
        found = judged(self.model(noised.x_t, noised.t).float(), target)
        count = found.labelled.clamp(min=1)
        return {"loss": found.loss / count, "accuracy": found.right / count}
