"""ldm-evaluate: measure a model and write the figures as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    p = argparse.ArgumentParser(prog="ldm-evaluate", description="Measure a model.", allow_abbrev=False)
    p.add_argument("--model", default=None, help="model folder or hub id (default: the bundled model)")
    p.add_argument("--suite", choices=("reconstruction", "shapes"), required=True)
    p.add_argument("--data", default="shapes", help="data source of the reconstruction suite")
    p.add_argument("--split", default="validation", help="split of --data")
    p.add_argument("--resolution", type=int, default=None, help="default: the model's own")
    p.add_argument("--features", choices=("none", "efficientnet_lite0"), default="none", help="perceptual distance too")
    p.add_argument("--num-samples", type=int, default=500, help="pictures, of each split in the shapes suite")
    p.add_argument("--num-shapes", type=int, choices=(1, 2), default=None, help="shapes suite: scenes of one or two")
    p.add_argument("--steps", type=int, default=None)
    p.add_argument("--guidance-scale", type=float, default=None)
    p.add_argument("--sampler", default=None)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-size", type=int, default=50)
    p.add_argument("--device", default=None)
    p.add_argument("--output", default=None, metavar="FILE.json", help="where to write the figures and a picture grid")
    return p


def main() -> None:
    """Entry point: exit code 2 and one sentence on bad input, 130 when interrupted."""
    try:
        run(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Measures, prints the figures, and writes them and a grid beside them where `--output` says.

    Raises:
        ValueError: one sentence naming the flag or file at fault.
    """
    args = parser().parse_args(list(argv))
    if args.num_samples < 1:
        raise ValueError(f"--num-samples is {args.num_samples}; it must be at least 1")
    report, grid = _shapes(args) if args.suite == "shapes" else _reconstruction(args)
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        grid.save(path.with_suffix(".png"))
    return report


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _shapes(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    from ldm.evaluation.grid import image_grid
    from ldm.evaluation.shapes import SPLITS, evaluate_shapes
    from ldm.pipeline import TextToImage

    pipe = TextToImage.from_pretrained(args.model, _device(args))
    wanted = {"steps": args.steps, "guidance_scale": args.guidance_scale, "sampler": args.sampler}
    with tqdm(total=args.num_samples * len(SPLITS), unit="image") as bar:
        splits, drawn = evaluate_shapes(
            pipe, args.num_samples, args.seed, args.num_shapes, args.batch_size, bar.update, **wanted
        )
    settings = {
        "model": args.model or "bundled",
        "steps": pipe.setting("num_inference_steps", args.steps),
        "guidance_scale": pipe.setting("guidance_scale", args.guidance_scale),
        "sampler": pipe.setting("sampler", args.sampler),
        "seed": args.seed,
        "num_shapes": args.num_shapes,
    }
    shown = [row for name in drawn for row in drawn[name][:16]]
    labels = [f"{'ok' if row[2].scene else 'WRONG'}: {row[0]}" for row in shown]
    grid = image_grid([row[1] for row in shown], 8, labels, min_side=128)
    return {"suite": "shapes", "num_samples": args.num_samples, "splits": splits, "settings": settings}, grid


def _reconstruction(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    import torch

    from autoencoder import EfficientNetFeatureDistance
    from ldm.data.batches import Transform
    from ldm.data.pixels import stacked
    from ldm.data.sources import open_source
    from ldm.data.transforms import to_images
    from ldm.evaluation.grid import image_grid
    from ldm.evaluation.reconstruction import psnr, reconstruct
    from ldm.pretrained import BUNDLED, read_vae, resolve

    device = _device(args)
    vae = read_vae(resolve(args.model or BUNDLED)).to(device)
    resolution = args.resolution or vae.config.sample_size
    source = open_source(args.data, args.split, resolution, max_samples=args.num_samples)
    images = stacked(source, Transform(resolution), args.num_samples)
    pairs = list(reconstruct(vae, (chunk.to(device) for chunk in torch.split(images, 32))))
    x, y = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
    values = psnr(x, y)
    order = values.argsort()
    middle = len(order) // 2
    chosen = torch.cat([order[:8], order[middle : middle + 8]])
    labels = [f"{values[i]:.1f} dB" for i in chosen]
    grid = image_grid(to_images(x[chosen]) + to_images(y[chosen]), len(chosen), labels * 2, min_side=64)
    metrics = {
        "psnr": float(values.mean()),
        "psnr_median": float(values.median()),
        "psnr_worst": float(values.min()),
        "l1": float((x - y).abs().mean()),
    }
    if args.features == "efficientnet_lite0":
        distance = EfficientNetFeatureDistance()
        distances = torch.cat([distance(b.cpu(), a.cpu()) for a, b in pairs])
        metrics["perceptual_efficientnet_lite0"] = float(distances.mean())
    settings = {"model": args.model or "bundled", "data": source.name, "resolution": resolution}
    return {"suite": "reconstruction", "num_samples": len(x), "metrics": metrics, "settings": settings}, grid


if __name__ == "__main__":
    main()
