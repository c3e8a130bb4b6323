"""ClipTextModel against transformers' CLIPTextModel, and the exchange of folders with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from conditioning import ClipTextConfig, ClipTextModel, canonical_state_dict

LENGTH = 12
BASE = ClipTextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
    projection_dim=20,
    bos_token_id=97,
    eos_token_id=98,
    pad_token_id=98,
)
CONFIGS = {
    "quick_gelu": BASE,
    "gelu": replace(BASE, hidden_act="gelu", num_attention_heads=2, layer_norm_eps=1e-3),
    "legacy_eos": replace(BASE, eos_token_id=2, num_hidden_layers=2, hidden_size=24),
    "gelu_other_eos": replace(BASE, hidden_act="gelu", eos_token_id=50, pad_token_id=0, num_hidden_layers=1),
}


def random_ids(config: ClipTextConfig, length: int = LENGTH) -> Tensor:
    """Rows that end and pad at different positions: the end token is also the pad token."""
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids = torch.randint(3, 97, (5, length), generator=torch.Generator().manual_seed(0))
    ids[ids == end] += 1
    for row, stop in enumerate((1, 3, length // 2, length - 2, length - 1)):
        ids[row, stop:] = end
    return ids


def theirs_of(config: ClipTextConfig, cls: Any = transformers.CLIPTextModel) -> Any:
    torch.manual_seed(1)
    model = cls(transformers.CLIPTextConfig(**config.to_dict())).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def assert_same_outputs(ours: ClipTextModel, theirs: Any, ids: Tensor) -> None:
    expected = theirs(ids, output_hidden_states=True)
    hidden, pooled = ours(ids)
    assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    projected = ours.text_projection is not None
    assert_close(pooled, expected.text_embeds if projected else expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [LENGTH, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_transformers(name: str, length: int, tmp_path: Path) -> None:
    theirs = theirs_of(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = ClipTextModel.from_pretrained(tmp_path)
    assert ours.config == CONFIGS[name]
    with torch.no_grad():
        assert_same_outputs(ours, theirs, random_ids(CONFIGS[name], length))


@pytest.mark.parametrize("skip_layers", [0, 1, 2])
def test_skipped_layers_equal_diffusers_clip_skip(skip_layers: int, tmp_path: Path) -> None:
    """diffusers' encode_prompt: final_layer_norm(hidden_states[-(clip_skip + 1)])."""
    theirs = theirs_of(BASE)
    theirs.save_pretrained(tmp_path)
    ids = random_ids(BASE)
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        hidden, pooled = ClipTextModel.from_pretrained(tmp_path)(ids, skip_layers)
        states = theirs.final_layer_norm(expected.hidden_states[-(skip_layers + 1)])
    assert_close(hidden, states, atol=1e-5, rtol=1e-5)
    assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_folder_loads_in_transformers(name: str, tmp_path: Path) -> None:
    ours = ClipTextModel.from_scratch(CONFIGS[name], torch.Generator().manual_seed(4))
    ours.save_pretrained(tmp_path)
    cls: Any = transformers.CLIPTextModel
    theirs, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_same_outputs(ours, theirs.eval(), random_ids(CONFIGS[name]))


def test_projection_passes_both_ways(tmp_path: Path) -> None:
    theirs = theirs_of(BASE, transformers.CLIPTextModelWithProjection)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ClipTextModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    cls: Any = transformers.CLIPTextModelWithProjection
    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [cls.__name__]
    with torch.no_grad():
        assert_same_outputs(ours, theirs, random_ids(BASE))
        assert_same_outputs(ours, again.eval(), random_ids(BASE))


def test_saved_names_are_those_of_stable_diffusion(tmp_path: Path) -> None:
    ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0)).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {f"text_model.{name}" for name in theirs_of(BASE).state_dict()}


