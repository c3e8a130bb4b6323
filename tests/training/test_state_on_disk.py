"""States under damage and on failing disks: what is broken is found, and one that is good is always there."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config.file import Launch
from ldm.data import cache_files
from ldm.training import run_dir
from ldm.training.run_dir import RunDir, is_intact, read_state, size_in_bytes

KEEP = 9
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
PARTS = ("network", "optimizer", "progress")


def state(step: int) -> dict[str, Any]:
    """Tensors of several types, nested; every number says which step it is of."""
    network = {"weight": torch.full((3, 5), float(step)), "half": torch.full((7,), step).half()}
    moments = [{"m": torch.full((3, 5), step / 10), "step": torch.tensor(float(step))}, torch.arange(step, step + 4)]
    return {"network": network, "optimizer": {"state": moments}, "progress": {"step": step, "losses": [0.1 * step]}}


def run_with(folder: Path, *steps: int) -> RunDir:
    run = RunDir(folder)
    run.make_folders()
    for step in steps:
        run.save(step, state(step), KEEP)
    return run


def newest(run: RunDir) -> tuple[int, list[str]]:
    """The step that a run would start from, its values checked, and the warnings."""
    warnings: list[str] = []
    found = run.load_newest(warnings.append)
    assert found is not None
    step, values = found
    assert float(values["network"]["weight"].mean()) == step == values["progress"]["step"]
    return step, warnings


TRAIN = """
import sys
from pathlib import Path
from benchmarks.forked import settle, train_here, write_config
settle()
one, two = (Path(sys.argv[1]) / stage for stage in ("one", "two"))
sys.exit(train_here("one", write_config("one", one)) or train_here("two", write_config("two", two, one / "export")))
"""
ENTRIES = {
    "one": {"autoencoder", "discriminator", "loss", "ema", "optimizer", "discriminator_optimizer", "progress"},
    "two": {"network", "ema", "optimizer", "progress"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny trainings of both stages leave, in `one` and `two`: stage one has a discriminator, both an average."""
    folder = tmp_path_factory.mktemp("trained")
    root = Path(__file__).parent.parent.parent
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", TRAIN, str(folder)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def copy_of(trained: Path, stage: str, folder: Path) -> tuple[RunDir, list[Path], Any]:
    """A copy of a trained run to be damaged, the files of its newest state, and the values of the state before it."""
    shutil.copytree(trained / stage / "state", folder / "state")
    run = RunDir(folder)
    assert run.complete() == [run.state(4), run.state(6)]
    files = sorted(run.state(6).iterdir())
    assert {path.stem for path in files} == ENTRIES[stage] | {"manifest"}
    return run, files, read_state(run.state(4))


def passed_over(run: RunDir, previous: Any, read: bool) -> bool:
    """Whether the newest state is known to be damaged, and the one before it chosen; with `read`, read and compared.

    Reading takes ten times as long as checking the hashes, so the tests do it a few times a file only.
    """
    if not read:
        return run.newest_intact() == run.state(4)
    warnings: list[str] = []
    found = run.load_newest(warnings.append)
    named = len(warnings) == 1 and str(run.state(6)) in warnings[0]
    return named and found is not None and found[0] == 4 and same(found[1], previous)


def flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def same(tree: Any, other: Any) -> bool:
    """Whether two states have the same values, bit by bit."""
    if isinstance(tree, torch.Tensor):
        return torch.equal(tree, other)
    if isinstance(tree, dict):
        return tree.keys() == other.keys() and all(same(value, other[key]) for key, value in tree.items())
    if isinstance(tree, list):
        return len(tree) == len(other) and all(map(same, tree, other))
    return bool(tree == other)


@pytest.mark.parametrize("stage", ENTRIES)
def test_a_thousand_flipped_bits_are_all_found(trained: Path, tmp_path: Path, stage: str) -> None:
    """In each stage, spread over every file of a state; 2,000 in all."""
    run, files, previous = copy_of(trained, stage, tmp_path)
    draw = random.Random(0)
    for number in range(1000):
        path = files[number % len(files)]
        place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, place, bit)
        assert passed_over(run, previous, number < 3 * len(files)), (path.name, place, bit)
        flip(path, place, bit)
    assert is_intact(run.state(6))


