"""A linear classifier on frozen features, which reads an attribute such as the style from pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY = 1e-3
"""Half of it times the squared norm of the weights is added to the mean cross-entropy."""
MIN_SPREAD = 1e-6


class LinearProbe:
    """Multinomial logistic regression on standardised features [N, D], in float64, fitted to convergence by L-BFGS.

    Raises:
        ValueError: there are fewer than two different labels.
    """

    def __init__(self, features: Tensor, labels: Sequence[str]) -> None:
        self.names = sorted(set(labels))
        if len(self.names) < 2:
            raise ValueError(f"a classifier needs two different labels, got only {', '.join(self.names)}")
        x, self.mean = features.double(), features.double().mean(0)
        self.spread = x.std(0).clamp(min=MIN_SPREAD)
        target = torch.tensor([self.names.index(label) for label in labels])
        self.weight = torch.zeros(x.shape[1], len(self.names), dtype=torch.float64)
        self.bias = torch.zeros(len(self.names), dtype=torch.float64)
        self._fit(self._standardised(x), target)

    def correct(self, features: Tensor, labels: Sequence[str]) -> Tensor:
        """Whether each picture is classified as its label: bool [N]; a label that was never trained is never right."""
        found = (self._standardised(features.double()) @ self.weight + self.bias).argmax(1).tolist()
        return torch.tensor([self.names[i] == label for i, label in zip(found, labels, strict=True)])

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread

    @torch.enable_grad()
    def _fit(self, x: Tensor, target: Tensor) -> None:
        parameters = [self.weight.requires_grad_(), self.bias.requires_grad_()]
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ self.weight + self.bias, target) + DECAY / 2 * self.weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        for parameter in parameters:
            parameter.requires_grad_(False)
