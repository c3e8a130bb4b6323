"""A classifier that reads a label, such as the style, from pictures; trained here, on labelled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.evaluation.features import LookFeatures
from ldm.seeds import generator

RECIPE = "2"
"""Counts what changes here, or in `LookFeatures`, what a reader would be."""
EPOCHS, LEAST_STEPS, BATCH = 6, 60, 64
LOOK_RATE, HEAD_RATE, WARM_UP = 3e-4, 1e-3, 0.1
SIDE = 128
MIN_SPREAD = 1e-3
MEASURED = 2048


class LabelReader(nn.Module):
    """Channel statistics of EfficientNet-Lite0's stages, standardised, and a linear layer on them.

    Args:
        names: the labels that it can tell.

    Raises:
        ValueError: there are fewer than two different labels, or the packaged weights are not installed.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = sorted(set(names))
        if len(self.names) < 2:
            raise ValueError(f"a classifier needs two different labels, got only {', '.join(self.names)}")
        self.look = LookFeatures()
        self.register_buffer("mean", torch.zeros(self.look.dim))
        self.register_buffer("spread", torch.ones(self.look.dim))
        self.head = nn.Linear(self.look.dim, len(self.names))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, labels] of images [B, 3, H, W] in [-1, 1], whose longer side is brought to 128 px."""
        logits: Tensor = self.head((self._looks(x) - self.mean) / self.spread)
        return logits

    def correct(self, logits: Tensor, labels: Sequence[str]) -> Tensor:
        """Whether each picture is read as its label: bool [N]; a label that was never trained is never right."""
        return torch.tensor([self.names[i] == name for i, name in zip(logits.argmax(1).tolist(), labels, strict=True)])

    def fit(self, images: Tensor, labels: Sequence[str], progress: Callable[[range], Any] = iter) -> None:
        """Trains all of it by AdamW at a one-cycle rate (Smith 2018), each picture mirrored half of the time.

        Args:
            images: uint8 [N, 3, H, W] on the CPU, as `pixels` gives them.
        """
        device = self.head.weight.device
        target = torch.tensor([self.names.index(label) for label in labels])
        self._standardise(torch.split(images[:: -(-len(images) // MEASURED)], BATCH))
        rates = [
            {"params": self.look.requires_grad_(True).parameters(), "lr": LOOK_RATE},
            {"params": self.head.parameters(), "lr": HEAD_RATE},
        ]
        size = min(BATCH, len(images))
        steps = max(LEAST_STEPS, EPOCHS * len(images) // size)
        optimizer = torch.optim.AdamW(rates, weight_decay=1e-2)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, [LOOK_RATE, HEAD_RATE], steps + 1, pct_start=WARM_UP)
        draws = generator("label reader")
        epochs = -(-steps * size // len(images))
        rows = torch.cat([torch.randperm(len(images), generator=draws) for _ in range(epochs)])
        for step in progress(range(steps)):
            chosen = rows[step * size : (step + 1) * size]
            x = images[chosen]
            mirrored = torch.rand(len(x), 1, 1, 1, generator=draws) < 0.5
            logits = self(_images(torch.where(mirrored, x.flip(3), x)).to(device))
            optimizer.zero_grad()
            F.cross_entropy(logits, target[chosen].to(device)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
        self.requires_grad_(False)

    @torch.no_grad()
    def _standardise(self, batches: Iterable[Tensor]) -> None:
        features = torch.cat([self._looks(_images(batch).to(self.mean.device)) for batch in batches])
        self.mean.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp(min=MIN_SPREAD))

    def _looks(self, x: Tensor) -> Tensor:
        """The features of images; small ones are enlarged, or the network's first steps would skip what shades them."""
        features: Tensor = self.look(_scaled(x.float(), SIDE / max(x.shape[2:])))
        return features


def _scaled(x: Tensor, factor: float) -> Tensor:
    """Images [B, 3, H, W] with their sides times the factor."""
    size = [max(1, round(side * factor)) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def pixels(x: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], their longer side reduced to 128 px where it is above, as uint8 on the CPU."""
    small = _scaled(x.float(), min(1.0, SIDE / max(x.shape[2:])))
    return (small.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()


def _images(levels: Tensor) -> Tensor:
    """What `pixels` gave, back in [-1, 1]."""
    return levels.float() / 127.5 - 1
