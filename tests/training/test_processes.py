"""Reading what `accelerate launch` was asked for, and telling a lost process from another error."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from ldm.training import processes
from ldm.training.processes import LostProcess, last_state_named, launch_words, torchrun_arguments
from ldm.training.run_dir import RunDir

CONFIGS = Path(__file__).parent.parent.parent / "train_configs" / "accelerate"
REST = ["--cpu", "--num_processes", "2", "train_ldm.py", "--config", "launch.yaml"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["/usr/bin/python3", "/venv/bin/accelerate", "launch"],
        ["/usr/bin/python3", "-X", "dev", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch"],
    ],
)
def test_every_name_of_the_launcher_is_known(launcher: list[str]) -> None:
    assert launch_words([*launcher, *REST]) == REST


@pytest.mark.parametrize(
    "command", [["bash"], ["python", "train_ldm.py", "launch"], ["torchrun", "train_ldm.py"], ["accelerate", "env"], []]
)
def test_other_parents_are_not(command: list[str]) -> None:
    assert launch_words(command) is None


def test_only_a_launched_process_without_a_rank_starts_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(processes.os, "execv", lambda program, argv: started.append(argv))
    monkeypatch.setattr(processes, "launcher_arguments", lambda: launch_command_parser().parse_args(REST))
    monkeypatch.setattr(sys, "argv", ["train_ldm.py", "--config", "launch.yaml"])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    processes.start_all_processes()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    processes.start_all_processes()
    assert started == []
    monkeypatch.delenv("RANK")
    processes.start_all_processes()
    assert started[0][1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train_ldm.py", "--config", "launch.yaml"
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["--config_file", str(CONFIGS / "fsdp.yaml")], ["--use_fsdp"]])
def test_sharding_is_told_to_processes_on_the_cpu(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(processes.os, "execv", lambda program, argv: None)
    monkeypatch.setattr(processes.psutil.Process, "cmdline", lambda self: ["accelerate", "launch", *words, *REST])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "")
    processes.start_all_processes()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_several_machines_share_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    asked = argparse.Namespace(num_processes=8, num_machines=4, machine_rank=3)
    assert torchrun_arguments(asked) == [
        "--nnodes=4", "--node-rank=3", "--master-addr=10.0.0.1", "--master-port=1234", "--nproc-per-node=2"
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_our_files(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and config.mixed_precision == "no"
    assert f"--config_file train_configs/accelerate/{path.name}" in path.read_text()


def test_an_error_in_the_loop_names_the_newest_intact_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    run.make_folders()
    with pytest.raises(FloatingPointError, match="ten in a row; no state was saved yet"), last_state_named(run):
        raise FloatingPointError("ten in a row")
    for step in (2, 4):
        run.save(step, {"progress": {"step": step}}, 9)
    (run.state(4) / "progress.json").write_text("{}")
    with pytest.raises(FloatingPointError, match=rf"last good state is {run.state(2)}$"), last_state_named(run):
        raise FloatingPointError("ten in a row")
    closed = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.2]:4821\nmore")
    with pytest.raises(RuntimeError, match="pair") as plain, last_state_named(run):
        raise closed
    assert plain.value is closed
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with (
        pytest.raises(LostProcess, match=rf"was lost \(\[pair.*4821\); the last good state is {run.state(2)}, and the"),
        last_state_named(run),
    ):
        raise closed


def test_a_crash_in_native_code_names_the_line_of_python() -> None:
    code = "import os; from ldm.training.launch import run_command\ndef main(): os.abort()\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr and "line 2 in main" in done.stderr
