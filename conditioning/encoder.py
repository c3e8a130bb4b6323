"""What every text encoder offers: text -> token rows -> `Conditioning`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from conditioning.types import Conditioning

Fragment = tuple[str, float]
"""A piece of a prompt and the weight of its words, 1 where they are as the encoder gives them."""

FOLDERS = ("text_encoder", "tokenizer")
"""Where a model folder keeps the two halves of an encoder."""


class TextEncoder(nn.Module, ABC):
    """A tokenizer and a text model as one condition encoder.

    A token row is whatever long tensor `encode` needs for one example, so token rows [B, ...] can be indexed, moved
    and replaced row by row without knowing the encoder.

    Attributes:
        trainable: whether the parameters take gradients.
    """

    trainable: bool

    @property
    @abstractmethod
    def context_dim(self) -> int:
        """D of the context [B, L, D]."""

    @property
    @abstractmethod
    def pooled_dim(self) -> int:
        """P of the pooled vector [B, P]."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, tuple[str, str]]:
        """The entries of `model_index.json`: folder -> library and class that read it."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token rows [B, ...] (long, CPU); what does not fit into one row is cut off."""

    @abstractmethod
    def encode(self, tokens: Tensor) -> Conditioning:
        """The condition of token rows [B, ...], on the model's device."""

    @abstractmethod
    def save_parts(self, folder: Path) -> None:
        """Write the folders named in `parts` into the model folder `folder`."""

    def forward(self, tokens: Tensor) -> Conditioning:
        """`encode`."""
        return self.encode(tokens)

    def set_trainable(self, trainable: bool) -> None:
        """Whether the parameters take gradients from now on."""
        self.trainable = trainable
        self.requires_grad_(trainable)

    def beyond_context(self) -> list[nn.Module]:
        """The modules that the pooled vector needs and the context does not; where nobody reads the pooled vector no
        gradient reaches them, which distributed training does not allow for a trained weight."""
        return []

    def null(self, n: int) -> Conditioning:
        """`n` rows of the null condition of classifier-free guidance: the encoding of the empty prompt."""
        return self.encode(self.tokenize([""])).repeat_interleave(n)

    def windows(self, text: str) -> Tensor:
        """Token rows [N, ...] that hold `text` one after the other; one row where the encoder knows no other way."""
        return self.tokenize([text])

    def truncated(self, text: str) -> str | None:
        """The end of `text` that `windows` leaves out, or None when it holds all of it."""
        return None

    def holds(self, text: str) -> bool:
        """Whether one token row, which is what training uses, holds all of `text`."""
        return len(self.windows(text)) == 1 and self.truncated(text) is None

    def encode_text(self, text: str) -> Conditioning:
        """One row for the whole `text`: its windows encoded one by one and joined, pooled from the first."""
        return self.encode(self.windows(text)).joined()

    def encode_fragments(self, fragments: Sequence[Fragment]) -> Conditioning:
        """One row for a prompt whose words have weights; see `conditioning.weighting`.

        Raises:
            ValueError: this encoder cannot weight words.
        """
        raise ValueError(
            f"the prompt weights its words, which a {type(self).__name__} cannot; give the prompt without weights"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
