"""What both training scripts do before and around their loops: placement, trackers, sizes, exit codes."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from torch import Tensor, nn

from ldm.config import AutoencoderTraining, ClassifierTraining, ConfigError, LdmTraining, TrainingConfig
from ldm.config.file import Launch, completed, dump_config, flat_settings
from ldm.data.order import BatchPlan
from ldm.training.processes import LostProcess, lost_connection, start_all_processes
from ldm.training.run_dir import RunDir
from ldm.training.sharding import accelerator_kind

AnyTraining = AutoencoderTraining | ClassifierTraining | LdmTraining
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
PR_SET_PDEATHSIG = 1


def place(config: AnyTraining) -> Accelerator:
    """The accelerator: processes, devices, precision and accumulation."""
    keep_heap()
    stop_with_parent()
    start_all_processes()
    use_all_cores()
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    training, folder = config.training, config.output_dir
    accelerator = accelerator_kind(config)(
        mixed_precision=usable_precision(training.mixed_precision, on_gpu),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with=trackers(training.report_to) or None,
        project_config=ProjectConfiguration(folder, os.path.join(folder, "logs")),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(config.seed)
    return accelerator


def usable_precision(asked: str, on_gpu: bool) -> str:
    """`training.mixed_precision` where it can be had. A CPU computes in bf16 only with instructions for its products
    (AVX-512 BF16 or AMX) and else in fp32: without them a step would take hundreds of times as long."""
    features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = features.get("avx512_bf16") or features.get("amx_bf16")
    return asked if on_gpu or (asked == "bf16" and native) else "no"


def trackers(report_to: str) -> list[str]:
    """Names of the trackers in `training.report_to`, which holds `none` or names with commas between them.

    Raises:
        ConfigError: the package of one of them is not installed.
    """
    names = [] if report_to == "none" else report_to.split(",")
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ConfigError(
                f"`training.report_to` is {report_to!r}, but {name} is not installed; `pip install {name}`, or one of "
                f"none, {', '.join(available)}"
            )
    return names


def open_run(accelerator: Accelerator, config: AnyTraining, launch: Launch) -> RunDir:
    """The run folder, locked and compared with the config, and its trackers; for a dry run a throw-away folder.

    TensorBoard writes to `logs/`, and wandb keeps its own files there. The others are given the config, of which
    TensorBoard would keep a copy for every start.

    Raises:
        ConfigError: the folder cannot be used, see `RunDir.prepare`.
    """
    if launch.dry_run:
        return trial_run(accelerator)
    run = RunDir(config.output_dir)
    if accelerator.is_main_process:
        run.prepare(dump_config(config), launch, partial(completed, type(config)))
    accelerator.wait_for_everyone()
    training, wandb = config.training, {"dir": str(run.logs), "name": run.folder.name}
    settings = None if training.report_to in ("none", "tensorboard") else flat_settings(config)
    accelerator.init_trackers(training.tracker_project_name, settings, {"wandb": wandb})
    return run


def trial_run(accelerator: Accelerator) -> RunDir:
    """A run folder for a dry run, shared by all processes and deleted when the main one ends."""
    names = [tempfile.mkdtemp(prefix="ldm_dry_run_") if accelerator.is_main_process else ""]
    broadcast_object_list(names)
    if accelerator.is_main_process:
        atexit.register(shutil.rmtree, names[0], ignore_errors=True)
    run = RunDir(names[0])
    run.make_folders()
    return run


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


def due(step: int, every: int, total: int) -> bool:
    """Whether something is done after `step` steps: every `every` steps, and at the end."""
    return step % every == 0 or step == total


def parameter_count(module: nn.Module) -> str:
    """For instance `1.73 M`."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function; what ends it is one sentence on stderr.

    The exit code is 2 for bad input, 1 for a loss that stays non-finite or a lost process, 130 for Ctrl-C. A crash in
    a library's native code says on which line of Python it happened.
    """
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr may be no file
        faulthandler.enable()
    try:
        main()
    except (ConfigError, ValueError, OSError, FloatingPointError, LostProcess) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, (FloatingPointError, LostProcess)) else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        print("error: another process of this training ended; what it said tells why", file=sys.stderr)
        sys.exit(1)
