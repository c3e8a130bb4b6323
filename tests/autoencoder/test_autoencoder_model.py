"""AutoencoderKL against diffusers' class with the same weights, its folder format and its config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIGS: dict[str, dict[str, Any]] = {
    "f1": {"block_out_channels": (32,), "latent_channels": 2},
    "f2": {"block_out_channels": (32, 64), "latent_channels": 4, "layers_per_block": 2},
    "f4 without attention": {
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
    "f8 without quant convs": {
        "block_out_channels": (16, 16, 32, 32),
        "norm_num_groups": 16,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1159,
    },
    "f16": {"block_out_channels": (16, 16, 16, 32, 32), "norm_num_groups": 4, "latent_channels": 8},
    "gelu, one quant conv": {
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "act_fn": "gelu",
        "use_quant_conv": False,
    },
    "attention in the levels": {
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "four channels in": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "norm_num_groups": 16,
    },
}
STABLE_DIFFUSION_1 = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def build_pair(values: dict[str, Any], seed: int = 0) -> tuple[AutoencoderKL, DiffusersAutoencoder]:
    """Ours and diffusers' with equal weights, all drawn at random, biases and norm scales included."""
    config = AutoencoderConfig(**values)
    torch.manual_seed(seed)
    ours = AutoencoderKL(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = DiffusersAutoencoder.from_config(config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def tiny() -> AutoencoderKL:
    return build_pair({"block_out_channels": (16, 32), "norm_num_groups": 8})[0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name: str) -> None:
    ours, theirs = build_pair(CONFIGS[name])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    factor = ours.downsample_factor
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, ours.config.in_channels, 16, 32, generator=generator) * 2 - 1
    z = torch.randn(2, ours.config.latent_channels, 16 // factor, 32 // factor, generator=generator)
    posterior = theirs.encode(x).latent_dist
    assert_close(ours.moments(x), posterior.parameters, atol=1e-4, rtol=1e-4)
    assert_close(ours.encode(x).mean, posterior.mean, atol=1e-4, rtol=1e-4)
    assert_close(ours.encode(x).logvar, posterior.logvar, atol=1e-4, rtol=1e-4)
    assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_stable_diffusion_autoencoder_equals_diffusers() -> None:
    config = AutoencoderConfig.from_dict(STABLE_DIFFUSION_1)
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), DiffusersAutoencoder.from_config(STABLE_DIFFUSION_1)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.empty(value.shape).uniform_(-0.02, 0.02, generator=generator) + (value.ndim == 1) * 0.5
        for key, value in theirs.state_dict().items()
    }
    assert len(state) == 248
    ours.load_state_dict(state, strict=True, assign=True)
    theirs.load_state_dict(state, strict=True, assign=True)
    x = torch.rand(1, 3, 16, 24, generator=generator) * 2 - 1
    z = torch.randn(1, 4, 2, 3, generator=generator)
    assert ours.downsample_factor == 8
    assert ours.config.scaling_factor == 0.18215
    assert_close(ours.moments(x), theirs.encode(x).latent_dist.parameters, atol=1e-4, rtol=1e-4)
    assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["f4 without attention", "f8 without quant convs", "f2"])
@torch.no_grad()
def test_saved_folder_is_read_by_diffusers(name: str, tmp_path: Path) -> None:
    ours, _ = build_pair(CONFIGS[name])
    ours.save_pretrained(tmp_path)
    theirs = DiffusersAutoencoder.from_pretrained(tmp_path)
    factor = ours.downsample_factor
    z = torch.randn(
        1, ours.config.latent_channels, 16 // factor, 16 // factor, generator=torch.Generator().manual_seed(2)
    )
    assert_close(theirs.decode(z).sample, ours.decode(z), atol=1e-4, rtol=1e-4)
    assert theirs.config.shift_factor == ours.config.shift_factor
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_folder_of_diffusers_is_read_and_roundtrip_is_bit_equal(tmp_path: Path) -> None:
    _, theirs = build_pair(CONFIGS["attention in the levels"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = AutoencoderKL.from_pretrained(str(tmp_path / "ours"))
    assert again.config == ours.config
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_from_pretrained_casts_to_the_asked_type(tiny: AutoencoderKL, tmp_path: Path) -> None:
    tiny.half().save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).dtype == torch.float32
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_old_attention_names_are_read(tiny: AutoencoderKL, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(state)
    for key in state:
        for new, former in old.items():
            if f".{new}." in key:
                renamed[key.replace(f".{new}.", f".{former}.")] = renamed.pop(key)
    assert sum("proj_attn" in key for key in renamed) == 4
    save_file(renamed, tmp_path / WEIGHTS)
    loaded = AutoencoderKL.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def _drop(state: dict[str, torch.Tensor]) -> None:
    del state["decoder.conv_in.bias"]


def _add(state: dict[str, torch.Tensor]) -> None:
    state["decoder.extra"] = torch.zeros(1)


def _reshape(state: dict[str, torch.Tensor]) -> None:
    state["decoder.conv_in.bias"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_drop, ["lacks", "'decoder.conv_in.bias'"]),
        (_add, ["unknown", "'decoder.extra'"]),
        (_reshape, ["'decoder.conv_in.bias'", "(7,)", "(32,)"]),
    ],
)
def test_wrong_weights_are_named(
    spoil: Callable[[dict[str, torch.Tensor]], None], words: list[str], tiny: AutoencoderKL, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    spoil(state)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=WEIGHTS) as caught:
        AutoencoderKL.from_pretrained(tmp_path)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"latent_chanels": 4}'])
