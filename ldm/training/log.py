"""What a person sees of a run: a progress bar, the trackers, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from ldm.training.run_dir import write_text
from ldm.training.trial import peak_memory


class TrainingLog:
    """Averages named scalars between two reports and writes them to every place at once, from the main process only.

    A step's time runs from its first `waiting` to its `add`, so validations and saves are no part of the speeds.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, first: int, last: int, examples_per_step: int, quiet: bool = False
    ) -> None:
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        if accelerator.is_main_process and self.path.exists():
            forget_after(self.path, first)
        self.examples_per_step = examples_per_step
        self.bar = tqdm(initial=first, total=last, disable=quiet or not accelerator.is_main_process, dynamic_ncols=True)
        self.started = time.perf_counter()
        self.step_started: float | None = None
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.steps, self.busy, self.waited = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around taking a batch: what it lasts is the time that training waited for data."""
        began = time.perf_counter()
        self.step_started = began if self.step_started is None else self.step_started
        yield
        self.waited += time.perf_counter() - began

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Counts one optimiser step with its values; device tensors are not waited for."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += 1
        self.steps += 1
        self.busy += time.perf_counter() - (self.step_started or self.started)
        self.step_started = None
        self.bar.update()

    def report(self, step: int, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """Writes the averages since the last report over steps and processes, speeds, memory and `more`; returns them.

        Every process must call it.
        """
        row = {**self._means(), **(more or {}), **self._speeds(), **memory(self.accelerator.device)}
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k in ("loss", "nll", "images_per_second")})
        self.write(step, row)
        self._clear()
        return row

    def _means(self) -> dict[str, float]:
        names = list(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name].to(self.accelerator.device) / self.counts[name] for name in names])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, reduction="mean")
        return dict(zip(names, means.tolist(), strict=True))

    def _speeds(self) -> dict[str, float]:
        busy = max(self.busy, 1e-9)
        return {
            "images_per_second": self.steps * self.examples_per_step / busy,
            "step_seconds": busy / max(self.steps, 1),
            "data_wait_share": self.waited / busy,
            "seconds": time.perf_counter() - self.started,
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values as they are, for instance those of a validation; what is not finite as null."""
        if not self.accelerator.is_main_process:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.despite_the_disk(step, "a row of metrics"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        with self.despite_the_disk(step, "what the trackers were given"):
            self.accelerator.log(dict(values), step=step)

    def show(self, name: str, image: Image, path: Path, step: int) -> None:
        """Writes a picture to its file and to the trackers that take pictures; the main process calls it.

        The file appears whole: a later start takes its being there for a validation that was done.
        """
        with self.despite_the_disk(step, path.name):
            half = path.with_name(f".{path.name}")
            image.save(half)
            half.replace(path)
        with self.despite_the_disk(step, f"the trackers' {name}"):
            tracker_image(self.accelerator, name, image, step)

    @contextmanager
    def despite_the_disk(self, step: int, lost: str) -> Iterator[None]:
        """Around writing what training can do without: a disk that fails costs `lost`, and a line says so."""
        try:
            yield
        except OSError as error:
            self.say(f"step {step}: warning: {lost} could not be written ({error}); training goes on")

    def say(self, message: str | None) -> None:
        """One line, if there is one to say, above the progress bar, from the main process."""
        if self.accelerator.is_main_process and message is not None:
            self.bar.write(message)

    def close(self) -> None:
        self.bar.close()
        with self.despite_the_disk(int(self.bar.n), "the trackers' last rows"):
            self.accelerator.end_training()


def tracker_image(accelerator: Accelerator, name: str, image: Image, step: int) -> None:
    """Shows a picture in the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
        elif callable(getattr(tracker, "log_images", None)):
            tracker.log_images({name: [np.asarray(image)]}, step=step)


def memory(device: torch.device) -> dict[str, float]:
    """The largest memory so far, in GiB: of the process, and what it allocated on its GPU."""
    found = {"peak_memory_gib": peak_memory()}
    if device.type == "cuda":
        found["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


class TimestepLosses:
    """The mean loss in each tenth of the timesteps since the last report, over all processes."""

    def __init__(self, num_train_timesteps: int, reduce_mean: Callable[[Tensor], Tensor], bins: int = 10) -> None:
        self.edges = [round(i * num_train_timesteps / bins) for i in range(bins + 1)]
        self.reduce_mean = reduce_mean
        self.sums: Tensor | None = None

    def add(self, loss: Tensor, t: Tensor) -> None:
        """Counts the loss of every example [B] at its timestep [B] in [0, num_train_timesteps]."""
        inner = torch.tensor(self.edges[1:-1], device=t.device, dtype=t.dtype)
        index = torch.bucketize(t, inner, right=True)
        counted = torch.stack([loss.detach().float(), torch.ones(len(loss), device=loss.device)])
        sums = torch.zeros(2, len(self.edges) - 1, device=loss.device).index_add_(1, index, counted)
        self.sums = sums if self.sums is None else self.sums + sums

    def means(self) -> dict[str, float]:
        """`loss_t_0_99` and so on, of the parts in which there was an example, and begins anew; all must call it."""
        if self.sums is None:
            return {}
        total, count = self.reduce_mean(self.sums).tolist()
        self.sums = None
        names = [f"loss_t_{low}_{high - 1}" for low, high in pairwise(self.edges)]
        return {name: a / n for name, a, n in zip(names, total, count, strict=True) if n}


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
