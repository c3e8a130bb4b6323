"""What a data set is, as a hash: equal for a copy of it elsewhere, another one when pictures or captions change.

And what a network's weights are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

EDGE = 1 << 16
"""Bytes at either end of a large file that are read; a parquet file's index stands at its end."""


def of_values(values: Iterable[object]) -> str:
    """SHA-256 over the values' representations."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def of_files(files: Sequence[str]) -> str:
    """SHA-256 over names, sizes and both ends of archives, in their order."""
    return of_values((Path(file).name, Path(file).stat().st_size, *_ends(file)) for file in files)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's weights, the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def encoder_hash(vae: nn.Module) -> str:
    """The same over what encodes: the weights of an autoencoder without those of its decoder."""
    parts = {name: part for name, part in vae.named_children() if name not in ("decoder", "post_quant_conv")}
    return weights_hash(nn.ModuleDict(parts))


def _ends(file: str) -> tuple[str, str]:
    with open(file, "rb") as handle:
        first = handle.read(EDGE)
        handle.seek(max(0, Path(file).stat().st_size - EDGE))
        last = handle.read(EDGE)
    return hashlib.sha256(first).hexdigest(), hashlib.sha256(last).hexdigest()
