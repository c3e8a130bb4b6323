"""The processes of a training: starting all that were asked for, and telling when one of them was lost."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch.distributed
from accelerate.commands.config import load_config_from_file
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from ldm.data.text import first_line
from ldm.training.run_dir import RunDir

LOST = (
    "closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "timed out",
    "timeout",
    "remote process",
)
"""What the messages of gloo and NCCL say when the other end is gone, in lower case."""


class LostProcess(RuntimeError):  # noqa: N818
    """Another process of the same training ended; the message says what to do."""


def start_all_processes() -> None:
    """Makes `accelerate launch --cpu --num_processes N` mean what it says.

    Its launcher for CPUs starts a single process and leaves the others to MPI. That process, the only one to come here
    without a rank, reads with the launcher's own parser what its parent was asked for, and becomes torchrun with the
    same script and arguments.
    """
    asked = None if "RANK" in os.environ or "MASTER_ADDR" not in os.environ else launcher_arguments()
    if asked is None or (asked.num_processes or 1) < 2 or asked.mpirun_hostfile:
        return
    if asked.use_fsdp or getattr(asked, "distributed_type", None) == DistributedType.FSDP:
        os.environ["ACCELERATE_USE_FSDP"] = "true"  # which its launcher tells on GPUs alone
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(asked), *sys.argv])


def launcher_arguments() -> argparse.Namespace | None:
    """The arguments of `accelerate launch` where it is this process's parent, with those of its config file."""
    try:
        words = launch_words(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return None
    if words is None:
        return None
    asked: argparse.Namespace = launch_command_parser().parse_args(words)
    for name, value in _file_settings(asked).items():
        if getattr(asked, name, None) is None:
            setattr(asked, name, value)
    return asked


def launch_words(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch`, or another name of it, in a command line; None in any other command line."""
    for place, word in enumerate(command[:6]):
        name, before = Path(word).name, Path(command[place - 1]).name if place else ""
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(command[place + 1 :])
        if word == "launch" and before in ("accelerate", "accelerate.commands.accelerate_cli"):
            return list(command[place + 1 :])
    return None


def _file_settings(asked: argparse.Namespace) -> Mapping[str, object]:
    """The config file that the launcher read: the one it was given, or, without `--cpu`, the user's own."""
    default = os.path.isfile(default_config_file) and not asked.cpu
    return dict(vars(load_config_from_file(asked.config_file))) if asked.config_file or default else {}


def torchrun_arguments(asked: argparse.Namespace) -> list[str]:
    """torchrun's arguments for what `accelerate launch` was asked: N is the number of processes on all machines."""
    machines = asked.num_machines or 1
    each = [f"--nproc-per-node={asked.num_processes // machines}"]
    if machines == 1:
        return ["--standalone", *each]
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    rank = f"--node-rank={asked.machine_rank or 0}"
    return [f"--nnodes={machines}", rank, f"--master-addr={host}", f"--master-port={port}", *each]


@contextmanager
def last_state_named(run: RunDir) -> Iterator[None]:
    """Around a training loop: what ends it tells the newest intact state.

    Raises:
        FloatingPointError: as it was, the state added.
        LostProcess: in the place of a collective's failure after another process ended.
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {_newest(run)}") from error
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        raise LostProcess(
            f"the connection to another process of this training was lost ({first_line(error)}); {_newest(run)}, and "
            "the same command on all hosts goes on from it"
        ) from error


def _newest(run: RunDir) -> str:
    folder = run.newest_intact()
    return "no state was saved yet" if folder is None else f"the last good state is {folder}"


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    return shared and any(word in str(error).lower() for word in LOST)
