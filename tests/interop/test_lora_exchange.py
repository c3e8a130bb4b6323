"""LoRA files of diffusers, PEFT and kohya's layout here, ours there: the same pictures, and the weights come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import TextToImage
from ldm.adapters import Lora, LowRank, read_lora, write_diffusers_lora, write_kohya_lora
from ldm.cli import convert, generate
from ldm.interop.checkpoint import Checkpoint, write_folder
from ldm.interop.names import renamed, unet_names
from ldm.interop.tensors import ModelError

GIVEN: dict[str, Any] = {"prompt": "a large red circle", "negative_prompt": "a green star", "guidance_scale": 4.0}
LATENTS = {family: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)) for family in ("sd1", "sdxl")}
UNET_LAYERS = {
    "down_blocks.0.resnets.0.conv1": 5,
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 3,
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0": 3,
    "down_blocks.1.attentions.0.proj_in": 2,
    "down_blocks.1.downsamplers.0.conv": 2,
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": 4,
    "mid_block.resnets.1.time_emb_proj": 3,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v": 3,
}
"""Layer -> rank: linear and convolution layers of several ranks."""
TEXT_LAYERS = {
    **{f"text_model.encoder.layers.0.self_attn.{name}_proj": 3 for name in ("q", "k", "v", "out")},
    "text_model.encoder.layers.1.mlp.fc1": 3,
}
"""Of one rank, and all four projections: diffusers' reader of kohya's text encoder keys understands no others."""
PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def folders(sibling: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora_models")
    for family in PIPELINES:
        write_folder(sibling(family), root / family)
    return {family: root / family for family in PIPELINES}


def random_lora(pipe: TextToImage, seed: int = 0) -> Lora:
    """Strong random updates of several layers, with scales other than 1."""
    rng, parts = torch.Generator().manual_seed(seed), {}
    for part, network in pipe.loras.parts.items():
        layers = {}
        for name, rank in (UNET_LAYERS if part == "unet" else TEXT_LAYERS).items():
            weight = network.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            down = torch.randn(rank, *weight.shape[1:], generator=rng) * weight[0].numel() ** -0.5
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=rng)
            layers[name] = LowRank(down, up, 0.25)
        parts[part] = layers
    return Lora(parts)


def theirs(folder: Path, family: str, *loras: tuple[Path, float]) -> Image.Image:
    pipe = PIPELINES[family].from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for number, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"number_{number}")
    if loras:
        pipe.set_adapters([f"number_{n}" for n in range(len(loras))], [scale for _, scale in loras])
    size = {"height": 32, "width": 32}
    image: Image.Image = pipe(**GIVEN, **size, latents=LATENTS[family], num_inference_steps=4).images[0]
    return image


def ours(pipe: TextToImage, family: str) -> Image.Image:
    (image,) = pipe(**GIVEN, latents=LATENTS[family], steps=4)
    return image


def weights(pipe: TextToImage) -> dict[str, Tensor]:
    """A copy of what a LoRA can change: the U-Net's and the text encoders' tensors."""
    parts = pipe.loras.parts.items()
    return {f"{part}.{key}": value.clone() for part, network in parts for key, value in network.state_dict().items()}


def assert_unchanged(pipe: TextToImage, before: Mapping[str, Tensor]) -> None:
    after = weights(pipe)
    assert after.keys() == before.keys()
    assert [key for key, value in after.items() if not torch.equal(value, before[key])] == []


def apart(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize("family", PIPELINES)
def test_our_files_load_in_diffusers_and_draw_the_same(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    pipe = TextToImage.from_pretrained(folders[family])
    plain = ours(pipe, family)
    files = [write_diffusers_lora(random_lora(pipe, n), tmp_path / f"{n}.safetensors") for n in range(2)]
    before = weights(pipe)
    for file, scale in zip(files, (0.8, -0.5), strict=True):
        pipe.load_lora(file, scale)
    changed = {key.split(".")[0] for key, value in weights(pipe).items() if not torch.equal(value, before[key])}
    assert changed == {"sd1": {"unet", "text_encoder"}, "sdxl": {"unet", "text_encoder", "text_encoder_2"}}[family]
    drawn = ours(pipe, family)
    assert apart(drawn, plain) > 40
    assert apart(drawn, theirs(folders[family], family, (files[0], 0.8), (files[1], -0.5))) <= 2
    pipe.unload_loras()
    assert_unchanged(pipe, before)
    assert apart(ours(pipe, family), plain) == 0


@pytest.mark.parametrize("family", PIPELINES)
def test_kohya_files_of_ours_load_in_diffusers(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    pipe = TextToImage.from_pretrained(folders[family])
    written = random_lora(pipe)
    file = write_kohya_lora(written, tmp_path / "kohya.safetensors")
    read = read_lora(file)
    assert {part: set(layers) for part, layers in read.parts.items()} == {p: set(v) for p, v in written.parts.items()}
    pipe.load_lora(file)
    assert apart(ours(pipe, family), theirs(folders[family], family, (file, 1.0))) <= 2


@pytest.fixture
def written_by_diffusers(folders: dict[str, Path], tmp_path: Path) -> tuple[Path, Image.Image]:
    """A file that diffusers' training scripts write, alpha in its header, and its picture there."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    for network, targets in (
        (pipe.unet, ["to_q", "to_k", "to_out.0", "conv1"]),
        (pipe.text_encoder, ["q_proj", "fc1"]),
    ):
        config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        pipe_part: Any = network
        pipe_part.add_adapter(config)
    picture = pipe(**GIVEN, latents=LATENTS["sd1"], num_inference_steps=4).images[0]
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        **{
            f"{name}_lora_layers": get_peft_model_state_dict(part, adapter_name="default")
            for name, part in parts.items()
        },
        **{f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()},
    )
    return tmp_path / "pytorch_lora_weights.safetensors", picture


