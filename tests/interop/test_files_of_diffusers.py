"""Files as diffusers' conversion scripts write them, from a second implementation of the names: read tensor for tensor.

The functions here compute a name from what the other one says; `ldm.interop.names` is not used, so that a mistake in its
tables cannot cancel out. Depths are those of the published networks, which are the only ones that the scripts know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.interop.checkpoint import Checkpoint, read_folder, write_folder
from ldm.interop.tensors import ModelError
from ldm.pretrained import read_model
from ldm.single_file import read_single_file

Sibling = Callable[..., Checkpoint]
State = Mapping[str, Tensor]
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (64, 128, 192, 192),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**FOUR_LEVELS, "attention_head_dim": 8},
    "sd2": {**FOUR_LEVELS, "attention_head_dim": (1, 2, 3, 3)},
    "sdxl": {
        "block_out_channels": (64, 128, 192),
        "attention_head_dim": (1, 2, 3),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
    },
}
SCALES = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
LAYERS = 2
"""Residual blocks of a level on the way down, in all published networks."""
UNET_KEYS = {"sd1": 686, "sd2": 686, "sdxl": 1680}
"""Of the published U-Nets, whatever their width."""


# --- the second implementation


def unet_name(key: str, attends: tuple[bool, ...]) -> str:
    """`attends` says of every level on the way up whether it has transformers."""
    ends = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    }  # fmt: skip
    module, _, kind = key.rpartition(".")
    if module in ends:
        return f"{ends[module]}.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        return f"middle_block.{1 if found[1] == 'attentions' else 2 * int(found[2])}.{in_block(found[1], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key)
    assert found, key
    level, what, index, rest = int(found[2]), found[3], int(found[4]), found[5]
    first = level * (LAYERS + 1)
    if what == "downsamplers":
        return f"input_blocks.{first + LAYERS + 1}.0.op.{kind}"
    if what == "upsamplers":
        return f"output_blocks.{first + LAYERS}.{2 if attends[level] else 1}.{rest}"
    place = f"input_blocks.{first + index + 1}" if found[1] == "down" else f"output_blocks.{first + index}"
    return f"{place}.{1 if what == 'attentions' else 0}.{in_block(what, rest)}"


def in_block(what: str, rest: str) -> str:
    if what == "attentions":
        return rest
    places = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    module, _, kind = rest.rpartition(".")
    return f"{places[module]}.{kind}"


def vae_name(key: str, levels: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"mid_block\.attentions\.0\.(to_)?", "mid.attn_1.", key)
    key = key.replace("attn_1.group_norm", "attn_1.norm").replace("attn_1.out.0", "attn_1.proj_out")
    key = re.sub(r"(down|up)samplers\.0", r"\1sample", key)
    key = re.sub(r"resnets\.(\d)", r"block.\1", key)
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    return re.sub(r"down_blocks\.(\d)", r"down.\1", key)


def original_vae(state: State, levels: int) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        name = vae_name(key, levels)
        projects = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)
        yield name, value.reshape(*value.shape, 1, 1) if projects else value


def open_clip(state: State) -> Iterator[tuple[str, Tensor]]:
    """Queries, keys and values of a layer in one matrix, the projection transposed."""
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name):
            if found[2] == "q":
                three = [state[key.replace("q_proj", f"{one}_proj")] for one in "qkv"]
                yield f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}", torch.cat(three)
        elif name == "text_projection.weight":
            yield "text_projection", value.T.contiguous()
        elif name == "embeddings.position_embedding.weight":
            yield "positional_embedding", value
        else:
            for theirs, ours in (
                ("embeddings.", ""), ("final_layer_norm", "ln_final"), ("encoder.layers", "transformer.resblocks"),
                ("self_attn", "attn"), ("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj"),
            ):  # fmt: skip
                name = name.replace(theirs, ours)
            yield name, value


def write_as_diffusers_does(folder: Path, family: str, path: Path, half: bool) -> dict[str, Tensor]:
    """U-Net, autoencoder and text towers in one file without metadata."""

    def weights(name: str) -> dict[str, Tensor]:
        (file,) = (folder / name).glob("*.safetensors")
        return load_file(file)

    unet, vae = weights("unet"), weights("vae")
    levels = 1 + max(int(found[1]) for key in unet if (found := re.match(r"up_blocks\.(\d)", key)))
    attends = tuple(any(key.startswith(f"up_blocks.{level}.attentions") for key in unet) for level in range(levels))
    state = {f"model.diffusion_model.{unet_name(key, attends)}": value for key, value in unet.items()}
    state |= {f"first_stage_model.{key}": value for key, value in original_vae(vae, levels=4)}
    first = weights("text_encoder")
    if family == "sd2":
        state |= {f"cond_stage_model.model.{key}": value for key, value in open_clip(first)}
    else:
        place = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        state |= {f"{place}.transformer.{key}": value for key, value in first.items()}
    if family == "sdxl":
        second = open_clip(weights("text_encoder_2"))
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second}
    if half:
        state = {key: value.half() for key, value in state.items()}
    save_file(state, path)
    return state


# --- read by us


@pytest.fixture
def folder(sibling: Sibling, family: str, tmp_path: Path) -> Path:
    vae = {"block_out_channels": (32, 32, 32, 64), "scaling_factor": SCALES[family]}
    write_folder(sibling(family, unet=UNETS[family], vae=vae), tmp_path / "folder")
    return tmp_path / "folder"


@pytest.fixture
def file(folder: Path) -> Path:
    """Where the file goes: beside the folder's vocabulary, without which CLIP's would be taken."""
    return folder / "model.safetensors"


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("family", UNETS)
def test_every_tensor_is_that_of_the_folder(folder: Path, file: Path, family: str, half: bool) -> None:
    written = write_as_diffusers_does(folder, family, file, half)
    assert sum(key.startswith("model.diffusion_model.") for key in written) == UNET_KEYS[family]
    expected, read = read_folder(folder), read_single_file(file)
    assert read.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert read.parts[name].state.keys() == part.state.keys()
        for key, value in part.state.items():
            found = read.parts[name].state[key]
            wanted = value.half() if half else value
            assert found.dtype == wanted.dtype and torch.equal(found, wanted), f"{name}: {key}"


@pytest.mark.parametrize("family", UNETS)
def test_the_model_that_it_makes_is_that_of_the_folder(folder: Path, file: Path, family: str) -> None:
    write_as_diffusers_does(folder, family, file, half=False)
    ours, theirs = read_model(folder), read_model(file)
    assert replace(theirs.unet.config, sample_size=8) == ours.unet.config
    assert replace(theirs.vae.config, sample_size=32) == ours.vae.config
    for part in ("unet", "vae", "text_encoder"):
        expected, found = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("family", ["sdxl"])
@pytest.mark.parametrize("width", [127, 131])
def test_sizes_and_pooled_text_that_do_not_add_up_are_refused(
    folder: Path, file: Path, family: str, width: int
) -> None:
    key = "model.diffusion_model.label_emb.0.0.weight"
    state = write_as_diffusers_does(folder, family, file, half=False)
    save_file({**state, key: state[key][:, :width].clone()}, file)
    with pytest.raises(ModelError, match=rf"model.safetensors: `label_emb.0.0.weight` takes {width} numbers"):
        read_single_file(file)
