"""What a person sees of a run: a progress bar, the trackers, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ldm.training.run_dir import write_text


class TrainingLog:
    """Averages named scalars between two reports and writes them to every place at once, from the main process only."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, first: int, last: int, examples_per_step: int, quiet: bool = False
    ) -> None:
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        if accelerator.is_main_process and self.path.exists() and not quiet:
            forget_after(self.path, first)
        self.examples_per_step = examples_per_step
        self.bar = tqdm(initial=first, total=last, disable=quiet or not accelerator.is_main_process, dynamic_ncols=True)
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self.started = self.reported = time.perf_counter()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Counts one optimiser step with its values; device tensors are not waited for."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += 1
        self.steps += 1
        self.bar.update()

    def report(self, step: int) -> dict[str, float]:
        """Writes the averages since the last report over steps and processes, with images per second; returns them.

        Every process must call it.
        """
        now = time.perf_counter()
        means = {name: float(self._reduced(value)) / self.counts[name] for name, value in self.sums.items()}
        means["images_per_second"] = self.steps * self.examples_per_step / (now - self.reported)
        means["seconds"] = now - self.started
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k != "seconds"})
        self.write(step, means)
        self.sums, self.counts, self.steps, self.reported = {}, Counter(), 0, now
        return means

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values as they are, for instance those of a validation; what is not finite as null."""
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(dict(values), step=step)
        with open(self.path, "a", encoding="utf-8") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def _reduced(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        mean: Tensor = self.accelerator.reduce(value.to(self.accelerator.device, torch.float32), reduction="mean")
        return mean

    def say(self, message: str) -> None:
        """One line above the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(message)

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def averaged(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every scalar over the micro-batches of one optimiser step."""
    return {name: torch.stack([part[name].detach() for part in parts]).mean() for name in parts[0]}


def forget_after(path: Path, step: int) -> None:
    """Drops from a metrics file what was written after the state that a run starts from, and a torn last line."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    write_text(path, "".join(kept))
