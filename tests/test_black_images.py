"""A decoder or U-Net that overflows is noticed: decoded again in float32, or one sentence; never a black picture."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoencoder import AutoencoderKL, LatentCodec
from autoencoder.codec import whole_decode
from ldm import TextToImage
from ldm.cli import generate

PROMPT = "a red circle"


def overflow_in_half(vae: AutoencoderKL, value: float, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Makes one value of each picture `value` unless the decoder runs in float32; notes the dtypes of its calls."""
    decode: Callable[[AutoencoderKL, Tensor], Tensor] = AutoencoderKL.decode
    seen: list[torch.dtype] = []

    def overflowing(self: AutoencoderKL, z: Tensor) -> Tensor:
        seen.append(self.dtype)
        image = decode(self, z)
        if self.dtype != torch.float32:
            image[0, 0, 0, 0] = value
        return image

    monkeypatch.setattr(AutoencoderKL, "decode", overflowing)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_picture_that_overflows_in_half_precision_is_decoded_in_float32(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    pipe = TextToImage.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in pipe.model.vae.state_dict().items()}
    seen = overflow_in_half(pipe.model.vae, value, monkeypatch)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = pipe._decode(z, whole_decode)
        assert seen == [torch.bfloat16, torch.float32]
        whole = LatentCodec.from_config(copy.deepcopy(pipe.model.vae).float())
        assert torch.equal(image, whole.decode(z)) and image.std() > 0.05
    after = pipe.model.vae.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())


def test_weights_that_are_not_finite_are_an_error_and_never_a_picture(tiny_model_folder: Path) -> None:
    for part, where in (("vae", "decoder"), ("unet", "U-Net")):
        pipe = TextToImage.from_pretrained(tiny_model_folder)
        with torch.no_grad():
            next(getattr(pipe.model, part).parameters()).fill_(float("nan"))
            pipe.model.vae.decoder.conv_in.bias.fill_(float("nan" if part == "vae" else "0"))
        with pytest.raises(FloatingPointError, match=f"the {where} gave values that are not finite"):
            pipe(PROMPT, steps=1)


def test_the_command_ends_with_one_sentence_and_writes_nothing(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LatentCodec, "decode", lambda self, z, *_: torch.full((1, 3, 32, 32), float("nan")))
    out = tmp_path / "out.png"
    argv = ["ldm-generate", "-p", PROMPT, "-m", str(tiny_model_folder), "-o", str(out), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert end.value.code == 1 and not out.exists()
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: the decoder gave values that are not finite")


def test_an_infinite_value_does_not_pass_for_white(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = LatentCodec.from_config(AutoencoderKL.from_pretrained(tiny_model_folder / "vae"))
    monkeypatch.setattr(codec.vae, "decode", lambda z: torch.tensor([[[[float("inf"), -5.0, 0.5]]]]))
    image = codec.decode(torch.zeros(1, 4, 1, 1)).flatten()
    assert image[0].isnan() and image[1:].tolist() == [-1.0, 0.5]
