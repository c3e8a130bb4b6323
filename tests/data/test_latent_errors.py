"""The file of the errors that a model makes of pictures' latents, and the command that writes it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from autoencoder import AutoencoderKL
from ldm.cli import data
from ldm.data.batches import SkipCounter, Transform
from ldm.data.fingerprint import encoder_hash
from ldm.data.latent_errors import LatentErrors, write_latent_errors
from ldm.data.shapes import ShapesDataset
from ldm.data.sources import Columns, Example, open_source
from ldm.data.transforms import BadImage, to_images, to_tensor
from ldm.pipeline import TextToImage
from ldm.training.redrawing import draw_latent_errors


@pytest.fixture(scope="module")
def pipe(tiny_model_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_model_folder)


def test_rows_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    errors = torch.randn(3, 2, 4, 4)
    write_latent_errors(tmp_path / "new" / "e.safetensors", ["a", "b/ü", "c"], errors, "hash", ("here", "data"))
    read = LatentErrors(tmp_path / "new" / "e.safetensors")
    assert (len(read), read.encoder, read.data, read.shape) == (3, "hash", ("here", "data"), (2, 4, 4))
    assert_close(read.of(["c", "a", "c"]), errors[[2, 0, 2]].half().float(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"e\.safetensors has no row for d; make it anew"):
        read.of(["a", "d"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.safetensors"]


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    save_file({"errors": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    write_latent_errors(tmp_path / "twice.safetensors", ["a", "a"], torch.zeros(2, 1, 1, 1), "hash", ("here", "data"))
    for name in ("other", "text", "missing", "twice"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is no file of `ldm-data errors`"):
            LatentErrors(tmp_path / f"{name}.safetensors")


def test_redrawn_latents_are_those_of_the_pictures_that_the_pipeline_draws(pipe: TextToImage) -> None:
    """At strength 1 from noise, below as from a start picture: the same pixels."""
    start = next(iter(ShapesDataset("train", 1, 32)))["image"]
    z = pipe.codec.encode(to_tensor(start)[None])
    for strength in (1.0, 0.6):
        init = {} if strength == 1 else {"init_image": start, "strength": strength}
        drawn = pipe.redraw(["a red circle"], z, strength, [7], steps=5)
        expected = pipe("a red circle", seed=7, steps=5, **init)[0]
        assert to_images(pipe.codec.decode(drawn))[0].tobytes() == expected.tobytes()


def test_the_command_writes_what_redrawing_changes(tiny_model_folder: Path, pipe: TextToImage, tmp_path: Path) -> None:
    file = tmp_path / "errors.safetensors"
    flags = ["--model", str(tiny_model_folder), "--max-samples", "7", "--steps", "4", "--seed", "5", "--device", "cpu"]
    files = [tmp_path / f"{size}.safetensors" for size in (1, 3, 50)]
    for file in files:
        argv = [*flags, "--output", str(file), "--strengths", "0.5", "1", "--batch-size", file.stem]
        data.run(["errors", "shapes", *argv])
    source, transform = open_source("shapes", "train", 32, Columns("image", ("text",)), 7, seed=5), Transform(32)
    read = [LatentErrors(file) for file in files]
    assert len(read[0]) == 7 and read[0].encoder == encoder_hash(pipe.model.vae)
    assert read[0].data == (source.name, source.fingerprint())
    for index in range(7):
        example = source[index]
        z = pipe.codec.encode(transform(example, 0, 0)[None])
        drawn = pipe.redraw([example.captions[0]], z, (0.5, 1.0)[index % 2], [5 + index], steps=4)
        for one in read:  # half precision: 2^-11 of a value
            assert_close(one.of([example.key]), (drawn - z) / pipe.codec.scale, rtol=1e-3, atol=1e-4)


def test_a_file_drawn_in_half_precision_names_the_encoder_of_the_folder(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes in float16 by default; the command does not, so that training knows its encoder again."""
    monkeypatch.setattr("ldm.cli.device.usable_device", lambda name: torch.device("cpu"))
    read, asked = TextToImage.from_pretrained, list[Any]()
    monkeypatch.setattr(TextToImage, "from_pretrained", lambda *args: asked.append(args[2]) or read(*args))
    flags = ["--model", str(tiny_model_folder), "--output", str(tmp_path / "e.safetensors"), "--max-samples", "1"]
    data.run(["errors", "shapes", *flags, "--steps", "1"])
    vae = AutoencoderKL.from_pretrained(tiny_model_folder / "vae")
    assert LatentErrors(tmp_path / "e.safetensors").encoder == encoder_hash(vae) and asked == [torch.float32]


