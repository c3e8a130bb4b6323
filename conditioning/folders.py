"""The text encoders of a model folder: which kind it holds, and its entries in `model_index.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conditioning.clip_text import ClipTextEncoder
from conditioning.dual_text import DualTextEncoder
from conditioning.encoder import FOLDERS, TextEncoder
from conditioning.t5_text import ENCODERS, T5TextEncoder
from conditioning.transformers_text import TransformersTextEncoder

CLIP_TYPES = (None, "clip", "clip_text_model")
"""`model_type` of a config that our own CLIP reads; a config without one is taken for a CLIP."""


def text_folders(folder: Path, suffix: str = "") -> tuple[Path, Path]:
    """Where a model folder keeps a text model and its tokenizer: two subfolders, or both in the folder itself."""
    parts = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    return parts if all(part.is_dir() for part in parts) else (folder, folder)


def read_transformers_encoder(folder: Path) -> TransformersTextEncoder | None:
    """The text encoder of a model folder that transformers has to read; None for CLIP's, which is our own.

    Raises:
        ValueError: a file is damaged, or the parts do not fit each other.
    """
    text_encoder, tokenizer = (folder / name for name in FOLDERS)
    kind = _read_json(text_encoder / "config.json").get("model_type")
    if kind in CLIP_TYPES:
        return None
    encoder = T5TextEncoder if kind in ENCODERS else TransformersTextEncoder
    return encoder.from_pretrained(text_encoder, tokenizer).eval()


def index_entries(encoder: TextEncoder) -> dict[str, Any]:
    """The entries of `model_index.json` that depend on the encoder.

    diffusers has pipelines for one CLIP and for two. For other encoders the pipeline's class is one that it does not
    know, so that it refuses them rather than draw with their padding attended to.
    """
    entries: dict[str, Any] = {name: list(classes) for name, classes in encoder.parts.items()}
    match encoder:
        case DualTextEncoder():
            return entries | {"force_zeros_for_empty_prompt": encoder.zero_null}
        case ClipTextEncoder():
            return entries
        case _:
            return entries | {"_class_name": "LdmTextToImage"}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing where there is no file, which the reader of the part will say."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not an object")
    return content
