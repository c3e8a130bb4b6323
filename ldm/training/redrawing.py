"""The errors of the latents that a model draws, for the training of a decoder that bears them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.batches import SkipCounter, Transform
from ldm.data.fingerprint import encoder_hash
from ldm.data.latent_errors import write_latent_errors
from ldm.data.sources import Source, every_sample
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
        strengths: how far they are noised, in (0, 1]; one picture after the other takes the next.
        batch_size: pictures at once; changes speed and memory only.
        progress: called with the number of pictures just redrawn.
        settings: those of `TextToImage.redraw`; picture i uses seed + i.

    Raises:
        ValueError: naming the setting that is out of range, or the name that two pictures have; `path` is a folder; no
            picture can be used.
        FloatingPointError: what is drawn is not finite.
        TooManyBadSamples: when more pictures than allowed cannot be used.
    """
    for strength in strengths:
        check_strength(strength)
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; the errors are written to a file")
    keys, errors = dict[str, None](), list[Tensor]()
    readable = _readable(source, Transform(resolution), skips)
    while samples := list(itertools.islice(readable, batch_size * len(strengths))):
        places = [range(turn, len(samples), len(strengths)) for turn in range(min(len(strengths), len(samples)))]
        drawn = list[Tensor]()
        for strength, part in zip(strengths, places, strict=False):
            seeds = [seed + len(keys) + place for place in part]
            drawn.append(_errors(pipe, [samples[place] for place in part], strength, seeds, settings))
            progress(len(part))
        errors.append(torch.cat(drawn)[torch.tensor(list(itertools.chain(*places))).argsort()])
        for sample in samples:
            if sample.key in keys:
                raise ValueError(f"two pictures of {source.name} are named {sample.key}; their errors need names")
            keys[sample.key] = None
    if not keys:
        raise ValueError(f"no picture of {source.name} could be used: {skips.summary()}")
    data = (source.name, source.fingerprint())
    write_latent_errors(path, list(keys), torch.cat(errors), encoder_hash(pipe.model.vae), data)
    return len(keys)


@torch.no_grad()
def _errors(
    pipe: TextToImage, part: Sequence[_Sample], strength: float, seeds: Sequence[int], settings: Mapping[str, Any]
) -> Tensor:
    """Of some pictures, in half precision [N, C, h, w], in units of the raw latents."""
    z = pipe.codec.encode(torch.stack([sample.image for sample in part]).to(pipe.device)).float()
    drawn = pipe.redraw([sample.caption for sample in part], z, strength, seeds, **settings)
    error = ((drawn - z) / torch.as_tensor(pipe.codec.scale).to(z)).half().cpu()
    for sample, row in zip(part, error, strict=True):
        if not row.isfinite().all():
            raise FloatingPointError(f"what the model draws of {sample.key} is not finite; its weights are damaged")
    return error


def _readable(source: Source, transform: Transform, skips: SkipCounter) -> Iterator[_Sample]:
    for index, item in enumerate(every_sample(source)):
        if isinstance(item, BadImage):
            skips.add(1, (str(item),))
            continue
        skips.add(1, ())
        yield _Sample(item.key, item.captions[0], transform(item, 0, index))
