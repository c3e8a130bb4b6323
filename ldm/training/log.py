"""What a person sees of a run: a progress bar, the trackers, and metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm


class TrainingLog:
    """Averages named scalars between two reports and writes them to every place at once, from the main process only."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, first: int, last: int, examples_per_step: int, quiet: bool = False
    ) -> None:
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        self.examples_per_step = examples_per_step
        self.bar = tqdm(initial=first, total=last, disable=quiet or not accelerator.is_main_process, dynamic_ncols=True)
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.started = self.reported = time.perf_counter()

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Counts one optimiser step with its values; device tensors are not waited for."""
        for name, value in values.items():
            value = torch.as_tensor(value).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.bar.update()

    def report(self, step: int) -> dict[str, float]:
        """Writes the averages since the last report, with images per second; returns them."""
        now = time.perf_counter()
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        means["images_per_second"] = self.steps * self.examples_per_step / (now - self.reported)
        means["seconds"] = now - self.started
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in means.items() if k != "seconds"})
        self.write(step, means)
        self.sums, self.steps, self.reported = {}, 0, now
        return means

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values as they are, for instance those of a validation."""
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log(dict(values), step=step)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def say(self, message: str) -> None:
        """One line above the progress bar, from the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(message)

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()
