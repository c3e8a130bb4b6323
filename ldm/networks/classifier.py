"""A classifier of noisy latents for classifier guidance (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .blocks import DownBlock2D, MidBlock2D
from .config import DownBlockType, UNetConfig, UpBlockType
from .embeddings import TimestepEmbedding, sinusoidal_embedding
from .unet import initialise

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """The contracting half of a U-Net without text, and the names of the classes.

    Raises:
        ValueError: naming the key, its value and what is accepted.
    """

    labels: tuple[str, ...] = ()
    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (64, 128)
    layers_per_block: int = 1
    norm_num_groups: int = 16

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"`labels` is {list(self.labels)}; it must name at least 2 classes, each once")
        self.body()

    def body(self) -> UNetConfig:
        """The U-Net whose contracting half this is."""
        down: tuple[DownBlockType, ...] = tuple("DownBlock2D" for _ in self.block_out_channels)
        up: tuple[UpBlockType, ...] = tuple("UpBlock2D" for _ in self.block_out_channels)
        return UNetConfig(
            in_channels=self.in_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            down_block_types=down,
            mid_block_type="UNetMidBlock2D",
            up_block_types=up,
        )


class LatentClassifier(nn.Module):
    """log p(y | x_t) of every class y for noisy latents at a timestep."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        body, widths = config.body(), config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], body.time_embed_dim)
        inputs, last = (widths[0], *widths), len(widths) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock2D(body, level, inputs[i], downsample=i < last) for i, level in enumerate(body.down_levels())
        )
        self.mid_block = MidBlock2D(body, body.mid_level())
        self.norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], body.norm_eps)
        self.linear_out = nn.Linear(widths[-1], len(config.labels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits [B, classes] for noisy latents [B, C, h, w] and timesteps [B]."""
        waves = sinusoidal_embedding(t, self.config.block_out_channels[0]).to(x.dtype)
        emb = nn.functional.silu(self.time_embedding(waves))
        h = self.conv_in(x)
        for down in self.down_blocks:
            h, _ = down(h, emb, None, None)
        h = nn.functional.silu(self.norm_out(self.mid_block(h, emb, None, None)))
        logits: Tensor = self.linear_out(h.mean((2, 3)))
        return logits

    def log_prob(self, label: str) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_t [B, C, h, w], t [B]) -> log p(label | x_t) [B].

        Raises:
            ValueError: the label is none of the classes.
        """
        if label not in self.config.labels:
            raise ValueError(f"label is {label!r}; this classifier knows {', '.join(self.config.labels)}")
        index = self.config.labels.index(label)
        return lambda x, t: self(x, t.to(x.device)).log_softmax(1)[:, index]

    @classmethod
    def from_scratch(cls, config: ClassifierConfig, generator: torch.Generator) -> LatentClassifier:
        """A network to train, a function of the generator alone; its first answer is the same for all classes."""
        with torch.device("meta"):
            classifier = cls(config)
        classifier.to_empty(device=generator.device)
        with torch.no_grad():
            for module in classifier.modules():
                initialise(module, generator)
            for parameter in classifier.linear_out.parameters():
                parameter.zero_()
        return classifier

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> LatentClassifier:
        """Reads what `save_pretrained` wrote.

        Raises:
            ValueError: one sentence naming the file that is missing or at fault.
        """
        path = Path(folder)
        try:
            values: dict[str, Any] = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
            lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
            classifier = cls(ClassifierConfig(**{**values, **lists}))
            classifier.load_state_dict(safetensors.torch.load_file(path / WEIGHTS_NAME), strict=True)
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} is not a classifier: {' '.join(str(error).split())}") from error
        return classifier.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        safetensors.torch.save_file(state, path / WEIGHTS_NAME, metadata={"format": "pt"})
        (path / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
