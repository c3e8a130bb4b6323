"""Pictures of a Stable Diffusion 1.5 at full size beside those of diffusers, from the same latents and random weights.

    python -m benchmarks.pipeline_full_size

Text to image with guidance in fp32, five steps of each of five samplers. Only the vocabulary is small, that of the
built-in captions. Needs 5 GiB of disk for the model folder and 10 GiB of memory; prints one JSON line a sampler and
ends with code 1 where a pixel differs by more than 2 of 255 levels.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from autoencoder import AutoencoderConfig, AutoencoderKL
from benchmarks.parity_full_size import CONFIGS, random_state
from conditioning import ClipTextConfig, ClipTextEncoder, ClipTextModel, ClipTokenizer
from ldm import TextToImage
from ldm.data.shapes import captions, scene
from ldm.networks import UNet, UNetConfig
from ldm.pretrained import Model, write_model
from ldm.process import DiffusionConfig

SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
GIVEN: dict[str, Any] = {"prompt": "a large red circle", "negative_prompt": "a green star", "guidance_scale": 4.0}
SETTINGS = {"sampler": "ddim", "num_inference_steps": 5, "guidance_scale": 4.0}
TOLERANCE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128, help="pixels, a multiple of 64")
    args = parser.parse_args()
    noise = torch.randn(1, 4, args.side // 8, args.side // 8, generator=torch.Generator().manual_seed(5))
    with tempfile.TemporaryDirectory() as name:
        write_model(random_model(), Path(name) / "model")
        gc.collect()
        ours = {sampler: drawn(Path(name) / "model", sampler, noise) for sampler in SAMPLERS}
        gc.collect()
        worst = [report(sampler, *ours[sampler], Path(name) / "model", noise) for sampler in SAMPLERS]
    sys.exit(max(worst) > TOLERANCE)


def random_model() -> Model:
    """SD 1.5's three networks at their size, every weight random."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(CONFIGS["sd15"])).eval()
    unet.load_state_dict(random_state(unet), strict=True, assign=True)
    widths = (128, 256, 512, 512)
    vae = AutoencoderKL(
        AutoencoderConfig(block_out_channels=widths, layers_per_block=2, scaling_factor=0.18215, sample_size=512)
    ).eval()
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 8  # pictures that use the whole range of levels
    tokenizer = ClipTokenizer.train((text for i in range(100) for text in captions(scene(i))), 600)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = ClipTextConfig(tokenizer.vocab_size, 768, 3072, 12, 12, **ids)
    text = ClipTextEncoder(tokenizer, ClipTextModel.from_scratch(config, torch.Generator().manual_seed(1))).eval()
    diffusion = DiffusionConfig(timestep_spacing="trailing", steps_offset=0)
    return Model(vae, unet, text, diffusion, SETTINGS, "# Random weights\n")


def drawn(folder: Path, sampler: str, noise: torch.Tensor) -> tuple[Image.Image, float]:
    """Our picture and its seconds."""
    pipe = TextToImage.from_pretrained(folder)
    began = time.perf_counter()
    (image,) = pipe(**GIVEN, **size(noise), latents=noise, steps=5, sampler=sampler)
    return image, time.perf_counter() - began


def size(noise: torch.Tensor) -> dict[str, int]:
    """Pixels of the picture of these latents."""
    return {"height": 8 * noise.shape[2], "width": 8 * noise.shape[3]}


def report(sampler: str, image: Image.Image, seconds: float, folder: Path, noise: torch.Tensor) -> int:
    """Prints how far diffusers' picture is from ours; the largest difference in levels."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    if sampler in ("euler", "heun"):
        # their state is x / alpha, which starts at noise · sqrt(1 + s²); the pipeline multiplies by init_noise_sigma
        pipe.scheduler.set_timesteps(5)
        noise = noise * float((1 + pipe.scheduler.sigmas[0] ** 2).sqrt() / pipe.scheduler.init_noise_sigma)
    began = time.perf_counter()
    theirs = pipe(**GIVEN, **size(noise), latents=noise, num_inference_steps=5).images[0]
    other = time.perf_counter() - began
    levels = np.asarray(image).astype(int), np.asarray(theirs).astype(int)
    largest = int(np.abs(levels[0] - levels[1]).max())
    print(
        json.dumps(
            {
                "sampler": sampler,
                "size": list(image.size),
                "spread_of_levels": round(float(levels[1].std()), 1),
                "largest_difference": largest,
                "seconds": {"ours": round(seconds, 1), "diffusers": round(other, 1)},
            }
        ),
        flush=True,
    )
    return largest


if __name__ == "__main__":
    main()
