"""Malformed models: whatever is wrong, one sentence names the file, and nothing hangs, eats memory or runs code."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.cli import convert, generate
from ldm.interop.checkpoint import read_folder, write_folder
from ldm.interop.tensors import read_metadata
from ldm.pretrained import read_model
from ldm.single_file import write_single_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
SECONDS, MEMORY = 10, 100e6
"""What refusing one model may take: of processor time, and of bytes at any moment."""
Change = Callable[[Path], object]
Limit = Callable[[float], AbstractContextManager[None]]


class Alarm:
    """Unpickling it would raise."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code from a pickle has run')",)


def config(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def header(data: bytes, length: int | None = None) -> bytes:
    return (len(data) if length is None else length).to_bytes(8, "little") + data


def as_pickle(name: str, value: Any = None) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        pickled = (folder / name).with_suffix(".bin")
        torch.save({"x": torch.zeros(1)}, pickled) if value is None else pickled.write_bytes(pickle.dumps(value))

    return change


def shards(**values: Any) -> Change:
    """Two shards, and the index with other entries."""

    def change(folder: Path) -> None:
        state = load_file(folder / UNET)
        keys = sorted(state)
        names = {"a.safetensors": keys[:9], "b.safetensors": keys[9:]}
        for name, inside in names.items():
            save_file({key: state[key] for key in inside}, folder / "unet" / name)
        weight_map = {key: name for name, inside in names.items() for key in inside}
        weight_map |= {keys[0]: values["first"]} if "first" in values else {}
        weight_map |= {"surplus": "a.safetensors"} if "surplus" in values else {}
        if "missing" in values:
            (folder / "unet" / "b.safetensors").unlink()
        index = {"weight_map": values.get("weight_map", weight_map)}
        (folder / UNET).unlink()
        (folder / INDEX).write_text(json.dumps(index))

    return change


def only_variant(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def directory(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


HUGE = 10**9
FOLDERS: dict[str, tuple[Change, str]] = {
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "it has no unet"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "it has no tokenizer"),
    "no scheduler file": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is missing"),
    "deep JSON": (content("unet/config.json", b"[" * 200_000), "unet/config.json is not readable JSON"),
    "config is not text": (content("vae/config.json", b"\xff\xfe\x00"), "vae/config.json is not readable JSON"),
    "config is null": (content("text_encoder/config.json", b"null"), "text_encoder/config.json holds NoneType"),
    "weights are a folder": (directory(UNET), "unet"),
    "weights are empty": (content(UNET, b""), f"{UNET} is not a safetensors file or is truncated"),
    "weights are text": (content(VAE, b"hello " * 99), f"{VAE} is not a safetensors file"),
    "weights are HTML": (content(TEXT, b"<html>404</html>"), f"{TEXT} is not a safetensors file"),
    "endless header": (content(UNET, header(b"{}", 2**60)), f"{UNET} is not a safetensors file"),
    "header is no JSON": (content(UNET, header(b"x" * 64)), f"{UNET} is not a safetensors file"),
    "header is a list": (content(UNET, header(b"[1, 2]")), f"{UNET} is not a safetensors file"),
    "offsets outside": (
        content(UNET, header(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')),
        f"{UNET} is not a safetensors file",
    ),
    "unknown dtype": (
        content(UNET, header(b'{"w":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}') + b"0000"),
        f"{UNET} is not a safetensors file",
    ),
    "no tensors": (content(UNET, header(b"{}")), "unet/config.json names"),
    "endless layers": (config("unet/config.json", layers_per_block=HUGE), "unet/config.json names"),
    "endless transformers": (config("unet/config.json", transformer_layers_per_block=HUGE), "unet/config.json names"),
    "endless text layers": (config("text_encoder/config.json", num_hidden_layers=HUGE), "text_encoder/config.json names"),
    "endless decoder": (config("vae/config.json", layers_per_block=HUGE), "vae/config.json names"),
    "huge width": (config("unet/config.json", block_out_channels=[16 * HUGE, 32 * HUGE]), "unet/config.json"),
    "huge vocabulary": (config("text_encoder/config.json", vocab_size=10**12), "text_encoder"),
    "huge positions": (config("text_encoder/config.json", max_position_embeddings=10**15), "text_encoder"),
    "huge schedule": (config("scheduler/scheduler_config.json", num_train_timesteps=10**12), "num_train_timesteps is"),
    "huge picture": (config("unet/config.json", sample_size=HUGE), "sample_size is"),
    "no heads": (config("text_encoder/config.json", num_attention_heads=0), "text_encoder/config.json"),
    "negative width": (config("unet/config.json", block_out_channels=[-16, 32]), "unet/config.json"),
    "width is text": (config("vae/config.json", block_out_channels="wide"), "vae/config.json"),
    "layers are text": (config("text_encoder/config.json", num_hidden_layers="two"), "text_encoder"),
    "unknown key": (config("unet/config.json", widht=3), "`widht` is not a key of a U-Net config"),
    "scale of zero": (config("vae/config.json", scaling_factor=0), "scaling_factor"),
    "betas fall": (config("scheduler/scheduler_config.json", beta_start=0.5), "beta_start is 0.5"),
    "trained betas": (config("scheduler/scheduler_config.json", trained_betas=[0.1]), "trained_betas has 1 values"),
    "settings are a list": (content("ldm.json", b"[]"), "ldm.json holds list"),
    "pickled U-Net": (as_pickle(UNET), "diffusion_pytorch_model.bin is a pickle, which can run code"),
    "pickled code": (as_pickle(UNET, Alarm()), "diffusion_pytorch_model.bin is a pickle, which can run code"),
    "another variant": (only_variant, "it has the variant fp16, which --variant fp16 reads"),
    "index is a list": (shards(weight_map=[1]), "weight_map is not an object of file names"),
    "index names numbers": (shards(weight_map={"a": 5}), "weight_map is not an object of file names"),
    "index leaves the folder": (shards(first="../vae/diffusion_pytorch_model.safetensors"), "shards are safetensors files"),
    "index names a pickle": (shards(first="a.bin"), "shards are safetensors files beside the index"),
    "a shard is missing": (shards(missing=True), "b.safetensors is missing"),
    "a shard lacks a key": (shards(surplus=True), "lacks `surplus`"),
    "a key is elsewhere": (shards(first="b.safetensors"), "does not place there"),
}  # fmt: skip


@pytest.fixture
def refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit_time: Limit,
    limit_memory: Limit,
) -> Callable[..., str]:
    """Runs `ldm-generate` on a model, expects exit code 2 and gives back the one sentence on stderr."""

    def run(model: Path, *flags: str) -> str:
        monkeypatch.setattr(
            sys, "argv", ["ldm-generate", "-p", "two", "-m", str(model), "-o", str(tmp_path / "o"), *flags]
        )
        with limit_memory(MEMORY), limit_time(SECONDS), pytest.raises(SystemExit) as stopped:
            generate.main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert str(model) in said.err and len(said.err) < 1000
        return said.err

    return run


@pytest.mark.parametrize("name", FOLDERS)
def test_a_malformed_folder(refused: Any, tiny_model_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    change, sentence = FOLDERS[name]
    change(folder)
    assert sentence in refused(folder)


# --- single files


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(path: Path) -> None:
        state, metadata = load_file(path), read_metadata(path)
        change(state)
        save_file(state, path, metadata=metadata)

    return apply


def entry(change: Callable[[Any], Any]) -> Change:
    """Another "ldm.configs" in the header."""

    def apply(path: Path) -> None:
        state, metadata = load_file(path), read_metadata(path)
        metadata["ldm.configs"] = change(json.loads(metadata["ldm.configs"]))
        save_file(state, path, metadata=metadata)

    return apply


def keep(prefix: str) -> Change:
    return tensors(lambda s: [s.pop(key) for key in list(s) if not key.startswith(prefix)])


def deep(configs: Any) -> str:
    configs["parts"]["unet"]["layers_per_block"] = HUGE
    return json.dumps(configs)


def outside(configs: Any) -> str:
    configs["tokenizers"]["tokenizer"]["../../evil"] = "x"
    return json.dumps(configs)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
FILES: dict[str, tuple[Change, str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is not a safetensors file or is truncated"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "is not a safetensors file or is truncated"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "is not a safetensors file or is truncated"),
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" * 20), "is not a safetensors file"),
    "the U-Net alone": (keep("model."), "it has no key that begins with `cond_stage_model.transformer.`"),
    "no autoencoder": (
        tensors(lambda s: [s.pop(key) for key in list(s) if key.startswith("first_")]),
        "it has no key that begins with `first_stage_model.`",
    ),
    "the autoencoder alone": (keep("first_stage_model."), "it has no key that begins with `model.diffusion_model.`"),
    "a part of diffusers": (
        lambda p: save_file({"down_blocks.0.x": torch.zeros(1)}, p),
        "a part in diffusers' layout",
    ),
    "a LoRA": (lambda p: save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, p), "is a LoRA, not a whole model"),
    "a tensor is missing": (tensors(lambda s: s.pop(FIRST)), "conv_in.weight"),
    "a tensor too many": (
        tensors(lambda s: s.update({"model.diffusion_model.surplus": torch.zeros(1)})),
        "the key `surplus` has no place in this model",
    ),
    "a part too many": (tensors(lambda s: s.update(control_model=torch.zeros(1))), "has the key `control_model`"),
    "another shape": (tensors(lambda s: s.update({FIRST: s[FIRST][1:].clone()})), "`conv_in.weight` has shape"),
    "entry is no JSON": (entry(lambda c: "{"), "the entry `ldm.configs` of its header is damaged"),
    "entry is deep": (entry(lambda c: "[" * 100_000), "the entry `ldm.configs` of its header is damaged"),
    "entry lacks parts": (entry(lambda c: json.dumps(c | {"parts": {}})), "describes other parts"),
    "entry is endless": (entry(deep), "layers, but"),
    "entry writes elsewhere": (entry(outside), "the entry `ldm.configs` of its header is damaged"),
    "entry without vocabulary": (
        entry(lambda c: json.dumps(c | {"tokenizers": {"tokenizer": {"vocab.json": "{}"}}})),
        "vocab.json with merges.txt",
    ),
}  # fmt: skip


@pytest.fixture
def single(tiny_model_folder: Path, tmp_path: Path) -> Path:
    write_single_file(read_folder(tiny_model_folder), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file(refused: Any, single: Path, name: str) -> None:
    change, sentence = FILES[name]
    change(single)
    assert sentence in refused(single)


# --- pickles


def test_a_pickle_is_read_when_asked_for_and_gives_the_same_model(single: Path, tmp_path: Path, refused: Any) -> None:
    checkpoint, folder = tmp_path / "model.ckpt", tmp_path / "folder"
    torch.save({"state_dict": load_file(single), "global_step": 7}, checkpoint)
    assert "is a pickle, which can run code when read; --allow-pickle reads its tensors only" in refused(checkpoint)
    write_folder(convert.read_checkpoint(str(single))[0], folder)
    state = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(state, (folder / UNET).with_suffix(".bin"))
    read = read_model(folder, allow_pickle=True).unet.state_dict()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("data", [pickle.dumps(Alarm()), b"", b"no pickle", pickle.dumps([1, 2])])
def test_a_pickle_of_anything_but_tensors_is_refused_although_allowed(
    refused: Any, tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(data)
    assert str(path) in refused(path, "--allow-pickle")


def test_an_old_torch_reads_no_pickle(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.ckpt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "torch 2.9.1+cpu is not trusted with it; 2.10 or later is" in refused(
        tmp_path / "model.ckpt", "--allow-pickle"
    )
