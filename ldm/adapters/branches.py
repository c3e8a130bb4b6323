"""Low-rank branches to train beside the frozen layers of a network (Hu et al. 2021, figure 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from ldm.adapters.adapter import Adapter
from ldm.adapters.lora_files import write_diffusers_lora
from ldm.adapters.low_rank import ADAPTED, Lora, LowRank, MergedLoras


class LoraBranch(nn.Module):
    """x -> (alpha / r) · B A x beside one layer; B starts at zero, A normal with variance 1 / fan-in."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        weight, ones = layer.weight, (1,) * (layer.weight.ndim - 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *ones, device=weight.device))
        self.scale = scale

    def beside(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: the layer's output with the branch's added."""
        if isinstance(layer, nn.Conv2d):
            inner = functional.conv2d(inputs[0], self.down, None, layer.stride, layer.padding, layer.dilation)
            return output + self.scale * functional.conv2d(inner, self.up)
        return output + self.scale * functional.linear(functional.linear(inputs[0], self.down), self.up)


class LoraBranches(Adapter):
    """Branches beside those trainable layers of a model whose names end in one of `targets`; all else is frozen.

    The layers are not touched: a branch is a hook on one, and `eject` takes the hooks away. The state is the factors'.

    Args:
        parts: the networks by name, see `adapted_parts`.
        targets: for each part to adapt, ends of layer names, such as `to_q` or `ff.net.2`.
        rank: r of every branch.
        alpha: the branches count alpha / r times.
        generator: on the CPU, for A.

    Raises:
        ValueError: a target ends no layer's name, or no layer that they end is trainable.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        targets: Mapping[str, Sequence[str]],
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._parts, self._hooks = dict(parts), list[RemovableHandle]()
        self._placed: dict[str, LoraBranch] = {}
        for part, ends in targets.items():
            for name, layer in targeted(parts[part], ends).items():
                if layer.weight.requires_grad:
                    self._placed[f"{part}.{name}"] = LoraBranch(layer, rank, alpha / rank, generator)
        if not self._placed:
            raise ValueError(f"the targets {dict(targets)} are frozen layers, so nothing would be trained")
        for network in parts.values():
            network.requires_grad_(False)
        self.branches = nn.ModuleDict({name.replace(".", "/"): branch for name, branch in self._placed.items()})
        self.inject()

    def inject(self) -> None:
        self.eject()
        for name, branch in self._placed.items():
            part, _, layer = name.partition(".")
            self._hooks.append(self._parts[part].get_submodule(layer).register_forward_hook(branch.beside))

    def eject(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def lora(self) -> Lora:
        """The present factors."""
        found: dict[str, dict[str, LowRank]] = {}
        for name, branch in self._placed.items():
            part, _, layer = name.partition(".")
            factors = LowRank(branch.down.detach().clone(), branch.up.detach().clone(), branch.scale)
            found.setdefault(part, {})[layer] = factors
        return Lora(found)

    @contextmanager
    def merged(self) -> Iterator[None]:
        merged = MergedLoras(self._parts)
        self.eject()
        merged.add(self.lora())
        try:
            yield
        finally:
            merged.eject()
            self.inject()

    def save(self, folder: Path) -> Path:
        """Writes the factors as diffusers' `pytorch_lora_weights.safetensors`."""
        return write_diffusers_lora(self.lora(), folder)


def targeted(network: nn.Module, ends: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear and convolution layers of a network whose names end in one of `ends`.

    Raises:
        ValueError: one of them ends no such layer's name.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, ADAPTED)}
    for end in ends:
        if not any(_ends(name, end) for name in layers):
            raise ValueError(f"{end!r} ends the name of no linear or convolution layer of the {type(network).__name__}")
    return {name: layer for name, layer in layers.items() if any(_ends(name, end) for end in ends)}


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")
