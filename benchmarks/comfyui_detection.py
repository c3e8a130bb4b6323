"""What `ldm-convert --check` says of networks for ComfyUI, beside what a checkout of ComfyUI makes of their files.

    python benchmarks/comfyui_detection.py --comfyui ~/ComfyUI

ComfyUI is asked for the family that it sees in names and shapes, and builds the network that it would load. The file
opens where that is the right family and every tensor and number of heads is the file's. Towers and noise schedule are
the published ones throughout. No weights are made. Packages that ComfyUI requires and this environment
lacks are replaced by empty ones, since nothing is computed. Ends with code 1 where the two differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.interop.compatibility import Description, Verdict, verdicts
from ldm.interop.families import SD1_UNET, SD2_UNET, SD_VAE, SDXL_UNET, TOWERS
from ldm.interop.layout import vae_to_original
from ldm.interop.names import renamed, unet_names
from ldm.networks import UNet, UNetConfig
from ldm.process import DiffusionConfig

PREFIX = "model.diffusion_model."
V_BIAS = f"{PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""Read by ComfyUI, which guesses v-prediction from it, so it needs values."""
CLASSES = {"sd1": ("SD15",), "sd2": ("SD20",), "sdxl": ("SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B")}
"""ComfyUI's classes for the plain and the inpainting models of a layout."""
FindUNet = Callable[[UNetConfig, str], str]
FindVae = Callable[[AutoencoderConfig], str]


