"""Trains a small CLIP on captioned pictures: the start of stage two's text encoder, and with another seed its judge.

    python -m benchmarks.emoji_clip --minutes 10 --output runs/emoji/clip
    python -m benchmarks.emoji_clip --minutes 10 --seed 1 --output runs/emoji/judge

The image tower is an ImageNet EfficientNet-Lite0, whose weights come in a package, and stays as it is; a head over its
pooled features and a text transformer are trained against it (Zhai et al. 2022, LiT). Its features are computed once,
so that a core has a judge in minutes. The folder is one of open_clip's: `open_clip.create_model("local-dir:DIR")`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from torch import Tensor

from autoencoder.perceptual import load_efficientnet
from ldm.data.batches import Transform
from ldm.data.sources import Columns, Source, open_source
from ldm.data.transforms import to_images
from ldm.evaluation.text_image import CANDIDATES, candidate_rows, r_precision

CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "mlp",
        "timm_drop": 0.1,
    },
    "text_cfg": {"context_length": 20, "width": 128, "heads": 4, "layers": 2},
}
MEAN, STD = 127 / 255, 128 / 255
"""How EfficientNet-Lite was shown its pictures, as shares of the largest level."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of all, the features included")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", default="emoji", metavar="SOURCE")
    parser.add_argument("--caption-columns", nargs="+", default=["captions"])
    parser.add_argument("--image-size", type=int, default=96, help="side to which the tower resizes pictures")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(args.seed)
    model, preprocess, tokenizer = new_model(args.output, args.image_size)
    columns = Columns("image", tuple(args.caption_columns))
    sources = [open_source(args.data, split, 64, columns) for split in ("train", "validation")]
    (features, captions), (held, held_captions) = (encoded(model, preprocess, source) for source in sources)
    print(f"features of {len(features)} + {len(held)} pictures: {time.monotonic() - start:.0f} s", flush=True)
    steps = train(model, tokenizer, features, captions, start + 60 * args.minutes, args)
    texts = [row[0] for row in held_captions]
    with torch.no_grad():
        figures = retrieval(model.visual.head(held), model.encode_text(tokenizer(texts)), texts)
    figures |= {"steps": steps, "batch_size": args.batch_size, "seconds": round(time.monotonic() - start)}
    save_file(model.state_dict(), args.output / "open_clip_model.safetensors")
    (args.output / "retrieval.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


def new_model(folder: Path, image_size: int) -> tuple[Any, Any, Any]:
    """A CLIP with the image tower's ImageNet weights, how it takes pictures, and its tokenizer; writes the config."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "open_clip_config.json"
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": image_size}}
    path.write_text(json.dumps({"model_cfg": config}))
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, load_weights=False, image_mean=(MEAN,) * 3, image_std=(STD,) * 3, image_interpolation="bicubic"
    )
    save_config_for_hf(model, path, config)
    trunk, source = model.visual.trunk, load_efficientnet("efficientnet-lite0").state_dict()
    weights = dict(zip(trunk.state_dict(), source.values(), strict=False))  # the same network; ours has no classifier
    trunk.load_state_dict(weights)
    model.lock_image_tower()
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@torch.no_grad()
def encoded(model: Any, preprocess: Any, source: Source) -> tuple[Tensor, list[tuple[str, ...]]]:
    """The image tower's pooled features [N, 1280] of every picture, and its captions."""
    transform, features, captions = Transform(64), list[Tensor](), list[tuple[str, ...]]()
    for first in range(0, len(source), 64):
        examples = [source[i] for i in range(first, min(first + 64, len(source)))]
        images = to_images(torch.stack([transform(example, 0, 0) for example in examples]))
        features.append(model.visual.trunk(torch.stack([preprocess(image) for image in images])))
        captions += [example.captions for example in examples]
    return torch.cat(features), captions


def train(
    model: Any,
    tokenizer: Any,
    features: Tensor,
    captions: Sequence[Sequence[str]],
    deadline: float,
    args: argparse.Namespace,
) -> int:
    """Contrastive steps until the deadline, the learning rate a cosine of the time left; returns their number."""
    rng, start, steps = random.Random(args.seed), time.monotonic(), 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    contrast = open_clip.ClipLoss()
    model.visual.head.train()
    while (now := time.monotonic()) < deadline:
        rows = rng.sample(range(len(features)), min(args.batch_size, len(features)))
        tokens = tokenizer([rng.choice(captions[row]) for row in rows])
        rate = math.cos(math.pi / 2 * (now - start) / (deadline - start)) * min(1, (steps + 1) / 50)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        images = F.normalize(model.visual.head(features[rows]), dim=-1)
        loss = contrast(images, model.encode_text(tokens, normalize=True), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}, {now - start:.0f} s, loss {float(loss):.3f}", flush=True)
    model.eval()
    return steps


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, Any]:
    """How often the own caption, or picture, is found: among 32 captions, and among all. Each caption stands once."""
    if len(captions) < 2:
        return {"pairs": len(captions)}
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    similarity, own, count = images @ texts.T, torch.arange(len(images)), min(CANDIDATES, len(captions))
    candidates = candidate_rows(own.tolist(), len(captions), count)
    ranks = {
        "image_to_text": (similarity > similarity.diagonal()[:, None]).sum(1),
        "text_to_image": (similarity > similarity.diagonal()[None]).sum(0),
    }
    found = {f"{way}_top{k}": float((rank < k).float().mean()) for way, rank in ranks.items() for k in (1, 5)}
    own_found = float(r_precision(images, texts, candidates).mean())
    return {"pairs": len(images), f"r_precision_{count}": own_found, **found}


if __name__ == "__main__":
    main()
