"""Tiny trainings in forked processes: torch is imported once, and a run of six steps takes about a second.

What `kills.py` and `survival.py` share. `Points` names the places in a run at which something can be done to it: in a
step, around and amid every file that is written, flushed, renamed or removed, while encoding, validating and exporting.
The names are found by running, so a new file or a new stage is a new point by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL.Image import Image

import train_autoencoder
import train_ldm
from autoencoder import AutoencoderKL
from ldm.training.ema import Ema
from ldm.training.launch import run_command
from ldm.training.log import TrainingLog
from ldm.training.run_dir import RunDir

STEPS = 6
TRAINING = {
    "max_train_steps": STEPS,
    "train_batch_size": 8,
    "ema_decay": 0.9,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
}
STAGE_ONE: dict[str, Any] = {
    "data": {"source": "shapes", "resolution": 32, "max_train_samples": 64, "max_validation_samples": 4},
    "autoencoder": {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "loss": {"perceptual": 0.0, "kl": 1.0e-3, "discriminator": 0.2, "discriminator_start": 2},
    "perceptual": {"type": "none"},
    "discriminator": {"num_layers": 1, "base_channels": 8, "norm": "batch"},
    "optimizer": {"learning_rate": 1.0e-4, "lr_warmup_steps": 2},
    "statistics_samples": 32,
    "training": TRAINING,
    "validation": {"steps": 3, "num_images": 2},
}
STAGE_TWO: dict[str, Any] = {
    "data": {"source": "shapes", "resolution": 32, "max_train_samples": 64},
    "latents": {"shard_size": 16, "batch_size": 8},
    "text_encoder": {
        "type": "clip_from_scratch",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 600,
        "max_length": 24,
    },
    "unet": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    },
    "optimizer": {"learning_rate": 1.0e-3},
    "training": TRAINING,
    "validation": {
        "steps": 3,
        "num_loss_samples": 4,
        "validation_prompts": ["a red circle"],
        "num_inference_steps": 2,
    },
}
ALIKE = (
    (r"\d+", "N"),
    (r"/(autoencoder|discriminator|loss|network|ema|optimizer|discriminator_optimizer|progress)\.", "/PART."),
    (r"^tokenizer/.*", "tokenizer/FILE"),
    (r"^\.export\.tmp/.*safetensors.*", ".export.tmp/WEIGHTS"),
    (r"^\.export\.tmp/(?!WEIGHTS).*", ".export.tmp/FILE"),
)
MAINS: dict[str, Callable[[], None]] = {"one": train_autoencoder.main, "two": train_ldm.main}


class Points:
    """Calls `act` at the `at`-th passing of the place `label`; without a label it writes every name down."""

    def __init__(self, folder: Path, label: str | None = None, at: int = 1, act: Callable[[], None] | None = None):
        self.folder, self.label, self.at, self.act = folder, label, at, act
        self.trace: list[str] = []

    def here(self, label: str, before_acting: Callable[[], None] | None = None) -> None:
        self.trace.append(label)
        if label == self.label and self.trace.count(label) == self.at and self.act is not None:
            if before_acting is not None:
                before_acting()
            self.act()

    def name(self, path: str | os.PathLike[str]) -> str:
        """A path in the run folder without what tells one of many like it from another: numbers, parts of a model."""
        text = os.fspath(path)
        inside = os.path.relpath(text, self.folder) if text.startswith(str(self.folder)) else "elsewhere"
        for pattern, name in ALIKE:
            inside = re.sub(pattern, name, inside)
        return inside

    def around(self, owner: Any, attribute: str, label: Callable[..., str]) -> None:
        """Makes a place before and after every call of a function."""
        inner = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            name = label(*args)
            self.here(f"before {name}")
            result = inner(*args, **kwargs)
            self.here(f"after {name}")
            return result

        setattr(owner, attribute, wrapped)

    def install(self) -> None:
        """Places in a step, around validation, encoding and logging, and around everything done to the disk."""
        for owner, attribute, name in (
            (train_autoencoder.AutoencoderTask, "generator_loss", "the generator's loss"),
            (train_autoencoder.AutoencoderTask, "discriminator_loss", "the discriminator's loss"),
            (train_ldm.TextToImageTask, "loss", "the denoising loss"),
            (Accelerator, "backward", "backward"),
            (torch.optim.AdamW, "step", "the optimiser's step"),
            (Ema, "update", "the average's update"),
            (Ema, "_load", "putting the average in place"),
            (AutoencoderKL, "moments", "encoding"),
            (TrainingLog, "write", "writing metrics"),
            (RunDir, "_prune", "pruning"),
        ):
            self.around(owner, attribute, lambda *_, name=name: name)
        self.around(os, "replace", lambda source, target: f"rename to {self.name(target)}")
        self._flushes()
        self._writes(Path, "write_text", lambda path, *_: path)
        self._writes(safetensors.torch, "serialize_file", lambda _, path, *__: path)
        self._writes(Image, "save", lambda _, target, *__: target)
        self._removals()

    def _flushes(self) -> None:
        inner = os.fsync

        def wrapped(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._half(path)
            self.here(f"before fsync of {self.name(path)}")
            inner(descriptor)
            self.here(f"after fsync of {self.name(path)}")

        os.fsync = wrapped

    def _writes(self, owner: Any, attribute: str, target: Callable[..., Any]) -> None:
        inner = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = target(*args)
            self.here(f"before writing {self.name(path)}")
            result = inner(*args, **kwargs)
            self._half(path)
            self.here(f"after writing {self.name(path)}")
            return result

        setattr(owner, attribute, wrapped)

    def _half(self, path: str | os.PathLike[str]) -> None:
        """A file that was written but not flushed: acting here finds it half as long, as amid its writing."""
        if os.path.isfile(path):
            self.here(f"half of {self.name(path)}", lambda: os.truncate(path, os.path.getsize(path) // 2))

    def _removals(self) -> None:
        inner = shutil.rmtree

        def wrapped(path: Any, *args: Any, **kwargs: Any) -> None:
            if not os.path.isdir(path):
                return inner(path, *args, **kwargs)
            first = next((entry.path for entry in os.scandir(path) if entry.is_file()), None)
            self.here(f"before removing {self.name(path)}")
            self.here(f"half of removing {self.name(path)}", lambda: os.unlink(first) if first else None)
            inner(path, *args, **kwargs)
            self.here(f"after removing {self.name(path)}")

        shutil.rmtree = wrapped  # type: ignore[assignment]


def write_config(stage: str, folder: Path, autoencoder: Path | None = None) -> Path:
    """A config file beside the run folder that it names."""
    content = {"one": STAGE_ONE, "two": {**STAGE_TWO, "autoencoder": str(autoencoder)}}[stage]
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(json.dumps({"output_dir": str(folder), **content}))
    return path


def train_here(stage: str, config: Path, *argv: str) -> int:
    """Trains in this very process and returns the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sys.argv = ["train", "--config", str(config), *argv]
    try:
        run_command(MAINS[stage])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@contextmanager
