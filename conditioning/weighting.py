r"""Weighted words: AUTOMATIC1111's prompt syntax, applied by the library `compel`.

    (word)        1.1 times          ((word))  1.21 times
    [word]        1/1.1 times        (two words:1.3)  1.3 times
    \( \) \[ \] \\   the characters themselves

Weights multiply when brackets are nested; a bracket without its partner acts to the end of the prompt, or stands for
itself when it closes what was never opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from conditioning.clip_text import ClipTextEncoder
    from conditioning.encoder import Fragment

ROUND, SQUARE = 1.1, 1 / 1.1
_TOKENS = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[Fragment]:
    """The pieces of a prompt in AUTOMATIC1111's syntax, neighbours of one weight joined.

    Raises:
        ValueError: a weight is negative.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []
    for token in _TOKENS.findall(prompt):
        if token in ("(", "["):
            opened.append((token, len(pieces)))
        elif token[0] == ":" and len(token) > 1 and opened and opened[-1][0] == "(":
            _multiply(pieces, opened.pop()[1], _weight(token))
        elif token in (")", "]") and opened and opened[-1][0] == {")": "(", "]": "["}[token]:
            bracket, start = opened.pop()
            _multiply(pieces, start, ROUND if bracket == "(" else SQUARE)
        else:
            pieces.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    for bracket, start in reversed(opened):
        _multiply(pieces, start, ROUND if bracket == "(" else SQUARE)
    return _joined(pieces)


def weighted(encoder: ClipTextEncoder, fragments: Sequence[Fragment]) -> Tensor:
    """The context [1, N·L, D] of weighted fragments, each window of L tokens encoded alone.

    A weight above 1 moves the states of a word away from those of the empty prompt; one below 1 blends with the
    encoding in which the other words cannot see the word (compel, `DownweightMode.MASK`).

    Raises:
        ValueError: `compel` is not installed.
    """
    try:
        from compel import EmbeddingsProvider, SplitLongTextMode
    except ImportError as error:
        raise ValueError("weights in a prompt need the package compel: pip install 'ldm[text]'") from error
    provider = EmbeddingsProvider(
        _Tokenizer(encoder),
        _Model(encoder),
        truncate=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )
    texts, weights = zip(*fragments, strict=True)
    context: Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
        [list(texts)], [list(weights)], device=encoder.device
    )
    return context


class _Tokenizer:
    """The part of transformers' tokenizer interface that compel uses."""

    def __init__(self, encoder: ClipTextEncoder) -> None:
        tokenizer = encoder.tokenizer
        self.model_max_length = tokenizer.model_max_length
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self._ids: Callable[[str], list[int]] = tokenizer.ids

    def __call__(self, texts: Sequence[str], **settings: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.bos_token_id, *self._ids(text), self.eos_token_id] for text in texts]}


class _Model:
    """The part of transformers' text model interface that compel uses."""

    def __init__(self, encoder: ClipTextEncoder) -> None:
        self._encoder = encoder
        self.device, self.dtype = encoder.device, next(encoder.parameters()).dtype

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._encoder.encode_masked(ids.long(), attention_mask).context)


def _weight(token: str) -> float:
    weight = float(token[1:-1])
    if weight < 0:
        raise ValueError(f"the prompt gives the weight {weight:g}; it must be 0 or more")
    return weight


def _multiply(pieces: list[tuple[str, float]], start: int, factor: float) -> None:
    pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]


def _joined(pieces: Sequence[Fragment]) -> list[Fragment]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return [(text, weight) for text, weight in joined if text.strip()] or [("", 1.0)]
