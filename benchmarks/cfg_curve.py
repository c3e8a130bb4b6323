"""Accuracy on the shapes data against the guidance scale, for a model folder.

    python benchmarks/cfg_curve.py runs/shapes/ldm/export --num-samples 200 --output docs/images/cfg_curve.png

Writes a picture and a JSON beside it. Every scale draws the same captions from the same seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.shapes import evaluate_shapes
from ldm.pipeline import TextToImage

COLOURS = {"scene": "black", "kind": "#1f77b4", "color": "#d62728", "size": "#2ca02c", "relation": "#9467bd"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--num-samples", type=int, default=200, help="captions a split and scale")
    parser.add_argument("--steps", type=int, default=None, help="default: the model's own")
    parser.add_argument("--sampler", default=None, help="default: the model's own")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    pipe = TextToImage.from_pretrained(args.model)
    points: list[dict[str, Any]] = []
    for scale in args.scales:
        settings = {"guidance_scale": scale, "steps": args.steps, "sampler": args.sampler}
        report, _ = evaluate_shapes(pipe, args.num_samples, **settings)
        points.append({"guidance_scale": scale, **report})
        print(json.dumps(points[-1]), flush=True)
    figures = {
        "num_samples": args.num_samples,
        "steps": pipe.setting("num_inference_steps", args.steps),
        "sampler": pipe.setting("sampler", args.sampler),
        "points": points,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(points).save(args.output)


def draw(points: list[dict[str, Any]], width: int = 640, height: int = 360) -> Image.Image:
    """Accuracy against the scale: a line an attribute on the training distribution, dots on held-out captions."""
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    left, right, top, bottom = 50, width - 110, 20, height - 40
    scales = [point["guidance_scale"] for point in points]
    low, high = min(scales), max(max(scales), min(scales) + 1)

    def place(scale: float, accuracy: float | None) -> tuple[float, float]:
        across = left + (right - left) * (scale - low) / (high - low)
        return across, bottom - (bottom - top) * (accuracy or 0.0)

    for tick in range(0, 101, 20):
        _, y = place(low, tick / 100)
        pen.line([(left, y), (right, y)], fill="#dddddd")
        pen.text((left - 40, y - 7), f"{tick} %", fill="black", font=font)
    for scale in scales:
        pen.text((place(scale, 0)[0] - 6, bottom + 4), f"{scale:g}", fill="black", font=font)
    for index, (name, colour) in enumerate(COLOURS.items()):
        pen.line([place(p["guidance_scale"], p["train"][name]) for p in points], fill=colour, width=2)
        for point in points:
            x, y = place(point["guidance_scale"], point["heldout"][name])
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        pen.text((right + 10, top + 18 * index), name, fill=colour, font=font)
    pen.text(
        (left, bottom + 20), "guidance scale (lines: training distribution, dots: held out)", fill="black", font=font
    )
    return image


if __name__ == "__main__":
    main()
