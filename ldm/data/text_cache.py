"""The captions of a data set encoded once by a frozen text encoder, in shards beside the latents.

    text/settings.json            what was encoded, and with what
    text/shard_00000.safetensors  context [n, L, D] and, where the encoder has them, context_mask and pooled
    text/manifest.json            written last: the hash of every shard

Captions are in the order of their text, each once, the empty prompt always among them.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from conditioning import Conditioning, TextEncoder
from ldm.data.cache_files import check_settings, file_hash, write_tensors, write_text

FORMAT, SHARD_SIZE, BATCH_SIZE = 1, 1024, 32
MANIFEST = "manifest.json"
FIELDS = ("context", "context_mask", "pooled")


@dataclass(frozen=True)
class TextSettings:
    """What the entries depend on: hashes of the captions' token rows and of the encoder's weights."""

    count: int
    tokens: str
    encoder: str
    format: int = FORMAT


def distinct_captions(captions: Iterable[str]) -> list[str]:
    """Every caption once, in order, the empty prompt among them."""
    return sorted({"", *captions})


def text_settings(captions: Sequence[str], encoder: TextEncoder, weights: str) -> TextSettings:
    """The settings of a cache of `captions`; `weights` is the hash of the encoder's."""
    digest = hashlib.sha256()
    for start in range(0, len(captions), BATCH_SIZE):
        digest.update(encoder.tokenize(captions[start : start + BATCH_SIZE]).numpy().tobytes())
    return TextSettings(len(captions), digest.hexdigest(), weights)


def build_text_cache(
    folder: Path,
    captions: Sequence[str],
    encoder: TextEncoder,
    settings: TextSettings,
    progress: Callable[[int], object] = lambda n: None,
) -> None:
    """Encodes the shards that are not there yet; nothing where the cache is complete.

    Raises:
        StaleCache: the folder holds encodings of other captions or of another encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(folder, settings)
    if (folder / MANIFEST).exists():
        return
    hashes: list[str] = []
    for start in range(0, len(captions), SHARD_SIZE):
        path = folder / f"shard_{start // SHARD_SIZE:05d}.safetensors"
        shard = captions[start : start + SHARD_SIZE]
        if not path.exists():
            _write_shard(path, encoder, shard, progress)
        hashes.append(file_hash(path))
    write_text(folder / MANIFEST, json.dumps(hashes))


class TextCache:
    """Random access to cached conditions by caption; shards are memory-mapped by safetensors."""

    def __init__(self, folder: Path, captions: Sequence[str]) -> None:
        """Opens a complete cache of `captions`.

        Raises:
            ValueError: naming the shard that is missing or damaged.
        """
        self.captions = captions
        self.shards: list[Conditioning] = []
        for path, digest in _shards(folder).items():
            if problem := _problem(path, digest):
                raise ValueError(problem)
            self.shards.append(_read_shard(path))

    def row(self, text: str) -> Conditioning:
        """The condition [1, L, D] of a caption of the cache or of the empty prompt.

        Raises:
            KeyError: a text that is not in the cache.
        """
        index = bisect_left(self.captions, text)
        if index == len(self.captions) or self.captions[index] != text:
            raise KeyError(text)
        return self.shards[index // SHARD_SIZE].index(torch.tensor([index % SHARD_SIZE]))


def verify_text_cache(folder: Path) -> list[str]:
    """Reads every byte of the encodings in `folder`, where there are any; a sentence for each damaged shard."""
    if not folder.exists():
        return []
    if not (folder / MANIFEST).exists():
        return [f"{folder} is not complete; the command that began it goes on with it"]
    return [problem for path, digest in _shards(folder).items() if (problem := _problem(path, digest))]


def _shards(folder: Path) -> dict[Path, str]:
    """The hash of every shard."""
    return {folder / f"shard_{i:05d}.safetensors": h for i, h in enumerate(json.loads((folder / MANIFEST).read_text()))}


def _problem(path: Path, digest: str) -> str | None:
    if path.exists() and file_hash(path) == digest:
        return None
    return f"{path} is missing or damaged; delete {path.parent} to encode the captions again"


@torch.no_grad()
def _write_shard(path: Path, encoder: TextEncoder, captions: Sequence[str], progress: Callable[[int], object]) -> None:
    parts: list[Conditioning] = []
    for start in range(0, len(captions), BATCH_SIZE):
        batch = captions[start : start + BATCH_SIZE]
        parts.append(encoder.encode(encoder.tokenize(batch)).to("cpu"))
        progress(len(batch))
    whole = Conditioning.cat(parts)
    tensors = {name: getattr(whole, name).contiguous() for name in FIELDS if getattr(whole, name) is not None}
    write_tensors(path, tensors)


def _read_shard(path: Path) -> Conditioning:
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Conditioning(**tensors)
    except (SafetensorError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete {path.parent} to encode the captions again"
        ) from error
