"""The flags of `ldm-generate` that shape the sampler's way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm import TextToImage
from ldm.cli import generate
from ldm.networks import ClassifierConfig, LatentClassifier


@pytest.fixture
def draw(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """Runs the command on the tiny model and returns its pictures."""

    def run(*argv: str, output: str = "out") -> list[Path]:
        folder = str(tmp_path / output)
        report = generate.run(["-m", str(tiny_model_folder), "-o", folder, "--steps", "3", "--json", *argv])
        return [Path(name) for name in report["images"]]

    return run


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = ClassifierConfig(("circle", "star"), block_out_channels=(8,), norm_num_groups=4)
    network = LatentClassifier.from_scratch(config, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.linear_out.weight, generator=torch.Generator().manual_seed(1))
    network.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    (["--spacing", "karras", "--sampler", "dpmpp_2m"], {"spacing": "karras", "sampler": "dpmpp_2m"}),
    (["--eta", "0.7"], {"eta": 0.7}),
    (["--guidance-rescale", "0.7", "--cfg-scale", "7"], {"guidance_rescale": 0.7, "guidance_scale": 7.0}),
    (["--guidance-interval", "0.3", "inf"], {"guidance_interval": (0.3, float("inf"))}),
    (
        ["--dynamic-threshold", "0.9", "--threshold-limit", "1.5"],
        {"dynamic_threshold": 0.9, "threshold_limit": 1.5},
    ),
]


@pytest.mark.parametrize(("argv", "settings"), FLAGS, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_a_flag_reaches_the_pipeline_and_the_picture_repeats_it(
    draw: Any, tiny_model_folder: Path, argv: list[str], settings: dict[str, Any]
) -> None:
    (path,) = draw("-p", "two", "--seed", "4", *argv)
    (image,) = TextToImage.from_pretrained(tiny_model_folder)("two", seed=4, steps=3, **settings)
    assert Image.open(path).tobytes() == image.tobytes()
    (plain,) = draw("-p", "two", "--seed", "4", output="plain")
    assert Image.open(plain).tobytes() != image.tobytes()
    (again,) = draw("--from-image", str(path), output="again")
    assert again.read_bytes() == path.read_bytes()


def test_a_classifier_is_followed_and_remembered(draw: Any, classifier: Path) -> None:
    flags = ["--classifier", str(classifier), "--class-label", "star", "--classifier-scale", "40"]
    (path,), (plain,) = draw("-p", "two", *flags), draw("-p", "two", output="plain")
    assert Image.open(path).tobytes() != Image.open(plain).tobytes()
    (again,) = draw("--from-image", str(path), output="again")
    assert again.read_bytes() == path.read_bytes()


def test_an_interpolation_is_written_frame_by_frame_and_each_can_be_repeated(draw: Any) -> None:
    flags = ["--interpolate", "3", "--to-prompt", "a blue star", "--to-seed", "9", "--seed", "2"]
    paths = draw("-p", "two", *flags, "--grid")
    assert [p.name for p in paths] == ["00000_seed2.png", "00001_seed2.png", "00002_seed2.png", "grid.png"]
    (first,) = draw("-p", "two", "--seed", "2", output="first")
    assert Image.open(first).tobytes() == Image.open(paths[0]).tobytes()
    with Image.open(paths[1]) as image:
        image.load()
        stored = json.loads(image.text["ldm"])  # type: ignore[attr-defined]
    assert (stored["part"], stored["to_prompt"], stored["to_seed"]) == (0.5, "a blue star", 9)
    (again,) = draw("--from-image", str(paths[1]), output="again")
    assert Image.open(again).tobytes() == Image.open(paths[1]).tobytes()


def test_previews_show_every_step_of_every_picture(draw: Any, tmp_path: Path) -> None:
    argv = ["-p", "two", "--num-images", "3", "--batch-size", "2", "--seed", "5", "--preview", str(tmp_path / "small")]
    draw(*argv)
    names = {f"{i:05d}_seed{5 + i}_step{step:03d}.png" for i in range(3) for step in range(3)}
    assert {p.name for p in (tmp_path / "small").iterdir()} == names
    assert Image.open(tmp_path / "small" / "00002_seed7_step002.png").size == (32, 32)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eta", "0.5", "--sampler", "euler"], "eta is 0.5 with sampler 'euler'; only ddim has it"),
        (["--class-label", "star"], "--class-label needs --classifier"),
        (["--classifier", "{classifier}"], "--classifier needs --class-label"),
        (
            ["--classifier", "{classifier}", "--class-label", "dog"],
            "label is 'dog'; this classifier knows circle, star",
        ),
        (["--classifier", "{nothing}", "--class-label", "star"], "{nothing} is not a classifier"),
        (["--interpolate", "3"], "--interpolate needs --to-prompt or --to-seed"),
        (["--interpolate", "1", "--to-seed", "3"], "--interpolate is 1; it must be at least 2"),
        (["--to-seed", "3"], "--to-seed needs --interpolate N"),
        (["--interpolate", "3", "--to-seed", "3", "--num-images", "2"], "--num-images is 2 with --interpolate"),
        (["--interpolate", "3", "--to-seed", "3", "-p", "one"], "but 2 prompts were given"),
    ],
)
def test_a_bad_flag_is_named(
    tiny_model_folder: Path,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    names = {"classifier": str(classifier), "nothing": str(tmp_path / "nothing")}
    given = ["-m", str(tiny_model_folder), "-o", str(tmp_path / "refused"), "-p", "two"]
    monkeypatch.setattr(sys, "argv", ["ldm-generate", *given, *(flag.format(**names) for flag in argv)])
    with pytest.raises(SystemExit) as stopped:
        generate.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert message.format(**names) in said
    assert not (tmp_path / "refused").exists()
