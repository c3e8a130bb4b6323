"""Strict reading of weight files, which explains itself, and their writing, whole or in shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
SAFE_PICKLE_TORCH = (2, 10)
"""From this torch on `weights_only=True` has no known way around it."""
HASH_PLACEHOLDER = "0x" + 64 * "0"


class ModelError(ValueError):
    """A model that cannot be read; the message names the file and what is wrong."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: it is missing, not JSON, nested too deeply, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not an object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_tensors(path: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or, where allowed, of a pickle of tensors (`read_pickle`).

    Raises:
        ModelError: the file is missing, truncated, of another format, or a pickle that was not allowed.
    """
    if _is_pickle(path):
        return read_pickle(path, allow_pickle)
    return _opened(path, lambda file, key: file.get_tensor(key))


def read_metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries in its header. Raises as `read_tensors`."""
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors, without reading them. Raises as `read_tensors`."""
    _refuse_pickle(path)
    return list(_opened(path, lambda file, key: None))


def _opened(path: Path, value: Any) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: value(file, key) for key in file.keys()}  # noqa: SIM118, a safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    if not path.is_file():
        return ModelError(f"{path} is missing or not a file")
    return ModelError(f"{path} is not a safetensors file or is truncated: {' '.join(str(error).split())}")


def read_pickle(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, `.bin` or `.pt` file, unpickled with `weights_only=True`.

    Raises:
        ModelError: pickles were not allowed, torch is older than 2.10, or the file holds anything but tensors.
    """
    if not allow_pickle:
        raise ModelError(f"{path} is a pickle, which can run code when read; --allow-pickle reads its tensors only")
    if _torch_version() < SAFE_PICKLE_TORCH:
        raise ModelError(f"{path} is a pickle, and torch {torch.__version__} is not trusted with it; 2.10 or later is")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes torch raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} is not a pickle of tensors: {reason}") from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not named tensors")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _torch_version() -> tuple[int, int]:
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    return int(major), int(minor)


def _is_pickle(path: Path) -> bool:
    return path.suffix.lower() in PICKLES


def _refuse_pickle(path: Path) -> None:
    if _is_pickle(path):
        raise ModelError(f"{path} is a pickle; only safetensors files have a header to read")


def read_weights(
    folder: Path, stem: str, variant: str | None = None, allow_pickle: bool = False
) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a part's folder and the file that names them: whole, in shards, of a variant, or pickled.

    A part without files of the asked variant is read from its plain ones.

    Raises:
        ModelError: one sentence naming the file at fault, or what the folder holds instead.
    """
    for name in ([variant] if variant else []) + [None]:
        whole, index = (folder / part for part in _file_names(stem, name))
        if index.is_file():
            return _read_shards(index), index
        if whole.is_file():
            return read_tensors(whole), whole
    for pickled in (folder / f"{base}.bin" for base in (stem, "pytorch_model")):
        if pickled.is_file():
            return read_pickle(pickled, allow_pickle), pickled
    raise ModelError(f"{folder} lacks {stem}.safetensors{_other_variants(folder, stem)}")


def _file_names(stem: str, variant: str | None) -> tuple[str, str]:
    """The whole file and the index of shards, as diffusers and transformers name them."""
    dot = f".{variant}" if variant else ""
    return f"{stem}{dot}.safetensors", f"{stem}.safetensors.index{dot}.json"


def _other_variants(folder: Path, stem: str) -> str:
    others = sorted({path.name.removeprefix(f"{stem}.").split(".")[0] for path in folder.glob(f"{stem}.*.safetensors")})
    return f"; it has the variant {others[0]}, which --variant {others[0]} reads" if others else ""


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map is not an object of file names")
    for name in weight_map.values():
        if Path(name).name != name or _is_pickle(Path(name)):
            raise ModelError(f"{index}: weight_map names {name!r}; shards are safetensors files beside the index")
    return weight_map


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = read_tensors(index.parent / name)
        for key in shard:
            if weight_map.get(key) != name:
                raise ModelError(f"{index.parent / name} holds `{key}`, which {index.name} does not place there")
        state |= shard
    if missing := sorted(weight_map.keys() - state.keys()):
        raise ModelError(
            f"{index.parent / weight_map[missing[0]]} lacks `{missing[0]}`, which {index.name} places there"
        )
    return state


def check_state(source: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ModelError, naming file and key, unless both hold the same names and shapes."""
    if missing := sorted(expected.keys() - state.keys()):
        raise ModelError(f"{source} lacks the key `{missing[0]}` of its config ({len(missing)} missing)")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ModelError(f"{source} has the key `{unknown[0]}`, unknown to its config ({len(unknown)} unknown)")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ModelError(
                f"{source}: `{key}` has shape {list(state[key].shape)}; the config asks for {list(value.shape)}"
            )


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Puts the tensors, as float32, into a module that may be on the meta device. Raises as `check_state`."""
    check_state(source, state, module.state_dict())
    module.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)


def write_weights(
    state: Mapping[str, Tensor], folder: Path, stem: str, variant: str | None = None, max_shard_size: str | None = None
) -> None:
    """Writes one safetensors file, or shards of at most `max_shard_size` ("2GB") with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, index = _file_names(stem, variant)
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    for name, keys, weight_map in _shards(plain, whole, max_shard_size):
        save_file({key: plain[key] for key in keys}, folder / name, metadata={"format": "pt"})
        if weight_map:
            write_json(folder / index, {"metadata": {"total_size": _bytes(plain.values())}, "weight_map": weight_map})


def _shards(
    state: Mapping[str, Tensor], whole: str, max_shard_size: str | None
) -> Iterable[tuple[str, list[str], dict[str, str]]]:
    """(file name, its keys, the index's weight map, which is empty where there is one file)."""
    if max_shard_size is None:
        yield whole, list(state), {}
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = whole.replace(".safetensors", "{suffix}.safetensors")
    try:
        split = split_torch_state_dict_into_shards(dict(state), filename_pattern=pattern, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ModelError(f"--max-shard-size {max_shard_size} is not a size such as 2GB") from error
    for name, keys in split.filename_to_tensors.items():
        yield name, keys, split.tensor_to_filename if split.is_sharded else {}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_hashed(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], hash_key: str) -> None:
    """Writes one safetensors file atomically, `metadata[hash_key]` being the sha256 of its tensor bytes, "0x...".

    The header is written with a place for the hash, which is filled in once the tensors lie in the file.
    """
    with _replacing(path, state, {**metadata, hash_key: HASH_PLACEHOLDER}) as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(8 + header.index(HASH_PLACEHOLDER.encode()))
        file.write(f"0x{digest}".encode())


def save_tensors(state: Mapping[str, Tensor], path: Path) -> Path:
    """Writes one safetensors file atomically; returns its path."""
    with _replacing(path, state, {"format": "pt"}):
        pass
    return path


@contextmanager
def _replacing(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[BufferedRandom]:
    """A safetensors file beside `path`, open for changes; after the block it is on disk and bears that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(plain, temporary, metadata=dict(metadata))
    with open(temporary, "r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
