"""Adapters that are trained: what they compute, what they leave untouched, and that ejecting gives the model back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from conditioning import ClipTextEncoder
from ldm import TextToImage
from ldm.adapters import Adapter, LoraBranches, LowRank, TextualInversion, adapted_parts, read_lora
from ldm.pretrained import Model, read_model, write_model

TARGETS = {"unet": ("to_q", "to_out.0", "conv1", "downsamplers.0.conv"), "text_encoder": ("q_proj", "fc1")}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
Build = Callable[[Model], Adapter]


def lora(model: Model) -> LoraBranches:
    parts = adapted_parts(model.unet, model.text_encoder)
    model.text_encoder.set_trainable(True)
    return LoraBranches(parts, TARGETS, 3, 6.0, torch.Generator().manual_seed(1))


def inversion(model: Model) -> TextualInversion:
    assert isinstance(model.text_encoder, ClipTextEncoder)
    model.unet.requires_grad_(False)
    model.text_encoder.requires_grad_(False)
    return TextualInversion(model.text_encoder, "<heart>", "star circle")


ADAPTERS: dict[str, Build] = {"lora": lora, "textual_inversion": inversion}


def output(model: Model, text: str = "a large red <heart> on white") -> Tensor:
    context = model.text_encoder.encode(model.text_encoder.tokenize([text] * 2)).context
    raw: Tensor = model.unet(X, torch.tensor([10.0, 500.0]), context)
    return raw


def learn(model: Model, adapter: Adapter) -> None:
    """A few steps of Adam on an arbitrary target."""
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (output(model) - 1).square().mean().backward()
        optimizer.step()


def weights(model: Model) -> dict[str, Tensor]:
    parts: tuple[nn.Module, ...] = (model.unet, model.text_encoder)
    return {f"{n}.{key}": v.clone() for n, part in enumerate(parts) for key, v in part.state_dict().items()}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_ejecting_gives_the_model_back_bit_for_bit(tiny_model_folder: Path, kind: str) -> None:
    model = read_model(tiny_model_folder)
    before, drawn, ids = weights(model), output(model), model.text_encoder.tokenize(["a <heart>"])
    adapter = ADAPTERS[kind](model)
    learn(model, adapter)
    assert not torch.allclose(output(model), drawn, atol=1e-3)
    with adapter.merged():
        pass
    adapter.eject()
    after = weights(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(output(model), drawn) and torch.equal(model.text_encoder.tokenize(["a <heart>"]), ids)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_the_adapter_learns_and_all_of_it_does(tiny_model_folder: Path, kind: str) -> None:
    model = read_model(tiny_model_folder)
    adapter = ADAPTERS[kind](model)
    before, start = weights(model), [p.detach().clone() for p in adapter.parameters()]
    learn(model, adapter)
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert all(not torch.equal(p, old) for p, old in zip(adapter.parameters(), start, strict=True))
    sizes = sum(p.numel() for p in adapter.parameters()), sum(value.numel() for value in before.values())
    assert sizes[0] < sizes[1] / 10


def test_new_branches_change_nothing_and_are_a_function_of_the_generator(tiny_model_folder: Path) -> None:
    model = read_model(tiny_model_folder)
    drawn = output(model)
    first = lora(model)
    assert torch.equal(output(model), drawn)
    first.eject()
    second = lora(read_model(tiny_model_folder))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_compute_what_the_adapter_did(tiny_model_folder: Path, tmp_path: Path, kind: str) -> None:
    model = read_model(tiny_model_folder)
    adapter = ADAPTERS[kind](model)
    learn(model, adapter)
    expected = output(model)
    with adapter.merged():
        torch.testing.assert_close(output(model), expected, rtol=0, atol=2e-5)
        write_model(model, tmp_path / "merged")
    torch.testing.assert_close(output(read_model(tmp_path / "merged")), expected, rtol=0, atol=2e-5)
    assert torch.equal(output(model), expected), "after the block the adapter acts from outside again"


def test_a_branch_is_the_low_rank_update_of_a_strided_convolution(tiny_model_folder: Path) -> None:
    """Against the convolution by W + (alpha / r) · B A, the product taken with einsum."""
    model = read_model(tiny_model_folder)
    adapter = lora(model)
    learn(model, adapter)
    layer = model.unet.get_submodule("down_blocks.0.downsamplers.0.conv")
    assert isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)
    factors = adapter.lora().parts["unet"]["down_blocks.0.downsamplers.0.conv"]
    update = torch.einsum("or,rikl->oikl", factors.up[:, :, 0, 0], factors.down) * 6.0 / 3
    x = torch.randn(1, layer.in_channels, 8, 8)
    expected = nn.functional.conv2d(x, layer.weight + update, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_saved_lora_is_the_learnt_one(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = read_model(tiny_model_folder)
    adapter = lora(model)
    learn(model, adapter)
    expected = output(model)
    file = adapter.save(tmp_path)
    assert file.name == "pytorch_lora_weights.safetensors"
    pipe = TextToImage(read_model(tiny_model_folder))
    pipe.loras.add(read_lora(tmp_path))
    torch.testing.assert_close(output(pipe.model), expected, rtol=0, atol=2e-5)


def test_rank_stabilised_and_plain_scales_multiply_the_same_product() -> None:
    down, up, weight = torch.randn(2, 6), torch.randn(5, 2), torch.zeros(5, 6)
    torch.testing.assert_close(LowRank(down, up, 0.5).delta(weight), up @ down / 2)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ({"unet": ("to_q", "to_z")}, "'to_z' ends the name of no linear or convolution layer of the UNet"),
        ({"unet": ("o_q",)}, "'o_q' ends"),
        ({"text_encoder": ("layer_norm1",)}, "'layer_norm1' ends .* of the ClipTextModel"),
    ],
)
def test_a_target_without_a_layer_is_an_error(
    tiny_model_folder: Path, targets: dict[str, tuple[str, ...]], sentence: str
) -> None:
    model = read_model(tiny_model_folder)
    parts = adapted_parts(model.unet, model.text_encoder)
    with pytest.raises(ValueError, match=sentence):
        LoraBranches(parts, targets, 2, 2.0, torch.Generator())


def test_a_new_token_starts_as_its_initializer_and_has_an_id_of_its_own(tiny_model_folder: Path) -> None:
    model = read_model(tiny_model_folder)
    encoder = model.text_encoder
    assert isinstance(encoder, ClipTextEncoder)
    table, known = encoder.model.text_model.embeddings.token_embedding, encoder.tokenizer.vocab_size
    ids = encoder.tokenizer.ids("star")
    expected = output(model, "a large star")
    adapter = TextualInversion(encoder, "<heart>", "star")
    assert encoder.tokenizer.ids("a large <heart>") == [*encoder.tokenizer.ids("a large"), known]
    assert encoder.tokenizer.ids("a large <HEART>")[-1] == known, "CLIP's tokenizer knows no capitals"
    torch.testing.assert_close(adapter.embedding[0], table.weight[ids].mean(0))
    if len(ids) == 1:
        torch.testing.assert_close(output(model, "a large <heart>"), expected)
    with pytest.raises(ValueError, match="'<heart>' already"):
        TextualInversion(encoder, "<heart>", "star")
    adapter.eject()
    with pytest.raises(ValueError, match="has no tokens"):
        TextualInversion(encoder, "<heart>", " ")


def test_a_layer_that_nobody_reads_gets_no_branch(tiny_model_folder: Path) -> None:
    """As the last layer behind a penultimate context: its branch would never see a gradient."""
    model = read_model(tiny_model_folder)
    model.text_encoder.set_trainable(True)
    model.unet.mid_block.requires_grad_(False)  # type: ignore[union-attr]
    adapter = lora(model)
    names = adapter.lora().parts["unet"]
    assert names and not any(name.startswith("mid_block") for name in names)
    assert not any(p.requires_grad for p in (*model.unet.parameters(), *model.text_encoder.parameters()))
    with pytest.raises(ValueError, match="nothing would be trained"):
        parts = adapted_parts(model.unet, model.text_encoder)
        LoraBranches(parts, {"unet": ("to_q",)}, 2, 2.0, torch.Generator())


def test_transformers_reads_the_extended_vocabulary(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = read_model(tiny_model_folder)
    adapter = inversion(model)
    with adapter.merged():
        write_model(model, tmp_path / "model")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "model" / "tokenizer")
    text = "a large <heart> on a <HEART>, red"
    ids = theirs(text, padding="max_length", truncation=True).input_ids
    assert ids == model.text_encoder.tokenize([text])[0].tolist()
    read = read_model(tmp_path / "model").text_encoder
    assert torch.equal(read.tokenize([text]), model.text_encoder.tokenize([text]))


def test_diffusers_draws_the_same_with_the_learnt_token(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = read_model(tiny_model_folder)
    adapter = inversion(model)
    learn(model, adapter)
    file = adapter.save(tmp_path)
    assert load_file(file)["<heart>"].shape == (1, 32)
    given = {"prompt": "a large <heart>", "guidance_scale": 4.0, "latents": X[:1]}
    (ours,) = TextToImage(replace(model, settings={}))(**given, steps=3)  # type: ignore[arg-type]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(file)
    theirs = pipe(**given, num_inference_steps=3).images[0]
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 2
