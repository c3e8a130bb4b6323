"""DreamBooth on a model of the shapes: five pictures of a red heart, and what becomes of the rest.

    python -m benchmarks.dreambooth --model shapes --output runs/dreambooth

runs train_configs/shapes/dreambooth.yaml on the model (class pictures and training), then draws with and without the
LoRA that it leaves: the subject on every background, beside other shapes, and the captions of `ldm-evaluate --suite
shapes` with the same seeds. Prints JSON, writes it to report.json, and a grid of both to grid.png. Further flags,
such as `--training.max_train_steps 100`, are overrides of the config. A training that is complete is not repeated.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.heart import PROMPT, is_heart
from ldm.data.shapes import BACKGROUNDS
from ldm.evaluation.grid import image_grid
from ldm.evaluation.shapes import evaluate_shapes
from ldm.pipeline import TextToImage

CONFIG = "train_configs/shapes/dreambooth.yaml"
SHOWN = (
    *(PROMPT.format(name) for name in ("white", "navy", "gray")),
    "a large sks heart above a small blue square on a beige background",
    "a small sks heart on a black background",
    "a large red circle on a white background",
    "a large yellow star above a small red square on a navy background",
)
"""Prompts of the grid: the subject, the subject in new company, and what must stay as it was."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run and the figures")
    parser.add_argument("--num-samples", type=int, default=300, help="captions of each split of the shapes suite")
    parser.add_argument("--num-hearts", type=int, default=10, help="pictures of the subject on each background")
    args, overrides = parser.parse_known_args()
    minutes = train(args.model, args.output / "run", overrides)
    pipe = TextToImage.from_pretrained(args.model)
    before, shown_before = measured(pipe, args.num_samples, args.num_hearts)
    pipe.load_lora(args.output / "run" / "adapter")
    after, shown_after = measured(pipe, args.num_samples, args.num_hearts)
    report = {
        "model": args.model,
        "training_cpu_minutes": minutes,
        "captions_a_split": args.num_samples,
        "hearts_drawn": args.num_hearts * len(BACKGROUNDS),
        "before": before,
        "after": after,
        "points_lost": lost(before["shapes"], after["shapes"]),
    }
    text = json.dumps(report, indent=2)
    (args.output / "report.json").write_text(text + "\n", encoding="utf-8")
    labels = [f"{when}: {prompt}" for when in ("before", "after") for prompt in SHOWN]
    image_grid(shown_before + shown_after, len(SHOWN), labels, min_side=128).save(args.output / "grid.png")
    print(text)


def train(model: str, run: Path, overrides: list[str]) -> float | None:
    """Minutes of CPU time of the training, class pictures included; None where it was done already."""
    if (run / "adapter").exists():
        return None
    command = ["train_ldm.py", "--config", CONFIG, "--pretrained", model, "--output_dir", str(run), *overrides]
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round((used.ru_utime + used.ru_stime) / 60, 2)


def measured(pipe: TextToImage, captions: int, hearts: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """The share of subjects that are right, the accuracies of the shapes suite, and the pictures of the grid."""
    prompts = [PROMPT.format(name) for name in BACKGROUNDS]
    drawn = pipe(prompts, num_images=hearts, seed=0, batch_size=50)
    splits, _ = evaluate_shapes(pipe, captions)
    return {"hearts": sum(map(is_heart, drawn)) / len(drawn), "shapes": splits}, pipe(list(SHOWN), seed=1)


def lost(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Percentage points that each attribute of each split lost."""
    return {
        split: {name: round(100 * (value - after[split][name]), 2) for name, value in row.items() if value is not None}
        for split, row in before.items()
    }


if __name__ == "__main__":
    main()
