"""ldm-evaluate: measure a model and write the figures as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from tqdm import tqdm

from ldm.cli import options
from ldm.cli.device import usable_device
from ldm.cli.exits import exit_codes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ldm.evaluation.features import FeatureNet

    Module = TypeVar("Module", bound=nn.Module)

JUDGE = "efficientnet_lite2"
"""The default network of the reconstruction suite: no training loss of ours uses it."""

ROWS = {
    "psnr": "PSNR in dB, mean over pictures",
    "psnr_median": "PSNR in dB, median",
    "psnr_worst": "PSNR in dB, worst picture",
    "ssim": "SSIM",
    "l1": "L1, pictures in [-1, 1]",
}
"""Metric -> what the printed table calls it."""


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    p = argparse.ArgumentParser(prog="ldm-evaluate", description="Measure a model.", allow_abbrev=False)
    p.add_argument(
        "--model",
        default=None,
        help="model folder, vae folder, hub id, emoji or shapes (default: the one of these two that --data is for)",
    )
    p.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    p.add_argument("--variant", default=None, help="which weight files to read, such as fp16")
    p.add_argument("--suite", choices=("generation", "reconstruction", "shapes"), required=True)
    p.add_argument("--num-samples", type=int, default=500, help="pictures, of each split in the shapes suite")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-size", type=int, default=50)
    p.add_argument("--device", default=None)
    p.add_argument("--output", default=None, metavar="FILE.json", help="where to write the figures and a picture grid")
    p.add_argument("--num-shapes", type=int, choices=(1, 2), default=None, help="shapes suite: scenes of one or two")
    drawn = p.add_argument_group("shapes and generation suites")
    several = "generation suite: several are compared"
    drawn.add_argument("--steps", "--num-inference-steps", type=int, nargs="+", default=None, help=several)
    drawn.add_argument("--guidance-scale", type=float, nargs="+", default=None, help=several)
    drawn.add_argument("--sampler", default=None)
    judged = p.add_argument_group("reconstruction and generation suites")
    judged.add_argument("--data", default="shapes", metavar="SOURCE", help="any data source that training reads")
    judged.add_argument("--split", default="validation", help="split of --data")
    judged.add_argument("--image-column", default="image", metavar="NAME", help="column of --data with the pictures")
    judged.add_argument("--caption-column", default="text", metavar="NAME", help="column of --data with captions")
    judged.add_argument("--resolution", type=int, default=None, help="default: the model's own")
    nets = "efficientnet_lite0, efficientnet_lite2"
    lpips = "lpips_vgg, lpips_alex, lpips_squeeze"
    more = "inception, timm:NAME, open_clip:NAME or none"
    judged.add_argument("--features", default=JUDGE, metavar="NAME", help=f"of Frechet distances: {nets}, {more}")
    judged.add_argument("--features-weights", default=None, metavar="FILE", help="their weights as a local file")
    p.add_argument("--perceptual", default=JUDGE, metavar="NAME", help=f"reconstruction suite: {nets}, {lpips} or none")
    p.add_argument("--perceptual-weights", default=None, metavar="FILE", help="backbone of an lpips distance")
    _add_generation_flags(p.add_argument_group("generation suite"))
    return p


def _add_generation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--clip", default="none", metavar="NAME", help="local-dir:FOLDER or an architecture of open_clip"
    )
    group.add_argument("--clip-weights", default=None, metavar="FILE", help="checkpoint of that architecture")
    group.add_argument("--candidates", type=int, default=32, help="captions that R-precision chooses among")
    group.add_argument("--caption-split", default=None, help="draw the captions of this split (default: --split)")
    group.add_argument("--num-reference", type=int, default=None, help="pictures of --split (default: --num-samples)")
    group.add_argument("--training-split", default="train", help="of --data, for copies and the classifier")
    group.add_argument("--num-training", type=int, default=10_000, help="pictures of it at most; 0: neither of both")
    group.add_argument("--feature-cache", default=None, metavar="DIR", help="keep what judges see in the data there")
    group.add_argument("--label-column", default=None, metavar="NAME", help="column of --data to classify pictures by")
    options.add_ranking(group)
    group.add_argument("--bootstrap", type=int, default=200, help="bootstrap samples behind the intervals; 0: none")


def main() -> None:
    """Entry point: exit code 2 and one sentence on bad input, 130 when interrupted."""
    with exit_codes():
        run(sys.argv[1:])


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints the figures, and writes them and a grid beside them where `--output` says.

    Raises:
        ValueError: one sentence naming the flag or file at fault.
    """
    args = parser().parse_args(list(argv))
    for flag, value in (("--num-samples", args.num_samples), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")
    args.model = args.model or ("emoji" if args.data == "emoji" and args.suite != "shapes" else "shapes")
    if args.suite == "generation":
        return _generation(args)
    if args.best_of != 1 or args.ranker is not None:
        raise ValueError(f"--best-of and --ranker are for the generation suite, not for --suite {args.suite}")
    if args.output and (Path(args.output).suffix == ".png" or Path(args.output).is_dir()):
        raise ValueError(f"--output is {args.output}; it must be a .json file, the picture is written beside it")
    report, grid = _shapes(args) if args.suite == "shapes" else _reconstruction(args)
    text = json.dumps(report, indent=2)
    print(text if args.suite == "shapes" else _table(report))
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        grid.save(path.with_suffix(".png"))
    return report


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    from ldm.cli.evaluate_generation import GenerationSuite

    return GenerationSuite(args).report()


def _shapes(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    from ldm.evaluation.grid import image_grid
    from ldm.evaluation.shapes import SPLITS, evaluate_shapes
    from ldm.pipeline import TextToImage

    pipe = TextToImage.from_pretrained(
        args.model, usable_device(args.device), revision=args.revision, variant=args.variant
    )
    steps, scale = _single("--steps", args.steps), _single("--guidance-scale", args.guidance_scale)
    wanted = {"steps": steps, "guidance_scale": scale, "sampler": args.sampler}
    with tqdm(total=args.num_samples * len(SPLITS), unit="image") as bar:
        splits, drawn = evaluate_shapes(
            pipe, args.num_samples, args.seed, args.num_shapes, args.batch_size, bar.update, **wanted
        )
    settings = {
        "model": args.model,
        "revision": args.revision,
        "steps": pipe.setting("num_inference_steps", steps),
        "guidance_scale": pipe.setting("guidance_scale", scale),
        "sampler": pipe.setting("sampler", args.sampler),
        "seed": args.seed,
        "num_shapes": args.num_shapes,
    }
    shown = [row for name in drawn for row in drawn[name][:16]]
    labels = [f"{'ok' if row[2].scene else 'WRONG'}: {row[0]}" for row in shown]
    grid = image_grid([row[1] for row in shown], 8, labels, min_side=128)
    return {"suite": "shapes", "num_samples": args.num_samples, "splits": splits, "settings": settings}, grid


def _reconstruction(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    from ldm.data.batches import Transform
    from ldm.data.sources import Columns, open_source
    from ldm.evaluation.features import feature_net, perceptual_distance
    from ldm.evaluation.reconstruction import Pictures, comparison_grid, evaluate_reconstruction
    from ldm.pretrained import read_vae, resolve

    device = usable_device(args.device)
    perceptual = _judge("--perceptual", perceptual_distance, args.perceptual, args.perceptual_weights, device)
    features = _judge("--features", feature_net, args.features, args.features_weights, device)
    folder = resolve(args.model, args.revision, args.variant)
    vae = read_vae(folder, args.variant).to(device)
    resolution = vae.config.sample_size if args.resolution is None else args.resolution
    if resolution < 1 or resolution % vae.downsample_factor:
        raise ValueError(f"--resolution is {resolution}; it must be a positive multiple of {vae.downsample_factor}")
    columns = Columns(args.image_column, (args.caption_column,))
    source = open_source(args.data, args.split, resolution, columns, seed=args.seed)
    pictures = Pictures(source, Transform(resolution), args.num_samples, args.batch_size, device)
    figures = evaluate_reconstruction(vae, tqdm(pictures.batches(), unit="batch"), perceptual, features)
    count = len(figures.psnr)
    _warn(count, pictures.skipped, features)
    settings = {
        "model": args.model,
        "revision": args.revision,
        "data": source.name,
        "resolution": resolution,
        "perceptual": args.perceptual,
        "features": args.features,
        "feature_dimensions": next((net.dim for net in features.values()), None),
        "skipped": len(pictures.skipped),
        "seed": args.seed,
    }
    report = {"suite": "reconstruction", "num_samples": count, "metrics": figures.metrics, "settings": settings}
    return report, comparison_grid(vae, pictures, figures.psnr)


def _single(flag: str, values: Sequence[Any] | None) -> Any:
    """The one value of a flag that takes several in another suite; None without it."""
    if values is not None and len(values) > 1:
        raise ValueError(f"{flag} has {len(values)} values; the shapes suite takes one")
    return values[0] if values else None


def _judge(
    flag: str, build: Callable[[str, str | None], Module], name: str, weights: str | None, device: torch.device
) -> dict[str, Module]:
    """The network that a flag names, by its name; none where it says `none`."""
    try:
        return {} if name == "none" else {name: build(name, weights).to(device)}
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from error


def _warn(count: int, skipped: Sequence[str], features: Mapping[str, FeatureNet]) -> None:
    """Says on stderr, in a line each, which pictures are missing and what a Frechet distance is not worth."""
    if skipped:
        print(f"warning: {len(skipped)} samples could not be used, such as {skipped[0]}", file=sys.stderr)
    for name, net in features.items():
        if count < net.dim:
            print(
                f"warning: {count} pictures are fewer than the {net.dim} features of {name}: compare this Frechet "
                "distance only with one of as many pictures",
                file=sys.stderr,
            )


def _table(report: Mapping[str, Any]) -> str:
    settings, count = report["settings"], report["num_samples"]
    perceptual, features, side = (settings[key] for key in ("perceptual", "features", "resolution"))
    names = {
        **ROWS,
        f"perceptual_{perceptual}": f"perceptual distance, {perceptual}",
        f"frechet_{features}": f"Frechet distance, {features}, {settings['feature_dimensions']} features",
    }
    rows = [(names[metric], value) for metric, value in report["metrics"].items()]
    width = max(len(name) for name, _ in rows)
    title = f"{settings['model']} on {settings['data']}, {count} pictures of {side} x {side}"
    return "\n".join([title, *(f"  {name:{width}}  {value:10.4f}" for name, value in rows)])


if __name__ == "__main__":
    main()
