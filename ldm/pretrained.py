"""Model folders in the diffusers pipeline layout: read, written atomically, found on disk or on the hub."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from autoencoder import Autoencoder, CodebookUpdate
from conditioning import (
    ClipTextEncoder,
    ClipTextModel,
    ClipTokenizer,
    DualTextEncoder,
    TextEncoder,
    index_entries,
    read_transformers_encoder,
)
from ldm.interop.checkpoint import TOKENIZERS, folder_parts, model_index, read_part, replace_folder
from ldm.interop.networks import build_text_model, build_tokenizer, build_unet, build_vae, explained
from ldm.interop.tensors import ModelError, read_json, write_json
from ldm.networks import UNet, UNetConfig
from ldm.process import ProcessConfig, process_from_dict
from ldm.single_file import read_single_file

BUNDLED = {name: Path(__file__).parent / "bundled" / name for name in ("emoji", "shapes")}
"""The models that come with the package, by the names that stand for them."""
DEFAULT_MODEL = "emoji"
SETTING_KINDS = {"sampler": str, "num_inference_steps": int, "guidance_scale": float}
MAX_TIMESTEPS, MAX_SAMPLE_SIZE = 100_000, 4096
"""Beyond these a config is damaged, and what it asks for would not fit into memory."""
HUB_WEIGHTS = ("diffusion_pytorch_model", "*/diffusion_pytorch_model", "model", "text_encoder*/model")
"""Weight files of a hub repository that are downloaded, whole or in shards; copies as a single file are not."""
READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError)
"""What reading a damaged file raises."""
POOLED_KEY, POOLED = "projection_class_embeddings_input_dim", "text encoder's pooled width + 6 addition_time_embed_dim"


@dataclass(frozen=True)
class Model:
    """The parts of a text-to-image model.

    `settings` is ldm.json, what diffusers has no field for; `card` is README.md, the model card.
    """

    vae: Autoencoder
    unet: UNet
    text_encoder: TextEncoder
    diffusion: ProcessConfig
    settings: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    variant: str | None = None,
    files: Sequence[str] | None = None,
) -> Path:
    """A local folder or file, the name of a bundled model, or a hub id downloaded into the Hugging Face cache.

    Args:
        revision: branch, tag or commit of a hub id.
        variant: which weight files of a hub id to download, such as "fp16".
        files: patterns of what to download of a hub id, in the place of a model's files.

    Raises:
        ModelError: when there is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if str(name) in BUNDLED:
        return BUNDLED[str(name)]
    if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        known = " or ".join(BUNDLED)
        raise ModelError(f"{name} is no model folder or file here, not {known}, and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        patterns = hub_files(variant) if files is None else list(files)
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{name} is not a folder here and cannot be had from the hub: {reason}") from error


def hub_files(variant: str | None = None) -> list[str]:
    """Patterns of what is downloaded: every config and vocabulary, and the weights of one variant."""
    dot = f".{variant}" if variant else ""
    ends = (f"{dot}.safetensors", f"{dot}-*-of-*.safetensors")
    return ["*.json", "*.txt", "*spiece.model", *(f"{stem}{end}" for stem in HUB_WEIGHTS for end in ends)]


def read_model(
    name: str | os.PathLike[str], revision: str | None = None, variant: str | None = None, allow_pickle: bool = False
) -> Model:
    """Reads a pipeline folder, a single file in the original layout, or a hub id.

    A folder has `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, in SDXL's layout `text_encoder_2/` and
    `tokenizer_2/` too, and `ldm.json` if there.

    Args:
        revision, variant: see `resolve`; a variant is also looked for in a local folder.
        allow_pickle: read tensors, and nothing else, from .ckpt, .bin and .pt files.

    Raises:
        ModelError: one sentence naming the file and the key at fault.
    """
    path = resolve(name, revision, variant)
    model = _model_of_file(path, allow_pickle) if path.is_file() else _model_of_folder(path, variant, allow_pickle)
    _check_fit(model, path)
    return model


def _model_of_folder(folder: Path, variant: str | None, allow_pickle: bool) -> Model:
    folder_parts(folder)
    card_file = folder / "README.md"
    return Model(
        read_vae(folder, variant, allow_pickle),
        read_unet(folder, variant, allow_pickle),
        read_text_encoder(folder, variant, allow_pickle),
        read_diffusion(folder),
        read_settings(folder),
        card_file.read_text(encoding="utf-8", errors="replace") if card_file.exists() else "",
    )


def _model_of_file(path: Path, allow_pickle: bool) -> Model:
    checkpoint = read_single_file(path, allow_pickle)
    names = [name for name in TOKENIZERS if name in checkpoint.parts]
    models = [build_text_model(checkpoint.parts[name]) for name in names]
    tokenizers = [build_tokenizer(checkpoint.tokenizers[TOKENIZERS[name]], path) for name in names]
    return Model(
        build_vae(checkpoint.parts["vae"]),
        build_unet(checkpoint.parts["unet"]),
        explained(path, clip_encoder, models, tokenizers, {}),
        explained(path, process_from_dict, checkpoint.scheduler),
        _checked_settings(checkpoint.settings, path),
        checkpoint.card,
    )


def read_vae(
    folder: Path,
    variant: str | None = None,
    allow_pickle: bool = False,
    update: CodebookUpdate = CodebookUpdate(),
) -> Autoencoder:
    """The autoencoder of a pipeline folder, of a folder that is a `vae/` itself, or of a model's single file.

    `update` is how a codebook learns.
    """
    if folder.is_file():
        return build_vae(read_single_file(folder, allow_pickle).parts["vae"], update)
    return build_vae(read_part(_part(folder, "vae"), "vae", variant, allow_pickle), update)


def read_unet(folder: Path, variant: str | None = None, allow_pickle: bool = False) -> UNet:
    """The U-Net of a pipeline folder, or of a folder that is a `unet/` itself."""
    return build_unet(read_part(_part(folder, "unet"), "unet", variant, allow_pickle))


def read_text_encoder(folder: Path, variant: str | None = None, allow_pickle: bool = False) -> TextEncoder:
    """The text encoder of a pipeline folder and its tokenizer, or both of each; other than CLIP's from safetensors."""
    other = explained(folder / "text_encoder", read_transformers_encoder, folder)
    if other is not None:
        return other
    names = [name for name in TOKENIZERS if (folder / name).is_dir()]
    models = [build_text_model(read_part(folder / name, name, variant, allow_pickle)) for name in names]
    folders = [folder / TOKENIZERS[name] for name in names]
    tokenizers = [explained(path, ClipTokenizer.from_pretrained, path) for path in folders]
    index = folder / "model_index.json"
    return explained(folders[-1], clip_encoder, models, tokenizers, read_json(index) if index.exists() else {})


def clip_encoder(
    models: Sequence[ClipTextModel], tokenizers: Sequence[ClipTokenizer], index: Mapping[str, Any]
) -> TextEncoder:
    """One CLIP encoder, or two as in SDXL; `index` is model_index.json, its missing keys at diffusers' defaults."""
    if len(models) == 1:
        return ClipTextEncoder(tokenizers[0], models[0]).eval()
    first, second = (
        ClipTextEncoder(tokenizer, model, skip_layers=1, final_norm=False)
        for tokenizer, model in zip(tokenizers, models, strict=True)
    )
    return DualTextEncoder(first, second, bool(index.get("force_zeros_for_empty_prompt", True))).eval()


def read_diffusion(folder: Path) -> ProcessConfig:
    """The diffusion process of a pipeline folder."""
    path = folder / "scheduler" / "scheduler_config.json"
    return explained(path, process_from_dict, read_json(path))


def read_settings(folder: Path) -> dict[str, Any]:
    """What `ldm.json` holds; nothing where there is no such file."""
    path = folder / "ldm.json"
    return _checked_settings(read_json(path) if path.exists() else {}, path)


def _checked_settings(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    for key, kind in SETTING_KINDS.items():
        if not isinstance(settings.get(key, kind()), (kind, int) if kind is float else kind):
            raise ModelError(f"{path}: {key} is {settings[key]!r}, but it must be of type {kind.__name__}")
    return dict(settings)


def write_model(model: Model, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Writes a pipeline folder with `README.md` and `ldm.json`: temporary name, then rename over what was there.

    Args:
        dtype: of the stored weights.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, module in (("vae", model.vae), ("unet", model.unet)):
        copy.deepcopy(module).to(dtype).save_pretrained(temporary / name)
    copy.deepcopy(model.text_encoder).to(dtype).save_parts(temporary)
    write_json(temporary / "scheduler" / "scheduler_config.json", model.diffusion.to_dict())
    write_json(temporary / "model_index.json", _model_index(model))
    write_json(temporary / "ldm.json", dict(model.settings))
    (temporary / "README.md").write_text(model.card, encoding="utf-8")
    replace_folder(temporary, target)


def write_vae(vae: Autoencoder, folder: str | os.PathLike[str], card: str, settings: Mapping[str, Any]) -> None:
    """Writes what stage one produces, `vae/`, `ldm.json` and `README.md`, atomically."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    vae.save_pretrained(temporary / "vae")
    write_json(temporary / "ldm.json", dict(settings))
    (temporary / "README.md").write_text(card, encoding="utf-8")
    replace_folder(temporary, target)


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _model_index(model: Model) -> dict[str, Any]:
    entries = model_index(
        model.unet.config.in_channels, model.diffusion.to_dict(), isinstance(model.text_encoder, DualTextEncoder)
    )
    return entries | index_entries(model.text_encoder) | {"vae": ["diffusers", type(model.vae).__name__]}


def _check_fit(model: Model, path: Path) -> None:
    if model.diffusion.num_train_timesteps > MAX_TIMESTEPS:
        steps = model.diffusion.num_train_timesteps
        raise ModelError(f"{path}: num_train_timesteps is {steps}; a schedule may have {MAX_TIMESTEPS} entries")
    if (model.unet.config.sample_size or 0) > MAX_SAMPLE_SIZE:
        side = model.unet.config.sample_size
        raise ModelError(f"{_unet_config(path)}: sample_size is {side}; it may be {MAX_SAMPLE_SIZE} at most")
    channels, encoder = model.vae.latent_channels, model.text_encoder
    unet = model.unet.config
    latents = "vae's latent_channels"
    if unet.in_channels not in (channels, 2 * channels + 1):  # inpainting: latents, mask, masked picture's latents
        raise ModelError(f"{_unet_config(path)}: in_channels is {unet.in_channels}, but the {latents} is {channels}")
    learned = model.diffusion.variance_type == "learned_range"
    predicted = channels * (1 + learned)
    if unet.out_channels != predicted:
        doubled = f"double of the {latents} for its learned variance" if learned else latents
        raise ModelError(f"{_unet_config(path)}: out_channels is {unet.out_channels}, but the {doubled} is {predicted}")
    contexts = {level.context_dim for level in (*unet.down_levels(), unet.mid_level()) if level.depth}
    for key, wrong, source, wanted in (
        ("cross_attention_dim", contexts != {encoder.context_dim}, "text encoder's width", encoder.context_dim),
        (POOLED_KEY, getattr(unet, POOLED_KEY) != pooled_inputs(unet, encoder), POOLED, pooled_inputs(unet, encoder)),
    ):
        if wrong:
            raise ModelError(f"{_unet_config(path)}: {key} is {getattr(unet, key)}, but the {source} is {wanted}")


def pooled_inputs(unet: UNetConfig, encoder: TextEncoder) -> int | None:
    """The `projection_class_embeddings_input_dim` of a U-Net that reads the pooled vector and sizes, or what it has."""
    if unet.addition_embed_type != "text_time":
        return unet.projection_class_embeddings_input_dim
    return encoder.pooled_dim + 6 * (unet.addition_time_embed_dim or 0)


def _unet_config(path: Path) -> Path:
    return path if path.is_file() else path / "unet" / "config.json"
