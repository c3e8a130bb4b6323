"""Limits within which malformed data must be read: time for each, memory for all of a test."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

SECONDS = 2
CLOCK_SECONDS = 5 * SECONDS
"""By the clock, for what waits instead of computing. A busy machine gives a process a part of a core only, and a disk
that others use lets it wait; what hangs does so for ever, and is found with five times the limit as well."""
GROWTH = 300_000_000


class TooSlow(BaseException):
    """Not an Exception, because the readers rightly turn any of those into a sample that cannot be used."""


@contextmanager
def limited_time(seconds: float = SECONDS, clock_seconds: float = CLOCK_SECONDS) -> Iterator[None]:
    """Ends what computes for `seconds` or lasts for `clock_seconds`, also when it waits for a pipe.

    It fails as well where a library swallowed the exception.
    """
    late: list[str] = []

    def end(number: int, frame: object) -> None:
        done = f"computed for {seconds} s" if number == signal.SIGPROF else f"lasted {clock_seconds} s"
        late.append(done)
        raise TooSlow(done)

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, clock_seconds)}
    before = {number: signal.signal(number, end) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    assert not late, late


@pytest.fixture
def within_limits() -> Callable[..., AbstractContextManager[None]]:
    """`with within_limits():` around the reading of one thing."""
    return limited_time


@pytest.fixture
def prompt() -> Iterator[None]:
    """The whole test within the limits of time; the import of `datasets`, which readers wait with, is not counted."""
    import datasets  # noqa: F401

    with limited_time():
        yield


@pytest.fixture
def lean() -> Iterator[None]:
    """Fails a test that at any time takes more than GROWTH bytes beyond what the process had before it.

    Only Linux tells the peak since a moment; elsewhere the test runs without this limit.
    """
    if sys.platform != "linux":
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    yield
    assert peak_memory() - before < GROWTH


def peak_memory() -> int:
    """The largest resident memory since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
