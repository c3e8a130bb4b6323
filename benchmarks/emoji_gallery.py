"""The pictures of docs/gallery.md: fixed prompts, their nearest training pictures, sweeps and ways between prompts.

    python -m benchmarks.emoji_gallery --model emoji --output docs/images/gallery

Prompt i has seed i. `seen` are names and styles of training pictures, `combinations` names that training holds in
other styles only, `names` those that it does not hold at all, and `free` what people might type. Under every grid of
pictures stand the training pictures that are nearest in the features of EfficientNet-Lite2.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from ldm.data.batches import Transform
from ldm.data.emoji import STYLES
from ldm.data.sources import Columns, open_source
from ldm.data.transforms import to_images, to_tensor
from ldm.evaluation.features import feature_net
from ldm.evaluation.generation import JudgedSet, Judges, judge_pictures
from ldm.evaluation.grid import image_grid
from ldm.evaluation.judged_cache import JudgedCache, judges_key
from ldm.evaluation.memorisation import Neighbours
from ldm.evaluation.reconstruction import Pictures
from ldm.evaluation.sharing import Share
from ldm.pipeline import TextToImage

SEEN = (
    "fluent-3d: red heart, sun, hamburger, sunflower, umbrella, guitar, ghost, balloon",
    "noto: cat face, grinning face, strawberry, hot beverage, butterfly, full moon, snowman, key",
    "twemoji: pizza, banana, dog face, four leaf clover, star, automobile, light bulb, skull",
    "fluent-flat: rocket, birthday cake, frog, cactus, rainbow, crown, thumbs up, blue heart",
)
"""32 prompts by style, chosen before any model was trained on them."""
COMBINATIONS = (
    "fluent-3d: red apple, panda, dumpling",
    "noto: green heart, yellow heart",
    "twemoji: rocket, pineapple",
    "fluent-flat: soccer ball",
)
NAMES = (
    "fluent-3d: dragon, cold face",
    "noto: new moon, bacon, eggplant",
    "twemoji: two-hump camel, pause button",
    "fluent-flat: tulip",
)
FREE = (
    "a red heart",
    "cat",
    "a happy cat face",
    "glossy 3d pizza",
    "flat fluent emoji of a rocket",
    "a smiling yellow face",
    "green tree",
    "flag with red and white stripes",
)
SWEPT = (0, 8, 16, 24)
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)
STEPS = (5, 10, 25, 50, 100)
WAYS = ((0, 31), (8, 18), (9, 23))
"""Pairs of the seen prompts to walk between."""
NET = "efficientnet_lite2"


def prompts(groups: tuple[str, ...]) -> list[str]:
    """`style: name, name` as captions of the data."""
    pairs = [group.split(": ") for group in groups]
    return [f"a {STYLES[style]} emoji of {name}" for style, names in pairs for name in names.split(", ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="default: the bundled one")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="keep the features of the training pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pipe = TextToImage.from_pretrained(args.model)
    seen = prompts(SEEN)
    sets = {"seen": seen, "combinations": prompts(COMBINATIONS), "names": prompts(NAMES), "free": list(FREE)}
    drawn = {name: pipe(captions, seed=0, batch_size=32) for name, captions in sets.items()}
    copies = Copies(args.feature_cache)
    for name, images in drawn.items():
        nearest, labels = copies.nearest(images)
        rows = [half for i in range(0, len(images), 8) for half in (images[i : i + 8], nearest[i : i + 8])]
        texts = [half for i in range(0, len(images), 8) for half in (sets[name][i : i + 8], labels[i : i + 8])]
        grid = image_grid([x for row in rows for x in row], 8, [x for row in texts for x in row], min_side=96)
        grid.save(args.output / f"{name}.png")
        print(json.dumps({"set": name, "distances": labels}))
    swept = [seen[i] for i in SWEPT]
    guided = [pipe(seen[i], guidance_scale=scale, seed=i)[0] for scale in GUIDANCE for i in SWEPT]
    stepped = [pipe(seen[i], steps=count, seed=i)[0] for count in STEPS for i in SWEPT]
    for name, images, values in (("guidance", guided, GUIDANCE), ("steps", stepped, STEPS)):
        labels = [f"{name} {value:g}: {prompt}" for value in values for prompt in swept]
        image_grid(images, len(swept), labels, min_side=96).save(args.output / f"{name}.png")
    parts = [part / 7 for part in range(8)]
    ways = [pipe.interpolate((seen[a], seen[b]), (a, b), parts) for a, b in WAYS]
    image_grid([image for way in ways for image in way], 8, None, min_side=96).save(args.output / "ways.png")


class Copies:
    """The training pictures of the emoji in feature space."""

    def __init__(self, cache: Path | None) -> None:
        source = open_source("emoji", "train", 64, Columns("image", ("text",)))
        self.pictures = Pictures(source, Transform(64), len(source), 64)
        self.net = feature_net(NET)

        def judge() -> JudgedSet:
            return judge_pictures(self.pictures, Judges(NET, self.net, None), Share(), labelled=False)

        kept = JudgedCache(cache, judges_key((NET,), ()))
        self.features = kept.get(self.pictures, 64, False, judge).vectors.features

    def nearest(self, images: list[Image.Image]) -> tuple[list[Image.Image], list[str]]:
        """For each picture the training picture nearest to it, and its caption with the distance."""
        features = self.net(torch.stack([to_tensor(image) for image in images]))
        found = Neighbours.of(features, self.features)
        rows = found.indices.tolist()
        labels = [
            f"{self.pictures.captions[row][0]} ({distance:.2f})"
            for row, distance in zip(rows, found.distances.tolist(), strict=True)
        ]
        return to_images(self.pictures.again(rows)), labels


if __name__ == "__main__":
    main()