def levels(base: UNetConfig, *widths: int, attends: str | None = None, **changes: Any) -> UNetConfig:
    """`base` at other widths; `attends` has a letter a level, "x" for a transformer, and is all "x" by default."""
    crossed = [letter == "x" for letter in attends or "x" * len(widths)]
    kinds = {
        "down_block_types": tuple("CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed),
        "up_block_types": tuple("CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)),
    }
    if base.use_linear_projection:
        kinds["attention_head_dim"] = tuple(width // 64 for width in widths)
    return replace(base, block_out_channels=widths, **{**kinds, **changes})


SD1, SD2, SDXL = SD1_UNET, SD2_UNET, SDXL_UNET
ARCHITECTURES: dict[str, tuple[str, UNetConfig]] = {
    "SD 1.5": ("sd1", SD1),
    "SD 1.5, inpainting": ("sd1", replace(SD1, in_channels=9)),
    "SD 1.5, 8 channels": ("sd1", replace(SD1, in_channels=8)),
    "preset sd1-compat": ("sd1", levels(SD1, 320, 320, layers_per_block=1)),
    "320 x 1-2, one block": ("sd1", levels(SD1, 320, 640, layers_per_block=1)),
    "320 x 1-2-4-4, one block": ("sd1", levels(SD1, 320, 640, 1280, 1280, attends="xxx-", layers_per_block=1)),
    "320 x 1, four blocks": ("sd1", levels(SD1, 320, layers_per_block=4)),
    "320 x 1-2-4": ("sd1", levels(SD1, 320, 640, 1280)),
    "320 x 2-1": ("sd1", levels(SD1, 640, 320)),
    "320 x 3-3": ("sd1", levels(SD1, 320, 960, 960)),
    "one, two and three blocks": ("sd1", levels(SD1, 320, 640, 640, layers_per_block=(1, 2, 3))),
    "transformers at the deep end": ("sd1", levels(SD1, 320, 640, 640, attends="--x")),
    "transformers at both ends": ("sd1", levels(SD1, 320, 640, 640, attends="x-x")),
    "a transformer in the middle alone": ("sd1", levels(SD1, 320, 640, attends="--")),
    "two transformer layers": ("sd1", levels(SD1, 320, 640, transformer_layers_per_block=2)),
    "one and three transformer layers": ("sd1", levels(SD1, 320, 640, transformer_layers_per_block=(1, 3))),
    "320 x 1-1.5": ("sd1", levels(SD1, 320, 480)),
    "widths from 128": ("sd1", levels(SD1, 128, 256)),
    "widths from 192": ("sd1", levels(SD1, 192, 384)),
    "widths from 640": ("sd1", levels(SD1, 640, 1280)),
    "SD 1.5, four heads": ("sd1", replace(SD1, attention_head_dim=4)),
    "SD 1.5, heads of 64": ("sd1", replace(SD1, attention_head_dim=(5, 10, 20, 20))),
    "SD 1.5, linear projections": ("sd1", replace(SD1, use_linear_projection=True)),
    "SD 1.5, context 1024": ("sd1", replace(SD1, cross_attention_dim=1024)),
    "SD 1.5, contexts of two widths": ("sd1", replace(SD1, cross_attention_dim=(768, 768, 512, 768))),
    "SD 1.5, context 512": ("sd1", replace(SD1, cross_attention_dim=512)),
    "SD 1.5, scale and shift by time": ("sd1", replace(SD1, resnet_time_scale_shift="scale_shift")),
    "SD 1.5, class labels": ("sd1", replace(SD1, num_class_embeds=10)),
    "SD 2.1": ("sd2", SD2),
    "SD 2.1, inpainting": ("sd2", replace(SD2, in_channels=9)),
    "SD 2.1, one block": ("sd2", levels(SD2, 320, 640, 1280, 1280, attends="xxx-", layers_per_block=1)),
    "SD 2, 320 x 1-2-4": ("sd2", levels(SD2, 320, 640, 1280)),
    "SD 2, 320 x 1-2, one block": ("sd2", levels(SD2, 320, 640, layers_per_block=1)),
    "SD 2, widths from 256": ("sd2", levels(SD2, 256, 512)),
    "SD 2.1, eight heads": ("sd2", replace(SD2, attention_head_dim=8)),
    "SD 2.1, convolutions": ("sd2", replace(SD2, use_linear_projection=False)),
    "SD 2.1, context 768": ("sd2", replace(SD2, cross_attention_dim=768)),
    "SDXL": ("sdxl", SDXL),
    "SDXL, inpainting": ("sdxl", replace(SDXL, in_channels=9)),
    "SDXL, 8 channels": ("sdxl", replace(SDXL, in_channels=8)),
    "SDXL, distilled to 1-2-4": ("sdxl", replace(SDXL, transformer_layers_per_block=(1, 2, 4))),
    "SDXL, distilled to 1-1-2": ("sdxl", replace(SDXL, transformer_layers_per_block=(1, 1, 2))),
    "SDXL, one block, 1-2-5": ("sdxl", replace(SDXL, layers_per_block=1, transformer_layers_per_block=(1, 2, 5))),
    "SDXL, one block, 1-2-6": ("sdxl", replace(SDXL, layers_per_block=1, transformer_layers_per_block=(1, 2, 6))),
    "SDXL, one block": ("sdxl", replace(SDXL, layers_per_block=1)),
    "SDXL, shallow": ("sdxl", replace(SDXL, transformer_layers_per_block=1)),
    "SDXL, 320 x 1-1-2": ("sdxl", levels(SDXL, 320, 320, 640, attends="-xx")),
    "SDXL, 320 x 1-1.5-2": ("sdxl", levels(SDXL, 320, 480, 640, attends="-xx", attention_head_dim=(5, 8, 10))),
    "SDXL, widths from 128": ("sdxl", levels(SDXL, 128, 256, 512, attends="-xx")),
    "SDXL, eight heads": ("sdxl", replace(SDXL, attention_head_dim=8)),
    "SDXL, convolutions": ("sdxl", replace(SDXL, use_linear_projection=False)),
    "SDXL, size numbers of 128": (
        "sdxl",
        replace(SDXL, addition_time_embed_dim=128, projection_class_embeddings_input_dim=1280 + 6 * 128),
    ),
}  # fmt: skip


F4: dict[str, Any] = {"block_out_channels": (128, 256, 512), "down_block_types": (), "up_block_types": ()}
AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "autoencoder of SD": SD_VAE,
    "autoencoder f4": replace(SD_VAE, **F4),
    "autoencoder f4, half the widths": replace(SD_VAE, **{**F4, "block_out_channels": (64, 128, 256)}),
    "autoencoder f16": replace(SD_VAE, **{**F4, "block_out_channels": (128, 256, 512, 512, 512)}),
    "autoencoder, half the widths": replace(SD_VAE, block_out_channels=(64, 128, 256, 256)),
    "autoencoder, one block": replace(SD_VAE, layers_per_block=1),
    "autoencoder, no 1x1 convolutions": replace(SD_VAE, use_quant_conv=False, use_post_quant_conv=False),
    "autoencoder, one 1x1 convolution": replace(SD_VAE, use_quant_conv=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    args = parser.parse_args()
    if not (args.comfyui / "comfy" / "model_detection.py").is_file():
        parser.error(f"{args.comfyui} is no ComfyUI checkout: it has no comfy/model_detection.py")
    find_unet, find_vae = comfyui(args.comfyui)
    agree = [
        shown(name, check(layout, unet), find_unet(unet, layout)) for name, (layout, unet) in ARCHITECTURES.items()
    ]
    agree += [shown(name, check("sd1", SD1_UNET, vae), find_vae(vae)) for name, vae in AUTOENCODERS.items()]
    print(f"{sum(agree)} of {len(agree)} agree")
    sys.exit(not all(agree))


def shown(name: str, said: Verdict, found: str) -> bool:
    """Prints what both say; whether they agree."""
    agree = said.opens is not bool(found)
    print(f"{'' if agree else 'DIFFERENT '}{name}")
    print(f"    --check  {'yes' if said.opens else f'no: {said.reasons[0]}'}")
    print(f"    ComfyUI  {f'no: {found}' if found else 'yes'}")
    return agree


def check(layout: str, unet: UNetConfig, vae: AutoencoderConfig = SD_VAE) -> Verdict:
    """What `ldm-convert --check` says of this U-Net, or autoencoder, among the published parts of its layout."""
    pipeline = f"StableDiffusion{'XL' if layout == 'sdxl' else ''}{'Inpaint' if unet.in_channels == 9 else ''}Pipeline"
    texts = {name: tower.to_dict() for name, tower in TOWERS[layout].items()}
    described = Description("single file", pipeline, unet, vae, texts, DiffusionConfig(), clip_vocabulary=True)
    return next(verdict for verdict in verdicts(described) if verdict.tool == "ComfyUI")


def comfyui(checkout: Path) -> tuple[FindUNet, FindVae]:
    """Functions that say why ComfyUI would not open a file with this U-Net, or autoencoder, or ""."""
    replace_missing(checkout / "requirements.txt")
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu"]
    from comfy import options

    options.enable_args_parsing()
    from comfy import model_base, model_detection, ops, sd

    logging.disable(logging.ERROR)

    def find_unet(unet: UNetConfig, layout: str) -> str:
        with torch.device("meta"):
            ours = UNet(unet)
        state = {f"{PREFIX}{key}": value for key, value in renamed(ours.state_dict(), unet_names(unet)).items()}
        if V_BIAS in state:
            state[V_BIAS] = torch.zeros(state[V_BIAS].shape)
        known = model_detection.model_config_from_unet(dict(state), PREFIX)
        if known is None:
            return "it knows no such model"
        if type(known).__name__ not in CLASSES[layout]:
            return f"it takes it for {type(known).__name__}"
        try:
            known.model_type(state, PREFIX)
        except KeyError as error:
            return f"it looks for {error}"
        theirs = model_base.UNetModel(**known.unet_config, device="meta", operations=ops.disable_weight_init)
        return unlike(state, theirs) or other_heads(ours, theirs)

    def find_vae(vae: AutoencoderConfig) -> str:
        with torch.device("meta"):
            shapes = AutoencoderKL(vae).state_dict()
        state = {key: torch.zeros(value.shape) for key, value in vae_to_original(shapes, vae).items()}
        try:
            return unlike(state, sd.VAE(sd=dict(state)).first_stage_model)
        except RuntimeError as error:
            return " ".join(str(error).split())[:90]

    return find_unet, find_vae


def replace_missing(requirements: Path) -> None:
    """Puts an empty module in the place of every required package that is not installed, and of its modules."""
    lines = requirements.read_text().splitlines() if requirements.is_file() else []
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines if line[:1].isalpha()}
    missing = {name for name in names if importlib.util.find_spec(name) is None}

    class Empty:
        def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
            wanted = name.split(".")[0] in missing
            return importlib.util.spec_from_loader(name, self, is_package=True) if wanted else None

        def create_module(self, spec: Any) -> Any:
            return MagicMock(name=spec.name, __spec__=spec, __path__=[])

        def exec_module(self, module: Any) -> None:
            pass

    sys.meta_path.append(Empty())


def unlike(state: dict[str, Tensor], theirs: nn.Module) -> str:
    """How the tensors of a file differ from those of the network that is to take them."""
    found = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return f"{len(wrong)} tensors do not fit, such as {wrong[0]}" if wrong else ""


def other_heads(ours: UNet, theirs: nn.Module) -> str:
    """How the numbers of heads differ, which no shape tells."""
    said = {f"{name}.x": module.heads for name, module in ours.named_modules() if hasattr(module, "to_q")}
    made = {name: module.heads for name, module in theirs.named_modules() if hasattr(module, "to_q")}
    named = {key.removesuffix(".x"): heads for key, heads in renamed(said, unet_names(ours.config)).items()}
    wrong = [name for name in named if named[name] != made[name]]
    return f"{named[wrong[0]]} heads in {wrong[0]}, of which it makes {made[wrong[0]]}" if wrong else ""


if __name__ == "__main__":
    main()
