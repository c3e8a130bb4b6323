"""A model as configs and tensors, before any network is built: the common form of folders and single files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, dtype

from conditioning import canonical_state_dict
from ldm.interop.tensors import ModelError, read_json, read_weights, weight_shapes, write_json, write_weights

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Names of the weight files of a pipeline folder's parts, which diffusers and transformers chose differently."""
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
DIFFUSERS_VERSION = "0.30.0"


@dataclass(frozen=True)
class Part:
    """A network of a model: its config.json and its tensors in diffusers' names; errors name the two files."""

    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    source: Path
    config_source: Path


@dataclass(frozen=True)
class Checkpoint:
    """What a pipeline folder or single file holds.

    Attributes:
        parts: "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2".
        scheduler: scheduler_config.json.
        tokenizers: "tokenizer" and "tokenizer_2": file name -> text.
        settings: ldm.json.
        card: README.md.
    """

    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""

    @property
    def configs(self) -> dict[str, Any]:
        """All of the above that is not a tensor."""
        return {
            "parts": {name: dict(part.config) for name, part in self.parts.items()},
            "scheduler": dict(self.scheduler),
            "tokenizers": {name: dict(files) for name, files in self.tokenizers.items()},
            "settings": dict(self.settings),
            "card": self.card,
        }


def folder_parts(folder: Path) -> list[str]:
    """The networks of a pipeline folder. Raises ModelError where a part that every model has is missing."""
    needed = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if missing := [name for name in needed if not (folder / name).is_dir()]:
        raise ModelError(f"{folder} is not a model folder: it has no {', '.join(missing)}")
    return [name for name in STEMS if (folder / name).is_dir()]


def read_folder(folder: Path, variant: str | None = None, allow_pickle: bool = False) -> Checkpoint:
    """A pipeline folder of the Stable Diffusion family, its tensors in the dtype that they are stored in.

    Raises:
        ModelError: one sentence naming the file and the key at fault.
    """
    parts = {name: read_part(folder / name, name, variant, allow_pickle) for name in folder_parts(folder)}
    settings, card = folder / "ldm.json", folder / "README.md"
    return Checkpoint(
        parts,
        read_json(folder / "scheduler" / "scheduler_config.json"),
        {TOKENIZERS[name]: _read_tokenizer(folder / TOKENIZERS[name]) for name in parts if name in TOKENIZERS},
        read_json(settings) if settings.exists() else {},
        card.read_text(encoding="utf-8") if card.exists() else "",
    )


def folder_shapes(folder: Path, name: str, variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a part's tensors, from the headers of its files."""
    return weight_shapes(folder / name, STEMS[name], variant)


def read_part(folder: Path, name: str, variant: str | None = None, allow_pickle: bool = False) -> Part:
    """The part `name` of `STEMS` from its own folder. Raises ModelError as `read_folder`."""
    config = read_json(folder / "config.json")
    state, source = read_weights(folder, STEMS[name], variant, allow_pickle)
    return Part(config, canonical_state_dict(state) if name in TOKENIZERS else state, source, folder / "config.json")


def _read_tokenizer(folder: Path) -> dict[str, str]:
    """The texts of a CLIP tokenizer's folder; `tokenizer.json` stands in where there is no vocab.json."""
    names = TOKENIZER_FILES if (folder / "vocab.json").is_file() else (*TOKENIZER_FILES, "tokenizer.json")
    files = {name: folder / name for name in names}
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder} holds a file that is not text: {error}") from error


def write_folder(
    checkpoint: Checkpoint,
    folder: Path,
    to: dtype | None = None,
    variant: str | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Writes a pipeline folder that diffusers opens: a temporary name, then a rename over what was there.

    Args:
        to: of the stored weights; None leaves them as they are.
        variant: goes into the names of the weight files, such as "fp16".
        max_shard_size: splits larger weight files, such as "2GB".
    """
    temporary = _temporary(folder)
    for name, part in checkpoint.parts.items():
        state = {key: value if to is None else value.to(to) for key, value in part.state.items()}
        write_weights(state, temporary / name, STEMS[name], variant, max_shard_size)
        write_json(temporary / name / "config.json", part.config)
    for name, files in checkpoint.tokenizers.items():
        (temporary / name).mkdir(parents=True)
        for file, text in files.items():
            (temporary / name / file).write_text(text, encoding="utf-8")
    write_json(temporary / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    channels = checkpoint.parts["unet"].config.get("in_channels", 4)
    index = model_index(channels, checkpoint.scheduler, "text_encoder_2" in checkpoint.parts)
    write_json(temporary / "model_index.json", index)
    write_json(temporary / "ldm.json", checkpoint.settings)
    (temporary / "README.md").write_text(checkpoint.card, encoding="utf-8")
    replace_folder(temporary, folder)


def model_index(in_channels: int, scheduler: Mapping[str, Any], double: bool = False) -> dict[str, Any]:
    """model_index.json: which pipeline of diffusers opens the folder, and with which classes.

    Args:
        in_channels: the U-Net's; nine are latents, mask and masked picture, which the inpainting pipeline gives it.
        scheduler: scheduler_config.json.
        double: two text encoders, as SDXL has.
    """
    kind = f"StableDiffusion{'XL' if double else ''}{'Inpaint' if in_channels == 9 else ''}Pipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if double:
        index |= {"force_zeros_for_empty_prompt": True}
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    else:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    return index | {
        "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def replace_folder(temporary: Path, target: Path) -> None:
    """Makes the files of a complete folder durable, then puts it in the place of another."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
