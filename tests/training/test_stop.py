"""SIGTERM and Ctrl-C, sent to this process and to one that holds a loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.training.stop import Stopped, StopSignal

LOOP = """
import sys, time, torch
from torch.utils.data import DataLoader, Dataset
from accelerate import Accelerator
from ldm.data.batches import leave_signals_to_parent
from ldm.training.stop import StopSignal
class Slow(Dataset):
    def __len__(self): return 10_000
    def __getitem__(self, i):
        time.sleep(0.02)
        return i
stop, accelerator = StopSignal(), Accelerator(cpu=True)
batches = iter(DataLoader(Slow(), batch_size=1, num_workers=2, worker_init_fn=leave_signals_to_parent))
with stop.deferred():
    for step, batch in enumerate(batches):
        print(step, flush=True)
        if stop.requested(accelerator):
            print("saved", flush=True)
            stop.leave()
"""


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    """A stop signal in this process, whose own handlers come back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_the_loop_the_first_signal_already_ends_the_process(stop: StopSignal, number: int, code: int) -> None:
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), number)
    assert end.value.code == code


def test_in_the_loop_it_is_remembered_and_ends_what_asks(stop: StopSignal) -> None:
    with pytest.raises(SystemExit) as end, stop.deferred():
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        seen, ended = [], False
        with stop.interruptible():
            for item in stop.checked([1, 2]):
                seen.append(item)
            ended = True
        assert seen == [] and not ended
        with pytest.raises(Stopped):
            stop.check("any", "argument")
    assert end.value.code == 143


def test_processes_that_validate_together_end_at_the_same_check(stop: StopSignal) -> None:
    others = iter([0, 0, signal.SIGTERM])
    accelerator: Any = SimpleNamespace(num_processes=2, device="cpu")
    accelerator.gather = lambda own: torch.cat([own, torch.tensor([next(others)])])
    seen = []
    with stop.interruptible(accelerator):
        for item in stop.checked([1, 2, 3, 4]):
            seen.append(item)
    assert seen == [1, 2] and stop.number == signal.SIGTERM
    with pytest.raises(Stopped):
        stop.check()


def test_a_repeated_signal_within_two_seconds_is_the_same(stop: StopSignal) -> None:
    with pytest.raises(SystemExit) as end, stop.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
    assert end.value.code == 130


def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal\n"
        "from ldm.training import stop\n"
        "stop.REPEAT_SECONDS = 0.0\n"
        "with stop.StopSignal().deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "still here\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_leaves_the_workers_alone(number: int, code: int) -> None:
    """A terminal and a batch system signal every process of a job, so the loader's workers get it too."""
    run = subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout is not None
    assert [run.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]  # one batch of each worker: both have begun
    os.killpg(run.pid, number)
    out, err = run.communicate(timeout=120)
    assert run.returncode == code and out.endswith("saved\n"), err
