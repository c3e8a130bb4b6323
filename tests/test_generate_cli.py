"""`ldm-generate`: flags, files, text chunks in the PNGs, and what it says about bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from ldm import TextToImage
from ldm.cli import generate
from ldm.data.shapes import ShapesDataset
from ldm.pretrained import BUNDLED

ROOT = Path(__file__).parent.parent
AWKWARD = [
    'a "red" circle, with: commas, Steps: 7, and colons',
    "two lines\nof a red circle",
    "un cercle rouge été 日本語 🔴🟦",
    "دائرة حمراء עיגול אדום",
    "back\\slash and 'quotes' and <html> & {braces}",
]
CONTRACT = {
    "--prompt", "--prompts-file", "--negative-prompt", "--model", "--num-images", "--steps",
    "--guidance-scale", "--sampler", "--seed", "--height", "--width", "--batch-size", "--init-image",
    "--strength", "--mask", "--output", "--grid", "--device", "--dtype", "--json", "--from-image",
    "--metadata", "-p", "-m", "-n", "-o", "--num-inference-steps", "--cfg-scale", "--scheduler", "--from-file",
    "--outdir",
}  # fmt: skip


@pytest.fixture
def draw(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command on the tiny model and returns what it reports."""

    def run(*argv: str, output: str = "out") -> dict[str, Any]:
        return generate.run(["--model", str(tiny_model_folder), "--output", str(tmp_path / output), "--json", *argv])

    return run


