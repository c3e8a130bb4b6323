"""The errors of the latents that a model draws, for the training of a decoder that bears them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.batches import SkipCounter, Transform
from ldm.data.fingerprint import encoder_hash
from ldm.data.latent_errors import write_latent_errors
from ldm.data.sources import Source
from ldm.data.transforms import BadImage
from ldm.pipeline import TextToImage, check_strength


class _Sample(NamedTuple):
    key: str
    caption: str
    image: Tensor


def draw_latent_errors(
    pipe: TextToImage,
    source: Source,
    resolution: int,
    path: str | Path,
    strengths: Sequence[float],
    skips: SkipCounter,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], object] = lambda count: None,
    **settings: Any,
) -> int:
    """Writes a file of `LatentErrors` and returns its number of rows: each picture's latents are redrawn with its first
    caption, and what they were before is subtracted.

    Args:
        strengths: how far they are noised, in (0, 1]; one batch after the other takes the next.
        progress: called with the number of pictures just redrawn.
        settings: those of `TextToImage.redraw`; picture i uses seed + i.

    Raises:
        ValueError: naming the setting that is out of range.
        TooManyBadSamples: when more pictures than allowed cannot be used.
    """
    for strength in strengths:
        check_strength(strength)
    keys, errors = list[str](), list[Tensor]()
    readable = _readable(source, Transform(resolution), skips)
    for strength in itertools.cycle(strengths):
        batch = list(itertools.islice(readable, batch_size))
        if not batch:
            break
        with torch.no_grad():
            z = pipe.codec.encode(torch.stack([sample.image for sample in batch]).to(pipe.device)).float()
        captions = [sample.caption for sample in batch]
        errors.append((pipe.redraw(captions, z, strength, seed + len(keys), **settings) - z).cpu())
        keys += [sample.key for sample in batch]
        progress(len(batch))
    write_latent_errors(path, keys, torch.cat(errors), encoder_hash(pipe.model.vae))
    return len(keys)


def _readable(source: Source, transform: Transform, skips: SkipCounter) -> Iterator[_Sample]:
    for index in range(len(source)):
        try:
            example = source[index]
        except BadImage as error:
            skips.add(1, (str(error),))
            continue
        skips.add(1, ())
        yield _Sample(example.key, example.captions[0], transform(example, 0, index))
