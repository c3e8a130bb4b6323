"""The kinds of text encoder, chosen by `text_encoder.type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import draccus

from ldm.config.common import require_at_least


@dataclass(frozen=True)
class TextEncoderConfig(draccus.ChoiceRegistry):  # type: ignore[misc]
    """How a caption becomes the U-Net's context; `type` chooses the kind."""


@TextEncoderConfig.register_subclass("clip")
@dataclass(frozen=True)
class PretrainedClip(TextEncoderConfig):
    """A CLIP text tower from a model folder or hub id with `text_encoder/` and `tokenizer/`, or from one folder."""

    path: str = "openai/clip-vit-large-patch14"
    clip_skip: int = 0
    trainable: bool = False


@TextEncoderConfig.register_subclass("clip_from_scratch")
@dataclass(frozen=True)
class ScratchClip(TextEncoderConfig):
    """A CLIP-architecture text transformer trained jointly with the U-Net, its BPE learnt from the captions."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    vocab_size: int = 4096
    max_length: int = 77


@TextEncoderConfig.register_subclass("pretrained")
@dataclass(frozen=True)
class PretrainedText(TextEncoderConfig):
    """That of the model in `pretrained`."""

    trainable: bool = False


@TextEncoderConfig.register_subclass("open_clip")
@dataclass(frozen=True)
class OpenClip(TextEncoderConfig):
    """A text tower of open_clip, exported as a plain CLIP; `clip_skip` 1 takes the penultimate states, as SD 2.

    `name` is an architecture with `pretrained`, a tag or a checkpoint file, or `local-dir:FOLDER`, `hf-hub:OWNER/NAME`.
    With `vocabulary` captions it keeps the tokens of the training captions only, for a tower that learnt no others.
    """

    name: str = "ViT-H-14"
    pretrained: str | None = None
    clip_skip: int = 1
    vocabulary: Literal["whole", "captions"] = "whole"
    trainable: bool = False


@TextEncoderConfig.register_subclass("clip_dual")
@dataclass(frozen=True)
class DualClip(TextEncoderConfig):
    """Two CLIP text towers side by side, as in SDXL; `path` is a model folder or hub id in SDXL's layout.

    `second_path` takes the second one from elsewhere: a folder or hub id as for `clip`.
    """

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    second_path: str | None = None
    trainable: bool = False


@TextEncoderConfig.register_subclass("t5")
@dataclass(frozen=True)
class PretrainedT5(TextEncoderConfig):
    """The encoder of a T5, mT5 or UMT5 from a folder or hub id; captions are cut at `max_length` tokens."""

    path: str = "google-t5/t5-base"
    max_length: int = 128
    trainable: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, "text_encoder", 1, "max_length")


@TextEncoderConfig.register_subclass("transformers")
@dataclass(frozen=True)
class PretrainedTransformer(TextEncoderConfig):
    """Any text encoder that transformers' AutoModel reads; `max_length` null takes the model's own."""

    path: str = "sentence-transformers/all-MiniLM-L6-v2"
    max_length: int | None = None
    trainable: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, "text_encoder", 1, "max_length")
