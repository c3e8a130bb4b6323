"""Which of the usual tools will open a model, and why another will not: predicted from configs, nothing is run.

What each tool looks at was read in its code: ComfyUI's model detection, AUTOMATIC1111's choice of a configuration and
InvokeAI's probes. A reason is a sentence about the model; a tool opens what it has no reason against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoencoder import AutoencoderConfig
from conditioning import ClipTextConfig
from ldm.interop.families import (
    SCALES,
    SDXL_UNET,
    TOWERS,
    UPSCALER_VAE,
    is_process,
    is_tower,
    is_unet,
    is_vae,
    layout_of,
)
from ldm.interop.names import unet_names
from ldm.interop.webui import webui_config
from ldm.networks.config import Level, UNetConfig
from ldm.process import DiffusionConfig

CONTEXTS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
SDXL_DEPTHS = ((0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 5), (0, 2, 6))
"""Transformer layers after each residual block on the way down, of SDXL and of the models distilled from it."""
SDXL_ADDED = (SDXL_UNET.projection_class_embeddings_input_dim, SDXL_UNET.addition_time_embed_dim)
INVOKE_CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
)
Checks = Iterable[tuple[bool, str]]
"""(what must hold, the reason where it does not)."""


@dataclass(frozen=True)
class Description:
    """What the tools look at.

    Attributes:
        form: "folder" or "single file"; a folder can be made a file and the other way round.
        pipeline: `_class_name` of model_index.json.
        texts: config.json of "text_encoder" and, for SDXL, "text_encoder_2".
        clip_vocabulary: whether every tokenizer gives CLIP's own ids.
        damage: what does not fit together in the weights, a sentence, or None.
    """

    form: str
    pipeline: str
    unet: UNetConfig
    vae: AutoencoderConfig
    texts: Mapping[str, Mapping[str, Any]]
    diffusion: DiffusionConfig
    clip_vocabulary: bool
    damage: str | None = None

    @property
    def layout(self) -> str:
        """The original layout that the model would be written in."""
        return layout_of(self.texts)

    @property
    def context(self) -> int:
        """Width of the text features that the towers give together."""
        return sum(int(text.get("hidden_size", text.get("d_model", 0))) for text in self.texts.values())


@dataclass(frozen=True)
class Verdict:
    """What a tool will do: `form` is how it takes the model, `notes` what to know although it opens."""

    tool: str
    form: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def opens(self) -> bool:
        return not self.reasons


def verdicts(model: Description) -> list[Verdict]:
    """What diffusers, ComfyUI, AUTOMATIC1111 and InvokeAI will do with a model."""
    return [_diffusers(model), _comfyui(model), _automatic1111(model), _invokeai(model)]


def _failed(checks: Checks) -> tuple[str, ...]:
    return tuple(reason for holds, reason in checks if not holds)


# --- diffusers: any widths, as long as the parts fit each other


def _diffusers(model: Description) -> Verdict:
    unet, vae = model.unet, model.vae
    latents, inpaints, read = vae.latent_channels, "Inpaint" in model.pipeline, _text_width(unet)
    double = "text_encoder_2" in model.texts
    wanted = (latents, 2 * latents + 1) if inpaints else (latents,)
    checks = [
        *_whole(model),
        (
            unet.in_channels in wanted,
            f"{model.pipeline} gives the U-Net {wanted[-1]} channels, it takes {unet.in_channels}",
        ),
        (
            unet.out_channels == latents,
            f"the U-Net gives {unet.out_channels} channels, the autoencoder takes {latents}",
        ),
        (read == str(model.context), f"the U-Net reads text of width {read}, not {model.context}"),
        (
            double or unet.addition_embed_type != "text_time",
            "the U-Net wants sizes and pooled text, which one encoder lacks",
        ),
        (not double or unet.addition_embed_type == "text_time", "the U-Net does not take the second encoder's vector"),
        (unet.class_embed_type is None and not unet.num_class_embeds, "no text-to-image pipeline gives class labels"),
    ]
    shifted = bool(vae.shift_factor)
    notes = _failed(
        [
            (not shifted, "its Stable Diffusion pipelines ignore the autoencoder's shift_factor"),
            (unet.sample_size is not None, "the U-Net's sample_size is null, so height and width must be given"),
        ]
    )
    how = "folder" if model.form == "folder" else "single file, with config= a folder of this architecture"
    return Verdict("diffusers", how, _failed(checks), notes)


def _whole(model: Description) -> Checks:
    return [(model.damage is None, model.damage or "")]


def _attending(unet: UNetConfig) -> list[Level]:
    """The levels with transformers, on the way down and in the middle; the way up has the same widths and heads."""
    return [level for level in (*unet.down_levels(), unet.mid_level()) if level.depth]


def _text_width(unet: UNetConfig) -> str:
    """Of the text that the transformers read: one number, unless the levels differ or there are none."""
    return " and ".join(map(str, sorted({level.context_dim for level in _attending(unet)}))) or "0"


# --- ComfyUI: the family is known by widths, the rest is taken for granted


def _comfyui(model: Description) -> Verdict:
    checks = [
        *_whole(model),
        *_original(model),
        *_comfy_unet(model),
        *_towers(model),
        *_comfy_vae(model),
    ]
    predicts_v = model.diffusion.prediction_type == "v_prediction"
    guesses = model.layout == "sd2" and model.unet.in_channels == 4 and _attends_in_block_11(model.unet)
    notes = _failed(
        [
            (
                not predicts_v or guesses or model.layout == "sdxl",
                "set v_prediction with the node ModelSamplingDiscrete",
            ),
            (model.vae.downsample_factor == 8, "its node EmptyLatentImage gives pictures of half the side asked for"),
            (not guesses, "it guesses v-prediction from the spread of a bias, which may fail on a young model"),
        ]
    )
    return Verdict("ComfyUI", "single file", _failed(checks), notes)


def _original(model: Description) -> Checks:
    """What the original layout and those who read it leave no room for."""
    unet, diffusion = model.unet, model.diffusion
    try:
        unet_names(unet)
        placed = ""
    except ValueError as error:
        placed = str(error)
    return [
        (not placed, placed),
        (diffusion.prediction_type != "sample", "the U-Net predicts the sample, not the noise or v"),
        (unet.norm_num_groups == 32 and unet.norm_eps == 1e-5, "its group norms are not of 32 groups with eps 1e-5"),
        (unet.act_fn in ("silu", "swish"), f"its activation is {unet.act_fn}, not silu"),
        (unet.time_cond_proj_dim is None, "its timestep embedding takes another input"),
        (unet.class_embed_type is None and not unet.num_class_embeds, "it has a class embedding"),
    ]


def _comfy_unet(model: Description) -> Checks:
    """It sees the first width, the context, the kind of projection, the added input and, of SDXL, the depths."""
    unet, layout = model.unet, model.layout
    first, linear = unet.block_out_channels[0], layout != "sd1"
    attending, read = _attending(unet), _text_width(unet)
    heads = [level.heads for level in attending]
    wanted = [level.channels // 64 if linear else 8 for level in attending]
    betas = model.diffusion
    if layout == "sdxl":  # its files have a mark for a schedule that ends at zero signal
        betas = replace(betas, rescale_betas_zero_snr=False)
    checks = [
        (first == 320, f"the U-Net's first width is {first}, not 320"),
        (not any(width % 320 for width in unet.block_out_channels), "its widths are not multiples of 320"),
        (any(level.depth for level in unet.down_levels()), "no level on its way down has a transformer"),
        (read == str(CONTEXTS[layout]), f"it reads text of width {read}, not {CONTEXTS[layout]}"),
        (unet.use_linear_projection is linear, f"its projections are {'convolutions' if linear else 'linear'}"),
        (heads == wanted, f"its heads are {heads}, not {wanted}"),
        (unet.in_channels in (4, 9), f"it takes {unet.in_channels} channels, not 4 or 9"),
        (unet.resnet_time_scale_shift == "default", "its timestep scales and shifts"),
        (is_process(betas), "its noise schedule is not Stable Diffusion's"),
    ]
    return [*checks, *(_comfy_sdxl(unet) if layout == "sdxl" else _comfy_sd(unet))]


def _comfy_sd(unet: UNetConfig) -> Checks:
    return [(unet.addition_embed_type is None, "it takes pooled text beside the timestep")]


def _comfy_sdxl(unet: UNetConfig) -> Checks:
    depths = tuple(level.depth for level in unet.down_levels() for _ in range(level.layers))
    added = unet.projection_class_embeddings_input_dim, unet.addition_time_embed_dim
    return [
        (depths in SDXL_DEPTHS, f"its blocks have {depths} transformer layers, as none of the SDXL models it knows"),
        (added == SDXL_ADDED, f"its added input and each size number in it are {added} wide, not {SDXL_ADDED}"),
    ]


def _attends_in_block_11(unet: UNetConfig) -> bool:
    depths = [level.depth for level in unet.up_levels() for _ in range(level.layers + 1)]
    return len(depths) > 11 and depths[11] > 0


def _towers(model: Description) -> Checks:
    names = {"sd1": "CLIP ViT-L/14", "sd2": "OpenCLIP ViT-H/14", "sdxl": "the tower of SDXL"}
    return [
        *(
            (_is_known(model.texts[name], known), f"its {name} is not {names[model.layout]}")
            for name, known in TOWERS[model.layout].items()
        ),
        (model.clip_vocabulary, "its tokenizer is not CLIP's, whose vocabulary the tool has built in"),
    ]


def _is_known(config: Mapping[str, Any], known: ClipTextConfig) -> bool:
    try:
        return is_tower(config, known)
    except (ValueError, TypeError):
        return False


def _comfy_vae(model: Description) -> Checks:
    """It also knows the upscaler's autoencoder, and does without the convolutions around the latents."""
    vae, plain = model.vae, not (model.vae.use_quant_conv or model.vae.use_post_quant_conv)
    whole = replace(vae, use_quant_conv=True, use_post_quant_conv=True) if plain else vae
    known = is_vae(whole) or is_vae(whole, UPSCALER_VAE)
    wanted = "(128; 1-2-4-4; two blocks; 4 channels) nor its upscaler's (1-2-4)"
    return [(known, f"its autoencoder is neither Stable Diffusion's {wanted}"), _latent_scale(model)]


