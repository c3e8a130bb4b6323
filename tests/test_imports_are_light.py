"""Drawing a picture must not wait for libraries that only training, tests or measuring need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "accelerate",
    "compel",
    "datasets",
    "diffusers",
    "draccus",
    "huggingface_hub",
    "lpips",
    "open_clip",
    "pandas",
    "tensorboard",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
    "transformers",
}


def loaded_after(code: str) -> set[str]:
    script = code + "\nimport sys; print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import ldm; from ldm.pipeline import TextToImage\nTextToImage.from_pretrained({model!r})('a red circle', steps=1)",
        "from ldm.cli.generate import run\nrun(['-p', 'a red circle', '-m', {model!r}, '--steps', '1', '-o', {out!r}, '--json'])",
    ],
    ids=["library", "command"],
)
def test_a_picture_is_drawn_without_heavy_libraries(code: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    loaded = loaded_after(code.format(model=str(tiny_model_folder), out=str(tmp_path)))
    assert {"torch", "ldm", "PIL"} <= loaded
    assert not loaded & HEAVY


def test_the_package_itself_imports_nothing() -> None:
    assert "torch" not in loaded_after("import ldm")
