from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.config import ConfigError, OptimizerConfig
from ldm.config.file import Launch
from ldm.data.fingerprint import weights_hash
from ldm.training.optim import adamw
from ldm.training.run_dir import DamagedState, RunDir, read_state, write_state

AUTO, NEVER = Launch("auto", False, False), Launch("never", False, False)
CONFIG = "output_dir: out\ntraining: {max_train_steps: 10}\n"


def plain(tree: Any) -> Any:
    """A tree that can be compared with ==: tensors as (type, shape, values), tuples as lists."""
    if isinstance(tree, Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.reshape(-1).view(torch.uint8).tolist() if tree.numel() else []
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    with torch.random.fork_rng():
        torch.manual_seed(steps)
        module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = adamw(module.parameters(), OptimizerConfig(learning_rate=1e-2), 1e-2)
    for step in range(steps):
        module(torch.full((4, 2), 0.1 * step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def state_of(step: int) -> dict[str, Any]:
    module, optimizer = trained(step)
    return {"network": module.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"step": step}}


def run_in(folder: Path, *steps: int, keep: int = 9) -> RunDir:
    run = RunDir(folder)
    run.prepare(CONFIG, AUTO)
    for step in steps:
        run.save(step, state_of(step), keep)
    return run


def newest(run: RunDir) -> tuple[int | None, list[str]]:
    """The step that a resumed run starts from, and the warnings; what was read must be what was saved."""
    warnings: list[str] = []
    found = run.load_newest(warnings.append)
    if found is None:
        return None, warnings
    assert plain(found[1]) == plain(state_of(found[0]))
    return found[0], warnings


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state: dict[str, dict[Any, Any]] = {
        "tensors": {
            "half": whole.half(), "bfloat": whole.bfloat16(), "long": whole.long(), "bool": whole > 5, "double": whole.double(),
            "scalar": torch.tensor(-0.0), "empty": torch.zeros(0, 3), "turned": whole.T, "part": whole[1], "nan": torch.tensor(math.nan),
            "parameter": nn.Parameter(whole[:2]),
        },
        "plain": {0: None, 7: True, "x": [1, 2.5, "text", [], {}], "big": 2**70, "small": 5e-324, "inf": math.inf},
        "alike": {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), "tensor": 3, "items": [torch.ones(2)]},
        "nothing": {},
    }  # fmt: skip
    write_state(tmp_path / "s", state)
    found = read_state(tmp_path / "s")
    expected = {**state, "tensors": {name: value.detach().contiguous() for name, value in state["tensors"].items()}}
    assert plain(found) == plain(expected)


def test_a_restored_optimiser_steps_as_the_old_one(tmp_path: Path) -> None:
    module, optimizer = trained()
    write_state(tmp_path / "s", {"network": module.state_dict(), "optimizer": optimizer.state_dict()})
    found = read_state(tmp_path / "s")
    other, restored = trained(0)
    other.load_state_dict(found["network"])
    restored.load_state_dict(found["optimizer"])
    for _ in range(3):
        for net, chosen in ((module, optimizer), (other, restored)):
            net(torch.ones(1, 2)).square().sum().backward()
            chosen.step()
            chosen.zero_grad()
    assert weights_hash(module) == weights_hash(other) != weights_hash(trained()[0])
    assert plain(optimizer.state_dict()) == plain(restored.state_dict())


def test_the_newest_state_is_used(tmp_path: Path) -> None:
    assert newest(run_in(tmp_path / "empty")) == (None, [])
    assert newest(run_in(tmp_path / "run", 2, 7, 12)) == (12, [])
    (tmp_path / "run" / "state" / "step_000099_copy").mkdir()
    assert newest(RunDir(tmp_path / "run")) == (12, [])


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    for step in (999_999, 1_000_000):
        write_state(run.states / f"step_{step:06d}", {"progress": {"step": step}})
    assert [folder.name for folder in run.complete()] == ["step_999999", "step_1000000"]
    run.save(1_000_001, state_of(1), keep=2)
    assert [folder.name for folder in run.complete()] == ["step_1000000", "step_1000001"]


FILES = sorted(
    [f"{name}.{kind}" for name in ("network", "optimizer", "progress") for kind in ("json", "safetensors")]
    + ["manifest.json"]
)


def test_the_files_are_those_that_the_tests_damage(tmp_path: Path) -> None:
    run = run_in(tmp_path, 2)
    assert sorted(f.name for f in (run.states / "step_000002").iterdir()) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_emptied_or_missing_file_is_named_and_the_older_state_used(tmp_path: Path, file: str) -> None:
    run = run_in(tmp_path, 2, 4)
    path = run.states / "step_000004" / file
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 1, 0, None):
        path.unlink()
        if length is not None:
            path.write_bytes(whole[:length])
        step, warnings = newest(run)
        assert step == 2 and len(warnings) == 1 and str(path) in warnings[0]
    path.write_bytes(whole)
    assert newest(run) == (4, [])


def test_any_flipped_bit_is_found_and_the_older_state_used(tmp_path: Path) -> None:
    run, draw = run_in(tmp_path, 2, 4), random.Random(0)
    for number in range(63):
        path = run.states / "step_000004" / FILES[number % len(FILES)]
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        step, warnings = newest(run)
        assert step == 2 and len(warnings) == 1 and "step_000004" in warnings[0], (path, place, bit)
        path.write_bytes(whole)
    assert newest(run) == (4, [])


