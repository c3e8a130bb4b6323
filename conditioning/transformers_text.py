"""Any text encoder of the transformers library, through its Auto classes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from conditioning.encoder import FOLDERS, TextEncoder
from conditioning.types import Conditioning

UNLIMITED = 10**6
"""transformers writes 1e30 for a tokenizer without limit."""

READING: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
"""How weights are read: never from pickles, and with a report."""

EXTRA = "this text encoder needs the package transformers: pip install 'ldm[text]'"


class TransformersTextEncoder(TextEncoder):
    """The last hidden states of a transformers model, its padding masked, and their mean as the pooled vector.

    A token row [2, L] holds ids and attention mask. The mean over the tokens (Reimers & Gurevych 2019, section 3) is
    the one summary that every model has; sentence encoders are trained for it. A pooler of the model's own is kept
    and not trained.

    Args:
        tokenizer, model: of transformers; an encoder-decoder model gives its encoder.
        max_length: positions of a row; None takes the tokenizer's or else the model's own limit.
        trainable: whether the parameters take gradients.

    Raises:
        ValueError: `max_length` exceeds the model's positions, or there is no limit to take.
    """

    def __init__(self, tokenizer: Any, model: Any, max_length: int | None = None, trainable: bool = False) -> None:
        super().__init__()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.model = model.requires_grad_(trainable)
        if getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)
        self.trainable = trainable
        self.tokenizer.model_max_length = _length(tokenizer, model.config, max_length)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def max_length(self) -> int:
        """L, the positions of a row."""
        return int(self.tokenizer.model_max_length)

    @property
    def context_dim(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def pooled_dim(self) -> int:
        return self.context_dim

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        classes = type(self.model).__name__, type(self.tokenizer).__name__
        return {folder: ("transformers", name) for folder, name in zip(FOLDERS, classes, strict=True)}

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids and attention mask [B, 2, L]; the first position counts as a token even where a text has none."""
        rows = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        mask = rows["attention_mask"].clone()
        mask[:, 0] = 1
        return torch.stack([rows["input_ids"], mask], dim=1)

    def truncated(self, text: str) -> str | None:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        return str(self.tokenizer.decode(ids[room:])) if len(ids) > room else None

    def encode(self, tokens: Tensor) -> Conditioning:
        """Context [B, L, D], its mask, and the mean [B, D] over the tokens."""
        ids, mask = tokens.to(self.device).unbind(1)
        context: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(context.dtype)
        return Conditioning(context, mask.bool(), (context * weights).sum(1) / weights.sum(1))

    def save_parts(self, folder: Path) -> None:
        text_encoder, tokenizer = (folder / name for name in FOLDERS)
        self.model.save_pretrained(text_encoder)
        self.tokenizer.save_pretrained(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        text_encoder_folder: str | os.PathLike[str],
        tokenizer_folder: str | os.PathLike[str],
        max_length: int | None = None,
        trainable: bool = False,
    ) -> Self:
        """Read model and tokenizer, the weights from safetensors alone, in float32.

        Raises:
            ValueError: transformers is missing, or one of the two cannot be read or does not fit the other.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ValueError(EXTRA) from error
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
                model, report = cls._read(text_encoder_folder)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ValueError(f"{text_encoder_folder}: transformers cannot read it: {error}") from error
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(f"{text_encoder_folder}: its weights lack {missing[0]} ({len(missing)} missing)")
        _require_embeddings(tokenizer, model)
        return cls(tokenizer, model, max_length, trainable)

    @classmethod
    def _read(cls, folder: str | os.PathLike[str]) -> tuple[Any, Any]:
        """The model in float32, and transformers' report on weights that are missing or left over."""
        from transformers import AutoModel

        model, report = AutoModel.from_pretrained(folder, **READING)
        return model.get_encoder() if model.config.is_encoder_decoder else model, report


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report, which names weights that nobody here needs (a decoder's, a head's)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require_embeddings(tokenizer: Any, model: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"tokenizer has {len(tokenizer)} ids, the model takes {rows}")


def _length(tokenizer: Any, config: Any, wished: int | None) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    own = tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED else positions
    length = own if wished is None else wished
    if length is None:
        raise ValueError("max_length is null, and neither tokenizer nor model has a limit; give a number of tokens")
    if length < 1 or (positions is not None and length > positions):
        raise ValueError(f"max_length is {length}; this text encoder takes 1 to {positions or 'any number of'} tokens")
    return int(length)
