"""Scaled-down siblings of Stable Diffusion 1, 2 and XL with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoencoder import AutoencoderConfig, AutoencoderKL
from conditioning import ClipTextConfig, ClipTextModel, ClipTokenizer
from ldm.data.shapes import captions, scene
from ldm.interop.checkpoint import Checkpoint, Part, write_folder
from ldm.networks import UNet, UNetConfig
from ldm.process import DiffusionConfig

WIDTH = 64

VAE = AutoencoderConfig(block_out_channels=(32, 32, 64), layers_per_block=2, scaling_factor=0.18215, sample_size=32)
SD1 = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64, 64),
    layers_per_block=2,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=WIDTH,
    attention_head_dim=8,
)
SD2 = replace(SD1, use_linear_projection=True, attention_head_dim=(2, 4, 4))
SDXL = replace(
    SD2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 3),
    cross_attention_dim=3 * WIDTH,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=2 * WIDTH + 6 * 8,
)
TEXT = ClipTextConfig(
    vocab_size=600,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=24,
    projection_dim=WIDTH,
)
UNETS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
V_TRAILING = DiffusionConfig(prediction_type="v_prediction", timestep_spacing="trailing")


def tokenizer_files(folder: Path) -> dict[str, str]:
    """A vocabulary of 600 learnt from captions of shapes."""
    ClipTokenizer.train((c for i in range(100) for c in captions(scene(i, "train"))), 600, 24).save_pretrained(folder)
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def text_part(config: ClipTextConfig, seed: int, projection: bool = False) -> Part:
    model = ClipTextModel.from_scratch(config, torch.Generator().manual_seed(seed), projection)
    architecture = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return part({"architectures": [architecture], **config.to_dict()}, model)


def part(config: dict[str, Any], module: torch.nn.Module) -> Part:
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    return Part(config, state, Path("memory"), Path("memory"))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tokenizer_files(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def sibling(vocabulary: dict[str, str]) -> Callable[..., Checkpoint]:
    """sibling("sd1" | "sd2" | "sdxl", unet={...}, vae={...}): random weights; the keyword arguments change configs."""
    words = len(vocabulary["vocab.json"].split(","))

    def build(
        family: str, unet: dict[str, Any] | None = None, vae: dict[str, Any] | None = None, seed: int = 0
    ) -> Checkpoint:
        torch.manual_seed(seed)
        unet_config, vae_config = (
            replace(UNETS[family], **unet or {}),
            replace(VAE, down_block_types=(), up_block_types=(), **vae or {}),
        )
        if family == "sdxl" and not vae:
            vae_config = replace(vae_config, scaling_factor=0.13025)
        noisy, decoder = UNet(unet_config), AutoencoderKL(vae_config)
        with torch.no_grad():
            noisy.conv_out.weight *= 3
            decoder.decoder.conv_out.weight *= 8
        first = replace(TEXT, hidden_act="gelu" if family == "sd2" else "quick_gelu", vocab_size=words)
        first = replace(first, bos_token_id=words - 2, eos_token_id=words - 1)
        parts = {
            "unet": part(unet_config.to_dict(), noisy),
            "vae": part(vae_config.to_dict(), decoder),
            "text_encoder": text_part(first, 1),
        }
        tokenizers = {"tokenizer": vocabulary}
        if family == "sdxl":
            second = replace(first, hidden_act="gelu", hidden_size=2 * WIDTH, projection_dim=2 * WIDTH)
            parts["text_encoder_2"] = text_part(second, 2, projection=True)
            tokenizers["tokenizer_2"] = vocabulary
        diffusion = V_TRAILING if family == "sd2" else DiffusionConfig()
        return Checkpoint(parts, diffusion.to_dict(), tokenizers, {"num_inference_steps": 5}, "# Tiny\n")

    return build


@pytest.fixture
def sibling_folder(sibling: Callable[..., Checkpoint], tmp_path: Path) -> Callable[..., Path]:
    """The same, as a pipeline folder."""

    def write(family: str, **changes: Any) -> Path:
        write_folder(sibling(family, **changes), tmp_path / family)
        return tmp_path / family

    return write
