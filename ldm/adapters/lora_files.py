"""LoRA files of diffusers, PEFT and kohya's scripts, read strictly and written.

diffusers: `unet.<layer>.lora_A.weight`, with older spellings of the end. PEFT: `base_model.model.<layer>.lora_A.weight`
in `adapter_model.safetensors`, beside `adapter_config.json`. kohya: `lora_unet_<layer with _>.lora_down.weight`, where
SDXL has the original names of its layers, and `.alpha`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.low_rank import Lora, LowRank
from ldm.interop.families import SDXL_UNET
from ldm.interop.names import inverted, renamed, unet_names
from ldm.interop.tensors import ModelError, read_json, read_metadata, read_names, read_tensors, save_tensors
from ldm.networks import UNetConfig

DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
LORA_NAMES = (DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG)
"""What a folder or hub repository with a LoRA holds."""
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers' training scripts keep PEFT's config in a file's header, its keys prefixed by the part."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
"""How a key ends -> which tensor of its layer it is."""
WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks", "transformer_blocks"),
    *("time_embedding", "add_embedding", "time_embed", "label_emb", "linear_1", "linear_2", "time_emb_proj"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection", "conv_in", "conv_out", "conv_shortcut"),
    *("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("add_k_proj", "add_v_proj"),
)
"""Names of modules with an underscore of their own, which is not a dot in kohya's keys."""
UNDERSCORED = re.compile(rf"(?<![^_])(?:{'|'.join(WORDS)})(?![^_])")
ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")

Factors = dict[str, dict[str, dict[str, Tensor]]]
"""Part -> layer -> `down`, `up` and perhaps `alpha`."""


def holds_lora(path: Path) -> bool:
    """Whether a folder or safetensors file is a LoRA rather than a model. Raises ModelError for a damaged file."""
    if path.is_dir():
        named = any((path / name).is_file() for name in (DIFFUSERS_FILE, PEFT_FILE))
        return named and not (path / "model_index.json").is_file()
    return path.suffix == ".safetensors" and any(_end(key) is not None for key in read_names(path))


def read_lora(path: Path, unet: UNetConfig = SDXL_UNET) -> Lora:
    """Reads a LoRA file, or a folder with one under diffusers' or PEFT's name.

    Args:
        unet: the U-Net whose layers a file means by their original names, as kohya's SDXL files do.

    Raises:
        ModelError: one sentence naming the file and what in it is not a LoRA's.
    """
    file = _file(path)
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is not a .safetensors file; a LoRA is read from nothing else")
    state = read_tensors(file)
    peft = file.with_name(PEFT_CONFIG)
    if any(key.startswith("base_model.model.") for key in state):
        config = {"": read_json(peft)} if peft.is_file() else {}
    else:
        config = _header_config(file)
    factors = _sorted(state, file, unet)
    if not factors:
        raise ModelError(f"{file} holds no tensors")
    parts: dict[str, dict[str, LowRank]] = {}
    for part, layers in factors.items():
        known = config.get(part, config.get("", {}))
        parts[part] = {name: _low_rank(f"{part}.{name}", roles, known, file) for name, roles in layers.items()}
    return Lora(parts, str(file))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = next((path / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (path / name).is_file()), None)
    if found is None:
        raise ModelError(f"{path} holds neither {DIFFUSERS_FILE} nor {PEFT_FILE}")
    return found


def _header_config(file: Path) -> dict[str, dict[str, Any]]:
    """PEFT's config of each part, as diffusers keeps it in the header; empty where there is none."""
    text = read_metadata(file).get(METADATA_KEY)
    if text is None:
        return {}
    try:
        content = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file}: {METADATA_KEY} in its header is not a JSON object") from error
    split: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for key, value in content.items():
        part, _, name = key.partition(".")
        split.setdefault(part, {})[name] = value
    return split


def _sorted(state: Mapping[str, Tensor], file: Path, unet: UNetConfig) -> Factors:
    factors: Factors = {}
    for key, value in state.items():
        end = _end(key)
        if end is None:
            raise ModelError(f"{file}: `{key}` is no tensor of a LoRA in the format of diffusers, PEFT or kohya")
        part, layer = _place(key.removesuffix(end), file, unet)
        roles = factors.setdefault(part, {}).setdefault(layer, {})
        if ENDS[end] in roles:
            raise ModelError(f"{file}: `{key}` is the second of its kind for the layer `{part}.{layer}`")
        roles[ENDS[end]] = value
    return factors


def _end(key: str) -> str | None:
    return next((end for end in ENDS if key.endswith(end)), None)


