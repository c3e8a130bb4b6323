"""The U-Net against diffusers' UNet2DConditionModel, and what diffusers cannot tell."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ldm.networks import UNet, UNetConfig, sinusoidal_embedding
from ldm.networks.blocks import ResnetBlock2D
from ldm.networks.config import FIXED_KEYS

CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
BATCH, LENGTH, WIDTH = 2, 5, 24
TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
THREE_LEVELS: dict[str, Any] = {
    **TWO_LEVELS,
    "block_out_channels": (16, 32, 48),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {
        **THREE_LEVELS,
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP),
        "layers_per_block": 2,
    },
    "sd2": {
        **TWO_LEVELS,
        "attention_head_dim": (2, 8),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **THREE_LEVELS,
        "attention_head_dim": (2, 4, 6),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
    "pooled_text": {**TWO_LEVELS, "addition_embed_type": "text", "addition_embed_type_num_heads": 3},
    "class_labels": {**TWO_LEVELS, "num_class_embeds": 7},
    "class_timestep": {**TWO_LEVELS, "class_embed_type": "timestep", "act_fn": "gelu"},
    "class_identity": {**TWO_LEVELS, "class_embed_type": "identity"},
    "class_projection": {
        **TWO_LEVELS,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 9,
    },
    "class_simple_projection": {
        **TWO_LEVELS,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 9,
    },
    "scale_shift": {**TWO_LEVELS, "resnet_time_scale_shift": "scale_shift"},
    "uneven": {
        **THREE_LEVELS,
        "layers_per_block": (1, 3, 2),
        "up_block_types": (UP, CROSS_UP, CROSS_UP),
        "out_channels": 8,
        "in_channels": 9,
    },
    "one_level": {
        **TWO_LEVELS,
        "block_out_channels": (32,),
        "down_block_types": (CROSS_DOWN,),
        "up_block_types": (CROSS_UP,),
    },
    "no_attention": {
        **TWO_LEVELS,
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP),
        "mid_block_type": "UNetMidBlock2D",
    },
    "no_middle": {**TWO_LEVELS, "mid_block_type": None},
    "guidance_embedding": {**TWO_LEVELS, "time_cond_proj_dim": 6},
    "biggan": {
        **TWO_LEVELS,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 16,
        "resnet_time_scale_shift": "scale_shift",
    },
    "biggan_attends_everywhere": {
        **THREE_LEVELS,
        "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3,
        "attention_head_dim": (4, 8, 16),
        "layers_per_block": (2, 1, 2),
        "out_channels": 8,
    },
    "biggan_without_attention": {
        **TWO_LEVELS,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "biggan_among_others": {
        **THREE_LEVELS,
        "down_block_types": ("ResnetDownsampleBlock2D", CROSS_DOWN, "SimpleCrossAttnDownBlock2D"),
        "up_block_types": (CROSS_UP, "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": 8,
    },
    "rare_options": {
        **TWO_LEVELS,
        "act_fn": "mish",
        "center_input_sample": True,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "mid_block_scale_factor": 1.5,
        "norm_eps": 1e-3,
        "sample_size": 8,
    },
}
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
SD15 = {**PUBLISHED_DEFAULTS, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
SD21 = {
    **PUBLISHED_DEFAULTS,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = {
    **PUBLISHED_DEFAULTS,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "upcast_attention": None,
    "use_linear_projection": True,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors here are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


def randomise(module: torch.nn.Module) -> None:
    """Every parameter random, the zero-initialised ones too, at a scale that keeps activations near one."""
    generator = rng(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
            parameter.normal_(0, fan_in**-0.5, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def pair(values: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    """Our network and diffusers' with the same random weights, loaded strictly."""
    config = UNetConfig(**values)
    ours = UNet(config)
    randomise(ours)
    theirs = UNet2DConditionModel.from_config(config.to_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def conditions(config: UNetConfig) -> dict[str, Tensor]:
    """What the config's network needs besides latents, timesteps and context."""
    labels: dict[str | None, Tensor] = {
        "timestep": torch.tensor([3.0, 250.0]),
        "identity": normal(BATCH, config.time_embed_dim, seed=5),
        "projection": normal(BATCH, 9, seed=5),
        "simple_projection": normal(BATCH, 9, seed=5),
    }
    found: dict[str, Tensor] = {}
    if config.num_class_embeds:
        found["class_labels"] = torch.tensor([0, 6])
    if config.class_embed_type:
        found["class_labels"] = labels[config.class_embed_type]
    if config.addition_embed_type == "text_time":
        found["pooled"] = normal(BATCH, 10, seed=6)
        found["size_ids"] = torch.tensor([[64, 48, 0, 0, 64, 64], [128, 96, 3, 5, 64, 32]])
    if config.time_cond_proj_dim:
        found["time_cond"] = normal(BATCH, config.time_cond_proj_dim, seed=7)
    return found


def run_diffusers(
    model: UNet2DConditionModel,
    x: Tensor,
    t: Any,
    context: Tensor | None,
    given: dict[str, Tensor],
    **more: Any,
) -> Tensor:
    added = {"text_embeds": given.get("pooled"), "time_ids": given.get("size_ids")}
    out: Tensor = model(
        x,
        t,
        context,
        class_labels=given.get("class_labels"),
        timestep_cond=given.get("time_cond"),
        added_cond_kwargs=added,
        return_dict=False,
        **more,
    )[0]
    return out


@pytest.mark.parametrize("size", [(8, 8), (13, 10)], ids=["even", "odd"])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    if name.startswith("biggan") and size == (13, 10):
        size = (12, 20)  # diffusers' blocks that resample only double
    ours, theirs = pair(CONFIGS[name])
    x, t = normal(BATCH, ours.config.in_channels, *size), torch.tensor([1, 837])
    context = normal(BATCH, LENGTH, WIDTH, seed=2) if ours.attends else None
    given = conditions(ours.config)
    with torch.no_grad():
        actual = ours(x, t, context, **given)
        expected = run_diffusers(theirs, x, t, context, given)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "pooled_text", "scale_shift", "biggan"])
