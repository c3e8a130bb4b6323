"""Whole models in one safetensors file in the original CompVis / Stability layout, read and written.

A file written here also carries every config in its header, so that any architecture comes back; the files of others
are understood from their names and shapes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import fold_into_convolutions
from ldm.interop.checkpoint import TOKENIZER_FILES, TOKENIZERS, Checkpoint, Part, require_clip
from ldm.interop.clip_vocabulary import clip_tokenizer_files
from ldm.interop.families import SCALES, is_process, is_unet, is_vae, layout_of
from ldm.interop.infer import (
    Shapes,
    infer_clip_config,
    infer_open_clip_config,
    infer_unet_config,
    infer_vae_config,
    penultimate,
    time_ids_width,
)
from ldm.interop.layout import LAYOUTS
from ldm.interop.networks import build_vae, explained, parsed
from ldm.interop.tensors import ModelError, read_metadata, read_tensors, write_hashed
from ldm.interop.webui import webui_config
from ldm.process import DiffusionConfig

CONFIGS_KEY = "ldm.configs"
"""Header entry with the JSON of `Checkpoint.configs`."""
HASH_KEY = "modelspec.hash_sha256"
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512", "sdxl": "stable-diffusion-xl-v1-base"}
"""Names that ModelSpec gives the layouts; of SD 2.x with v-prediction it is stable-diffusion-v2-768-v."""
IMPLEMENTATIONS = {
    "sd1": "https://github.com/CompVis/stable-diffusion",
    "sd2": "https://github.com/Stability-AI/stablediffusion",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
"""Empty tensors that say, in SDXL files, what the U-Net predicts and that the schedule ends without signal."""
IGNORED = re.compile(
    r"(model_ema\.|(betas|alphas_cumprod(_prev)?|sqrt_|log_one_minus_|posterior_|lvlb_weights|logvar|scale_factor)"
    r"|denoiser\.sigmas$|global_step$|first_stage_model\.loss\.|cond_stage_model\.(logit_scale|text_projection)$"
    rf"|{V_MARK}$|{ZERO_SNR_MARK}$|.*position_ids$)"
)
"""Entries of original files that no network needs: constants of the schedule, averages kept for training, marks."""
V_PREDICTION_STD = 0.09
"""Spread of one bias of Stable Diffusion 2's U-Net, above which ComfyUI takes the model for one of v-prediction."""


# --- writing


def write_single_file(checkpoint: Checkpoint, path: Path, to: torch.dtype | None = None) -> list[Path]:
    """Writes a model as one file, and beside it `<name>.yaml` where AUTOMATIC1111 would not know the architecture.

    The latents' scale and shift are folded into the autoencoder where its convolutions allow it, because the tools that
    read such files take the family's constant for granted.

    Args:
        to: of the stored weights; None leaves them as they are.

    Returns:
        the files written.

    Raises:
        ModelError: the original layout has no place for a part of this model, or a text encoder is not CLIP's.
    """
    require_clip(checkpoint)
    layout = layout_of({name: part.config for name, part in checkpoint.parts.items() if name in TOKENIZERS})
    folded = dataclasses.replace(
        checkpoint, parts={**checkpoint.parts, "vae": folded_vae(checkpoint.parts["vae"], layout)}
    )
    state = {key: value if to is None else value.to(to) for key, value in original_state(folded, layout).items()}
    write_hashed(state, path, _metadata(folded, layout, path.stem), HASH_KEY)
    return [path, *_write_webui_yaml(folded, layout, path)]


def original_state(checkpoint: Checkpoint, layout: str) -> dict[str, Tensor]:
    """All tensors of a model under their original names, with the marks of SDXL's v-prediction.

    Raises:
        ModelError: a part has a tensor, or a shape of its U-Net, that the layout does not know.
    """
    state: dict[str, Tensor] = {}
    for name, place in LAYOUTS[layout].items():
        part = checkpoint.parts[name]
        moved = explained(part.source, place.to_original, part.state, parsed(part, name))
        state |= {place.prefix + key: value for key, value in moved.items()}
    if layout == "sdxl" and checkpoint.scheduler.get("prediction_type") == "v_prediction":
        state[V_MARK] = torch.zeros(0)
        if checkpoint.scheduler.get("rescale_betas_zero_snr"):
            state[ZERO_SNR_MARK] = torch.zeros(0)
    return state


