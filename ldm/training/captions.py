"""The captions of a training run: how many are cut, and their encodings, made in every step or once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from conditioning import TextEncoder
from ldm.config import LatentCacheConfig
from ldm.data.fingerprint import weights_hash
from ldm.data.latents import LatentBatch, LatentCache
from ldm.data.text_cache import TextCache, build_text_cache, distinct_captions, text_settings
from ldm.tasks.captions import CachedCaptions, Captions, TokenizedCaptions

CHECKED_CAPTIONS = 10_000


def caption_source(
    config: LatentCacheConfig,
    cache: LatentCache,
    held_out: LatentBatch | None,
    encoder: TextEncoder,
    folder: Path,
    accelerator: Accelerator,
) -> Captions:
    """Token rows of captions, or with `cache_text` their conditions from `folder`, encoded there if they are not yet.

    What a single window cannot hold is cut off, and how often is printed.
    """
    first = list(itertools.islice(itertools.chain.from_iterable(cache.captions), CHECKED_CAPTIONS))
    if cut := sum(not encoder.holds(text) for text in first):
        accelerator.print(f"{cut} of the first {len(first)} captions are longer than the text encoder's window: cut")
    if not config.cache_text:
        return TokenizedCaptions(encoder)
    with torch.no_grad():
        others = set(() if held_out is None else held_out.captions)
        validation = {text: encoder.encode(encoder.tokenize([text])).to("cpu") for text in sorted(others)}
    return CachedCaptions(encode_captions(itertools.chain(*cache.captions), encoder, folder, accelerator), validation)


def encode_captions(captions: Iterable[str], encoder: TextEncoder, folder: Path, accelerator: Accelerator) -> TextCache:
    """The encodings of all captions in `folder`, made by the first process unless they are there; all must call it.

    Raises:
        StaleCache: the folder holds encodings of other captions or of another encoder.
    """
    distinct = distinct_captions(captions)
    with accelerator.main_process_first():
        settings = text_settings(distinct, encoder, weights_hash(encoder))
        with tqdm(total=len(distinct), desc="captions", disable=not accelerator.is_main_process) as bar:
            build_text_cache(folder, distinct, encoder, settings, bar.update)
    return TextCache(folder, distinct)
