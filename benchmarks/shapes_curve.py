"""Accuracy over training time on the shapes data, from the states that a run of train_ldm.py kept.

    python benchmarks/shapes_curve.py runs/shapes/ldm --num-samples 200 --output docs/images/shapes_curve.png

Needs a finished run whose `training.checkpoints_total_limit` let it keep its states. Writes a picture and a JSON
beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.shapes import evaluate_shapes
from ldm.pipeline import TextToImage
from ldm.training.run_dir import read_state

COLOURS = {"scene": "black", "kind": "#1f77b4", "color": "#d62728", "size": "#2ca02c", "relation": "#9467bd"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="take every n-th state")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    minutes = {row["step"]: row["seconds"] / 60 for row in rows if "seconds" in row}
    states = sorted((args.run / "state").glob("step_*"))
    points = []
    for folder in states[:: -args.every][::-1]:
        step = int(folder.name.removeprefix("step_"))
        report, _ = evaluate_shapes(pipeline(args.run, folder), args.num_samples)
        points.append({"step": step, "minutes": minutes.get(step), **report})
        print(points[-1], flush=True)
    figures = {"num_samples": args.num_samples, "points": points}
    args.output.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    draw(points).save(args.output)


def pipeline(run: Path, state: Path) -> TextToImage:
    """The exported model with the averaged weights of one state."""
    pipe = TextToImage.from_pretrained(run / "export", dtype=torch.float32)
    average = read_state(state)["ema"]
    for prefix, module in (("unet.", pipe.model.unet), ("text_encoder.", pipe.model.text_encoder)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)})
    return pipe


def draw(points: list[dict[str, object]], width: int = 640, height: int = 360) -> Image.Image:
    """Accuracy against minutes, one line an attribute, on captions of the training distribution."""
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    left, right, top, bottom = 50, width - 110, 20, height - 40
    last = max(float(p["minutes"] or 0) for p in points)
    for tick in range(0, 101, 20):
        y = bottom - (bottom - top) * tick / 100
        pen.line([(left, y), (right, y)], fill="#dddddd")
        pen.text((left - 40, y - 7), f"{tick} %", fill="black", font=font)
    for index, (name, colour) in enumerate(COLOURS.items()):
        across = [left + (right - left) * float(p["minutes"] or 0) / last for p in points]
        up = [bottom - (bottom - top) * float(p["train"][name] or 0) for p in points]
        line = list(zip(across, up, strict=True))
        pen.line(line, fill=colour, width=2)
        pen.text((right + 10, top + 18 * index), name, fill=colour, font=font)
    pen.text((left, bottom + 12), f"minutes of stage two (0 to {last:.0f})", fill="black", font=font)
    return image


if __name__ == "__main__":
    main()