def test_a_file_of_diffusers_draws_the_same_here(
    folders: dict[str, Path], written_by_diffusers: tuple[Path, Image.Image]
) -> None:
    file, picture = written_by_diffusers
    pipe = TextToImage.from_pretrained(folders["sd1"])
    plain = ours(pipe, "sd1")
    pipe.load_lora(file.parent)
    assert apart(ours(pipe, "sd1"), plain) > 20
    assert apart(ours(pipe, "sd1"), picture) <= 2


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_is_read_with_its_config(folders: dict[str, Path], tmp_path: Path, rslora: bool) -> None:
    """The weights that PEFT itself merges are those that ours has."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders["sd1"] / "unet")
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["to_q", "conv2"], init_lora_weights=False, use_rslora=rslora,
        rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2}, alpha_pattern={"attn2.to_q": 7},
    )  # fmt: skip
    tuned = peft.get_peft_model(unet, config)
    tuned.save_pretrained(tmp_path / "peft")
    expected = tuned.merge_and_unload().state_dict()
    pipe = TextToImage.from_pretrained(folders["sd1"])
    pipe.load_lora(tmp_path / "peft")
    for name, value in pipe.model.unet.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


OLD_ENDS: Mapping[str, Callable[[str], tuple[str, str]]] = {
    "attn_processor": lambda layer: (
        f"unet.{layer.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.down.weight",
        f"unet.{layer.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.up.weight",
    ),
    "lora.down": lambda layer: (f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"),
}


@pytest.mark.parametrize("spelling", OLD_ENDS)
def test_older_spellings_mean_the_same(folders: dict[str, Path], tmp_path: Path, spelling: str) -> None:
    layers = {
        n: low
        for n, low in random_lora(TextToImage.from_pretrained(folders["sd1"])).parts["unet"].items()
        if ".to_" in n
    }
    state = {}
    for name, low_rank in layers.items():
        down, up = OLD_ENDS[spelling](name)
        state |= {down: low_rank.down, up: low_rank.up}
    save_file(state, tmp_path / "old.safetensors")
    read = read_lora(tmp_path / "old.safetensors").parts["unet"]
    assert read.keys() == layers.keys()
    assert all(torch.equal(read[n].down, low.down) and torch.equal(read[n].up, low.up) for n, low in layers.items())


def test_sdxl_files_with_original_names_find_their_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    """kohya's scripts train SDXL on the original U-Net, whose block numbers follow from its depth."""
    pipe = TextToImage.from_pretrained(folders["sdxl"])
    lora = random_lora(pipe)
    state = {}
    for name, low_rank in lora.parts["unet"].items():
        (key,) = renamed({f"{name}.weight": None}, unet_names(pipe.model.unet.config))
        flat = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        state |= {f"{flat}.lora_down.weight": low_rank.down, f"{flat}.lora_up.weight": low_rank.up}
    assert any("input_blocks" in key for key in state)
    save_file(state, tmp_path / "original.safetensors")
    assert (
        read_lora(tmp_path / "original.safetensors", pipe.model.unet.config).parts["unet"].keys()
        == lora.parts["unet"].keys()
    )


