"""Flags that shape how ldm-generate draws: spacing, guidance, classifiers, interpolation, previews, best of several."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.evaluation.ranking import Ranking
    from ldm.pipeline import TextToImage
    from ldm.process import Prediction
    from ldm.sampling import ClassifierGuidance

SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential")
STORED_KINDS: dict[str, tuple[type, ...]] = {
    "spacing": (str, type(None)),
    "eta": (int, float, type(None)),
    "guidance_rescale": (int, float),
    "guidance_interval": (list, type(None)),
    "dynamic_threshold": (int, float, type(None)),
    "threshold_limit": (int, float),
    "classifier": (str, type(None)),
    "class_label": (str, type(None)),
    "classifier_scale": (int, float),
    "to_prompt": (str, type(None)),
    "to_seed": (int, type(None)),
    "part": (int, float, type(None)),
}
"""What the `ldm` text chunk of a PNG may hold of these flags; `part` is the place on the way of an interpolation."""


def add_options(p: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    p.add_argument("--spacing", choices=SPACINGS, default=None, help="of the timesteps (default: the model's own)")
    p.add_argument("--eta", type=float, default=None, help="of the ddim sampler, 0 deterministic to 1 ancestral")
    p.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1, against overexposure by guidance")
    p.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=None,
        help="noise levels sigma / alpha at which guidance acts",
    )
    p.add_argument(
        "--dynamic-threshold", type=float, metavar="QUANTILE", default=None, help="for instance 0.995, at high guidance"
    )
    p.add_argument("--threshold-limit", type=float, default=3.0, help="where that quantile of |x0| is pulled back to")
    p.add_argument("--classifier", metavar="FOLDER", default=None, help="a classifier of noisy latents to follow")
    p.add_argument("--class-label", default=None, help="the class that --classifier asks for")
    p.add_argument("--classifier-scale", type=float, default=1.0)
    p.add_argument("--interpolate", type=int, metavar="N", default=None, help="N pictures on the way to --to-prompt")
    p.add_argument("--to-prompt", default=None, help="with --interpolate: where the prompt ends")
    p.add_argument("--to-seed", type=int, default=None, help="with --interpolate: where the seed ends")
    p.add_argument("--preview", metavar="FOLDER", default=None, help="write a small picture there after every step")
    add_ranking(p)
    p.set_defaults(part=None)


def add_ranking(p: argparse._ActionsContainer) -> None:
    """Adds the flags of `ranking`."""
    p.add_argument("--best-of", type=int, metavar="N", default=1, help="draw N of each picture and keep the best")
    p.add_argument(
        "--ranker",
        metavar="NAME",
        default=None,
        help="the CLIP that tells which is best: local-dir:FOLDER or an architecture of open_clip",
    )
    p.add_argument("--ranker-weights", metavar="FILE", default=None, help="checkpoint of that architecture")


def ranking(args: argparse.Namespace, device: torch.device) -> Ranking:
    """How many candidates of each picture are drawn, and what chooses among them.

    Raises:
        ValueError: naming the flag that is missing or out of range, or the model that cannot be had.
    """
    if args.best_of < 1:
        raise ValueError(f"--best-of is {args.best_of}; it must be at least 1")
    if (args.best_of > 1) != (args.ranker is not None):
        have, lack = ("best-of", "ranker NAME, a CLIP to choose") if args.ranker is None else ("ranker", "best-of N")
        raise ValueError(f"--{have} needs --{lack}")
    if args.ranker is None and args.ranker_weights is not None:
        raise ValueError("--ranker-weights needs --ranker, the architecture that they are of")
    from ldm.evaluation.ranking import Ranking
    from ldm.evaluation.text_image import OpenClip

    if args.ranker is None:
        return Ranking()
    try:
        return Ranking(args.best_of, OpenClip(args.ranker, args.ranker_weights).to(device))
    except ValueError as error:
        raise ValueError(f"--ranker {args.ranker}: {error}") from error


def stored_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as the text chunk keeps them; `part` is each picture's own."""
    return {name: getattr(args, name) for name in STORED_KINDS if name != "part"}


