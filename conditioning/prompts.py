"""Prompts to conditions: weights, several windows, and batches in which no prompt depends on its neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from conditioning.encoder import TextEncoder
from conditioning.types import Conditioning
from conditioning.weighting import parse_weights

PromptSyntax = Literal["plain", "a1111"]
"""How a prompt is read: as it stands, or with weights."""


def encode_prompt(encoder: TextEncoder, prompt: str, syntax: PromptSyntax = "plain") -> Conditioning:
    """One row for a whole prompt; `a1111` reads weights, and gives what `plain` does where there are none.

    Raises:
        ValueError: the syntax is unknown, a weight is negative, or the encoder cannot weight words.
    """
    if syntax not in get_args(PromptSyntax):
        raise ValueError(f"prompt_syntax is {syntax!r}; accepted: {', '.join(get_args(PromptSyntax))}")
    fragments = [(prompt, 1.0)] if syntax == "plain" else parse_weights(prompt)
    if all(weight == 1 for _, weight in fragments):
        return encoder.encode_text(fragments[0][0])
    return encoder.encode_fragments(fragments)


def condition_batches(
    encoder: TextEncoder,
    prompts: Sequence[str],
    negative: str | None,
    repeats: int,
    batch_size: int,
    syntax: PromptSyntax = "plain",
) -> Iterator[tuple[Conditioning, Conditioning]]:
    """Conditions of all prompts in order, each `repeats` times, and as many rows of the negative prompt.

    The shorter of a prompt and the negative one is filled up with encodings of the empty prompt. A batch ends where
    the length changes, so a prompt's row never depends on how long the others are.

    Args:
        negative: None stands for the encoder's null condition.
    """
    empty, null = encoder.encode_text(""), encoder.null(1)
    away, filler = (null, null) if negative is None else (encode_prompt(encoder, negative, syntax), empty)
    encoded = (encode_prompt(encoder, prompt, syntax) for prompt in prompts)
    rows = (row for row in encoded for _ in range(repeats))
    padded = (row.padded(max(away.context.shape[1], row.context.shape[1]), empty) for row in rows)
    for length, group in itertools.groupby(padded, key=lambda row: row.context.shape[1]):
        while batch := list(itertools.islice(group, batch_size)):
            yield Conditioning.cat(batch), away.padded(length, filler).repeat_interleave(len(batch))