def test_converting_to_kohya_and_back_keeps_every_update(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = TextToImage.from_pretrained(folders["sd1"])
    first = write_diffusers_lora(random_lora(pipe), tmp_path / "a.safetensors")
    convert.run([str(first), str(tmp_path / "b.safetensors"), "--to", "kohya"])
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in load_file(tmp_path / "b.safetensors"))
    convert.run([str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"), "--to", "diffusers"])
    one, other = load_file(first), load_file(tmp_path / "c.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_generate_draws_with_loras_and_repeats_the_picture(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = TextToImage.from_pretrained(folders["sd1"])
    file = write_diffusers_lora(random_lora(pipe), tmp_path / "a.safetensors")
    common = ["-m", str(folders["sd1"]), "-p", "a red circle", "--steps", "2"]
    generate.run([*common, "--lora", f"{file}:0.5", "--lora", str(file), "-o", str(tmp_path / "x.png")])
    pipe.load_lora(file, 1.5)
    (expected,) = pipe("a red circle", steps=2)
    assert apart(Image.open(tmp_path / "x.png"), expected) <= 1
    generate.run(["--from-image", str(tmp_path / "x.png"), "-o", str(tmp_path / "y.png")])
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()
    generate.run([*common, "-o", str(tmp_path / "z.png")])
    assert apart(Image.open(tmp_path / "z.png"), expected) > 20


LAYER = "unet.mid_block.attentions.0.proj_in"
A, B = torch.zeros(2, 64, 1, 1), torch.zeros(64, 2, 1, 1)
SPOILT: Mapping[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "holds no tensors"),
    "a model": ({"conv_in.weight": A}, "`conv_in.weight` is no tensor of a LoRA"),
    "LoHa": ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": A}, "is no tensor of a LoRA"),
    "DoRA": ({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_magnitude_vector": A}, "lora_magnitude_vector` is no tensor"),
    "half": ({f"{LAYER}.lora_A.weight": A}, "without its up matrix"),
    "two ranks": ({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B[:, :1]}, "not of one rank"),
    "vectors": ({f"{LAYER}.lora_A.weight": A[:, 0, 0, 0], f"{LAYER}.lora_B.weight": B}, "not of one rank"),
    "twice": ({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora.down.weight": A}, "is the second of its kind"),
    "alpha": ({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B, f"{LAYER}.alpha": A}, "the alpha of"),
    "another layer": ({"unet.mid_block.x.lora_A.weight": A, "unet.mid_block.x.lora_B.weight": B}, "`unet.mid_block.x`, which"),
    "a norm": ({"unet.conv_norm_out.lora_A.weight": A, "unet.conv_norm_out.lora_B.weight": B}, "conv_norm_out`, which this"),
    "another width": ({f"{LAYER}.lora_A.weight": A[:, :32].clone(), f"{LAYER}.lora_B.weight": B}, "do not make the [64, 64"),
    "another part": ({"text_encoder_2.x.lora_A.weight": A, "text_encoder_2.x.lora_B.weight": B}, "changes the text_encoder_2"),
    "original name": ({"lora_unet_input_blocks_99_0.lora_down.weight": A}, "`input_blocks.99.0`, which this model"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_what_does_not_fit_is_one_sentence_and_changes_nothing(
    folders: dict[str, Path],
    tmp_path: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, sentence = SPOILT[case]
    good = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    if case not in ("nothing", "a model"):
        state = {f"{good}.lora_A.weight": torch.ones(2, 64), f"{good}.lora_B.weight": torch.ones(64, 2), **state}
    file = tmp_path / "spoilt.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, file)
    pipe = TextToImage.from_pretrained(folders["sd1"])
    before = weights(pipe)
    with pytest.raises(ModelError, match=r"spoilt\.safetensors") as raised:
        pipe.load_lora(file)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
    assert_unchanged(pipe, before)
    monkeypatch.setattr("sys.argv", ["ldm-generate", "-m", str(folders["sd1"]), "-p", "x", "--lora", str(file)])
    with pytest.raises(SystemExit) as left:
        generate.main()
    assert left.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.safetensors", b"\x08\x00\x00", "is not a safetensors file or is truncated"),
        ("x.bin", b"PK", "is not a .safetensors file"),
        ("folder/other.txt", b"", "holds neither pytorch_lora_weights.safetensors nor"),
    ],
)
def test_what_is_no_lora_file_is_one_sentence(
    folders: dict[str, Path], tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if "/" in name else path
    with pytest.raises(ModelError, match=str(source)) as raised:
        TextToImage.from_pretrained(folders["sd1"]).load_lora(source)
    assert sentence in str(raised.value)


def test_a_damaged_header_and_wrong_flags_are_sentences(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = TextToImage.from_pretrained(folders["sd1"])
    state = load_file(write_diffusers_lora(random_lora(pipe), tmp_path / "good.safetensors"))
    save_file(state, tmp_path / "header.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ModelError, match="lora_adapter_metadata in its header is not a JSON object"):
        pipe.load_lora(tmp_path / "header.safetensors")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "high"})}
    save_file(state, tmp_path / "alpha.safetensors", metadata=metadata)
    with pytest.raises(ModelError, match="the alpha of `unet"):
        pipe.load_lora(tmp_path / "alpha.safetensors")
    with pytest.raises(ValueError, match="must be a finite number"):
        pipe.load_lora(tmp_path / "good.safetensors", float("nan"))
    with pytest.raises(ValueError, match=r"--lora .*: the scale 'strong' is not a number"):
        generate.run(["-p", "x", "--lora", f"{tmp_path}/good.safetensors:strong"])
    with pytest.raises(ValueError, match="is a LoRA, so --to is diffusers or kohya"):
        convert.run([str(tmp_path / "good.safetensors"), str(tmp_path / "b.safetensors"), "--to", "single-file"])
    with pytest.raises(ValueError, match="--dtype belongs to a model"):
        convert.run([str(tmp_path / "good.safetensors"), "b.safetensors", "--to", "kohya", "--dtype", "float16"])


def test_half_precision_weights_come_back_too(folders: dict[str, Path]) -> None:
    pipe = TextToImage.from_pretrained(folders["sd1"], dtype=torch.float16)
    before, lora = weights(pipe), random_lora(pipe)
    weak = {part: {n: replace(low, scale=0.1) for n, low in layers.items()} for part, layers in lora.parts.items()}
    pipe.loras.add(Lora(weak))
    changed = {key for key, value in weights(pipe).items() if not torch.equal(value, before[key])}
    assert changed == {f"{part}.{name}.weight" for part, layers in weak.items() for name in layers}
    pipe.unload_loras()
    assert_unchanged(pipe, before)
