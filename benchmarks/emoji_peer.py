"""Our stage two beside diffusers' classes trained by the recipe of its text-to-image example script: equal time.

    python -m benchmarks.emoji_peer --autoencoder runs/emoji/autoencoder/export --clip runs/emoji/clip \
        --judge runs/emoji/judge --output runs/emoji_peer [--steps 1500]

Ours is `train_ldm.py --config train_configs/emoji/ldm.yaml` for so many steps; its whole time, the encoding of the data
included, is what the other side gets. That side is the same autoencoder, the same CLIP text tower and a U-Net of the
same widths as diffusers' and transformers' classes, trained as the script does by default: pictures encoded in every
step, the text tower frozen, epsilon-prediction of the mean squared error, AdamW at a constant 1e-4, batches of 16, an
average of the weights (--use_ema). Both draw from the same captions, on the same thread in fp32.

Both are judged by the generation suite with the same sampler and seeds, ours at the guidance of its config, the other
at each of several scales, of which its best counts. Writes report_RATE.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.emoji_recipes import CLIP, CONFIG, one_scale, run
from ldm.build import build_text_encoder
from ldm.config.text_encoders import OpenClip
from ldm.data.batches import Transform
from ldm.data.sources import Columns, open_source
from ldm.evaluation.reconstruction import Pictures

BATCH, LEARNING_RATE = 16, 1e-4
"""The script's defaults."""
GUIDANCE = (1.0, 2.0, 3.0)
FRECHET, KID = "frechet_efficientnet_lite2", "kid_efficientnet_lite2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True, help="exported by stage one")
    parser.add_argument("--clip", type=Path, required=True, help="folder of benchmarks.emoji_clip with the text tower")
    parser.add_argument("--judge", type=Path, required=True, help="another one, which measures R-precision")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of ours; its time is both sides' budget")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of the other side")
    parser.add_argument("--num-samples", type=int, default=564)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    times = args.output / "times.json"
    figures = json.loads(times.read_text()) if times.exists() else {"ours": ours(args)}
    times.write_text(json.dumps(figures))
    peer = args.output / f"peer_{args.learning_rate:g}"
    if not (peer / "model_index.json").exists():
        steps = train_peer(args, figures["ours"], peer)
        (peer / "steps.json").write_text(json.dumps(steps))
    report = {
        "seconds": figures["ours"],
        "steps": {"ours": args.steps, "peer": json.loads((peer / "steps.json").read_text())},
    }
    report |= {"ours": judged(args, args.output / "ours" / "export", [])[0]}
    rows = judged(args, peer, ["--guidance-scale", *GUIDANCE])
    best = min(rows, key=lambda row: row["metrics"][FRECHET])
    report |= {"peer": best, "peer_at_every_scale": rows, "learning_rate": args.learning_rate}
    report["gain"] = {name: 1 - report["ours"]["metrics"][name] / best["metrics"][name] for name in (FRECHET, KID)}
    path = args.output / f"report_{args.learning_rate:g}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def ours(args: argparse.Namespace) -> float:
    """Trains our side and returns the seconds from its start to its exported model."""
    start = time.monotonic()
    flags = ["--output_dir", args.output / "ours", "--autoencoder", args.autoencoder, "--validation.steps", args.steps]
    flags += ["--text_encoder", CLIP.replace("{trainable}", "true").format(clip=args.clip)]
    flags += ["--training.mixed_precision", "no", "--training.max_train_steps", args.steps, "--resume", "never"]
    run("train_ldm.py", "--config", CONFIG, *flags)
    return time.monotonic() - start


def train_peer(args: argparse.Namespace, seconds: float, folder: Path) -> int:
    """Trains diffusers' side for so long, writes its pipeline and returns the number of its steps."""
    start = time.monotonic()
    model = args.output / "ours" / "export"
    vae = AutoencoderKL.from_pretrained(one_scale(args.autoencoder, args.output / "vae") / "vae").requires_grad_(False)
    tokenizer, text = frozen_text(args)
    plain = {"addition_embed_type": None, "resnet_time_scale_shift": "default"}
    unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(model / "unet"), **plain})
    noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), args.learning_rate, (0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    ema = EMAModel(unet.parameters(), decay=0.9999, model_cls=UNet2DConditionModel, model_config=unet.config)
    pictures, captions = training_data()
    torch.manual_seed(0)
    rng, order, steps = random.Random(0), list[int](), 0
    while time.monotonic() - start < seconds:
        if len(order) < BATCH:
            order = rng.sample(range(len(pictures)), len(pictures))
        rows, order = order[:BATCH], order[BATCH:]
        with torch.no_grad():
            latents = vae.encode(pictures[rows]).latent_dist.sample() * vae.config.scaling_factor
            ids = tokenizer(
                [rng.choice(captions[row]) for row in rows],
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            context = text(ids)[0]
        eps, t = torch.randn_like(latents), torch.randint(0, 1000, (BATCH,))
        loss = F.mse_loss(unet(noise.add_noise(latents, eps, t), t, context).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        steps += 1
        if steps % 100 == 0:
            print(
                f"peer: step {steps}, {time.monotonic() - start:.0f} of {seconds:.0f} s, loss {float(loss):.4f}",
                flush=True,
            )
    ema.copy_to(unet.parameters())
    schedule = DDIMScheduler.from_config(noise.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, schedule, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return steps


def frozen_text(args: argparse.Namespace) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text tower of the CLIP as transformers' classes."""
    tower = build_text_encoder(OpenClip(f"local-dir:{args.clip}", clip_skip=0), [], 0, args.output / "tokenizer")
    folders = args.output / "text_encoder", args.output / "tokenizer"
    tower.save_parts(args.output)
    text = CLIPTextModel.from_pretrained(folders[0]).eval().requires_grad_(False)
    return CLIPTokenizer.from_pretrained(folders[1]), text


def training_data() -> tuple[Tensor, list[tuple[str, ...]]]:
    """All pictures [N, 3, 64, 64] in [-1, 1] and their captions."""
    source = open_source("emoji", "train", 64, Columns("image", ("captions", "text")))
    pictures = Pictures(source, Transform(64), len(source), 64)
    return torch.cat(list(pictures.batches())), pictures.captions


def judged(args: argparse.Namespace, model: Path, scales: list[object]) -> list[dict[str, object]]:
    """The runs of the generation suite, one for each guidance scale."""
    output = model.parent / f"{model.name}_evaluation"
    flags = ["--suite", "generation", "--model", model, "--data", "emoji", "--num-samples", args.num_samples, *scales]
    flags += ["--steps", 25, "--sampler", "ddim", "--num-training", 0, "--clip", f"local-dir:{args.judge}"]
    run("-m", "ldm.cli.evaluate", *flags, "--output", output)
    runs: list[dict[str, object]] = json.loads((output / "report.json").read_text())["runs"]
    return runs


if __name__ == "__main__":
    main()
