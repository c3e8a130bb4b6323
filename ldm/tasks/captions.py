"""Where a training step gets the condition of its captions: encoded in the step, or read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from conditioning import Conditioning, TextEncoder, drop_captions, dropped_rows
from ldm.data.text_cache import TextCache

Captions = Callable[[Sequence[str], float, Tensor], Tensor | Conditioning]
"""(captions [B], probability of dropping one, uniform numbers [B]) -> token rows to encode, or conditions."""


@dataclass(frozen=True)
class TokenizedCaptions:
    """Token rows [B, ...] for an encoder that runs in every step; a dropped caption is the empty prompt."""

    encoder: TextEncoder

    def __call__(self, captions: Sequence[str], probability: float, uniform: Tensor) -> Tensor:
        tokens = self.encoder.tokenize(captions)
        return drop_captions(tokens, self.encoder.tokenize([""])[0], probability, uniform)


@dataclass(frozen=True)
class CachedCaptions:
    """Conditions [B, L, D] that a frozen encoder made once; a dropped caption is the empty prompt's.

    `others` are conditions [1, L, D] of captions that are in no cache, such as those of a validation.
    """

    cache: TextCache
    others: Mapping[str, Conditioning] = field(default_factory=dict)

    def __call__(self, captions: Sequence[str], probability: float, uniform: Tensor) -> Conditioning:
        dropped = dropped_rows(probability, uniform).tolist()
        texts = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        rows = [self.others[text] if text in self.others else self.cache.row(text) for text in texts]
        return Conditioning.cat(rows)
