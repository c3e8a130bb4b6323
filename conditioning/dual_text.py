"""Two CLIP text encoders side by side, as in SDXL (Podell et al. 2023, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from conditioning.clip_text import ClipTextEncoder
from conditioning.encoder import FOLDERS, Fragment, TextEncoder
from conditioning.types import Conditioning

SECOND_FOLDERS = ("text_encoder_2", "tokenizer_2")


class DualTextEncoder(TextEncoder):
    """Contexts of both encoders joined on the feature axis; the pooled vector is the second one's.

    Args:
        first, second: encoders that make rows of one length. SDXL takes the penultimate states of both without the
            final norm (`skip_layers=1, final_norm=False`) and the projected pooled vector of the second.
        zero_null: the null condition is zero instead of the encoding of the empty prompt
            (diffusers' `force_zeros_for_empty_prompt`).

    What the first encoder has behind its context serves its pooled vector alone, which nobody reads: it is not trained.

    Raises:
        ValueError: the rows of the two differ in length, or only one of the two is trainable.
    """

    def __init__(self, first: ClipTextEncoder, second: ClipTextEncoder, zero_null: bool = False) -> None:
        super().__init__()
        lengths = first.tokenizer.model_max_length, second.tokenizer.model_max_length
        if lengths[0] != lengths[1]:
            raise ValueError(f"the tokenizers make rows of {lengths[0]} and {lengths[1]} ids; they must be equal")
        if first.trainable != second.trainable:
            raise ValueError(f"trainable is {first.trainable} and {second.trainable}; it must be the same for both")
        self.first, self.second = first, second
        self.zero_null, self.trainable = zero_null, first.trainable
        for unread in first.beyond_context():
            unread.requires_grad_(False)

    @property
    def context_dim(self) -> int:
        return self.first.context_dim + self.second.context_dim

    @property
    def pooled_dim(self) -> int:
        return self.second.pooled_dim

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        second = self.second.parts
        return self.first.parts | {new: second[old] for new, old in zip(SECOND_FOLDERS, FOLDERS, strict=True)}

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids [B, 2, L] of the two tokenizers."""
        return torch.stack([self.first.tokenize(texts), self.second.tokenize(texts)], dim=1)

    def windows(self, text: str) -> Tensor:
        """Ids [N, 2, L]; where one tokenizer needs fewer windows it gets empty ones."""
        rows = [encoder.windows(text) for encoder in (self.first, self.second)]
        count = max(map(len, rows))
        empty = [encoder.tokenize([""] * (count - len(ids))) for encoder, ids in zip(self._both, rows, strict=True)]
        return torch.stack([torch.cat(pair) for pair in zip(rows, empty, strict=True)], dim=1)

    def encode(self, tokens: Tensor) -> Conditioning:
        """The condition of ids [B, 2, L]."""
        return _beside(self.first.encode(tokens[:, 0]), self.second.encode(tokens[:, 1]))

    def encode_fragments(self, fragments: Sequence[Fragment]) -> Conditioning:
        """Both encoders' weighted contexts; the shorter one is filled with encodings of the empty prompt."""
        parts = [encoder.encode_fragments(fragments) for encoder in self._both]
        length = max(part.context.shape[1] for part in parts)
        return _beside(
            *(
                part.padded(length, encoder.encode(encoder.tokenize([""])))
                for part, encoder in zip(parts, self._both, strict=True)
            )
        )

    def set_trainable(self, trainable: bool) -> None:
        """The same for both, but for what the first has behind its context."""
        super().set_trainable(trainable)
        self.first.trainable = self.second.trainable = trainable
        for unread in self.first.beyond_context():
            unread.requires_grad_(False)

    def beyond_context(self) -> list[nn.Module]:
        return self.second.beyond_context()

    def null(self, n: int) -> Conditioning:
        """`n` rows of the encoded empty prompt, or of zeros with `zero_null`."""
        encoded = super().null(n)
        if not self.zero_null:
            return encoded
        pooled = None if encoded.pooled is None else torch.zeros_like(encoded.pooled)
        return Conditioning(torch.zeros_like(encoded.context), None, pooled)

    def save_parts(self, folder: Path) -> None:
        self.first.save_as(folder, *FOLDERS)
        self.second.save_as(folder, *SECOND_FOLDERS)

    @property
    def _both(self) -> tuple[ClipTextEncoder, ClipTextEncoder]:
        return self.first, self.second


def _beside(first: Conditioning, second: Conditioning) -> Conditioning:
    return Conditioning(torch.cat([first.context, second.context], dim=-1), None, second.pooled)
