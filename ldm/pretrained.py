"""Model folders in the diffusers pipeline layout: read, written atomically, found on disk or on the hub."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autoencoder import Autoencoder, CodebookUpdate, read_autoencoder
from conditioning import ClipTextEncoder
from ldm.networks import UNet
from ldm.process import DiffusionConfig

BUNDLED = Path(__file__).parent / "bundled"
DIFFUSERS_VERSION = "0.30.0"
SETTING_KINDS = {"sampler": str, "num_inference_steps": int, "guidance_scale": float}
HUB_FILES = [
    "*.json",
    "*.txt",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "*/diffusion_pytorch_model.safetensors",
]
"""What is downloaded of a hub repository: the parts in the diffusers layout, no variants and no single-file copies."""


class ModelError(ValueError):
    """A model that cannot be read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Model:
    """The parts of a text-to-image model.

    `settings` is ldm.json, what diffusers has no field for; `card` is README.md, the model card.
    """

    vae: Autoencoder
    unet: UNet
    text_encoder: ClipTextEncoder
    diffusion: DiffusionConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""


def resolve(name: str | os.PathLike[str]) -> Path:
    """A local folder, or a hub id downloaded into the Hugging Face cache (read from it when offline).

    Raises:
        ModelError: when there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise ModelError(f"{name} is not a model folder and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{name} is not a folder here and cannot be had from the hub: {reason}") from error


def read_model(name: str | os.PathLike[str]) -> Model:
    """Reads a pipeline folder: `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, and `ldm.json` if there.

    Raises:
        ModelError: one sentence naming the file and the key at fault.
    """
    folder = resolve(name)
    missing = [p for p in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not (folder / p).is_dir()]
    if missing:
        raise ModelError(f"{folder} is not a model folder: it has no {', '.join(missing)}")
    card_file = folder / "README.md"
    model = Model(
        read_vae(folder),
        read_unet(folder),
        read_text_encoder(folder),
        read_diffusion(folder),
        read_settings(folder),
        card_file.read_text(encoding="utf-8") if card_file.exists() else "",
    )
    _check_fit(model, folder)
    return model


def read_vae(folder: Path, update: CodebookUpdate = CodebookUpdate()) -> Autoencoder:
    """The autoencoder of a pipeline folder, or of a folder that is a `vae/` itself; `update` is a codebook's."""
    vae: Autoencoder = _explained(lambda part: read_autoencoder(part, update), _part(folder, "vae"))
    return vae


def read_unet(folder: Path) -> UNet:
    """The U-Net of a pipeline folder, or of a folder that is a `unet/` itself."""
    unet: UNet = _explained(UNet.from_pretrained, _part(folder, "unet"))
    return unet.eval()


def read_text_encoder(folder: Path) -> ClipTextEncoder:
    """The text encoder and tokenizer of a pipeline folder."""
    parts = folder / "text_encoder", folder / "tokenizer"
    encoder: ClipTextEncoder = _explained(ClipTextEncoder.from_pretrained, *parts)
    return encoder.eval()


def read_diffusion(folder: Path) -> DiffusionConfig:
    """The diffusion process of a pipeline folder."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return DiffusionConfig.from_dict(_read_json(path))
    except ModelError:
        raise
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """What `ldm.json` holds; nothing where there is no such file."""
    path = folder / "ldm.json"
    settings = _read_json(path) if path.exists() else {}
    for key, kind in SETTING_KINDS.items():
        if not isinstance(settings.get(key, kind()), (kind, int) if kind is float else kind):
            raise ModelError(f"{path}: {key} is {settings[key]!r}, but it must be of type {kind.__name__}")
    return settings


def write_model(model: Model, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Writes a pipeline folder with `README.md` and `ldm.json`: temporary name, then rename over what was there.

    Args:
        dtype: of the stored weights.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, module in (("vae", model.vae), ("unet", model.unet), ("text_encoder", model.text_encoder.model)):
        copy.deepcopy(module).to(dtype).save_pretrained(temporary / name)
    model.text_encoder.tokenizer.save_pretrained(temporary / "tokenizer")
    _write_json(temporary / "scheduler" / "scheduler_config.json", model.diffusion.to_dict())
    _write_json(temporary / "model_index.json", _model_index(model.vae))
    _write_json(temporary / "ldm.json", dict(model.settings))
    (temporary / "README.md").write_text(model.card, encoding="utf-8")
    _replace_folder(temporary, target)


def write_vae(vae: Autoencoder, folder: str | os.PathLike[str], card: str, settings: Mapping[str, Any]) -> None:
    """Writes what stage one produces, `vae/`, `ldm.json` and `README.md`, atomically."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    vae.save_pretrained(temporary / "vae")
    _write_json(temporary / "ldm.json", dict(settings))
    (temporary / "README.md").write_text(card, encoding="utf-8")
    _replace_folder(temporary, target)


def _replace_folder(temporary: Path, target: Path) -> None:
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


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _explained(read: Any, *folders: Path) -> Any:
    try:
        return read(*folders)
    except FileNotFoundError as error:
        raise ModelError(f"{folders[0].parent} is not a complete model: {_one_line(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = _one_line(error)
        named = any(str(folder) in reason for folder in folders)
        raise ModelError(reason if named else f"{' or '.join(map(str, folders))}: {reason}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_fit(model: Model, folder: Path) -> None:
    latents = ("vae's latent_channels", model.vae.latent_channels)
    width = ("text_encoder's hidden_size", model.text_encoder.model.config.hidden_size)
    for key, (source, wanted) in (("in_channels", latents), ("out_channels", latents), ("cross_attention_dim", width)):
        value = getattr(model.unet.config, key)
        if set(value if isinstance(value, tuple) else [value]) != {wanted}:
            raise ModelError(f"{folder / 'unet' / 'config.json'}: {key} is {value}, but the {source} is {wanted}")


def _model_index(vae: Autoencoder) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, not an object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