def test_a_flipped_bit_of_any_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    run, draw = run_in(tmp_path, 1), random.Random(1)
    path = run.states / "step_000001" / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(DamagedState):
            read_state(path.parent)


def test_a_state_of_another_format_is_not_read(tmp_path: Path) -> None:
    run = run_in(tmp_path, 1)
    path = run.states / "step_000001" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedState, match="has format 2, not 1"):
        read_state(path.parent)


def test_with_nothing_intact_the_run_starts_anew(tmp_path: Path) -> None:
    run = run_in(tmp_path, 2, 4)
    for folder in run.complete():
        (folder / "manifest.json").unlink()
    step, warnings = newest(run)
    assert step is None and len(warnings) == 2


def test_a_half_written_state_is_passed_over_and_cleared(tmp_path: Path) -> None:
    run = run_in(tmp_path, 2)
    half = run.states / ".tmp_step_000004"
    write_state(half, state_of(4))
    (half / "manifest.json").unlink()
    assert newest(run) == (2, [])
    run.save(3, state_of(3), 9)
    assert sorted(p.name for p in run.states.iterdir()) == ["step_000002", "step_000003"]


def test_a_failed_save_leaves_the_old_states_alone(tmp_path: Path) -> None:
    run = run_in(tmp_path, 2)
    with pytest.raises(TypeError):
        run.save(4, {"network": {"a": torch.ones(1)}, "bad": object()}, 9)
    assert [p.name for p in run.states.iterdir()] == ["step_000002"]
    assert newest(run) == (2, [])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    run = run_in(tmp_path, 2, 4)
    (run.states / "step_000004" / "network.json").write_text("{}")
    run.save(4, state_of(4), 9)
    assert newest(run) == (4, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_states_are_kept(tmp_path: Path, keep: int) -> None:
    run = run_in(tmp_path, 1, 2, 3, 4, keep=keep)
    assert [int(p.name[5:]) for p in run.complete()] == [1, 2, 3, 4][-keep:]


def test_a_damaged_later_state_never_displaces_an_intact_one(tmp_path: Path) -> None:
    run = run_in(tmp_path, 2, 6)
    (run.states / "step_000006" / "network.json").unlink()
    assert newest(run)[0] == 2
    run.save(4, state_of(4), keep=1)
    assert newest(run) == (4, [])


def test_a_changed_config_is_refused_with_the_list(tmp_path: Path) -> None:
    run_in(tmp_path, 2)
    changed = "output_dir: out\nseed: 3\ntraining: {max_train_steps: 20}\n"
    with pytest.raises(
        ConfigError, match=r"seed: None -> 3; training\.max_train_steps: 10 -> 20.*--allow-config-change"
    ):
        RunDir(tmp_path).prepare(changed, AUTO)
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    RunDir(tmp_path).prepare(changed, Launch("auto", True, False))
    assert (tmp_path / "config.yaml").read_text() == changed
    RunDir(tmp_path).prepare(changed, AUTO)


def test_a_run_without_a_state_starts_with_another_config(tmp_path: Path) -> None:
    RunDir(tmp_path).prepare(CONFIG, AUTO)
    corrected = "output_dir: out\nseed: 3\n"
    RunDir(tmp_path).prepare(corrected, AUTO)
    assert (tmp_path / "config.yaml").read_text() == corrected


@pytest.mark.parametrize("saved", ["state/step_000002", "ema/step_000002", "export"])
def test_whatever_a_run_saved_keeps_its_config(tmp_path: Path, saved: str) -> None:
    RunDir(tmp_path).prepare(CONFIG, AUTO)
    (tmp_path / saved).mkdir(parents=True)
    with pytest.raises(ConfigError, match="another config"):
        RunDir(tmp_path).prepare("output_dir: out\nseed: 3\n", AUTO)
    assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", hold, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline()
    with pytest.raises(ConfigError, match="is being used by another training process"):
        RunDir(tmp_path).prepare(CONFIG, AUTO)
    assert not (tmp_path / "config.yaml").exists()
    other.communicate()
    RunDir(tmp_path).prepare(CONFIG, AUTO)


def test_the_lock_lasts_as_long_as_the_run(tmp_path: Path) -> None:
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-S", "-c", take, str(tmp_path / ".lock")]
    first = run_in(tmp_path)
    assert b"BlockingIOError" in subprocess.run(command, stderr=subprocess.PIPE).stderr
    del first
    assert subprocess.run(command).returncode == 0


def test_resume_never_refuses_a_used_folder_only(tmp_path: Path) -> None:
    RunDir(tmp_path / "new").prepare(CONFIG, NEVER)
    (tmp_path / "empty").mkdir()
    RunDir(tmp_path / "empty").prepare(CONFIG, NEVER)
    for used in ("new", "empty"):
        with pytest.raises(ConfigError, match="is not empty and --resume never"):
            RunDir(tmp_path / used).prepare(CONFIG, NEVER)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        RunDir(tmp_path / "other").prepare(CONFIG, NEVER)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_weights_hash_sees_names_and_values() -> None:
    module, _ = trained()
    before = weights_hash(module)
    assert weights_hash(trained()[0]) == before
    with torch.no_grad():
        next(module.parameters()).view(-1)[0].add_(1e-6)
    assert weights_hash(module) != before
