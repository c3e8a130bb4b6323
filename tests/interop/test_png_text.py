"""Two hundred awkward prompts go into PNG files and come back, by us and by an independent reader."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sd_parsers import ParserManager

from ldm.cli import generate

ALPHABETS = (
    "abc xyz ",
    " \t,.;:!?()[]{}<>|",
    "\"'`\\/",
    "\n",
    "äöüßéèñçøåžłαβγдеж",
    "日本語中文한국어",
    "دائرةحمراءעיגול\u200f\u200e",
    "🔴🟦👩\u200d🚀🏳\ufe0f\u200d🌈",
    "\u0301\u00a0\ufeff\u2028",
)
SETTINGS: dict[str, Any] = {
    "seed": 7,
    "negative_prompt": 'blurry 🌫, "low"',
    "model": None,
    "revision": None,
    "variant": None,
    "dtype": None,
    "steps": 31,
    "guidance_scale": 6.5,
    "sampler": "dpmpp_2m",
    "height": 32,
    "width": 64,
    "init_image": None,
    "strength": 0.8,
    "mask": None,
}


def prompts() -> list[str]:
    """195 mixtures of the alphabets, and five special ones."""
    rng = random.Random(0)
    mixed = []
    for _ in range(195):
        letters = "".join(rng.sample(ALPHABETS, rng.randint(1, 4)))
        mixed.append("".join(rng.choice(letters) for _ in range(rng.randint(1, 80))))
    return [*mixed, "red, " * 2000 + "circle", "", "Steps: 3, Sampler: none\nSeed: 1", "(x:1.3) [x] \\(", "--prompt"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("png")
    written = []
    for index, prompt in enumerate(prompts()):
        path = folder / f"{index}.png"
        Image.new("RGB", (4, 4)).save(path, pnginfo=generate.png_text({"prompt": prompt, **SETTINGS, "seed": index}))
        written.append((prompt, path))
    return written


def test_every_prompt_comes_back_through_from_image(files: list[tuple[str, Path]]) -> None:
    assert len(files) == 200 and max(len(prompt.encode()) for prompt, _ in files) > 10_000
    for index, (prompt, path) in enumerate(files):
        args = generate._repeated(["--from-image", str(path)], str(path))
        assert args.prompt == [prompt]
        assert (args.seed, args.steps, args.guidance_scale, args.sampler) == (index, 31, 6.5, "dpmpp_2m")
        assert (args.negative_prompt, args.height, args.width) == (SETTINGS["negative_prompt"], 32, 64)


def test_an_independent_reader_finds_prompt_seed_steps_sampler_and_guidance(files: list[tuple[str, Path]]) -> None:
    reader = ParserManager()
    for index, (prompt, path) in enumerate(files):
        found = reader.parse(path)
        assert found is not None
        (sampler,) = found.samplers
        assert [p.value for p in sampler.prompts] == ([prompt.strip()] if prompt.strip() else [])
        assert [p.value for p in sampler.negative_prompts] == [SETTINGS["negative_prompt"]]
        assert sampler.name == "DPM++ 2M"
        assert sampler.parameters == {"seed": str(index), "steps": "31", "cfg_scale": "6.5"}