def test_parameter_gradients_equal_diffusers(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    x, t, context = normal(BATCH, 4, 8, 8), torch.tensor([20, 500]), normal(BATCH, LENGTH, WIDTH, seed=2)
    given = conditions(ours.config)
    ours(x, t, context, **given).square().mean().backward()
    run_diffusers(theirs, x, t, context, given).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_weights_load_strictly(name: str) -> None:
    config = UNetConfig(**CONFIGS[name])
    with torch.device("meta"):
        UNet(config).load_state_dict(UNet2DConditionModel.from_config(config.to_dict()).state_dict(), strict=True)


@pytest.mark.parametrize(
    ("published", "parameters"),
    [(SD15, 859_520_964), (SD21, 865_910_724), (SDXL, 2_567_463_684)],
    ids=["sd15", "sd21", "sdxl"],
)
def test_published_architectures(published: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(published)).state_dict()
        theirs = UNet2DConditionModel.from_config(published).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sum(value.numel() for value in ours.values()) == parameters


@pytest.mark.parametrize("t", [437, 437.0, 436.5, torch.tensor(437), torch.tensor(436.5)], ids=str)
def test_one_timestep_serves_every_row(t: Any) -> None:
    ours, theirs = pair(TWO_LEVELS)
    x, context = normal(BATCH, 4, 4, 4), normal(BATCH, LENGTH, WIDTH, seed=2)
    with torch.no_grad():
        actual = ours(x, t, context)
        torch.testing.assert_close(actual, ours(x, torch.tensor([float(t)] * BATCH), context), atol=0, rtol=0)
        torch.testing.assert_close(actual, run_diffusers(theirs, x, t, context, {}), atol=1e-4, rtol=0)


def test_rows_are_independent() -> None:
    ours, _ = pair(CONFIGS["sdxl"])
    x, t, context = normal(BATCH, 4, 8, 8), torch.tensor([20, 500]), normal(BATCH, LENGTH, WIDTH, seed=2)
    given = conditions(ours.config)
    with torch.no_grad():
        both = ours(x, t, context, **given)
        second = ours(x[1:], t[1:], context[1:], **{key: value[1:] for key, value in given.items()})
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)


def test_blocks_that_resample_take_odd_sizes() -> None:
    ours, _ = pair(CONFIGS["biggan"])
    with torch.no_grad():
        out = ours(normal(BATCH, 4, 13, 9), torch.tensor([20, 500]), normal(BATCH, LENGTH, WIDTH, seed=2))
    assert out.shape == (BATCH, 4, 13, 9) and out.isfinite().all()


def test_pooled_text_reaches_networks_without_attention() -> None:
    levels = {"down_block_types": (DOWN, DOWN), "up_block_types": (UP, UP), "mid_block_type": "UNetMidBlock2D"}
    ours, _ = pair({**CONFIGS["pooled_text"], **levels})
    x = normal(BATCH, 4, 8, 8)
    with torch.no_grad():
        one, other = (ours(x, 20, normal(BATCH, LENGTH, WIDTH, seed=seed)) for seed in (2, 3))
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`context` is None"):
        ours(x, 20)


