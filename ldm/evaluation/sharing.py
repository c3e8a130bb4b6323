"""The batches of an evaluation dealt to several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def _alone(items: list[Any]) -> list[Any]:
    return items


@dataclass(frozen=True)
class Share:
    """This process's part of the work: every `size`-th batch, whole, so that no figure depends on `size`.

    `gather` takes a list of this process and gives the lists of all processes, one after another, to each of them.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = _alone

    def map(self, batches: Iterable[Batch], work: Callable[[Batch], Result]) -> list[Result]:
        """`work` of every batch, in their order, in every process; all of them iterate over the same batches."""
        own = [(place, work(batch)) for place, batch in enumerate(batches) if place % self.size == self.rank]
        return [result for _, result in sorted(self.gather(own), key=lambda row: row[0])]

    def from_first(self, make: Callable[[], Result]) -> Result:
        """What `make` gives in the first process, in every process."""
        found: Result = self.gather([make()] if self.rank == 0 else [])[0]
        return found