def _vae(model: Description) -> Checks:
    wanted = "(128; 1-2-4-4; two blocks; 4 channels)"
    return [(is_vae(model.vae), f"its autoencoder is not Stable Diffusion's {wanted}"), _latent_scale(model)]


def _latent_scale(model: Description) -> tuple[bool, str]:
    vae = model.vae
    foldable = vae.use_quant_conv and vae.use_post_quant_conv
    exact = vae.scaling_factor == SCALES[model.layout] and not vae.shift_factor
    return foldable or exact, f"its latent scale is {vae.scaling_factor}, and there is no convolution to fold it into"


# --- AUTOMATIC1111: the published models, and through the yaml whatever the original code can say


def _automatic1111(model: Description) -> Verdict:
    checks = [*_whole(model), *_original(model), *_towers(model)]
    if model.layout == "sdxl":
        v_prediction = model.diffusion.prediction_type == "v_prediction"
        checks += [
            (is_unet(model.unet, "sdxl"), "it has two text encoders, but its U-Net is not SDXL's"),
            (model.unet.in_channels in (4, 9), f"it takes {model.unet.in_channels} channels, not 4 or 9"),
            (not v_prediction, "its configuration of SDXL predicts the noise"),
            *_vae(model),
        ]
    else:
        checks += _said_by_yaml(model)
    return Verdict("AUTOMATIC1111", "single file, with the yaml beside it", _failed(checks))


