"""The run folder: `config.yaml`, `state/step_000500/`, `ema/`, `export/`, `samples/`, `logs/`, `metrics.jsonl`.

A state is a folder of safetensors and JSON files. It is written under a temporary name, each file flushed to disk and
hashed, the manifest last, and then renamed; reading checks every hash, so a half-written or damaged state is named and
passed over and the newest intact one is used. There is no pickle.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.config import ConfigError
from ldm.config.file import Launch, differences
from ldm.data.cache_files import file_hash

State = dict[str, Any]
FORMAT = 1
SPARE_BYTES = 1 << 20


class RunDir:
    """One training run on disk. Only the main process writes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.states = self.folder / "state"
        self.averages = self.folder / "ema"
        self.samples = self.folder / "samples"
        self.logs = self.folder / "logs"
        self.export = self.folder / "export"
        self._lock: TextIO | None = None

    def prepare(self, config_yaml: str, launch: Launch, completed: Callable[[str], str] = str) -> None:
        """Takes the folder's lock, compares its config with this one's, and writes config.yaml.

        A run that ended before it saved anything, such as one whose data were not to be read, may start with another
        config. `completed` gives the text of an older config the settings that came since.

        Raises:
            ConfigError: when the folder is used and resuming is refused, in use by another process, or its config
            differs from that of what it holds.
        """
        if launch.resume == "never" and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty and --resume never was given; choose another output_dir")
        self.make_folders()
        self._take_lock()
        path = self.folder / "config.yaml"
        saved = bool(self.complete() or self.snapshots() or self.export.exists())
        if path.exists() and saved and not launch.allow_config_change:
            changed = differences(completed(path.read_text()), config_yaml)
            if changed:
                raise ConfigError(
                    f"{self.folder} was started with another config ({'; '.join(changed)}); choose another output_dir, "
                    "or give --allow-config-change to go on with the new one"
                )
        write_text(path, config_yaml)

    def make_folders(self) -> None:
        """Makes the folders for states, samples and logs."""
        for folder in (self.states, self.samples, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def _take_lock(self) -> None:
        """A record lock, because a data-loading worker that outlives a killed run does not inherit it."""
        self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{self.folder} is being used by another training process") from error

    def save(self, step: int, state: State, keep: int) -> None:
        """Writes `state/step_NNNNNN` atomically, then removes all but the newest `keep` states.

        A state of the same step that is there already is a damaged one, or this run would have started from it.

        Raises:
            OSError: the disk is too full or failed; the temporary folder is gone and the older states are untouched.
        """
        _publish(self.state(step), state)
        self._prune(step, keep)

    def keep_average(self, step: int, state: State) -> None:
        """Writes `ema/step_NNNNNN` atomically; it is never pruned.

        Raises:
            OSError: the disk is too full or failed; the temporary folder is gone and the others are untouched.
        """
        self.averages.mkdir(exist_ok=True)
        _publish(self.averages / _name(step), state)

    def drop_averages(self, step: int) -> bool:
        """Removes the averages of steps after `step`; returns whether that of `step` is there and whole."""
        for folder in self.snapshots():
            if _step(folder) > step:
                shutil.rmtree(folder, ignore_errors=True)
        return is_intact(self.averages / _name(step))

    def _prune(self, step: int, keep: int) -> None:
        """Keeps the newest `keep` states up to `step`; a later one is damaged, or this run would start from it.

        What cannot be removed stays; it is tried again after the next save.
        """
        states = self.complete()
        reached = [folder for folder in states if _step(folder) <= step]
        for folder in states:
            if folder not in reached[-keep:]:
                shutil.rmtree(folder, ignore_errors=True)

    def sample(self, step: int) -> Path:
        """Where the validation pictures after `step` steps belong."""
        return self.samples / f"{_name(step)}.png"

    def lacks_sample(self, step: int, every: int, total: int) -> bool:
        """Whether the validation that was due when step `step` was saved did not come to its end."""
        return step > 0 and (step % every == 0 or step == total) and not self.sample(step).exists()

    def state(self, step: int) -> Path:
        """Where the state after `step` steps belongs."""
        return self.states / _name(step)

    def complete(self) -> list[Path]:
        """Renamed states, oldest first."""
        return _steps(self.states)

    def snapshots(self) -> list[Path]:
        """The averages that were kept, oldest first."""
        return _steps(self.averages)

    def newest_intact(self) -> Path | None:
        """The newest state whose hashes are right."""
        return next((folder for folder in reversed(self.complete()) if is_intact(folder)), None)

    def load_newest(self, warn: Any) -> tuple[int, State] | None:
        """The newest intact state and its step; damaged ones are named through `warn` and passed over."""
        for folder in reversed(self.complete()):
            try:
                return _step(folder), read_state(folder)
            except DamagedState as error:
                warn(f"{error}; using an older state")
        return None


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _steps(parent: Path) -> list[Path]:
    folders = (p for p in parent.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit())
    return sorted(folders, key=_step)


def _publish(target: Path, state: State) -> None:
    """Writes a state under a temporary name beside its own, then renames it; abandoned ones are removed."""
    parent = target.parent
    temporary = parent / f".tmp_{target.name}"
    for abandoned in parent.glob(".tmp_step_*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    try:
        _check_space(parent, state)
        write_state(temporary, state)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_space(folder: Path, state: State) -> None:
    needed, free = size_in_bytes(state) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        reason = f"a state needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free"
        raise OSError(errno.ENOSPC, reason, str(folder))


class DamagedState(ValueError):  # noqa: N818
    """A state whose files are missing or differ from their hashes."""


def write_state(folder: Path, state: State) -> None:
    """Writes a tree of tensors, numbers, strings, lists and dicts as one safetensors and one JSON file per entry."""
    folder.mkdir(parents=True)
    hashes: dict[str, str] = {}
    for name, tree in state.items():
        tensors: dict[str, Tensor] = {}
        skeleton = json.dumps(_split(tree, name, tensors))
        write_text(folder / f"{name}.json", skeleton)
        _write_tensors(folder / f"{name}.safetensors", tensors)
        for file in (f"{name}.json", f"{name}.safetensors"):
            hashes[file] = file_hash(folder / file)
    write_text(folder / "manifest.json", json.dumps({"format": FORMAT, "sha256": hashes}, indent=1))
    sync_folder(folder)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    sync_file(path)


def read_state(folder: Path) -> State:
    """Reads back what `write_state` wrote, after checking every hash.

    Raises:
        DamagedState: naming the file that is missing or changed.
    """
    names = [file.removesuffix(".json") for file in checked_files(folder) if file.endswith(".json")]
    return {name: _read_entry(folder, name) for name in names}


def read_state_entry(folder: Path, name: str) -> Any:
    """Reads one part of a state, after checking the hashes of all.

    Raises:
        DamagedState: naming the file that is missing or changed.
    """
    checked_files(folder)
    return _read_entry(folder, name)


def checked_files(folder: Path) -> list[str]:
    """Names of a state's files, after checking every hash.

    Raises:
        DamagedState: naming the file that is missing or changed.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        version, hashes = manifest["format"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedState(f"{folder}/manifest.json cannot be read") from error
    if version != FORMAT:
        raise DamagedState(f"{folder}/manifest.json has format {version!r}, not {FORMAT}")
    for file, expected in hashes.items():
        if not _has_hash(folder / file, expected):
            raise DamagedState(f"{folder}/{file} is missing or damaged")
    return list(hashes)


def is_intact(folder: Path) -> bool:
    """Whether every file of a state is there with its hash."""
    try:
        return bool(checked_files(folder))
    except DamagedState:
        return False


def _has_hash(path: Path, expected: str) -> bool:
    try:
        return file_hash(path) == expected
    except (OSError, ValueError):
        return False


def _read_entry(folder: Path, name: str) -> Any:
    return _join(json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors"))


def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        path = f"{path}#{len(tensors)}" if path in tensors else path
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(tree, Mapping):
        return {"items": [[key, _split(value, f"{path}.{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [_split(value, f"{path}.{i}", tensors) for i, value in enumerate(tree)]
    return tree


def size_in_bytes(tree: Any) -> int:
    """What the tensors of a state take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tree))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {key: _join(value, tensors) for key, value in tree["items"]}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Flushes one file's contents to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
