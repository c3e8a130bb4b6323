"""Stateless randomness: every draw is a function of what it is for, never of what was drawn before.

A key is a tuple of integers and words, such as `(seed, "noise", step, row)`. Equal keys give equal draws in every
process and after every restart, so a resumed or differently distributed run repeats the undisturbed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and words."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(seed_of(*key))


def row_uniform(generators: Iterable[torch.Generator]) -> Tensor:
    """One uniform number in [0, 1) a row: [B]."""
    return torch.stack([torch.rand((), generator=g) for g in generators])
