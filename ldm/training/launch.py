"""What both training scripts do before and around their loops: placement, signals, sizes, the run folder's state."""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, set_seed
from torch import Tensor, nn

from ldm.config import ConfigError, TrainingConfig
from ldm.data.order import BatchPlan
from ldm.training.run_dir import RunDir

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PR_SET_PDEATHSIG = 1
REPEAT_SECONDS = 2.0


def place(config: TrainingConfig, run: RunDir, seed: int) -> Accelerator:
    """The accelerator: devices, precision and accumulation. On CPU everything is fp32, whatever the config says."""
    keep_heap()
    use_all_cores()
    stop_with_parent()
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    precision = config.mixed_precision if on_gpu else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(run.folder),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(seed)
    return accelerator


def trial_run(accelerator: Accelerator) -> RunDir:
    """A run folder for a dry run, shared by all processes and deleted when the main one ends."""
    names = [tempfile.mkdtemp(prefix="ldm_dry_run_") if accelerator.is_main_process else ""]
    broadcast_object_list(names)
    if accelerator.is_main_process:
        atexit.register(shutil.rmtree, names[0], ignore_errors=True)
    return RunDir(names[0])


def keep_heap() -> None:
    """Lets glibc keep freed memory: training otherwise spends much of its time in page faults for activations."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def use_all_cores() -> None:
    """Shares the cores among the processes of this machine; `accelerate launch` would leave one thread to each."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))


def stop_with_parent() -> None:
    """Asks Linux for a SIGTERM when the launcher dies, so that no run is left training with nobody's hand on it."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def batch_plan(config: TrainingConfig, accelerator: Accelerator) -> BatchPlan:
    """How the global batch is dealt to this process."""
    return BatchPlan(
        config.train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )


def mean_over_processes(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """A function that averages a tensor over all processes; the identity for a single one."""
    if accelerator.num_processes == 1:
        return lambda value: value
    return lambda value: accelerator.reduce(value, reduction="mean")


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a request to save and leave; the second one ends the process at once.

    A launcher passes on what the terminal has already sent, so what follows within two seconds is the same signal.
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self.since > REPEAT_SECONDS:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()

    def requested(self, accelerator: Accelerator) -> bool:
        """True in every process once any of them was signalled."""
        if accelerator.num_processes > 1:
            flag = torch.tensor([self.number], device=accelerator.device)
            self.number = int(accelerator.gather(flag).max())
        return self.number != 0

    def leave(self) -> NoReturn:
        """Ends the process with the exit code that the signal asks for: 143 or 130."""
        sys.exit(128 + self.number)


def parameter_count(module: nn.Module) -> str:
    """For instance `1.73 M`."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def peak_memory() -> float:
    """The process' largest resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def dry_run_report(seconds_per_step: float, steps: int) -> str:
    """What `--dry-run` says after its trial steps."""
    memory = f"peak memory so far {peak_memory():.2f} GiB"
    if torch.cuda.is_available():
        memory += f", on the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    minutes = seconds_per_step * steps / 60
    return f"{seconds_per_step:.3f} s per step, about {minutes:.1f} min for {steps} steps; {memory}"


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; bad input ends with one sentence on stderr and exit code 2."""
    try:
        main()
    except (ConfigError, ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def tracker_image(accelerator: Accelerator, name: str, image: Any, step: int) -> None:
    """Shows a picture in the trackers that take pictures."""
    import numpy as np

    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [np.asarray(image)]}, step=step)