def test_the_hash_of_an_encoder_is_of_its_own_weights_alone(tiny_model_folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_model_folder / "vae")
    before = encoder_hash(vae)
    for part, same in (("decoder", True), ("post_quant_conv", True), ("quant_conv", False), ("encoder", False)):
        changed = AutoencoderKL.from_pretrained(tiny_model_folder / "vae")
        with torch.no_grad():
            next(changed.get_submodule(part).parameters()).add_(1.0)
        assert (encoder_hash(changed) == before) == same, part


def test_prompts_of_several_windows_are_redrawn_as_each_alone(pipe: TextToImage) -> None:
    prompts = ["a red circle", "a red circle and a blue square " * 30, "a green star"]
    z = torch.randn(3, *pipe.plan().shape, generator=torch.Generator().manual_seed(0))
    together = pipe.redraw(prompts, z, 0.5, [4, 9, 1], steps=4)
    for i, seed in enumerate((4, 9, 1)):
        assert_close(together[i : i + 1], pipe.redraw(prompts[i : i + 1], z[i : i + 1], 0.5, [seed], steps=4))
    with pytest.raises(ValueError, match="3 latents need as many prompts and seeds, got 2 and 3"):
        pipe.redraw(prompts[:2], z, 0.5, [4, 9, 1])


def test_pictures_of_one_name_and_damaged_ones_are_refused(pipe: TextToImage, tmp_path: Path) -> None:
    class Source:
        name = "here"

        def __init__(self, *keys: str) -> None:
            self.keys = keys

        def __len__(self) -> int:
            return len(self.keys)

        def __getitem__(self, index: int) -> Example:
            if self.keys[index] == "damaged":
                raise BadImage("damaged: no picture")
            return Example(Image.new("RGB", (32, 32)), ("a red circle",), self.keys[index])

        def fingerprint(self) -> str:
            return "data"

    def drawn(*keys: str, path: Path = tmp_path / "e.safetensors") -> int:
        return draw_latent_errors(pipe, Source(*keys), 32, path, [1.0], SkipCounter(0.5), steps=1)  # type: ignore[arg-type]

    for keys, message in ((("a", "b", "a"), "two pictures of here are named a"), (("damaged",), "no picture of here")):
        with pytest.raises(ValueError, match=message):
            drawn(*keys)
    with pytest.raises(ValueError, match="is a folder"):
        drawn("a", path=tmp_path)
    assert not list(tmp_path.iterdir())
    assert drawn("a", "damaged", "b") == 2
    broken = TextToImage(replace(pipe.model, unet=deepcopy(pipe.model.unet)))
    with torch.no_grad():
        next(broken.model.unet.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="what the model draws of a is not finite"):
        draw_latent_errors(broken, Source("a"), 32, tmp_path / "n", [1.0], SkipCounter(0.5), steps=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strengths", "0.5", "0"], r"strength is 0\.0; it must lie in \(0, 1\]"),
        (["--steps", "0"], "steps is 0; this model accepts 1 to 1000"),
        (["--streaming"], "--streaming reads a source once"),
        (["--resolution", "30"], "height is 30; it must be a positive multiple of"),
    ],
)
def test_bad_flags_are_named_before_anything_is_drawn(
    tiny_model_folder: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    common = ["--model", str(tiny_model_folder), "--output", str(tmp_path / "e.safetensors"), "--max-samples", "2"]
    with pytest.raises(ValueError, match=message):
        data.run(["errors", "shapes", *common, *flags])
    assert not list(tmp_path.iterdir())
