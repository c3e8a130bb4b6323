"""The limits of time and memory that tests of malformed input stand on do catch what they are for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

Limit = Callable[..., AbstractContextManager[None]]


def test_what_computes_for_too_long_is_interrupted(limit_time: Limit) -> None:
    with pytest.raises(BaseException, match=r"computed for 0\.05 s"), limit_time(0.05):
        while True:
            pass


def test_what_waits_for_ever_is_interrupted(limit_time: Limit) -> None:
    reader, writer = os.pipe()
    with pytest.raises(BaseException, match=r"lasted 0\.1 s"), limit_time(0.02):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)


def test_a_peak_is_seen_although_it_is_over_and_an_earlier_one_was_higher(limit_memory: Limit) -> None:
    if sys.platform != "linux":
        return
    assert len(bytearray(b"x") * 300_000_000) == 300_000_000
    with limit_memory(100e6):
        assert len(bytearray(b"x") * 1_000_000) == 1_000_000
    with pytest.raises(AssertionError, match="MB more than at the start"), limit_memory(100e6):
        assert len(bytearray(b"x") * 200_000_000) == 200_000_000
