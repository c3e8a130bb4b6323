"""Sharded and variant folders, hub ids, and the command that writes them."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from ldm import TextToImage
from ldm.cli import convert
from ldm.interop.checkpoint import Checkpoint, write_folder
from ldm.pretrained import ModelError, read_model, resolve
from ldm.process import DiffusionConfig

Sibling = Callable[..., Checkpoint]


@pytest.fixture
def folder(sibling: Sibling, tmp_path: Path) -> Path:
    write_folder(sibling("sd2"), tmp_path / "folder")
    return tmp_path / "folder"


def states(path: Path, variant: str | None = None) -> dict[str, dict[str, torch.Tensor]]:
    model = read_model(path, variant=variant)
    return {name: getattr(model, name).state_dict() for name in ("unet", "vae", "text_encoder")}


def assert_same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> None:
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name


def test_shards_of_a_folder_are_read_by_us_and_by_diffusers(folder: Path, tmp_path: Path) -> None:
    convert.run([str(folder), str(tmp_path / "sharded"), "--to", "diffusers", "--max-shard-size", "200KB"])
    shards = sorted((tmp_path / "sharded" / "unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "sharded/unet/diffusion_pytorch_model.safetensors.index.json").is_file()
    assert_same(states(tmp_path / "sharded"), states(folder))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "sharded", subfolder="unet").state_dict()
    ours = read_model(folder).unet.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_a_half_precision_variant_is_read_by_us_and_by_diffusers(folder: Path, tmp_path: Path) -> None:
    flags = ["--to", "diffusers", "--dtype", "float16"]
    # written under the variant's name, from a folder that has plain files
    convert.run([str(folder), str(tmp_path / "half"), *flags, "--variant", "fp16"])
    names = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    with pytest.raises(ModelError, match="it has the variant fp16, which --variant fp16 reads"):
        read_model(tmp_path / "half")
    halved = {name: {k: v.half().float() for k, v in state.items()} for name, state in states(folder).items()}
    assert_same(states(tmp_path / "half", "fp16"), halved)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16", safety_checker=None)
    assert all(torch.equal(value, halved["unet"][key]) for key, value in theirs.unet.state_dict().items())


def test_the_flags_of_the_scheduler_are_honoured(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    diffusion = read_model(folder).diffusion
    zero_snr = DiffusionConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    assert diffusion == zero_snr
    pipe, seen = TextToImage.from_pretrained(folder), []
    pipe("two", steps=4, callback=lambda step, t, x, p: seen.append(int(t)))
    assert seen == [999, 749, 499, 249] and float(pipe.schedule.alphas_cumprod[-1]) == 0.0


def test_ldm_json_gives_the_defaults(folder: Path) -> None:
    assert TextToImage.from_pretrained(folder).setting("num_inference_steps") == 5


def test_a_variant_is_taken_from_the_hub_at_a_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    shutil.copytree(folder / "unet", folder / "safety_checker")
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    files += ["unet/diffusion_pytorch_model.fp16.safetensors", "model-ema.safetensors", "unet/x-00001-of-00002.bin"]

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision)
        asked["files"] = {f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in allow_patterns)}
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name", "v1", "fp16") == folder
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    weights = {name for name in asked["files"] if name.endswith((".safetensors", ".bin"))}
    assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert {"model_index.json", "tokenizer/merges.txt", "unet/config.json"} <= asked["files"]
    resolve("owner/name")
    assert "text_encoder/model.safetensors" in asked["files"] and "model-ema.safetensors" not in asked["files"]


def test_the_offline_cache_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repo = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert resolve("owner/name") == repo / "snapshots" / commit
    with pytest.raises(ModelError, match="owner/other is not a folder here and cannot be had from the hub"):
        resolve("owner/other")


# --- the command


def test_a_file_and_back(folder: Path, tmp_path: Path) -> None:
    path, again = tmp_path / "x.safetensors", tmp_path / "again"
    assert convert.run([str(folder), str(path), "--to", "single-file"]).splitlines()[0] == str(path)
    assert convert.run([str(path), str(again), "--to", "diffusers"]) == str(again)
    assert_same(states(again), states(folder))


def test_the_stored_dtype(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    convert.run([str(folder), str(path), "--to", "single-file", "--dtype", "bfloat16"])
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "ldm-convert needs SOURCE TARGET --to diffusers|single-file|kohya, or --check MODEL"),
        (["{model}", "x.safetensors"], "ldm-convert needs SOURCE TARGET --to"),
        (["{model}", "x.ckpt", "--to", "single-file"], "must be a file whose name ends in .safetensors"),
        (["{model}", "{taken}", "--to", "diffusers"], "exists and is not a model folder; it is left alone"),
        (["{model}", "{tmp}/y", "--to", "diffusers", "--max-shard-size", "much"], "is not a size such as 2GB"),
        (["--check", "{model}", "--to", "diffusers"], "--check MODEL writes nothing"),
        (["--check", "{taken}"], "is not a model folder: it has no unet"),
        (["{tmp}/none", "{tmp}/y", "--to", "diffusers"], "is no model folder or file here"),
    ],
)
def test_bad_usage_is_one_sentence(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    sentence: str,
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    filled = [word.format(model=folder, taken=taken, tmp=tmp_path) for word in argv]
    monkeypatch.setattr(sys, "argv", ["ldm-convert", *filled])
    with pytest.raises(SystemExit) as stopped:
        convert.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and sentence in said.err
    assert (taken / "letter.txt").read_text() == "mine"


def test_the_check_of_a_folder_has_a_line_for_each_tool(folder: Path) -> None:
    lines = convert.run(["--check", str(folder)]).splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["diffusers", "yes"],
        ["ComfyUI", "no"],
        ["AUTOMATIC1111", "no"],
        ["InvokeAI", "no"],
    ]
    assert "the U-Net's first width is 32, not 320" in lines[1]
