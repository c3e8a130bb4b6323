"""What every adapter that is trained offers: its parameters are the only ones that change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn


class Adapter(nn.Module, ABC):
    """A small module whose parameters act on a frozen model from outside."""

    @abstractmethod
    def inject(self) -> None:
        """Makes the model compute with the adapter, once however often it is called."""

    @abstractmethod
    def eject(self) -> None:
        """Gives the model back as it was, bit for bit."""

    @abstractmethod
    def merged(self) -> AbstractContextManager[None]:
        """Within the block the model's own weights hold what was learnt, so that it can be written."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Writes what was learnt, alone, as the file that diffusers reads."""