def _place(name: str, file: Path, unet: UNetConfig) -> tuple[str, str]:
    """The part and layer that a key without its end means, in diffusers' names."""
    for prefix, part in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            layer = _dotted(name.removeprefix(prefix))
            return part, _from_original(layer, file, unet) if part == "unet" else layer
    for part in PARTS:
        if name.startswith(f"{part}."):
            return part, _current(name.removeprefix(f"{part}."))
    layer = _current(name.removeprefix("base_model.model."))
    return "text_encoder" if layer.startswith(("text_model.", "text_projection")) else "unet", layer


def _current(layer: str) -> str:
    """Today's name of a layer that old files of diffusers or new versions of transformers call otherwise."""
    layer = layer.replace(".processor.", ".")
    layer = f"text_model.{layer}" if layer.startswith("encoder.layers.") else layer
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _dotted(flat: str) -> str:
    """`down_blocks_0_attentions_1_proj_in` -> `down_blocks.0.attentions.1.proj_in`."""
    kept = UNDERSCORED.sub(lambda found: found.group().replace("_", "\0"), flat)
    return kept.replace("_", ".").replace("\0", "_")


def _from_original(layer: str, file: Path, unet: UNetConfig) -> str:
    if not layer.startswith(ORIGINAL):
        return layer
    try:
        (key,) = renamed({f"{layer}.weight": None}, inverted(unet_names(unet)))
    except ValueError as error:
        raise ModelError(f"{file} changes the layer `{layer}`, which this model has not") from error
    return key.removesuffix(".weight")


def _low_rank(place: str, roles: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> LowRank:
    if missing := {"down", "up"} - roles.keys():
        raise ModelError(f"{file} has the layer `{place}` without its {sorted(missing)[0]} matrix")
    down, up = roles["down"], roles["up"]
    if min(down.ndim, up.ndim) < 2 or up.flatten(1).shape[1] != down.shape[0] or not down.numel():
        shapes = f"{list(up.shape)} and {list(down.shape)}"
        raise ModelError(f"{file}: `{place}` has matrices of shape {shapes}, which are not of one rank")
    alpha = _alpha(place.partition(".")[2], roles, config, down.shape[0])
    if alpha is None or not math.isfinite(alpha):
        raise ModelError(f"{file}: the alpha of `{place}` is not a number")
    root = bool(config.get("use_rslora"))
    return LowRank(down, up, alpha / (math.sqrt(down.shape[0]) if root else down.shape[0]))


def _alpha(name: str, roles: Mapping[str, Tensor], config: Mapping[str, Any], rank: int) -> float | None:
    """The layer's own tensor, or what PEFT's config says, whose patterns are ends of names; the rank without either."""
    if "alpha" in roles:
        return float(roles["alpha"]) if roles["alpha"].numel() == 1 else None
    patterns = config.get("alpha_pattern") or {}
    try:
        found = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
        return float(config.get("lora_alpha", rank) if found is None else patterns[found])
    except (TypeError, ValueError, re.error):
        return None


def write_diffusers_lora(lora: Lora, path: Path) -> Path:
    """Writes the file that diffusers' `load_lora_weights` reads; a folder gets it under diffusers' name.

    The scale goes into B, so that alpha equals the rank, which every version of diffusers takes for granted.
    """
    state: dict[str, Tensor] = {}
    for place, low_rank in _places(lora):
        state[f"{place}.lora_A.weight"] = low_rank.down
        state[f"{place}.lora_B.weight"] = (low_rank.up.float() * low_rank.scale).to(low_rank.up.dtype)
    return save_tensors(state, path if path.suffix == ".safetensors" else path / DIFFUSERS_FILE)


def write_kohya_lora(lora: Lora, path: Path) -> Path:
    """Writes kohya's format, with diffusers' layer names for every architecture, as its readers accept them."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    if "text_encoder_2" in lora.parts:
        prefixes |= {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    state: dict[str, Tensor] = {}
    for place, low_rank in _places(lora):
        part, _, layer = place.partition(".")
        name = prefixes[part] + layer.replace(".", "_")
        state[f"{name}.lora_down.weight"] = low_rank.down
        state[f"{name}.lora_up.weight"] = low_rank.up
        state[f"{name}.alpha"] = torch.tensor(low_rank.scale * low_rank.rank)
    return save_tensors(state, path)


def _places(lora: Lora) -> Iterable[tuple[str, LowRank]]:
    for part, layers in lora.parts.items():
        for name, low_rank in layers.items():
            yield f"{part}.{name}", low_rank