def test_roundtrip_is_bit_equal(tmp_path: Path) -> None:
    model = ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = ClipTextModel.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    reread = ClipTextModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(reread[name], tensor) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reads_old_half_precision_file_with_position_ids(dtype: torch.dtype, tmp_path: Path) -> None:
    model = ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
    save_file(state | positions, tmp_path / "model.safetensors")
    read = ClipTextModel.from_pretrained(tmp_path)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, state[name].float())


def test_canonical_names_of_old_and_new_transformers() -> None:
    new = theirs_of(BASE).state_dict()
    old = {f"text_model.{name}": tensor for name, tensor in new.items()}
    positions = {"embeddings.position_ids": torch.arange(3)}
    assert canonical_state_dict(new | positions).keys() == canonical_state_dict(old).keys() == old.keys()


def test_loaded_weights_can_be_trained(tmp_path: Path) -> None:
    ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0)).save_pretrained(tmp_path)
    model = ClipTextModel.from_pretrained(tmp_path)
    hidden, pooled = model(random_ids(BASE))
    (hidden.square().mean() + pooled.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_later_tokens_do_not_change_earlier_states() -> None:
    model = ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0))
    ids = random_ids(BASE)
    changed = ids.clone()
    changed[:, 8:] = 5
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    assert_close(before[:, :8], after[:, :8], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_from_scratch_is_a_function_of_the_generator() -> None:
    state = torch.random.get_rng_state()
    models = [ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    first, second, third = (model.text_model.embeddings.token_embedding.weight for model in models)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_from_scratch_has_the_distribution_of_transformers() -> None:
    config = replace(BASE, vocab_size=4000, hidden_size=128, intermediate_size=512, projection_dim=128)
    ours = ClipTextModel.from_scratch(config, torch.Generator().manual_seed(0), with_projection=True)
    torch.manual_seed(0)
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config.to_dict()))
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert abs(tensor.mean() - expected[name].mean()) < 0.002
        if tensor.ndim > 1:
            assert_close(tensor.std(), expected[name].std(), rtol=0.05, atol=0.0)
        else:
            assert torch.equal(tensor, expected[name])


def test_bad_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="hidden_act is 'relu', expected one of quick_gelu, gelu"):
        replace(BASE, hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_size is 32, expected a multiple of num_attention_heads = 5"):
        replace(BASE, num_attention_heads=5)


def test_bad_inputs_are_named() -> None:
    model = ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="13 positions, expected at most 12"):
        model(torch.zeros(1, 13, dtype=torch.long))
    for skip_layers in (-1, 3):
        with pytest.raises(ValueError, match=f"skip_layers is {skip_layers}, expected 0 to 2"):
            model(random_ids(BASE), skip_layers)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ClipTextModel.from_pretrained(tmp_path)
    ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    name = "text_model.final_layer_norm.weight"
    for broken in ({k: v for k, v in state.items() if k != name}, state | {name: torch.ones(3)}):
        save_file(broken, weights)
        with pytest.raises(ValueError, match=name):
            ClipTextModel.from_pretrained(tmp_path)
    save_file(state | {"vision_model.weight": torch.ones(3)}, weights)
    with pytest.raises(ValueError, match=r"vision_model\.weight"):
        ClipTextModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        ClipTextModel.from_pretrained(tmp_path)


def test_the_text_tower_of_a_whole_clip_model_is_read(tmp_path: Path) -> None:
    text = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 12, "bos_token_id": 97, "eos_token_id": 98}
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = ClipTextModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[97, 5, 6, 98, 98], [97, 8, 98, 98, 98]])
    with torch.no_grad():
        expected = theirs.text_model(input_ids=ids)
        hidden, pooled = ours(ids)
    torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_dropping_the_last_layers_is_skipping_them() -> None:
    model = ClipTextModel.from_scratch(BASE, torch.Generator().manual_seed(0), with_projection=True)
    ids = torch.tensor([[1, 5, 6, 2, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model.without_last(1)(ids)[0], model(ids, skip_layers=1)[0])
    with pytest.raises(ValueError, match="skip_layers"):
        model.without_last(BASE.num_hidden_layers)