def _said_by_yaml(model: Description) -> Checks:
    try:
        webui_config(model.layout, model.unet, model.vae, model.diffusion, SCALES[model.layout])
    except ValueError as error:
        return [(False, str(error))]
    zero_snr = model.diffusion.rescale_betas_zero_snr
    return [(not zero_snr, "its noise schedule ends at zero signal, for which the yaml has no word")]


# --- InvokeAI: folders of any width, files of the published sizes


def _invokeai(model: Description) -> Verdict:
    unet, prediction = model.unet, model.diffusion.prediction_type
    context = unet.cross_attention_dim
    wanted = CONTEXTS["sdxl"] if model.layout == "sdxl" else (CONTEXTS["sd1"], CONTEXTS["sd2"])
    fits = context == wanted if isinstance(wanted, int) else context in wanted
    checks = [
        *_whole(model),
        *((not reason, reason) for reason in _diffusers(model).reasons if reason != model.damage),
        (model.pipeline in INVOKE_CLASSES, f"it does not know the pipeline class {model.pipeline}"),
        (fits, f"the U-Net's cross_attention_dim is {context}, not {wanted}"),
        (unet.in_channels in (4, 9), f"the U-Net takes {unet.in_channels} channels, not 4 or 9"),
        (prediction in ("epsilon", "v_prediction"), f"the U-Net predicts the {prediction}"),
    ]
    return Verdict("InvokeAI", "folder", _failed(checks), _diffusers(model).notes)
