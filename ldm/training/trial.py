"""`--dry-run`: a few steps of every phase on a throw-away folder, and what the whole run would take."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from statistics import median

import torch

STEPS_A_PHASE = 3


def trial_steps(total: int, *starts: int) -> list[int]:
    """Three steps, as far as there are any, from the start of each phase of a run."""
    ends = [*starts[1:], total]
    return [
        step for start, end in zip(starts, ends, strict=True) for step in range(start, min(start + STEPS_A_PHASE, end))
    ]


def peak_memory() -> float:
    """The process' largest resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Trial:
    """Seconds of the phases of a dry run; of a phase's laps the median counts."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = {}
        self.counts: dict[str, float] = {}
        self.since = time.perf_counter()

    def mark(self, phase: str, count: float) -> None:
        """Ends a lap of `phase`, which began where the lap before it ended; the whole run has `count` of them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps.setdefault(phase, []).append(now - self.since)
        self.counts[phase], self.since = count, now

    def report(self, state: Path) -> str:
        """One line: seconds of each phase, minutes of the whole run, peak memory, and what a state takes on disk."""
        each = {phase: median(laps) for phase, laps in self.laps.items()}
        total = sum(self.counts[phase] * seconds for phase, seconds in each.items())
        size = sum(file.stat().st_size for file in state.iterdir())
        memory = f"peak memory {peak_memory():.2f} GiB"
        if torch.cuda.is_available():
            memory += f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
        phases = ", ".join(f"{seconds:.3f} s per {phase}" for phase, seconds in each.items())
        return f"{phases}; about {total / 60:.1f} min in all; {memory}; a state takes {size / 2**20:.1f} MiB"