def folded_vae(part: Part, layout: str) -> Part:
    """The autoencoder with the family's scale and no shift, drawing the same pictures.

    z = (raw - shift)·scale = raw'·s with raw' = (raw - shift) / (s / scale), s being the family's constant. One whose
    scale is that already, or which lacks the 1x1 convolutions around the latents, stays as it is.
    """
    config = parsed(part, "vae")
    scale, shift = SCALES[layout], config.shift_factor or 0.0
    if (config.scaling_factor, shift) == (scale, 0.0) or not (config.use_quant_conv and config.use_post_quant_conv):
        return part
    vae = build_vae(part)
    channels = config.latent_channels
    fold_into_convolutions(vae, torch.full((channels,), shift), torch.full((channels,), scale / config.scaling_factor))
    state = {key: value.to(part.state[key].dtype) for key, value in vae.state_dict().items()}
    return dataclasses.replace(part, config={**part.config, "scaling_factor": scale, "shift_factor": None}, state=state)


def _metadata(checkpoint: Checkpoint, layout: str, title: str) -> dict[str, str]:
    """ModelSpec 1.0.1, and our own entry."""
    unet, vae = checkpoint.parts["unet"].config, parsed(checkpoint.parts["vae"], "vae")
    side = (unet.get("sample_size") or 64) * vae.downsample_factor
    predicts_v = checkpoint.scheduler.get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v2-768-v" if layout == "sd2" and predicts_v else ARCHITECTURES[layout]
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture + ("-inpainting" if unet.get("in_channels") == 9 else ""),
        "modelspec.implementation": IMPLEMENTATIONS[layout],
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        CONFIGS_KEY: json.dumps(checkpoint.configs),
    }


def needs_webui_yaml(checkpoint: Checkpoint, layout: str) -> bool:
    """Whether AUTOMATIC1111 would take the file for another model: it knows the published architectures alone."""
    diffusion = DiffusionConfig.from_dict(checkpoint.scheduler)
    return not (
        layout == "sdxl"
        or (
            layout == "sd1"
            and diffusion.prediction_type == "epsilon"
            and is_process(diffusion)
            and is_unet(parsed(checkpoint.parts["unet"], "unet"), layout)
            and is_vae(parsed(checkpoint.parts["vae"], "vae"))
        )
    )


def _write_webui_yaml(checkpoint: Checkpoint, layout: str, path: Path) -> list[Path]:
    if not needs_webui_yaml(checkpoint, layout):
        return []
    import yaml

    unet, vae = (parsed(checkpoint.parts[name], name) for name in ("unet", "vae"))
    diffusion = DiffusionConfig.from_dict(checkpoint.scheduler)
    try:
        content = webui_config(layout, unet, vae, diffusion, vae.scaling_factor)
    except ValueError:  # `ldm-convert --check` says why; the file is still one for us and for diffusers
        return []
    target = path.with_suffix(".yaml")
    target.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return [target]


# --- reading


def read_single_file(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """A whole model from a file in the original layout, its tensors in diffusers' names and their stored dtype.

    Raises:
        ModelError: one sentence naming the file and the key at fault.
    """
    state = read_tensors(path, allow_pickle)
    metadata = {} if path.suffix != ".safetensors" else read_metadata(path)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    layout = detect_layout(shapes, path)
    inside = {name: _inside(state, place.prefix) for name, place in LAYOUTS[layout].items()}
    _refuse_unknown(state, layout, path)
    configs = stored_configs(metadata, path) or _inferred_configs(shapes, layout, path)
    if set(configs["parts"]) != set(inside):
        raise ModelError(f"{path}: `{CONFIGS_KEY}` describes other parts than the file holds")
    parts = {}
    for name, place in LAYOUTS[layout].items():
        original = Part(configs["parts"][name], inside[name], path, path)
        state_of_part = explained(path, place.from_original, inside[name], parsed(original, name))
        parts[name] = dataclasses.replace(original, state=state_of_part)
    scheduler = configs["scheduler"] or _inferred_scheduler(state, metadata, layout, path)
    tokenizers = configs["tokenizers"] or _tokenizers_of_others(layout, path)
    return Checkpoint(parts, scheduler, tokenizers, configs["settings"], configs["card"])


def detect_layout(shapes: Shapes, path: Path) -> str:
    """Which of `LAYOUTS` a file has, by its text towers.

    Raises:
        ModelError: it is no whole Stable Diffusion model; the sentence says what it looks like.
    """

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in shapes)

    if any(".lora_" in key or key.startswith("lora_") for key in shapes):
        raise ModelError(f"{path} is a LoRA, not a whole model; give it to --lora")
    if not has("model.diffusion_model."):
        what = "a part in diffusers' layout" if has("down_blocks.") or has("encoder.") else "no Stable Diffusion model"
        raise ModelError(f"{path} is {what}: it has no key that begins with `model.diffusion_model.`")
    found = next((name for name in ("sdxl", "sd2", "sd1") if all(has(p.prefix) for p in LAYOUTS[name].values())), None)
    if found is None:
        lacking = [p.prefix for p in LAYOUTS["sd1"].values() if not has(p.prefix)]
        raise ModelError(f"{path} is not a whole model: it has no key that begins with `{lacking[-1]}`")
    return found