@pytest.mark.parametrize("name", ["sd1", "pooled_text", "biggan"])
def test_masked_tokens_have_no_influence(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    x, t, context = normal(BATCH, 4, 8, 8), torch.tensor([20, 500]), normal(BATCH, LENGTH, WIDTH, seed=2)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    changed = context.clone()
    changed[0, 3:] = 1e3
    with torch.no_grad():
        masked = ours(x, t, context, context_mask=mask)
        torch.testing.assert_close(ours(x, t, changed, context_mask=mask), masked, atol=0, rtol=0)
        torch.testing.assert_close(ours(x[:1], t[:1], context[:1, :3]), masked[:1], atol=1e-5, rtol=0)
        assert (ours(x, t, context)[0] - masked[0]).abs().max() > 1e-3
        expected = run_diffusers(theirs, x, t, context, {}, encoder_attention_mask=mask)
    rows = slice(1, None) if name == "pooled_text" else slice(None)  # diffusers pools padding too
    torch.testing.assert_close(masked[rows], expected[rows], atol=1e-4, rtol=0)


def residuals_for(ours: UNet, x: Tensor, context: Tensor) -> list[Tensor]:
    """Random tensors in the shapes of the skip connections and of the middle block's output."""
    shapes: list[torch.Size] = []
    hooks = [ours.conv_in.register_forward_hook(lambda *a: shapes.append(a[2].shape))]
    hooks += [b.register_forward_hook(lambda *a: shapes.extend(s.shape for s in a[2][1])) for b in ours.down_blocks]
    with torch.no_grad():
        ours(x, 0, context)
    for hook in hooks:
        hook.remove()
    return [normal(*shape, seed=seed) for seed, shape in enumerate([*shapes, shapes[-1]])]


def test_residuals_equal_diffusers_controlnet_inputs() -> None:
    ours, theirs = pair(CONFIGS["sd1"])
    x, context = normal(BATCH, 4, 8, 8), normal(BATCH, LENGTH, WIDTH, seed=2)
    residuals = residuals_for(ours, x, context)
    with torch.no_grad():
        actual = ours(x, 100, context, residuals=residuals)
        expected = run_diffusers(
            theirs,
            x,
            100,
            context,
            {},
            down_block_additional_residuals=tuple(residuals[:-1]),
            mid_block_additional_residual=residuals[-1],
        )
        assert (actual - ours(x, 100, context)).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=f"`residuals` has 2 tensors; this U-Net takes {len(residuals)}"):
        ours(x, 100, context, residuals=residuals[:2])


@pytest.mark.parametrize("name", ["sd1", "sdxl", "no_middle", "biggan"])
def test_checkpointing_recomputes_and_keeps_gradients(name: str) -> None:
    ours, _ = pair(CONFIGS[name])
    x, t, context = normal(BATCH, 4, 8, 8), torch.tensor([20, 500]), normal(BATCH, LENGTH, WIDTH, seed=2)
    given, calls, gradients = conditions(ours.config), [], []
    resnets = [module for module in ours.modules() if isinstance(module, ResnetBlock2D)]
    for resnet in resnets:
        resnet.register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        ours.enable_gradient_checkpointing(enabled)
        ours.zero_grad()
        calls.clear()
        ours(x, t, context, **given).square().mean().backward()
        assert len(calls) == len(resnets) * (2 if enabled else 1)
        gradients.append({key: p.grad.clone() for key, p in ours.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == dict(ours.named_parameters()).keys()
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_channels_last_gives_the_same_output() -> None:
    ours, _ = pair(CONFIGS["sd1"])
    x, context = normal(BATCH, 4, 8, 8), normal(BATCH, LENGTH, WIDTH, seed=2)
    with torch.no_grad():
        expected = ours(x, 10, context)
        actual = ours.to(memory_format=torch.channels_last)(x, 10, context)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "class_labels", "biggan"])
