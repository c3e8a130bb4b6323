"""Low-rank adaptation (Hu et al. 2021): W + s · (alpha / r) · B A, merged into the weights and taken out again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conditioning import ClipTextEncoder, DualTextEncoder, TextEncoder, TransformersTextEncoder
from ldm.interop.tensors import ModelError
from ldm.networks import UNet

Layers = Mapping[str, "LowRank"]
ADAPTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LowRank:
    """The update of one linear or convolution layer.

    Attributes:
        down: A, [r, in] or [r, in, kh, kw].
        up: B, [out, r] or [out, r, 1, 1].
        scale: alpha / r, or alpha / sqrt(r) where a file says so (Kalajdzievski 2023).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        """The update (Hu et al. 2021, equation 3) in float32, with the shape and on the device of `weight`.

        A convolution by A and a 1 x 1 convolution by B are one convolution by the product of both as matrices.
        """
        up, down = (factor.to(weight.device, torch.float32).flatten(1) for factor in (self.up, self.down))
        return (self.scale * (up @ down)).reshape(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Whether this is an update of a weight [out, in, ...]."""
        return self.up.shape[0] == weight.shape[0] and self.down[0].numel() == weight[0].numel()


@dataclass(frozen=True)
class Lora:
    """The updates of a model by part (`unet`, `text_encoder`, `text_encoder_2`) and layer; `source` is the file."""

    parts: Mapping[str, Layers]
    source: str = "the LoRA"


def adapted_parts(unet: UNet, text_encoder: TextEncoder) -> dict[str, nn.Module]:
    """The networks of a model that a LoRA can change, under the names of diffusers' pipeline."""
    match text_encoder:
        case DualTextEncoder():
            towers = {"text_encoder": text_encoder.first.model, "text_encoder_2": text_encoder.second.model}
        case ClipTextEncoder() | TransformersTextEncoder():
            towers = {"text_encoder": text_encoder.model}
        case _:
            towers = {}
    return {"unet": unet, **towers}


class MergedLoras:
    """LoRAs added to the weights of a model, whose own weights are kept until they are put back.

    Args:
        parts: the networks by name, see `adapted_parts`.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = parts
        self._originals: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def add(self, lora: Lora, scale: float = 1.0) -> None:
        """Adds one more, `scale` times; nothing is changed where it does not fit.

        Raises:
            ModelError: naming the layer that the model lacks or has in another shape.
            ValueError: `scale` is not finite.
        """
        if not math.isfinite(scale):
            raise ValueError(f"the scale of {lora.source} is {scale}; it must be a finite number")
        weights = self._fitting(lora)
        for (part, name), weight in weights.items():
            self._originals.setdefault((part, name), weight.detach().clone())
            weight.copy_(weight.float() + scale * lora.parts[part][name].delta(weight))

    @torch.no_grad()
    def eject(self) -> None:
        """Puts the model's own weights back, bit for bit."""
        for (part, name), original in self._originals.items():
            self.parts[part].get_submodule(name).weight.copy_(original)  # type: ignore[operator]
        self._originals.clear()

    def _fitting(self, lora: Lora) -> dict[tuple[str, str], Tensor]:
        return {
            (part, name): self._weight(lora, part, name, low_rank)
            for part, layers in lora.parts.items()
            for name, low_rank in layers.items()
        }

    def _weight(self, lora: Lora, part: str, name: str, low_rank: LowRank) -> Tensor:
        if part not in self.parts:
            raise ModelError(f"{lora.source} changes the {part}, which this model has not")
        try:
            layer = self.parts[part].get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, ADAPTED):
            raise ModelError(f"{lora.source} changes the layer `{part}.{name}`, which this model has not")
        if not low_rank.fits(layer.weight):
            wanted, found = list(layer.weight.shape), [list(low_rank.up.shape), list(low_rank.down.shape)]
            raise ModelError(
                f"{lora.source}: `{part}.{name}` has factors of shape {found[0]} and {found[1]}, which do not make the "
                f"{wanted} of this model"
            )
        return layer.weight