@pytest.fixture
def refused(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs the command, expects exit code 2 and returns the sentence on stderr."""

    def run(*argv: str) -> str:
        defaults = ["--model", str(tiny_model_folder), "--output", str(tmp_path / "refused")]
        monkeypatch.setattr(sys, "argv", ["ldm-generate", *defaults, *argv])
        with pytest.raises(SystemExit) as stopped:
            generate.main()
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert not (tmp_path / "refused").exists()
        return said.err

    return run


def files(report: dict[str, Any]) -> list[Path]:
    return [Path(name) for name in report["images"]]


def chunks(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.text)  # type: ignore[attr-defined]


def picture(path: Path, size: int = 32) -> Path:
    ShapesDataset("train", 4, size)[3]["image"].save(path)
    return path


# --- flags and files


def test_every_flag_of_the_contract_exists() -> None:
    known = {option for action in generate.parser()._actions for option in action.option_strings}
    assert known >= CONTRACT


def test_it_writes_what_the_library_draws(draw: Any, tiny_model_folder: Path) -> None:
    report = draw(
        "-p", "a red circle", "-p", "two", "--num-images", "2", "--seed", "5", "--steps", "2", "--batch-size", "3"
    )
    paths = files(report)
    assert [p.name for p in paths] == [f"{i:05d}_seed{5 + i}.png" for i in range(4)]
    images = TextToImage.from_pretrained(tiny_model_folder)(["a red circle", "two"], num_images=2, seed=5, steps=2)
    assert [Image.open(p).tobytes() for p in paths] == [i.tobytes() for i in images]


def test_the_report_is_one_json_object(tiny_model_folder: Path, tmp_path: Path) -> None:
    argv = ["-m", str(tiny_model_folder), "-p", "two", "--steps", "2", "-o", str(tmp_path), "--json"]
    done = subprocess.run([sys.executable, "-m", "ldm.cli.generate", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    report = json.loads(done.stdout)
    assert files(report) == [tmp_path / "00000_seed0.png"] and files(report)[0].is_file()
    assert report["settings"]["steps"] == 2 and report["settings"]["guidance_scale"] == 3.0
    assert set(report["seconds"]) == {"load", "draw"}


def test_without_json_it_prints_the_paths(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["ldm-generate", "-m", str(tiny_model_folder), "-p", "two", "--steps", "1", "-o", str(tmp_path / "one.png")]
    monkeypatch.setattr(sys, "argv", argv)
    generate.main()
    assert capsys.readouterr().out == f"{tmp_path / 'one.png'}\n"


def test_output_is_a_folder_or_a_png_file(draw: Any, tmp_path: Path) -> None:
    assert files(draw("-p", "two", "--steps", "1", output="new/folder")) == [tmp_path / "new/folder/00000_seed0.png"]
    assert files(draw("-p", "two", "--steps", "1", output="deep/picture.PNG")) == [tmp_path / "deep/picture.PNG"]
    with pytest.raises(ValueError, match="is one file, but 2 pictures were asked for"):
        draw("-p", "two", "--num-images", "2", output="picture.png")


def test_prompts_come_from_flags_and_from_a_file(draw: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red circle\r\n\r\n  دائرة 🔴 \n".encode())
    report = draw("-p", "two", "--prompts-file", str(tmp_path / "prompts.txt"), "--steps", "1")
    assert [json.loads(chunks(p)["ldm"])["prompt"] for p in files(report)] == ["two", "a red circle", "دائرة 🔴"]


def test_the_grid_shows_every_picture(draw: Any, tmp_path: Path) -> None:
    argv = [flag for text in AWKWARD for flag in ("-p", text)]
    paths = files(draw(*argv, "--grid", "--steps", "1"))
    assert paths[-1] == tmp_path / "out/grid.png" and len(paths) == len(AWKWARD) + 1
    with Image.open(paths[-1]) as grid, Image.open(paths[0]) as first:
        assert grid.width > 3 * 128 and grid.height > 2 * 128
        enlarged = first.resize((128, 128), Image.Resampling.NEAREST)
        assert grid.crop((8, 8, 136, 136)).tobytes() == enlarged.tobytes()


def test_aliases_mean_the_same(draw: Any) -> None:
    long = draw(
        "--prompt", "two", "--steps", "2", "--guidance-scale", "2", "--sampler", "euler", "--negative-prompt", "x"
    )
    short = draw(
        "-p", "two", "--num-inference-steps", "2", "--cfg-scale", "2", "--scheduler", "euler", "-n", "x", output="b"
    )
    assert files(long)[0].read_bytes() == files(short)[0].read_bytes()


def test_size_dtype_and_start_picture_reach_the_pipeline(draw: Any, tmp_path: Path) -> None:
    start = str(picture(tmp_path / "start.png"))
    (path,) = files(
        draw(
            "-p", "two", "--width", "64", "--height", "32", "--dtype", "bfloat16", "--init-image", start, "--steps", "4"
        )
    )
    assert Image.open(path).size == (64, 32)
    (kept,) = files(draw("-p", "two", "--init-image", start, "--strength", "0.02", "--steps", "50", output="kept"))
    (anew,) = files(draw("-p", "two", "--init-image", start, "--strength", "1", "--steps", "4", output="anew"))
    assert Image.open(kept).tobytes() != Image.open(anew).tobytes()


def test_a_prompt_longer_than_the_window_is_read_to_its_end(draw: Any, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a red circle above a green square " * 8
    one, other = (files(draw("-p", long + end, "--steps", "1", output=end))[0] for end in ("star", "circle"))
    assert Image.open(one).tobytes() != Image.open(other).tobytes()
    assert "warning" not in capsys.readouterr().err


def test_the_prompt_syntax_decides_about_brackets_and_is_drawn_again(draw: Any) -> None:
    prompt = "a (red:1.5) circle"
    plain, weighted, none = (
        files(draw("-p", text, "--prompt-syntax", syntax, "--steps", "1", output=f"{syntax}{len(text)}"))[0]
        for text, syntax in ((prompt, "plain"), (prompt, "a1111"), ("a red circle", "a1111"))
    )
    pictures = [Image.open(path).tobytes() for path in (plain, weighted, none)]
    assert len(set(pictures)) == 3
    (again,) = files(draw("--from-image", str(weighted), output="again"))
    assert Image.open(again).tobytes() == pictures[1]


# --- text chunks


def a1111(parameters: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings of a `parameters` text, as AUTOMATIC1111's viewers split it."""
    *lines, last = parameters.strip().split("\n")
    settings = dict(re.findall(r"\s*([\w ]+): ([^,]+)(?:,|$)", last))
    marks = [i for i, line in enumerate(lines) if line.startswith("Negative prompt: ")]
    start = marks[-1] if marks else len(lines)
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt: ")
    return "\n".join(lines[:start]), negative, settings


@pytest.mark.parametrize("prompt", AWKWARD)
def test_the_parameters_line_reads_back(draw: Any, prompt: str) -> None:
    flags = ["--steps", "2", "--cfg-scale", "2.5", "--sampler", "dpmpp_2m", "--seed", "9", "-n", "blurry 🌫"]
    (path,) = files(draw("-p", prompt, *flags))
    text, negative, settings = a1111(chunks(path)["parameters"])
    assert (text, negative) == (prompt, "blurry 🌫")
    assert settings == {"Steps": "2", "Sampler": "DPM++ 2M", "CFG scale": "2.5", "Seed": "9", "Size": "32x32"}
    assert path.name == "00000_seed9.png"


def test_metadata_none_leaves_no_text(draw: Any) -> None:
    (path,) = files(draw("-p", "two", "--steps", "1", "--metadata", "none"))
    assert chunks(path) == {}


@pytest.mark.parametrize("prompt", AWKWARD)
def test_from_image_repeats_the_file_byte_for_byte(draw: Any, prompt: str) -> None:
    paths = files(
        draw(
            "-p",
            "two",
            "-p",
            prompt,
            "--num-images",
            "2",
            "--steps",
            "2",
            "-n",
            "x",
            "--sampler",
            "ddpm",
            "--seed",
            "3",
        )
    )
    for number in (1, 2):
        (again,) = files(draw("--from-image", str(paths[number]), output=f"again{number}"))
        assert again.name == f"00000_seed{3 + number}.png"
        assert again.read_bytes() == paths[number].read_bytes()


def test_from_image_knows_the_model_the_start_picture_and_the_dtype(
    tiny_model_folder: Path, draw: Any, tmp_path: Path
) -> None:
    start, mask = picture(tmp_path / "start.png"), tmp_path / "mask.png"
    Image.linear_gradient("L").resize((32, 32)).save(mask)
    flags = [
        "--init-image",
        str(start),
        "--mask",
        str(mask),
        "--strength",
        "0.6",
        "--dtype",
        "bfloat16",
        "--steps",
        "4",
    ]
    (path,) = files(draw("-p", "two", *flags))
    again = generate.run(["--from-image", str(path), "-o", str(tmp_path / "again"), "--json"])
    assert files(again)[0].read_bytes() == path.read_bytes()


def test_other_flags_win_over_the_picture(draw: Any) -> None:
    (path,) = files(draw("-p", "two", "--steps", "2", "--seed", "3"))
    more = files(draw("--from-image", str(path), "--num-images", "2", "--steps", "1", output="more"))
    stored = [json.loads(chunks(p)["ldm"]) for p in more]
    assert [(s["prompt"], s["steps"], s["seed"]) for s in stored] == [("two", 1, 3), ("two", 1, 4)]
    (other,) = files(draw("--from-image", str(path), "-p", "a red circle", output="other"))
    assert json.loads(chunks(other)["ldm"])["prompt"] == "a red circle"


# --- errors


def test_an_error_has_no_traceback(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "ldm.cli.generate", "-p", "two", "-m", str(tmp_path / "nothing"), "-o", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    known = " or ".join(BUNDLED)
    name = tmp_path / "nothing"
    assert done.stderr == (
        f"error: {name} is no model folder or file here, not {known}, and no hub id of the form owner/name\n"
    )


def test_no_prompt(refused: Any) -> None:
    assert "no prompt was given; use --prompt" in refused()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sampler", "dimm"], "sampler is 'dimm'; accepted: ddim, ddpm, euler, heun, dpmpp_2m"),
        (["--height", "33"], "height is 33; it must be a positive multiple of 8"),
        (["--width", "0"], "width is 0; it must be a positive multiple of 8"),
        (["--steps", "0"], "steps is 0; this model accepts 1 to 1000"),
        (["--num-images", "0"], "--num-images is 0; it must be at least 1"),
        (["--batch-size", "-1"], "--batch-size is -1; it must be at least 1"),
        (["--best-of", "0"], "--best-of is 0; it must be at least 1"),
        (["--best-of", "2"], "--best-of needs --ranker NAME, a CLIP to choose"),
        (["--ranker", "ViT-B-32"], "--ranker needs --best-of N"),
        (["--ranker-weights", "{start}"], "--ranker-weights needs --ranker"),
        (["--best-of", "2", "--ranker", "ViT-B-32"], "--ranker ViT-B-32: its `weights` must be a local checkpoint"),
        (
            ["--best-of", "2", "--ranker", "local-dir:{missing}"],
            "--ranker local-dir:{missing}: {missing} holds no open_clip_config.json",
        ),
        (
            ["--interpolate", "2", "--to-seed", "1", "--best-of", "2", "--ranker", "ViT-B-32"],
            "--best-of is 2 with --interpolate; it must be 1",
        ),
        (["--seed", "99999999999999999999"], "seed is 99999999999999999999; it must be an integer of 64 bits"),
        (["--mask", "{start}"], "--mask needs --init-image"),
        (["--init-image", "{start}", "--mask", "{missing}"], "--mask: {missing}: "),
        (["--init-image", "{text}"], "--init-image: {text}: "),
        (["--init-image", "{start}", "--strength", "0"], "strength is 0.0; it must lie in (0, 1]"),
        (["--prompts-file", "{missing}"], "--prompts-file {missing} cannot be read"),
        (["--prompts-file", "{start}"], "--prompts-file {start} cannot be read"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--from-image", "{start}"], "--from-image {start} is not a PNG made by ldm-generate"),
        (["--from-image", "{text}"], "--from-image {text} is not a PNG made by ldm-generate"),
        (["--from-image", "{missing}"], "--from-image {missing} is not a PNG made by ldm-generate"),
    ],
)
def test_a_bad_flag_is_named(refused: Any, tmp_path: Path, argv: list[str], message: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    names = {
        "start": str(picture(tmp_path / "start.png")),
        "text": str(tmp_path / "text.png"),
        "missing": str(tmp_path / "missing.png"),
    }
    assert message.format(**names) in refused("-p", "two", *(flag.format(**names) for flag in argv))


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", "many"), ("prompt", 7), ("model", ["x"]), ("seed", 1.5), ("output", None), ("width", None)],
)
def test_a_forged_text_chunk_is_refused_or_ignored(
    refused: Any, draw: Any, tmp_path: Path, key: str, value: Any
) -> None:
    (path,) = files(draw("-p", "two", "--steps", "1"))
    stored = json.loads(chunks(path)["ldm"]) | {key: value}
    info = PngInfo()
    info.add_itxt("ldm", json.dumps(stored))
    forged = tmp_path / "forged.png"
    Image.open(path).save(forged, pnginfo=info)
    if key == "output":
        (again,) = files(draw("--from-image", str(forged), output="again"))
        assert again.parent == tmp_path / "again"
    else:
        assert f"holds {key} {value!r}" in refused("--from-image", str(forged))


def test_a_file_in_the_place_of_the_output_folder_is_named(
    draw: Any,
    tmp_path: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").write_text("")
    argv = ["ldm-generate", "-m", str(tiny_model_folder), "-p", "two", "--steps", "1", "-o", str(tmp_path / "taken")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        generate.main()
    assert stopped.value.code == 2 and str(tmp_path / "taken") in capsys.readouterr().err


# --- damaged models

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
JSON_FILES = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "ldm.json",
]


@pytest.fixture
def damaged(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "damaged"))


def test_an_empty_folder(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused("-p", "two", "-m", str(tmp_path / "empty"))
    assert (
        f"{tmp_path / 'empty'} is not a model folder: it has no unet, vae, text_encoder, tokenizer, scheduler" in said
    )


@pytest.mark.parametrize("name", [UNET, VAE, TEXT, "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file(refused: Any, damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    said = refused("-p", "two", "-m", str(damaged))
    assert str((damaged / name).parent) in said and Path(name).name in said


def test_a_missing_vocabulary(refused: Any, damaged: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (damaged / "tokenizer" / name).unlink()
    assert str(damaged / "tokenizer") in refused("-p", "two", "-m", str(damaged))


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
@pytest.mark.parametrize("length", [0, 100, -10])
def test_truncated_weights(refused: Any, damaged: Path, name: str, length: int) -> None:
    (damaged / name).write_bytes((damaged / name).read_bytes()[:length])
    assert str((damaged / name).parent) in refused("-p", "two", "-m", str(damaged))


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_wrong_json(refused: Any, damaged: Path, name: str, text: str) -> None:
    (damaged / name).write_text(text)
    assert str((damaged / name).parent) in refused("-p", "two", "-m", str(damaged))


@pytest.mark.parametrize("name", [UNET, VAE, TEXT])
@pytest.mark.parametrize("change", ["shape", "missing", "unknown"])
def test_weights_of_another_model(refused: Any, damaged: Path, name: str, change: str) -> None:
    state = load_file(damaged / name)
    key = max(state, key=lambda k: (state[k].ndim, k))
    if change == "shape":
        state[key] = state[key][1:].contiguous()
    if change == "missing":
        del state[key]
    if change == "unknown":
        state["surplus.weight"] = torch.zeros(3)
    save_file(state, damaged / name)
    said = refused("-p", "two", "-m", str(damaged))
    assert str((damaged / name).parent) in said
    assert ("surplus.weight" if change == "unknown" else key.removeprefix("text_model.")) in said


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet/config.json", "block_out_channels", [16]),
        ("unet/config.json", "sample_size", "large"),
        ("vae/config.json", "latent_channels", "four"),
        ("vae/config.json", "scaling_factor", None),
        ("text_encoder/config.json", "hidden_size", "wide"),
        ("text_encoder/config.json", "num_attention_heads", 5),
        ("scheduler/scheduler_config.json", "beta_start", "small"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", None),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 1),
        ("tokenizer/tokenizer.json", "model", 7),
        ("ldm.json", "num_inference_steps", "many"),
        ("ldm.json", "guidance_scale", [3]),
        ("ldm.json", "sampler", 5),
    ],
)
def test_a_wrong_value_in_a_config(refused: Any, damaged: Path, name: str, key: str, value: Any) -> None:
    content = json.loads((damaged / name).read_text()) | {key: value}
    (damaged / name).write_text(json.dumps(content))
    assert str((damaged / name).parent) in refused("-p", "two", "-m", str(damaged))


def test_a_picture_can_be_decoded_in_pieces(draw: Callable[..., dict[str, Any]]) -> None:
    files = [
        draw("-p", "a red circle", "--steps", "2", *how, output=f"piece{i}.png")["images"][0]
        for i, how in enumerate(([], ["--tiled"], ["--tiled", "tiles"]))
    ]
    whole, *pieces = (torch.tensor(list(Image.open(file).tobytes())) for file in files)
    assert all(int((piece - whole).abs().max()) <= 1 for piece in pieces)
