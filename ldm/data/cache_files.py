"""Files of a cache: written under a temporary name, flushed and renamed; and the settings that they were made with."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class StaleCache(ValueError):  # noqa: N818
    """A cache made from other data, settings or weights; the message lists what differs."""


def check_settings(folder: Path, settings: DataclassInstance) -> None:
    """Writes `settings.json` into a new folder; compares it in a used one.

    Raises:
        StaleCache: listing the settings that differ.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(asdict(settings), indent=1))
    compare_settings(read_json(path), asdict(settings), folder)


def compare_settings(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raises a StaleCache that lists where the settings of a cache are not those that are wanted."""
    changed = [f"{k} was {found.get(k)!r}, is now {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if "fingerprint" in wanted:
        changed = [line for line in changed if not line.startswith(("source ", "fingerprint "))]
        if found.get("fingerprint") != wanted["fingerprint"]:
            changed.insert(0, _data_changed(found.get("source"), wanted["source"]))
    if changed:
        raise StaleCache(
            f"The latents in {folder} were made from something else ({'; '.join(changed)}); delete that folder or "
            "choose another one (latents.folder)"
        )


def _data_changed(found: str | None, wanted: str) -> str:
    if found == wanted:
        return f"the pictures or captions of {wanted!r} have changed"
    return f"the data were those of {found!r}, are now those of {wanted!r}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a cache. Raises a ValueError naming the file that is missing or damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete {path.parent} to encode the data again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged; delete {path.parent} to encode the data again")
    return tree


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Writes a safetensors file atomically and returns its hash."""
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    digest = file_hash(temporary)
    os.replace(temporary, path)
    return digest


def file_hash(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
