"""Exponential moving average of weights, updated in one fused call per dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.training.sharding import like, local


def warmed_decay(decay: float, updates: int) -> float:
    """The decay of the update that follows `updates` others."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """Keeps avg <- d·avg + (1 - d)·w, with d warmed up as min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up is TensorFlow's `ExponentialMovingAverage(num_updates)`: early averages forget the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the module's present weights."""
        decay = warmed_decay(self.decay, self.updates)
        self.updates += 1
        current = [local(p.detach()) for p in self.module.parameters()]
        torch._foreach_lerp_([local(average) for average in self.average.values()], current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averaged weights; afterwards its own again, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self._load(self.average)
        try:
            yield
        finally:
            self._load(own)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        for name, value in self.average.items():
            value.copy_(like(state[name], value))
        self.updates = updates

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(weights[name])
