"""Limits within which a whole test of malformed data must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

GROWTH = 300_000_000


@pytest.fixture
def prompt(limit_time: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    """The whole test within the limits of time; the import of `datasets`, which readers wait with, is not counted."""
    import datasets  # noqa: F401

    with limit_time():
        yield


@pytest.fixture
def lean(limit_memory: Callable[[float], AbstractContextManager[None]]) -> Iterator[None]:
    """Fails a test that at any time takes more than GROWTH bytes beyond what the process had before it."""
    with limit_memory(GROWTH):
        yield
