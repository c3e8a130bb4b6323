"""The file of the errors that a model makes of pictures' latents, and the command that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from ldm.cli import data
from ldm.data.batches import Transform
from ldm.data.fingerprint import encoder_hash
from ldm.data.latent_errors import LatentErrors, write_latent_errors
from ldm.data.shapes import ShapesDataset
from ldm.data.sources import Columns, open_source
from ldm.data.transforms import to_images, to_tensor
from ldm.pipeline import TextToImage


@pytest.fixture(scope="module")
def pipe(tiny_model_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_model_folder)


def test_rows_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    errors = torch.randn(3, 2, 4, 4)
    write_latent_errors(tmp_path / "new" / "e.safetensors", ["a", "b/ü", "c"], errors, "hash")
    read = LatentErrors(tmp_path / "new" / "e.safetensors")
    assert (len(read), read.encoder, read.shape) == (3, "hash", (2, 4, 4))
    assert_close(read.of(["c", "a", "c"]), errors[[2, 0, 2]].half().float(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"e\.safetensors has no row for d; make it anew"):
        read.of(["a", "d"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.safetensors"]


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    save_file({"errors": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text", "missing"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is no file of `ldm-data errors`"):
            LatentErrors(tmp_path / f"{name}.safetensors")


def test_redrawn_latents_are_those_of_the_pictures_that_the_pipeline_draws(pipe: TextToImage) -> None:
    """At strength 1 from noise, below as from a start picture: the same pixels."""
    start = next(iter(ShapesDataset("train", 1, 32)))["image"]
    z = pipe.codec.encode(to_tensor(start)[None])
    for strength in (1.0, 0.6):
        init = {} if strength == 1 else {"init_image": start, "strength": strength}
        drawn = pipe.redraw(["a red circle"], z, strength, 7, steps=5)
        expected = pipe("a red circle", seed=7, steps=5, **init)[0]
        assert to_images(pipe.codec.decode(drawn))[0].tobytes() == expected.tobytes()


def test_the_command_writes_what_redrawing_changes(tiny_model_folder: Path, pipe: TextToImage, tmp_path: Path) -> None:
    file = tmp_path / "errors.safetensors"
    flags = ["--model", str(tiny_model_folder), "--max-samples", "7", "--batch-size", "3", "--steps", "4"]
    data.run(["errors", "shapes", *flags, "--output", str(file), "--strengths", "0.5", "1", "--device", "cpu"])
    read = LatentErrors(file)
    assert len(read) == 7 and read.encoder == encoder_hash(pipe.model.vae)
    source, transform = open_source("shapes", "train", 32, Columns("image", ("text",)), 7, seed=0), Transform(32)
    for first, strength in ((0, 0.5), (3, 1.0), (6, 0.5)):  # batch after batch
        examples = [source[i] for i in range(first, min(first + 3, 7))]
        z = pipe.codec.encode(torch.stack([transform(example, 0, 0) for example in examples]))
        drawn = pipe.redraw([example.captions[0] for example in examples], z, strength, first, steps=4)
        # the file has half precision, so 2^-11 of the largest value
        assert_close(read.of([example.key for example in examples]), drawn - z, rtol=1e-3, atol=1e-3)


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
