"""SIGTERM and Ctrl-C: save and leave with the signal's exit code, whatever the run is doing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator

REPEAT_SECONDS = 2.0
T = TypeVar("T")


class Stopped(Exception):  # noqa: N818
    """Raised by `StopSignal.check` to end a validation early."""


class StopSignal:
    """What the first SIGTERM or Ctrl-C does depends on where it comes; a second one ends the process at once.

    Before and after the loop there is nothing to save that is not on disk, and the process leaves. Within
    `deferred()`, the loop, it becomes a request that the loop reads after every step. A launcher passes on what the
    terminal has already sent, so what follows within two seconds is the same signal. Forked workers ignore it.
    """

    def __init__(self) -> None:
        self.number, self.since, self.deferring, self.owner = 0, 0.0, False, os.getpid()
        self.together: Accelerator | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            return
        if self.number and time.monotonic() - self.since > REPEAT_SECONDS:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if not self.deferring:
                self.leave()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a signal is only remembered; one that came too late for the loop to read ends it here."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        if self.number:
            self.leave()

    @contextmanager
    def interruptible(self, together: Accelerator | None = None) -> Iterator[None]:
        """Ends the block where it calls `check` after a signal.

        With `together` the block runs in all processes, which end it at the same `check`, whoever got the signal.
        """
        self.together = together
        try:
            with suppress(Stopped):
                yield
        finally:
            self.together = None

    def check(self, *_: object) -> None:
        """For long work between two steps: raises `Stopped` once a signal has come. Arguments are ignored."""
        if self.number if self.together is None else self.requested(self.together):
            raise Stopped

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def requested(self, accelerator: Accelerator) -> bool:
        """True in every process once any of them was signalled; every process must call it."""
        if accelerator.num_processes > 1:
            flag = torch.tensor([self.number], device=accelerator.device)
            self.number = int(accelerator.gather(flag).max())
        return self.number != 0

    def leave(self) -> NoReturn:
        """Ends the process with the exit code that the signal asks for: 143 or 130."""
        sys.exit(128 + self.number)
