"""Neither network's pass leaves a gradient in the other or in the perceptual one: alone, accumulating, on two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

SCRIPT = Path(__file__).with_name("isolated_steps.py")
ROOT = Path(__file__).parent.parent.parent


def gradients(file: Path, processes: int, accumulation: int) -> dict[str, Tensor]:
    """What the script leaves when that many processes run it; its own checks make it fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file), str(accumulation)],
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=600)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(errors)
    return load_file(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return gradients(tmp_path_factory.mktemp("alone") / "gradients.safetensors", 1, 1)


def test_one_process_keeps_them_apart(alone: dict[str, Tensor]) -> None:
    assert {name.split(".")[0] for name in alone} == {"vae", "critic"}
    assert all(bool(torch.isfinite(value).all()) for value in alone.values())


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (2, 2)])
def test_cut_batches_keep_them_apart(
    alone: dict[str, Tensor], tmp_path: Path, processes: int, accumulation: int
) -> None:
    """The discriminator's loss is a mean over the batch, so its gradient is that of the whole batch. The autoencoder's
    adaptive weight is one of each micro-batch: its gradient agrees where the batch is cut by processes only."""
    cut = gradients(tmp_path / "gradients.safetensors", processes, accumulation)
    assert cut.keys() == alone.keys()
    size = {part: total_norm(alone, part) for part in ("critic", "vae")}
    for name, value in cut.items():
        part = name.split(".")[0]
        if part == "critic" or accumulation == 1:
            assert_close(value, alone[name], rtol=1e-4, atol=1e-6 * size[part])


def total_norm(found: dict[str, Tensor], part: str) -> float:
    return float(torch.stack([value.norm() for name, value in found.items() if name.startswith(part)]).norm())