@pytest.mark.parametrize("stage", ENTRIES)
def test_two_hundred_and_fifty_truncations_are_all_found(trained: Path, tmp_path: Path, stage: str) -> None:
    """In each stage, of every file of a state, its last byte alone among them; 500 in all."""
    run, files, previous = copy_of(trained, stage, tmp_path)
    draw = random.Random(1)
    for number in range(250):
        path = files[number % len(files)]
        whole = path.read_bytes()
        length = len(whole) - 1 if number < len(files) else draw.randrange(len(whole))
        os.truncate(path, length)
        assert passed_over(run, previous, number < 3 * len(files)), (path.name, length)
        path.write_bytes(whole)
    assert is_intact(run.state(6))


def test_every_bit_of_the_manifest_matters(tmp_path: Path) -> None:
    run = run_with(tmp_path, 4)
    path = run.state(4) / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            assert not is_intact(path.parent), (place, bit)


FAULTS = [
    *(("os.fsync", number) for number in range(1, 10)),
    *(("os.replace", number) for number in range(1, 6)),
    *(("save_file", number) for number in range(1, 4)),
    *(("open", number) for number in range(1, 14)),
    ("Path.mkdir", 1),
]


@pytest.mark.parametrize(("function", "number"), FAULTS)
def test_a_disk_fault_costs_one_state_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    run = run_with(tmp_path, 2)
    with monkeypatch.context() as patch:
        calls = break_call(patch, function, number)
        with pytest.raises(OSError, match="broken"):
            run.save(4, state(4), 1)
    assert calls[0] >= number, f"{function} was called {calls[0]} times only, the fault never came"
    assert all(name.startswith("step_") for name in os.listdir(run.states))
    step, warnings = newest(run)
    assert step in (2, 4) and not warnings
    run.save(6, state(6), 1)
    assert newest(run) == (6, []) and os.listdir(run.states) == ["step_000006"]


def break_call(patch: pytest.MonkeyPatch, function: str, number: int) -> list[int]:
    """Makes the `number`-th call of a function fail; counts the calls."""
    owner, name = {
        "os.fsync": (os, "fsync"),
        "os.replace": (os, "replace"),
        "save_file": (run_dir, "save_file"),
        "open": (run_dir, "open"),
        "Path.mkdir": (Path, "mkdir"),
    }[function]
    inner: Callable[..., Any] = getattr(owner, name, open)
    calls = [0]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(ERRORS[number % len(ERRORS)], "broken")
        return inner(*args, **kwargs)

    for module in (run_dir, cache_files) if name == "open" else (owner,):  # cache_files reads a file for its hash
        patch.setattr(module, name, breaking, raising=False)
    return calls


def test_there_are_thirty_faults() -> None:
    assert len(FAULTS) >= 30


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match="a state needs 1 MiB and 0 MiB are free") as error:
        run.save(4, state(4), KEEP)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(run.states) == ["step_000002"]


def test_the_size_of_a_state_counts_every_tensor() -> None:
    assert size_in_bytes(state(3)) == 3 * 5 * 4 + 7 * 2 + 3 * 5 * 4 + 4 + 4 * 8


def test_a_real_limit_of_the_file_system_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow over RLIMIT_FSIZE, as a full disk does in the midst of a write."""
    run = run_with(tmp_path, 2)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError):
            run.save(4, {"network": {"weight": torch.zeros(4096)}}, KEEP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(run.states) == ["step_000002"] and newest(run) == (2, [])


def test_what_cannot_be_removed_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", _refuse)
        run.save(4, state(4), 1)
    assert newest(run) == (4, [])


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "broken")


def test_a_workers_copy_of_the_lock_does_not_keep_a_killed_run_locked(tmp_path: Path) -> None:
    """A forked data-loading worker may outlive its killed parent; the next start must not be refused for it."""
    code = (
        "import os, sys, time, signal\n"
        "from ldm.config.file import Launch\n"
        "from ldm.training.run_dir import RunDir\n"
        "run = RunDir(sys.argv[1])\n"
        "run.prepare('a: 1\\n', Launch('auto', False, False))\n"
        "if os.fork() == 0:\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    worker = int(first.stdout.readline())
    try:
        assert first.wait() == -signal.SIGKILL
        os.kill(worker, 0)
        RunDir(tmp_path).prepare("a: 1\n", Launch("auto", False, False))
    finally:
        os.kill(worker, signal.SIGKILL)