def stored_configs(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """What a file that was written here says about itself; None for the files of others.

    Raises:
        ModelError: the entry is damaged.
    """
    if CONFIGS_KEY not in metadata:
        return None
    kinds = {"parts": dict, "scheduler": dict, "tokenizers": dict, "settings": dict, "card": str}
    try:
        configs = json.loads(metadata[CONFIGS_KEY])
        intact = all(isinstance(configs[key], kind) for key, kind in kinds.items())
        texts = [text for files in configs["tokenizers"].values() for text in files.values()]
        intact = intact and all(isinstance(part, dict) for part in configs["parts"].values())
        intact = intact and all(isinstance(text, str) for text in texts)
        intact = intact and all(name in TOKENIZER_FILES for files in configs["tokenizers"].values() for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise ModelError(f"{path}: the entry `{CONFIGS_KEY}` of its header is damaged")
    return dict(configs)


def _inferred_configs(shapes: Shapes, layout: str, path: Path) -> dict[str, Any]:
    inside = {name: _inside(shapes, place.prefix) for name, place in LAYOUTS[layout].items()}
    unet = explained(path, infer_unet_config, inside["unet"], layout)
    parts: dict[str, Any] = {
        "unet": unet.to_dict(),
        "vae": explained(path, infer_vae_config, inside["vae"], layout).to_dict(),
    }
    if layout == "sd2":
        whole = explained(path, infer_open_clip_config, inside["text_encoder"])
        # files made from diffusers folders hold the layers up to the penultimate only, and no projection
        parts["text_encoder"] = penultimate(whole) if "text_projection" in inside["text_encoder"] else whole
    else:
        parts["text_encoder"] = explained(path, infer_clip_config, inside["text_encoder"])
    if layout == "sdxl":
        parts["text_encoder_2"] = explained(path, infer_open_clip_config, inside["text_encoder_2"])
        pooled = parts["text_encoder_2"]["projection_dim"]
        parts["unet"]["addition_time_embed_dim"] = explained(path, time_ids_width, unet, pooled)
    return {"parts": parts, "scheduler": {}, "tokenizers": {}, "settings": {}, "card": ""}


def _inferred_scheduler(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], layout: str, path: Path
) -> dict[str, Any]:
    predicts_v = _predicts_v(state, metadata, layout, path)
    zero_snr = ZERO_SNR_MARK in state and predicts_v
    return DiffusionConfig(
        prediction_type="v_prediction" if predicts_v else "epsilon",
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    ).to_dict()


def _predicts_v(state: Mapping[str, Tensor], metadata: Mapping[str, str], layout: str, path: Path) -> bool:
    """What a file says in its header, a mark or the yaml beside it; of SD 2.x else the spread of a trained bias."""
    said = metadata.get("modelspec.prediction_type")
    if said is not None:
        return said.startswith("v")
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        return re.search(r"parameterization:\s*[\"']?v\b", beside.read_text(errors="replace")) is not None
    bias = state.get("model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias")
    plain = state["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 4
    if layout == "sd2" and bias is not None and plain:
        return float(bias.float().std(correction=0)) > V_PREDICTION_STD
    return V_MARK in state


def _tokenizers_of_others(layout: str, path: Path) -> dict[str, dict[str, str]]:
    """The folders `tokenizer` and `tokenizer_2` beside the file, or CLIP's own vocabulary."""
    found: dict[str, dict[str, str]] = {}
    for name, place in LAYOUTS[layout].items():
        if name in TOKENIZERS:
            folder = path.parent / TOKENIZERS[name]
            files = {file: folder / file for file in TOKENIZER_FILES if (folder / file).is_file()}
            pad = {} if ".transformer." in place.prefix else {"pad_token": "!"}
            read = {file: source.read_text(encoding="utf-8") for file, source in files.items()}
            found[TOKENIZERS[name]] = read or clip_tokenizer_files(**pad)
    return found


def _inside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _refuse_unknown(state: Mapping[str, Tensor], layout: str, path: Path) -> None:
    prefixes = tuple(place.prefix for place in LAYOUTS[layout].values())
    unknown = sorted(key for key in state if not key.startswith(prefixes) and not IGNORED.match(key))
    if unknown:
        raise ModelError(
            f"{path} has the key `{unknown[0]}`, which belongs to no part of the model ({len(unknown)} such)"
        )
