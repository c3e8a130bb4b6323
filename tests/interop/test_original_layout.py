"""The original key layout: diffusers' converters as the second implementation, and the way there and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoencoder import AutoencoderConfig, AutoencoderKL
from conditioning import ClipTextConfig, ClipTextModel
from ldm.interop import layout
from ldm.interop.checkpoint import Checkpoint, read_folder, write_folder
from ldm.interop.families import SD1_UNET, SD2_UNET, SD_VAE, SDXL_UNET, VIT_BIG_G, VIT_H, VIT_L, is_unet
from ldm.interop.infer import infer_clip_config, infer_open_clip_config, infer_unet_config, infer_vae_config
from ldm.interop.tensors import read_metadata
from ldm.networks import UNet, UNetConfig
from ldm.pretrained import ModelError, read_model
from ldm.single_file import read_single_file, write_single_file

Sibling = Callable[..., Checkpoint]
FAMILIES = ("sd1", "sd2", "sdxl")


def on_meta(build: Callable[[], torch.nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# --- the published sizes, without weights


def test_stable_diffusion_1_has_the_reference_number_of_keys() -> None:
    unet = layout.unet_to_original(on_meta(lambda: UNet(SD1_UNET)), SD1_UNET)
    vae = layout.vae_to_original(on_meta(lambda: AutoencoderKL(SD_VAE)), SD_VAE)
    text = layout.clip_to_original(on_meta(lambda: ClipTextModel(VIT_L)), VIT_L)
    assert (len(unet), len(vae), len(text)) == (686, 248, 196)
    assert unet["output_blocks.8.2.conv.weight"].shape == (640, 640, 3, 3)
    assert unet["input_blocks.11.0.out_layers.3.weight"].shape == (1280, 1280, 3, 3)
    assert unet["middle_block.1.proj_in.weight"].shape == (1280, 1280, 1, 1)
    assert vae["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert vae["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)


@pytest.mark.parametrize("unet", [SD1_UNET, SD2_UNET, SDXL_UNET], ids=FAMILIES)
def test_a_full_size_unet_has_the_keys_that_diffusers_reads(unet: UNetConfig) -> None:
    theirs = on_meta(lambda: diffusers.UNet2DConditionModel.from_config(unet.to_dict()))
    original = layout.unet_to_original(on_meta(lambda: UNet(unet)), unet)
    prefixed = {f"model.diffusion_model.{key}": value for key, value in original.items()}
    assert shapes(convert_ldm_unet_checkpoint(prefixed, dict(unet.to_dict()))) == shapes(theirs)


@pytest.mark.parametrize(("name", "unet"), zip(FAMILIES, [SD1_UNET, SD2_UNET, SDXL_UNET], strict=True))
def test_a_full_size_config_is_found_again_from_shapes_alone(name: str, unet: UNetConfig) -> None:
    original = layout.unet_to_original(on_meta(lambda: UNet(unet)), unet)
    assert infer_unet_config(shapes(original), name) == unet
    assert is_unet(infer_unet_config(shapes(original), name), name)


def test_a_full_size_autoencoder_and_the_text_towers_are_found_again() -> None:
    vae = layout.vae_to_original(on_meta(lambda: AutoencoderKL(SD_VAE)), SD_VAE)
    assert infer_vae_config(shapes(vae), "sd1") == SD_VAE
    clip = layout.clip_to_original(on_meta(lambda: ClipTextModel(VIT_L)), VIT_L)
    assert replace(ClipTextConfig.from_dict(infer_clip_config(shapes(clip)))) == VIT_L
    big = layout.open_clip_to_original(on_meta(lambda: ClipTextModel(VIT_BIG_G, True)), VIT_BIG_G)
    assert ClipTextConfig.from_dict(infer_open_clip_config(shapes(big))) == VIT_BIG_G
    huge = layout.open_clip_to_original(on_meta(lambda: ClipTextModel(VIT_H)), VIT_H)
    assert ClipTextConfig.from_dict(infer_open_clip_config(shapes(huge))) == replace(VIT_H, projection_dim=1024)


# --- diffusers' converters on random weights


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_converts_our_unet_and_autoencoder_to_the_same_tensors(sibling: Sibling, family: str) -> None:
    parts = sibling(family).parts
    unet = layout.unet_to_original(parts["unet"].state, UNetConfig.from_dict(parts["unet"].config))
    vae = layout.vae_to_original(parts["vae"].state, AutoencoderConfig.from_dict(parts["vae"].config))
    prefixed = {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    assert_equal(convert_ldm_unet_checkpoint(prefixed, dict(parts["unet"].config)), parts["unet"].state)
    prefixed = {f"first_stage_model.{key}": value for key, value in vae.items()}
    assert_equal(convert_ldm_vae_checkpoint(prefixed, dict(parts["vae"].config)), parts["vae"].state)


@pytest.mark.parametrize(("family", "name"), [("sd2", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_diffusers_converts_our_open_clip_tower_to_the_same_tensors(sibling: Sibling, family: str, name: str) -> None:
    part = sibling(family).parts[name]
    config, width = transformers.CLIPTextConfig.from_dict(dict(part.config)), part.config["hidden_size"]
    original = layout.open_clip_to_original(part.state, ClipTextConfig.from_dict(part.config))
    assert original["transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * width, width)
    prefixed = {f"tower.{key}": value for key, value in original.items()}
    theirs = convert_open_clip_checkpoint(transformers.CLIPTextModel(config), prefixed, prefix="tower.")
    assert_equal(theirs, part.state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_comes_back_bit_for_bit(sibling: Sibling, family: str) -> None:
    configs: dict[str, Any] = {"unet": UNetConfig, "vae": AutoencoderConfig}
    for name, place in layout.LAYOUTS[family].items():
        part = sibling(family).parts[name]
        config = configs.get(name, ClipTextConfig).from_dict(part.config)
        assert_equal(place.from_original(place.to_original(part.state, config), config), part.state)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": 1},
        {"layers_per_block": (1, 2, 3)},
        {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D",) * 2,
         "up_block_types": ("CrossAttnUpBlock2D",) * 2, "layers_per_block": 1},
        {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",),
         "up_block_types": ("CrossAttnUpBlock2D",)},
        {"down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D")},
        {"transformer_layers_per_block": 3},
        {"in_channels": 9},
        {"num_class_embeds": 7},
        {"class_embed_type": "timestep"},
    ],
)  # fmt: skip
def test_other_depths_come_back_too(sibling: Sibling, changes: dict[str, Any]) -> None:
    part = sibling("sd1", unet=changes).parts["unet"]
    config = UNetConfig.from_dict(part.config)
    original = layout.unet_to_original(part.state, config)
    assert len(original) == len(part.state)
    assert_equal(layout.unet_from_original(original, config), part.state)


def test_what_has_no_place_in_the_original_layout_is_named(sibling: Sibling, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`mid_block_type` is 'UNetMidBlock2D'; the original layout has"):
        write_single_file(sibling("sd1", unet={"mid_block_type": "UNetMidBlock2D"}), tmp_path / "x.safetensors")
    resnets = {"up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
    with pytest.raises(ModelError, match=r"`up_block_types` \['ResnetUp.* no residual blocks that resample"):
        write_single_file(sibling("sd1", unet=resnets), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"the key `time_embedding.cond_proj.weight` has no place"):
        write_single_file(sibling("sd1", unet={"time_cond_proj_dim": 5}), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_text_encoder_is_not_taken_for_clip(sibling: Sibling, tmp_path: Path) -> None:
    checkpoint = sibling("sd1")
    t5 = replace(checkpoint.parts["text_encoder"], config={"model_type": "t5", "d_model": 64})
    other = replace(checkpoint, parts={**checkpoint.parts, "text_encoder": t5})
    for write, target in ((write_single_file, "x.safetensors"), (write_folder, "x")):
        with pytest.raises(ModelError, match="model_type is 't5'; only CLIP text encoders are converted"):
            write(other, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


# --- whole files


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_file_folder_is_bit_equal(sibling: Sibling, family: str, tmp_path: Path) -> None:
    write_folder(sibling(family), tmp_path / "a")
    write_single_file(read_folder(tmp_path / "a"), tmp_path / "model.safetensors")
    write_folder(read_single_file(tmp_path / "model.safetensors"), tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    for name in files:
        a, b = tmp_path / "a" / name, tmp_path / "b" / name
        if name.suffix == ".safetensors":
            assert_equal(load_file(a), load_file(b))
        else:
            assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_diffusers_opens_the_file_with_the_folder_as_config(sibling: Sibling, family: str, tmp_path: Path) -> None:
    write_folder(sibling(family), tmp_path / "folder")
    write_single_file(sibling(family), tmp_path / "model.safetensors")
    opened = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    parts = sibling(family).parts
    assert_equal(opened.unet.state_dict(), parts["unet"].state)
    assert_equal(opened.vae.state_dict(), parts["vae"].state)
    theirs = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in opened.text_encoder.state_dict().items()}
    assert_equal(theirs, parts["text_encoder"].state)


def test_diffusers_opens_the_sdxl_file_too(sibling: Sibling, tmp_path: Path) -> None:
    write_folder(sibling("sdxl"), tmp_path / "folder")
    write_single_file(sibling("sdxl"), tmp_path / "model.safetensors")
    opened = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    parts = sibling("sdxl").parts
    assert_equal(opened.unet.state_dict(), parts["unet"].state)
    for name in ("text_encoder", "text_encoder_2"):
        state = getattr(opened, name).state_dict()
        theirs = {k if k.startswith("text_") else f"text_model.{k}": v for k, v in state.items()}
        assert_equal(theirs, parts[name].state)


def as_others_write_it(path: Path, extra: Mapping[str, Tensor] = {}) -> None:
    """Without our entry in the header, and with what old files hold beside the model."""
    save_file({**load_file(path), **extra}, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_others_is_understood_from_its_shapes(
    sibling: Sibling, vocabulary: dict[str, str], family: str, tmp_path: Path
) -> None:
    heads = {} if family == "sd1" else {"block_out_channels": (64, 128, 128), "attention_head_dim": (1, 2, 2)}
    checkpoint = sibling(family, unet=heads)
    path = tmp_path / "other.safetensors"
    write_single_file(checkpoint, path)
    path.with_suffix(".yaml").unlink(missing_ok=True)
    as_others_write_it(
        path, {"betas": torch.zeros(3), "model_ema.decay": torch.zeros(()), "global_step": torch.zeros(())}
    )
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        for file, text in vocabulary.items():
            (tmp_path / name / file).write_text(text)
    read = read_single_file(path)
    for name, part in checkpoint.parts.items():
        assert_equal(read.parts[name].state, part.state)
    found = replace(UNetConfig.from_dict(read.parts["unet"].config), sample_size=8)
    assert found == UNetConfig.from_dict(checkpoint.parts["unet"].config)
    assert read.tokenizers["tokenizer"]["vocab.json"] == vocabulary["vocab.json"]


@pytest.mark.parametrize("by", ["yaml", "mark", "spread", "nothing"])
def test_v_prediction_of_a_file_of_others_is_noticed(
    sibling: Sibling, vocabulary: dict[str, str], by: str, tmp_path: Path
) -> None:
    four = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    checkpoint = sibling(
        "sdxl" if by == "mark" else "sd2",
        unet={"block_out_channels": (64, 64, 64), "attention_head_dim": 1} if by == "mark" else {
            "block_out_channels": (64, 64, 64, 64), "attention_head_dim": 1, "down_block_types": four,
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        },
    )  # fmt: skip
    if by == "yaml":
        checkpoint = sibling(
            "sd2",
            unet={"block_out_channels": (64, 64, 64), "attention_head_dim": 1},
            vae={"block_out_channels": (32, 32, 32, 64)},
        )
    bias = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    if by == "spread":
        changed = {**checkpoint.parts["unet"].state, bias: torch.linspace(-1, 1, 64)}
        unet = replace(checkpoint.parts["unet"], state=changed)
        checkpoint = replace(checkpoint, parts={**checkpoint.parts, "unet": unet})
    path = tmp_path / "x.safetensors"
    write_single_file(checkpoint, path)
    if by != "yaml":
        path.with_suffix(".yaml").unlink(missing_ok=True)
    as_others_write_it(path, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)} if by == "mark" else {})
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        for file, text in vocabulary.items():
            (tmp_path / name / file).write_text(text)
    scheduler = read_single_file(path).scheduler
    assert scheduler["prediction_type"] == ("epsilon" if by == "nothing" else "v_prediction")
    assert scheduler["rescale_betas_zero_snr"] is (by == "mark")


def test_the_last_layer_of_a_whole_tower_of_stable_diffusion_2_is_left_out(sibling: Sibling, tmp_path: Path) -> None:
    checkpoint = sibling("sd2", unet={"block_out_channels": (64, 64, 64), "attention_head_dim": 1})
    path = tmp_path / "x.safetensors"
    write_single_file(checkpoint, path)
    prefix = "cond_stage_model.model."
    state = inside(load_file(path), prefix)
    last = {k.replace("resblocks.1.", "resblocks.2."): v.clone() for k, v in state.items() if "resblocks.1." in k}
    whole = {f"{prefix}{key}": value for key, value in last.items()}
    whole |= {f"{prefix}text_projection": torch.eye(64), f"{prefix}logit_scale": torch.ones(())}
    as_others_write_it(path, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.single_file.clip_tokenizer_files", lambda **kwargs: {})
        read = read_single_file(path)
    assert read.parts["text_encoder"].config["num_hidden_layers"] == 2
    assert_equal(read.parts["text_encoder"].state, checkpoint.parts["text_encoder"].state)


def test_old_names_of_the_text_tower_are_read(sibling: Sibling, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_single_file(sibling("sd1"), path)
    prefix = "cond_stage_model.transformer."
    metadata, state = read_metadata(path), load_file(path)
    old = {key.replace(f"{prefix}text_model.", prefix): value for key, value in state.items()}
    save_file({**old, f"{prefix}embeddings.position_ids": torch.arange(24)[None]}, path, metadata=metadata)
    assert_equal(read_single_file(path).parts["text_encoder"].state, sibling("sd1").parts["text_encoder"].state)


# --- header and yaml


def test_the_header_follows_modelspec_and_its_hash_is_that_of_the_tensors(sibling: Sibling, tmp_path: Path) -> None:
    path = tmp_path / "my model.safetensors"
    write_single_file(sibling("sd2"), path)
    said = read_metadata(path)
    assert said["modelspec.sai_model_spec"] == "1.0.1" and said["modelspec.title"] == "my model"
    assert said["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert said["modelspec.prediction_type"] == "v" and said["modelspec.resolution"] == "32x32"
    assert said["modelspec.implementation"].startswith("https://")
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert said["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("sd1", {}),
        ("sd1", {"layers_per_block": 1, "attention_head_dim": 4}),
        ("sd2", {"attention_head_dim": (1, 2, 2)}),
        ("sd1", {"in_channels": 9}),
    ],
)
def test_diffusers_reads_the_architecture_from_the_yaml(
    sibling: Sibling, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    eight = {
        "block_out_channels": (32, 64, 64, 64),
    }
    checkpoint = sibling(family, unet=changes, vae=eight)
    written = write_single_file(checkpoint, tmp_path / "x.safetensors")
    assert [path.name for path in written] == ["x.safetensors", "x.yaml"]
    said = yaml.safe_load((tmp_path / "x.yaml").read_text())
    blocks = said["model"]["params"]["unet_config"]["params"]["num_res_blocks"]
    assert blocks == [checkpoint.parts["unet"].config["layers_per_block"]] * 3
    said["model"]["params"]["unet_config"]["params"]["num_res_blocks"] = blocks[0]  # diffusers knows one number only
    theirs = create_unet_diffusers_config_from_ldm(said, {}, image_size=8 * 8)
    ours = UNetConfig.from_dict(checkpoint.parts["unet"].config)
    known = {key: value for key, value in theirs.items() if key in ours.to_dict() and value is not None}
    read = replace(UNetConfig.from_dict(known), sample_size=8)
    assert read.down_levels() == ours.down_levels() and read.up_levels() == ours.up_levels()
    assert (read.in_channels, read.use_linear_projection) == (ours.in_channels, ours.use_linear_projection)
    vae = create_vae_diffusers_config_from_ldm(said, {}, image_size=32)
    assert tuple(vae["block_out_channels"]) == eight["block_out_channels"]
    assert (vae["layers_per_block"], vae["latent_channels"], vae["scaling_factor"]) == (2, 4, 0.18215)
    assert said["model"]["params"]["parameterization"] == ("v" if family == "sd2" else "eps")


def test_no_yaml_where_the_original_code_has_no_words_for_the_model(sibling: Sibling, tmp_path: Path) -> None:
    assert write_single_file(sibling("sd1"), tmp_path / "f4.safetensors") == [tmp_path / "f4.safetensors"]


# --- the scale


def test_the_familys_scale_draws_the_pictures_of_the_measured_one(sibling: Sibling, tmp_path: Path) -> None:
    checkpoint = sibling("sd1", vae={"scaling_factor": 0.9, "shift_factor": 0.35})
    write_folder(checkpoint, tmp_path / "folder")
    write_single_file(checkpoint, tmp_path / "x.safetensors")
    before = read_model(tmp_path / "folder").vae
    theirs = diffusers.AutoencoderKL.from_config({**before.config.to_dict(), "shift_factor": None})
    original = inside(load_file(tmp_path / "x.safetensors"), "first_stage_model.")
    theirs.load_state_dict(convert_ldm_vae_checkpoint({f"vae.{k}": v for k, v in original.items()}, theirs.config))
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        drawn = theirs.decode(z / 0.18215).sample
        expected = before.decode(z / 0.9 + 0.35)
        assert (drawn - expected).abs().max() * 127.5 <= 1
        encoded = theirs.encode(images).latent_dist
        posterior = before.encode(images)
        torch.testing.assert_close(encoded.mean * 0.18215, (posterior.mean - 0.35) * 0.9, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(encoded.std * 0.18215, posterior.std * 0.9, atol=1e-4, rtol=1e-4)
    ours = read_single_file(tmp_path / "x.safetensors").parts["vae"].config
    assert (ours["scaling_factor"], ours["shift_factor"]) == (0.18215, None)


def test_stored_configs_are_json(sibling: Sibling, tmp_path: Path) -> None:
    write_single_file(sibling("sd1"), tmp_path / "x.safetensors")
    configs = json.loads(read_metadata(tmp_path / "x.safetensors")["ldm.configs"])
    assert configs == json.loads(json.dumps(sibling("sd1").configs))