def test_wrong_config_file_is_named(content: str | None, tiny: AutoencoderKL, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_missing_and_broken_weight_files_are_named(tiny: AutoencoderKL, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=WEIGHTS):
        AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=WEIGHTS):
        AutoencoderKL.from_pretrained(tmp_path)


def test_decode_is_last_layer_of_features(tiny: AutoencoderKL) -> None:
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    features = tiny.decode_features(z)
    image = torch.nn.functional.conv2d(features, tiny.last_layer, tiny.decoder.conv_out.bias, padding=1)
    assert features.shape == (2, 16, 8, 8)
    assert_close(tiny.decode(z), image)


def test_forward_takes_the_sample_that_the_noise_picks_and_the_mode_without(tiny: AutoencoderKL) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    posterior = tiny.encode(x)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    assert_close(tiny(x).image, tiny.decode(posterior.mean))
    out = tiny(x, noise)
    assert_close(out.image, tiny.decode(posterior.mean + posterior.std * noise))
    assert_close(out.posterior.mean, posterior.mean)


def test_gradient_checkpointing_changes_no_gradient(tiny: AutoencoderKL) -> None:
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1

    def gradients(enabled: bool) -> list[torch.Tensor]:
        tiny.set_gradient_checkpointing(enabled)
        tiny.zero_grad()
        tiny(x).image.square().sum().backward()
        return [parameter.grad.clone() for parameter in tiny.parameters() if parameter.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(list(tiny.parameters()))
    for expected, actual in zip(plain, recomputed, strict=True):
        assert_close(actual, expected)


def test_gradient_checkpointing_keeps_fewer_activations(tiny: AutoencoderKL) -> None:
    def saved_values(enabled: bool) -> int:
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        tiny.set_gradient_checkpointing(enabled)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tiny(torch.zeros(1, 3, 16, 16))
        return count

    assert saved_values(True) < 0.5 * saved_values(False)


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 3, 8, 7), (1, 1, 8, 8), (3, 8, 8)])
def test_impossible_images_are_refused(shape: tuple[int, ...], tiny: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        tiny.encode(torch.zeros(shape))


def test_impossible_latents_are_refused(tiny: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\]"):
        tiny.decode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_roundtrip_through_json(name: str) -> None:
    config = AutoencoderConfig(**CONFIGS[name])
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_has_the_keys_and_defaults_of_diffusers() -> None:
    theirs = {key: value for key, value in DiffusersAutoencoder().config.items() if not key.startswith("_")}
    ours = AutoencoderConfig().to_dict()
    assert ours.pop("_class_name") == "AutoencoderKL"
    assert ours == {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}


def test_unknown_config_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'latent_chanels'.*'latent_channels'"):
        AutoencoderConfig.from_dict({"latent_chanels": 4, "_anything": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_out_channels": (48,)}, r"norm_num_groups=32, got 48"),
        ({"block_out_channels": ()}, "at least one level"),
        (
            {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",)},
            "down_block_types.*1 and 2",
        ),
        ({"up_block_types": ("UpBlock2D",)}, "'UpBlock2D'"),
        ({"act_fn": "tanh"}, "silu.*'tanh'"),
        ({"latent_channels": 0}, "latent_channels.*0"),
        ({"layers_per_block": 1.5}, "layers_per_block.*1.5"),
        ({"scaling_factor": 0.0}, "scaling_factor.*0.0"),
        ({"latents_mean": (0.0, 1.0)}, "latents_mean has 2 entries, latent_channels is 4"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**values)


def test_kl_equals_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(9)
    posterior = DiagonalGaussian(torch.randn(3, 8, 5, 4, generator=generator) * 2)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert posterior.kl().shape == (3,)
    assert_close(posterior.kl(), expected, rtol=1e-5, atol=1e-4)


def test_kl_of_the_prior_is_zero() -> None:
    assert_close(DiagonalGaussian(torch.zeros(2, 6, 3, 3)).kl(), torch.zeros(2))


def test_logvar_is_clamped_and_extreme_moments_stay_finite() -> None:
    moments = torch.tensor([0.0, 0.0, -1e9, 1e9]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.isfinite(posterior.sample(torch.zeros(1, 2, 1, 1))).all()
    assert torch.isfinite(posterior.kl()).all()


def test_samples_have_the_posterior_mean_and_std() -> None:
    moments = torch.tensor([1.0, -2.0, 0.5, -1.0]).view(1, 4, 1, 1).expand(20000, 4, 1, 1)
    posterior = DiagonalGaussian(moments)
    sample = posterior.sample(torch.randn(20000, 2, 1, 1, generator=torch.Generator().manual_seed(10))).flatten(1)
    assert_close(sample.mean(0), torch.tensor([1.0, -2.0]), atol=0.05, rtol=0.0)
    assert_close(sample.std(0), torch.exp(torch.tensor([0.25, -0.5])), atol=0.03, rtol=0.0)
    assert torch.equal(
        posterior.sample(torch.randn(20000, 2, 1, 1, generator=torch.Generator().manual_seed(10))).flatten(1), sample
    )


def test_odd_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="even channel count"):
        DiagonalGaussian(torch.zeros(1, 3, 2, 2))