def test_saved_folder_is_read_by_diffusers(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(CONFIGS[name])
    ours.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    torch.testing.assert_close(loaded.state_dict(), dict(theirs.state_dict()), atol=0, rtol=0)
    assert all(loaded.config[key] == theirs.config[key] for key in ours.config.to_dict() if key[0] != "_")


def test_diffusers_folder_is_read(tmp_path: Path) -> None:
    ours, theirs = pair(CONFIGS["sdxl"])
    theirs.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == ours.config
    torch.testing.assert_close(loaded.state_dict(), ours.state_dict(), atol=0, rtol=0)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_file_loads_as_float32_by_default(tmp_path: Path) -> None:
    ours, _ = pair(TWO_LEVELS)
    ours.half().save_pretrained(tmp_path)
    assert {p.dtype for p in UNet.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in UNet.from_pretrained(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_saving_again_replaces_what_was_loaded(tmp_path: Path) -> None:
    UNet.from_scratch(UNetConfig(**TWO_LEVELS), rng(0)).save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.conv_out.weight.fill_(3)
    loaded.save_pretrained(tmp_path)
    torch.testing.assert_close(UNet.from_pretrained(tmp_path).state_dict(), loaded.state_dict(), atol=0, rtol=0)


def edit_state(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    state = {**safetensors.torch.load_file(path), **changes}
    safetensors.torch.save_file({key: value for key, value in state.items() if value is not None}, path)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    ours = UNet.from_scratch(UNetConfig(**TWO_LEVELS), rng())
    weights = "diffusion_pytorch_model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UNet.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    edit_state(tmp_path, **{"conv_in.bias": None})
    with pytest.raises(ValueError, match=rf"{weights} lacks the key `conv_in.bias` .*\(1 missing\)"):
        UNet.from_pretrained(tmp_path)
    edit_state(tmp_path, **{"conv_in.bias": torch.zeros(31)})
    with pytest.raises(ValueError, match=rf"{weights}: `conv_in.bias` has shape \[31\]; .* \[32\]"):
        UNet.from_pretrained(tmp_path)
    edit_state(tmp_path, **{"conv_in.bias": torch.zeros(32), "position_net.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{weights} has the key `position_net.bias`, .*\(1 unknown\)"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / weights).write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match=f"{weights} is not a safetensors file"):
        UNet.from_pretrained(tmp_path)
    (tmp_path / weights).unlink()
    with pytest.raises(FileNotFoundError, match=weights):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not JSON"),
        ("[]", r"config\.json holds a JSON list"),
        ('{"act_fn": "tanh"}', r"config\.json: `act_fn` is 'tanh'; accepted: 'silu'"),
    ],
)
def test_unusable_config_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)


def test_from_scratch_is_a_function_of_the_generator() -> None:
    config = UNetConfig(**CONFIGS["sdxl"])
    before = torch.get_rng_state()
    first, again, other = (UNet.from_scratch(config, rng(seed)).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    assert not torch.equal(first["conv_in.weight"], other["conv_in.weight"])


@pytest.mark.parametrize("name", ["sd1", "sdxl", "class_labels", "guidance_embedding", "biggan"])
def test_from_scratch_has_torch_layer_statistics_and_zero_last_layers(name: str) -> None:
    config = UNetConfig(**CONFIGS[name])
    last = ("conv_out.", ".conv2.", ".proj_out.", *((".to_out.",) if name == "biggan" else ()))
    scratch = UNet.from_scratch(config, rng()).named_parameters()
    for (key, parameter), reference in zip(scratch, UNet(config).parameters(), strict=True):
        if any(part in f".{key}" for part in last):
            assert not parameter.any(), key
        elif parameter.numel() >= 1000:
            torch.testing.assert_close(parameter.std(), reference.std(), atol=0, rtol=0.1, msg=key)
            assert parameter.abs().max() <= 5 * reference.std(), key
        elif "norm" in key:
            assert torch.equal(parameter, reference), key


def test_from_scratch_predicts_zero_and_then_learns() -> None:
    unet = UNet.from_scratch(UNetConfig(**TWO_LEVELS), rng())
    x, context, target = normal(8, 4, 8, 8), normal(8, LENGTH, WIDTH, seed=2), normal(8, 4, 8, 8, seed=3)
    assert not unet(x, 5, context).any()
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (unet(x, 5, context) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * target.square().mean()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sd1", {"context": None}, "`context` is None"),
        ("sd1", {"context_mask": torch.ones(BATCH, LENGTH)}, "`context_mask` has dtype torch.float32"),
        ("sdxl", {"pooled": None}, "`pooled` is None"),
        ("sdxl", {"size_ids": None}, "`size_ids` is None"),
        ("class_labels", {"class_labels": None}, "`class_labels` is None"),
        ("sd1", {"class_labels": torch.zeros(BATCH)}, r"`class_labels` is a tensor of shape \[2\]"),
        ("sd1", {"size_ids": torch.zeros(BATCH, 6)}, r"`size_ids` is a tensor of shape \[2, 6\]"),
        ("sd1", {"time_cond": torch.zeros(BATCH, 6)}, r"`time_cond` is a tensor of shape \[2, 6\]"),
    ],
)
def test_missing_or_unread_conditions(name: str, given: dict[str, Any], message: str) -> None:
    unet = UNet(UNetConfig(**CONFIGS[name]))
    context = normal(BATCH, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=message):
        unet(normal(BATCH, 4, 8, 8), 0, **{"context": context, **conditions(unet.config), **given})


@pytest.mark.parametrize("dim", [8, 9])
@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("flip", [False, True])
def test_sinusoidal_embedding_equals_diffusers(dim: int, freq_shift: int, flip: bool) -> None:
    t = torch.tensor([0.0, 1.0, 17.25, 999.0])
    actual = sinusoidal_embedding(t, dim, flip_sin_to_cos=flip, freq_shift=freq_shift)
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=freq_shift)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_config_keys_and_defaults_are_diffusers() -> None:
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    expected = {key: parameter.default for key, parameter in signature.items() if key != "self"}
    assert {field.name: field.default for field in fields(UNetConfig)} | dict(FIXED_KEYS) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_json(name: str) -> None:
    config = UNetConfig(**CONFIGS[name])
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_reads_diffusers_private_and_default_keys() -> None:
    private = {"_class_name": "UNet2DConditionModel", "_use_default_values": ["dropout"]}
    assert UNetConfig.from_dict({**private, **FIXED_KEYS}) == UNetConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dual_cross_attention": True}, "`dual_cross_attention` is True; this U-Net implements False only"),
        ({"only_cross_attention": [True, False]}, r"`only_cross_attention` is \[True, False\]"),
        ({"num_attention_heads": 8}, "`num_attention_heads` is 8; this U-Net implements None only"),
        ({"dropout": 0.1}, "`dropout` is 0.1"),
        ({"time_embedding_type": "fourier"}, "`time_embedding_type` is 'fourier'"),
        ({"block_channels": [32]}, r"`block_channels` is not a key of a U-Net config .*block_out_channels"),
        ({"in_channels": "4"}, "`in_channels` is '4'; accepted: int"),
        ({"in_channels": 0}, "`in_channels` is 0; it must be at least 1"),
        ({"in_channels": True}, "`in_channels` is True; accepted: int"),
        ({"norm_eps": -1e-5}, "`norm_eps` is -1e-05; it must be positive"),
        ({"layers_per_block": [2, 0, 2, 2]}, r"`layers_per_block` is \(2, 0, 2, 2\); it must be at least 1"),
        ({"sample_size": 64.5}, "`sample_size` is 64.5; accepted: int or None"),
        ({"addition_embed_type": "image"}, "`addition_embed_type` is 'image'; accepted: 'text', 'text_time' or None"),
        ({"addition_embed_type": "text", "cross_attention_dim": 100}, "`addition_embed_type_num_heads` is 64"),
        ({"addition_embed_type": "text", "cross_attention_dim": (64, 64, 64, 64)}, "one width for all levels"),
        (
            {"down_block_types": ["AttnDownBlock2D"]},
            "`down_block_types` is .*AttnDownBlock2D.*; accepted: a list",
        ),
        ({"block_out_channels": []}, r"`block_out_channels` is \(\); it must have at least 1"),
        (
            {"block_out_channels": [32, 64]},
            r"`down_block_types` is .*; `block_out_channels` asks for 2 entries",
        ),
        (
            {"attention_head_dim": [8, 8]},
            r"`attention_head_dim` is \(8, 8\); `block_out_channels` asks for 4",
        ),
        ({"attention_head_dim": 7}, "`attention_head_dim`, the number of heads, is 7 on a level of 320"),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": [8, 8, 8, 4096]},
            "`attention_head_dim`, the width of a head, is 4096 on a level of 1280",
        ),
        ({"norm_num_groups": 48}, "`block_out_channels` has 320; it must be a multiple of `norm_num_groups`"),
        ({"addition_embed_type": "text_time"}, "`addition_time_embed_dim` is None"),
        ({"class_embed_type": "projection"}, "`projection_class_embeddings_input_dim` is None"),
        ({"transformer_layers_per_block": [[1], [1], [1], [1]]}, "`transformer_layers_per_block` is"),
        ({"upcast_attention": "yes"}, "`upcast_attention` is 'yes'; accepted: bool or None"),
    ],
)
def test_bad_configs_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(values)
