"""VQModel against diffusers' class with the same weights; the codebook's losses and averages against hand computation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel as DiffusersVQModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from autoencoder import CodebookUpdate, Quantized, VQConfig, VQModel, code_statistics, tiled_decode
from autoencoder.vq import VectorQuantizer, codebook_usage, nearest_codes

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIGS: dict[str, dict[str, Any]] = {
    "f2": {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 20},
    "f4, wider codes, no attention": {
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 8,
        "latent_channels": 4,
        "vq_embed_dim": 6,
        "num_vq_embeddings": 33,
        "layers_per_block": 2,
        "mid_block_add_attention": False,
    },
    "attention in the levels": {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "latent_channels": 2,
        "act_fn": "gelu",
        "num_vq_embeddings": 8,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
}
AVERAGES = CodebookUpdate("ema", decay=0.9, smoothing=1e-3)


def build_pair(values: dict[str, Any]) -> tuple[VQModel, DiffusersVQModel]:
    """Ours and diffusers' with equal weights, drawn at random; the codes are spread like the latents."""
    config = VQConfig(**values)
    torch.manual_seed(0)
    ours = VQModel(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        ours.quantize.embedding.weight.normal_(0.0, 0.3)
    theirs = DiffusersVQModel.from_config(config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny() -> VQModel:
    return build_pair(CONFIGS["f2"])[0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_diffusers(name: str) -> None:
    ours, theirs = build_pair(CONFIGS[name])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = random(2, 3, 16, 8).clamp(-1, 1)
    latents = ours.encode(x)
    assert_close(latents, theirs.encode(x).latents, atol=1e-5, rtol=1e-5)
    quantized = ours.quantize(latents)
    z, loss, (_, _, indices) = theirs.quantize(latents)
    assert torch.equal(quantized.indices.flatten(), indices)
    assert quantized.used >= 2 / ours.config.num_vq_embeddings
    assert_close(quantized.z, z, atol=1e-5, rtol=1e-5)
    assert_close(quantized.commitment_loss + 0.25 * quantized.codebook_loss, loss, atol=1e-5, rtol=1e-5)
    assert_close(ours.decode(quantized.z), theirs.decode(latents).sample, atol=1e-5, rtol=1e-5)
    assert_close(ours(x).image, theirs(x).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_loss_has_diffusers_gradients_and_beta_is_the_commitments(legacy: bool, tiny: VQModel) -> None:
    theirs = build_pair(CONFIGS["f2"])[1]
    theirs.quantize.legacy = legacy
    latents = random(2, 3, 4, 4).requires_grad_()
    quantized = tiny.quantize(latents)
    legacy_loss = quantized.commitment_loss + 0.25 * quantized.codebook_loss
    loss = legacy_loss if legacy else quantized.loss(beta=0.25)
    ours = torch.autograd.grad(loss, [latents, tiny.quantize.embedding.weight])
    expected = torch.autograd.grad(theirs.quantize(latents)[1], [latents, theirs.quantize.embedding.weight])
    assert_close(ours, expected, atol=1e-7, rtol=1e-5)


def test_saved_folder_is_read_by_diffusers(tiny: VQModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    theirs = DiffusersVQModel.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert theirs.state_dict().keys() == tiny.state_dict().keys()
    assert all(torch.equal(value, tiny.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_folder_of_diffusers_is_read_and_roundtrip_is_bit_equal(tmp_path: Path) -> None:
    _, theirs = build_pair(CONFIGS["attention in the levels"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = VQModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = VQModel.from_pretrained(str(tmp_path / "ours"), dtype=torch.float64)
    assert again.config == ours.config
    assert not again.training and again.dtype == torch.float64
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key].float(), value), key


def test_old_attention_names_are_read_at_every_depth(tmp_path: Path) -> None:
    ours, _ = build_pair(CONFIGS["attention in the levels"])
    ours.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    old = {}
    for key, value in state.items():
        for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{former}.")
        old[key] = value
    assert "encoder.down_blocks.1.attentions.1.query.weight" in old
    save_file(old, tmp_path / WEIGHTS)
    loaded = VQModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["quantize.embedding.weight", "encoder.conv_out.bias"])
def test_wrong_weights_are_named(key: str, tiny: VQModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state[key] = torch.zeros(7)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}.*{key}.*\(7,\)"):
        VQModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("update", [CodebookUpdate(), AVERAGES])
def test_gradient_is_that_at_the_code(update: CodebookUpdate) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(7, 3, update)
    latents = random(2, 3, 4, 5).requires_grad_()
    weight = random(2, 3, 4, 5, seed=2)
    z = quantizer(latents).z
    code = quantizer.embedding.weight[nearest_codes(latents, quantizer.embedding.weight)].permute(0, 3, 1, 2)
    assert torch.equal(z, code)
    (through,) = torch.autograd.grad((z.sin() * weight).sum(), latents)
    leaf = code.detach().requires_grad_()
    (at_code,) = torch.autograd.grad((leaf.sin() * weight).sum(), leaf)
    assert_close(through, at_code)


def test_nearest_codes_equal_brute_force_and_stay_precise_under_autocast() -> None:
    latents, codebook = 30 + random(2, 3, 4, 5), 30 + random(50, 3, seed=2)
    distance = (latents.permute(0, 2, 3, 1).unsqueeze(3).double() - codebook.double()).square().sum(-1)
    expected = distance.argmin(-1)
    assert torch.equal(nearest_codes(latents, codebook), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(latents, codebook), expected)


def test_losses_of_a_hand_made_codebook() -> None:
    quantizer = VectorQuantizer(2, 2, CodebookUpdate())
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 2.0]]))
    latents = torch.tensor([[1.0, 1.0], [4.0, 0.0]]).T.reshape(1, 2, 1, 2)
    out: Quantized = quantizer(latents)
    assert out.indices.tolist() == [[[0, 1]]]
    assert out.z.flatten().tolist() == [0.0, 4.0, 0.0, 2.0]
    assert out.codebook_loss.item() == out.commitment_loss.item() == (1 + 1 + 0 + 4) / 4
    assert out.loss(0.5).item() == 1.5 * 1.5


def test_perplexity_and_use() -> None:
    perplexity, used = codebook_usage(torch.arange(12).view(3, 2, 2) % 4, 4)
    assert_close(perplexity, torch.tensor(4.0))
    assert used == 1.0
    perplexity, used = codebook_usage(torch.full((3, 2, 2), 2), 4)
    assert_close(perplexity, torch.tensor(1.0))
    assert used == 0.25
    perplexity, used = codebook_usage(torch.tensor([[[0, 0, 0, 1]]]), 8)
    p = torch.tensor([0.75, 0.25])
    assert_close(perplexity, torch.distributions.Categorical(p).entropy().exp())
    assert used == 0.25


def ema_model() -> VQModel:
    return VQModel.from_scratch(VQConfig(**CONFIGS["f2"]), seed=3, update=AVERAGES)


def test_averages_follow_the_hand_computation() -> None:
    model = ema_model()
    first = model.quantize.embedding.weight.detach().clone().double()
    counts, sums = torch.ones(20).double(), first.clone()
    for seed in (1, 2):
        latents = 0.1 * random(2, 3, 4, 4, seed=seed)
        indices = nearest_codes(latents, model.quantize.embedding.weight)
        model.update_codebook(*code_statistics(latents, indices, 20))
        flat = latents.permute(0, 2, 3, 1).reshape(-1, 3).double()
        for code in range(20):
            members = flat[indices.flatten() == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(members)
            sums[code] = 0.9 * sums[code] + 0.1 * members.sum(0)
    smoothed = (counts + 1e-3) / (counts.sum() + 20 * 1e-3) * counts.sum()
    assert_close(model.quantize.embedding.weight.double(), sums / smoothed[:, None], atol=1e-6, rtol=1e-5)
    assert (model.quantize.embedding.weight.double() - first).abs().max() > 1e-3


def test_a_constant_stream_pulls_its_code_there_and_an_idle_code_stays_finite() -> None:
    quantizer = VectorQuantizer(3, 2, CodebookUpdate("ema", decay=0.5, smoothing=1e-5))
    target = torch.tensor([0.25, -0.5])
    latents = target.view(1, 2, 1, 1).expand(1, 2, 4, 4)
    for _ in range(200):
        indices = nearest_codes(latents, quantizer.embedding.weight)
        quantizer.absorb(*code_statistics(latents, indices, 3))
    assert_close(quantizer.embedding.weight[indices[0, 0, 0]], target, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(quantizer.embedding.weight).all()


def test_averages_leave_no_gradient_on_the_codebook() -> None:
    model = ema_model()
    out = model(random(1, 3, 8, 8).clamp(-1, 1))
    assert out.quantized.codebook_loss == 0
    (out.image.square().mean() + out.quantized.loss()).backward()
    assert model.quantize.embedding.weight.grad is None
    grad = model.encoder.conv_in.weight.grad
    assert grad is not None and bool(grad.any())


def test_statistics_of_parts_add_up() -> None:
    latents, indices = random(4, 3, 2, 2), torch.arange(16).view(4, 2, 2) % 5
    whole = code_statistics(latents, indices, 6)
    parts = [code_statistics(latents[half], indices[half], 6) for half in (slice(0, 1), slice(1, 4))]
    for index in range(2):
        assert_close(parts[0][index] + parts[1][index], whole[index])
    assert whole[0].tolist() == [4, 3, 3, 3, 3, 0]


def test_codebook_state_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = ema_model()
    statistics = [(random(20, seed=s).abs() * 9, random(20, 3, seed=s + 9)) for s in range(4)]
    for counts, sums in statistics[:2]:
        model.update_codebook(counts, sums)
    assert model.state_dict().keys() == VQModel(model.config).state_dict().keys()
    model.save_pretrained(tmp_path)
    state = model.codebook_state()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"counts": (20,), "sums": (20, 3)}
    resumed = VQModel.from_pretrained(tmp_path, update=AVERAGES)
    resumed.load_codebook_state(state)
    for counts, sums in statistics[2:]:
        model.update_codebook(counts, sums)
        resumed.update_codebook(counts, sums)
    assert torch.equal(model.quantize.embedding.weight, resumed.quantize.embedding.weight)
    assert not torch.equal(state["counts"], model.codebook_state()["counts"])


def test_averages_start_at_the_loaded_codebook(tiny: VQModel, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    model = VQModel.from_pretrained(tmp_path, update=AVERAGES)
    state = model.codebook_state()
    assert torch.equal(state["sums"] / state["counts"].unsqueeze(1), tiny.quantize.embedding.weight)
    copied = copy.deepcopy(ema_model())
    copied.load_state_dict(tiny.state_dict())
    assert torch.equal(copied.codebook_state()["sums"], tiny.quantize.embedding.weight)


def test_wrong_codebook_states_are_refused() -> None:
    model = ema_model()
    state = model.codebook_state()
    for wrong in ({}, {"counts": state["counts"]}, {**state, "sums": torch.zeros(20, 4)}):
        with pytest.raises(ValueError, match=r"'sums': \(20, 3\)"):
            model.load_codebook_state(wrong)


def test_without_averages_there_is_no_state_and_no_update(tiny: VQModel) -> None:
    assert tiny.codebook_state() == {}
    tiny.load_codebook_state({})
    with pytest.raises(ValueError, match="'ema', got 'loss'"):
        tiny.update_codebook(torch.ones(20), torch.zeros(20, 3))


def test_from_scratch_is_a_function_of_the_seed() -> None:
    config = VQConfig(**CONFIGS["f2"])
    before = torch.random.get_rng_state()
    a, b, c = (VQModel.from_scratch(config, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["quantize.embedding.weight"], c["quantize.embedding.weight"])
    assert a["quantize.embedding.weight"].abs().max() <= 1 / 20
    assert not a["decoder.mid_block.resnets.0.conv2.weight"].any()


def test_a_few_steps_lower_the_loss() -> None:
    model = VQModel.from_scratch(VQConfig(**CONFIGS["f2"]), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = random(2, 3, 8, 8).clamp(-1, 1)
    losses = []
    for _ in range(6):
        out = model(x)
        loss = (out.image - x).square().mean() + out.quantized.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_tiles_decode_a_codebook_too(tiny: VQModel) -> None:
    z = tiny.quantize(random(1, 3, 4, 6)).z
    assert torch.equal(tiled_decode(tiny, z, 8, 2), tiny.decode(z))
    assert tiled_decode(tiny, z, 4, 2).shape == (1, 3, 8, 12)


def test_impossible_input_is_refused(tiny: VQModel) -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\] with H and W multiples of 2"):
        tiny.encode(torch.zeros(1, 3, 7, 8))
    wide = VQModel(VQConfig(**CONFIGS["f4, wider codes, no attention"]))
    with pytest.raises(ValueError, match=r"\[B, 6, h, w\]"):
        wide.decode(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_roundtrip_through_json(name: str) -> None:
    config = VQConfig(**CONFIGS[name])
    assert VQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_has_the_keys_and_defaults_of_diffusers() -> None:
    theirs = {key: value for key, value in DiffusersVQModel().config.items() if not key.startswith("_")}
    ours = VQConfig().to_dict()
    assert ours.pop("_class_name") == "VQModel"
    assert ours == {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_out_channels": (48,)}, "norm_num_groups=32, got 48"),
        ({"up_block_types": ("UpBlock2D",)}, "'UpBlock2D'"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings must be a positive integer, got 0"),
        ({"vq_embed_dim": -2}, "vq_embed_dim must be a positive integer or null, got -2"),
        ({"norm_type": "spatial"}, "norm_type must be 'group', got 'spatial'"),
        ({"lookup_from_codebook": True}, "lookup_from_codebook must be false, got True"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**values)


def test_unknown_config_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'num_vq_embedings'.*'num_vq_embeddings'"):
        VQConfig.from_dict({"num_vq_embedings": 4, "_anything": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "sgd"}, "rule must be one of loss, ema, got 'sgd'"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"smoothing": 0.0}, "smoothing must be positive, got 0.0"),
    ],
)
def test_impossible_updates_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookUpdate(**values)
