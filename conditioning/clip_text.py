"""CLIP's text tower with its tokenizer, as an encoder of prompts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from conditioning.clip_model import ClipTextConfig, ClipTextModel
from conditioning.encoder import FOLDERS, Fragment, TextEncoder
from conditioning.tokenizer import ClipTokenizer
from conditioning.types import Conditioning
from conditioning.weighting import weighted


class ClipTextEncoder(TextEncoder):
    """Tokenizer and CLIP text model as one condition encoder; CLIP attends to its padding, so there is no mask.

    Args:
        tokenizer: text -> ids.
        model: ids -> hidden states.
        skip_layers: hidden states from so many layers before the last one (`ClipTextModel.forward`).
        trainable: whether the parameters take gradients.
        final_norm: whether the context passes the final layer norm.

    Raises:
        ValueError: the tokenizer gives more ids or longer rows than the model has embeddings for, or
            `skip_layers` leaves no layer.
    """

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        model: ClipTextModel,
        skip_layers: int = 0,
        trainable: bool = False,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        _require_fit(tokenizer, model.config, skip_layers)
        self.tokenizer = tokenizer
        self.model = model.requires_grad_(trainable)
        self.skip_layers, self.final_norm = skip_layers, final_norm
        self.trainable = trainable

    def restricted(self, captions: Iterable[str]) -> ClipTextEncoder:
        """The same encoder for texts of the captions' words, with the tokens of these alone: its table is smaller.

        Weights are copied. Other words are read in smaller pieces, down to bytes.
        """
        tokenizer, ids = self.tokenizer.restricted(captions)
        roles = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        model = self.model.with_vocabulary(ids, *roles)
        return ClipTextEncoder(tokenizer, model, self.skip_layers, self.trainable, self.final_norm)

    @property
    def context_dim(self) -> int:
        return self.model.config.hidden_size

    @property
    def pooled_dim(self) -> int:
        config = self.model.config
        return config.hidden_size if self.model.text_projection is None else config.projection_dim

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        return dict(zip(FOLDERS, self._classes(), strict=True))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids [B, L] (long, CPU) with L the tokenizer's `model_max_length`."""
        return self.tokenizer(texts)

    def windows(self, text: str) -> Tensor:
        """Ids [N, L]: the text cut into pieces of L - 2 tokens, each between start and end token."""
        return self.tokenizer.windows(text)

    def encode(self, tokens: Tensor) -> Conditioning:
        """Context [B, L, D] and pooled vector of ids [B, L], on the model's device."""
        return self.encode_masked(tokens, None)

    def encode_masked(self, tokens: Tensor, attention_mask: Tensor | None) -> Conditioning:
        """The same, with tokens that the others may not look at; see `ClipTextModel.forward`."""
        context, pooled = self.model(tokens.to(self.device), self.skip_layers, self.final_norm, attention_mask)
        return Conditioning(context=context, pooled=pooled)

    def beyond_context(self) -> list[nn.Module]:
        tower, last = self.model.text_model, len(self.model.text_model.encoder.layers) - self.skip_layers
        layers = list(tower.encoder.layers)[last:]
        norm = [] if self.final_norm else [tower.final_layer_norm]
        projection = [] if self.model.text_projection is None else [self.model.text_projection]
        return [*layers, *norm, *projection]

    def encode_fragments(self, fragments: Sequence[Fragment]) -> Conditioning:
        """Weights applied to the context by `compel`; the pooled vector is that of the text without weights."""
        plain = self.encode(self.windows(" ".join(text for text, _ in fragments))[:1])
        return Conditioning(weighted(self, fragments), None, plain.pooled)

    def save_parts(self, folder: Path) -> None:
        self.save_as(folder, *FOLDERS)

    def save_as(self, folder: Path, text_encoder: str, tokenizer: str) -> None:
        """Write model and tokenizer into two subfolders of `folder`."""
        self.model.save_pretrained(folder / text_encoder)
        self.tokenizer.save_pretrained(folder / tokenizer)

    def _classes(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("transformers", self.model.architecture), ("transformers", "CLIPTokenizer")

    @classmethod
    def from_pretrained(
        cls,
        text_encoder_folder: str | os.PathLike[str],
        tokenizer_folder: str | os.PathLike[str],
        skip_layers: int = 0,
        trainable: bool = False,
    ) -> ClipTextEncoder:
        """Read the folders `text_encoder/` and `tokenizer/` of a diffusers pipeline.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a folder is inconsistent, or the two do not fit each other.
        """
        tokenizer = ClipTokenizer.from_pretrained(tokenizer_folder)
        model = ClipTextModel.from_pretrained(text_encoder_folder)
        return cls(tokenizer, model, skip_layers, trainable)


def _require_fit(tokenizer: ClipTokenizer, config: ClipTextConfig, skip_layers: int) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"tokenizer has {tokenizer.vocab_size} ids, the model takes {config.vocab_size}")
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise ValueError(
            f"tokenizer makes rows of {tokenizer.model_max_length} ids,"
            f" the model takes {config.max_position_embeddings}"
        )
    config.require_skippable(skip_layers)