def forked(work: Callable[[int], int], processes: int, log: Path) -> Iterator[list[int]]:
    """Runs `work(rank)` in as many forked processes; gives their ids. Its return value is the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _be_child(work, rank, processes, port, log)
        children.append(child)
    try:
        yield children
    finally:
        for child in children:
            end(child)


def _be_child(work: Callable[[int], int], rank: int, processes: int, port: int, log: Path) -> None:
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        if processes > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "OMP_NUM_THREADS": "1",
            }
        code = work(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_codes(children: list[int], patience: float = 60.0) -> list[int]:
    """Waits for all, after the first for `patience` seconds more. A killed one has minus its signal's number."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    deadline = time.monotonic() + patience
        time.sleep(0.005)
    return [codes.get(child, -999) for child in children]


def end(child: int) -> None:
    """Kills a child that still runs."""
    try:
        if os.waitpid(child, os.WNOHANG) == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    except ChildProcessError:
        pass


def final_hashes(run: Path, step: int = STEPS) -> dict[str, str]:
    """Hashes of raw weights, average, discriminator, optimisers and counters after the last step."""
    manifest = json.loads((run / "state" / f"step_{step:06d}" / "manifest.json").read_text())
    return dict(manifest["sha256"])


def exported(run: Path) -> dict[str, bytes]:
    """Contents of the exported weights."""
    return {str(f.relative_to(run)): f.read_bytes() for f in sorted((run / "export").rglob("*.safetensors"))}


def settle() -> None:
    """One thread and no warnings: call before the first fork."""
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1,1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
