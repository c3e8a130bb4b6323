"""Loss scaling for fp16: several optimisers behind accelerate's one gradient scaler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.training.sharding import gathered


class LossScaling:
    """Clips and steps with gradients that `accelerator.backward` may have scaled (Micikevicius et al. 2018, sec. 3.2).

    accelerate's own optimiser wrapper ends the scaler's round after every optimiser, which would divide the gradients
    of a second one twice. So the optimisers stay unwrapped, each is unscaled where it is clipped, and the round ends
    once an optimiser step. Without a scaler (fp32 and bf16) nothing is scaled.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler

    @property
    def halvings(self) -> int:
        """How many updates in a row may overflow while the scale comes down to one."""
        return 0 if self.scaler is None else max(0, math.ceil(math.log2(self.scaler.get_scale())))

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float | None
    ) -> Tensor:
        """Clips the gradients' total norm to `max_norm` (None: leaves them); returns the norm from before, unscaled."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return gathered(nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm))

    def step(self, *optimizers: torch.optim.Optimizer) -> None:
        """One update of every optimiser, each of which was clipped."""
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def skip(self) -> None:
        """Ends a step whose gradients or losses were not finite, with half the scale."""
        if self.scaler is not None:
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

    def parts(self) -> dict[str, LossScaling]:
        """What belongs into a run's state: this, where anything is scaled."""
        return {} if self.scaler is None else {"loss_scale": self}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the scale of a state."""
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state))
