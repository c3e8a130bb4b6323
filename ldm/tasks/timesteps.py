"""Which timesteps a training step draws, and what it remembers for the next ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.process import LossHistory, Objective


class TimestepDraw(Protocol):
    """Timesteps for a batch, and their losses back."""

    def draw(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Timesteps and weights, each [B], at the quantiles u [B] in [0, 1) of the training step's distribution."""
        ...

    def learn(self, rows: Sequence[int], t: Tensor, losses: Tensor) -> None:
        """Take note of the losses [B], without the weights, of rows of the global batch."""
        ...

    def parts(self) -> dict[str, ImportanceTimesteps]:
        """What of it a state has to keep, by name."""
        ...


class FixedTimesteps:
    """The objective's own distribution, which no loss changes; at first only its noisiest part, if so asked.

    Step k of the first `curriculum_steps` draws from the noisiest part p of the distribution alone, and p grows
    geometrically from `curriculum_start` to 1. There the caption is all that tells the picture, so that its words for
    places are learnt first; later on the noisy latents show the places themselves and leave little to learn from.
    """

    def __init__(self, objective: Objective, curriculum_steps: int = 0, curriculum_start: float = 1.0) -> None:
        self.objective = objective
        self.curriculum_steps, self.curriculum_start = curriculum_steps, curriculum_start

    def draw(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """See `TimestepDraw`; the weights are 1."""
        left = max(0.0, 1 - step / self.curriculum_steps) if self.curriculum_steps else 0.0
        part = self.curriculum_start**left
        return self.objective.timesteps(1 - (1 - u.double()) * part), torch.ones(len(u))

    def learn(self, rows: Sequence[int], t: Tensor, losses: Tensor) -> None:
        """Nothing is learnt."""

    def parts(self) -> dict[str, ImportanceTimesteps]:
        """Nothing."""
        return {}


class ImportanceTimesteps:
    """Timesteps where losses were large (Nichol & Dhariwal 2021, section 3.3), the same in every process.

    `gather` concatenates a tensor [B, ...] over all processes. Losses that are not finite are forgotten.
    """

    def __init__(self, num_train_timesteps: int, gather: Callable[[Tensor], Tensor]) -> None:
        self.history = LossHistory.empty(num_train_timesteps)
        self.gather = gather

    def draw(self, u: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """See `TimestepDraw`; the weights are 1 / (T·p_t)."""
        return self.history.draw(u)

    def learn(self, rows: Sequence[int], t: Tensor, losses: Tensor) -> None:
        """See `TimestepDraw`; in the order of the rows, so that it does not matter which process had which."""
        entries = torch.stack([torch.tensor(rows).to(losses), t.to(losses), losses.detach()], dim=1)
        everywhere = self.gather(entries).cpu()
        everywhere = everywhere[everywhere[:, 0].argsort()]
        _, steps, values = everywhere[everywhere[:, 2].isfinite()].unbind(1)
        self.history = self.history.updated(steps.long(), values)

    def parts(self) -> dict[str, ImportanceTimesteps]:
        """Itself."""
        return {"timesteps": self}

    def state_dict(self) -> dict[str, Tensor]:
        """The history's tensors."""
        return {"squares": self.history.squares, "counts": self.history.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.history = LossHistory(state["squares"], state["counts"])