def parts(args: argparse.Namespace) -> list[float] | None:
    """The places on the way of an interpolation; None where there is none.

    Raises:
        ValueError: naming the flag that is missing or out of range.
    """
    if args.part is not None and args.interpolate is None:
        return [args.part]
    if args.interpolate is None:
        for name in ("to_prompt", "to_seed"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --interpolate N, the number of pictures on the way")
        return None
    if args.interpolate < 2:
        raise ValueError(f"--interpolate is {args.interpolate}; it must be at least 2, both ends")
    if args.to_prompt is None and args.to_seed is None:
        raise ValueError("--interpolate needs --to-prompt or --to-seed, where the way ends")
    return [i / (args.interpolate - 1) for i in range(args.interpolate)]


def check_interpolation(prompts: list[str], num_images: int, best_of: int) -> None:
    """Refuses several prompts, pictures a prompt or candidates a picture with an interpolation.

    Raises:
        ValueError: naming the flag.
    """
    if len(prompts) > 1:
        raise ValueError(f"--interpolate goes from one prompt to another, but {len(prompts)} prompts were given")
    if num_images > 1:
        raise ValueError(f"--num-images is {num_images} with --interpolate; it must be 1")
    if best_of > 1:
        raise ValueError(f"--best-of is {best_of} with --interpolate; it must be 1")


def classifier(args: argparse.Namespace, pipe: TextToImage) -> ClassifierGuidance | None:
    """The classifier that was asked for, on the model's device.

    Raises:
        ValueError: naming the flag that is missing, or the classifier that cannot be read or is for other latents.
    """
    if args.classifier is None:
        if args.class_label is not None:
            raise ValueError("--class-label needs --classifier, the folder of a classifier of noisy latents")
        return None
    if args.class_label is None:
        raise ValueError("--classifier needs --class-label, the class to ask for")
    from ldm.networks import LatentClassifier
    from ldm.sampling import ClassifierGuidance

    network = LatentClassifier.from_pretrained(args.classifier).to(pipe.device)
    wanted = pipe.model.vae.config.latent_channels
    if network.config.in_channels != wanted:
        raise ValueError(
            f"--classifier {args.classifier} is for latents of {network.config.in_channels} channels; this model has "
            f"{wanted}"
        )
    return ClassifierGuidance(network.log_prob(args.class_label), args.classifier_scale)


def settings(args: argparse.Namespace, pipe: TextToImage, names: list[str]) -> dict[str, Any]:
    """The keyword arguments of the pipeline for these flags; `names` of the pictures, for their previews.

    Raises:
        ValueError: naming what is not accepted.
    """
    interval = args.guidance_interval
    if interval is not None and [type(value) for value in interval] not in ([float, float], [int, int]):
        raise ValueError(f"guidance_interval is {interval!r}; it must be two numbers")
    return {
        "spacing": args.spacing,
        "eta": args.eta,
        "guidance_rescale": args.guidance_rescale,
        "guidance_interval": None if interval is None else tuple(interval),
        "dynamic_threshold": args.dynamic_threshold,
        "threshold_limit": args.threshold_limit,
        "classifier": classifier(args, pipe),
        "callback": None if args.preview is None else previewer(pipe, Path(args.preview), names),
    }


def previewer(pipe: TextToImage, folder: Path, names: list[str]) -> Callable[[int, Tensor, Tensor, Prediction], None]:
    """A callback that writes `NAME_step003.png` for every picture: x0 as the model sees it, without the decoder."""
    from ldm.data.transforms import to_images

    folder.mkdir(parents=True, exist_ok=True)
    factor = pipe.model.vae.downsample_factor
    waiting, batch = list(names), list[str]()

    def write(step: int, t: Tensor, x: Tensor, prediction: Prediction) -> None:
        if step == 0:
            batch[:] = [waiting.pop(0) for _ in range(len(x))]
        for name, image in zip(batch, to_images(pipe.preview(prediction.x0)), strict=True):
            size = (image.width * factor, image.height * factor)
            image.resize(size, Image.Resampling.BILINEAR).save(folder / f"{name}_step{step:03d}.png")

    return write
