"""ldm-generate: prompts to PNG files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import options
from ldm.cli.device import usable_device
from ldm.cli.exits import exit_codes

if TYPE_CHECKING:
    from ldm.evaluation.ranking import Ranking
    from ldm.pipeline import TextToImage

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "euler_a": "Euler a",
    "unipc": "UniPC",
    "langevin": "Langevin",
    "predictor_corrector": "Predictor-corrector",
}
STORED_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "seed": (int,),
    "negative_prompt": (str, type(None)),
    "model": (str, type(None)),
    "revision": (str, type(None)),
    "variant": (str, type(None)),
    "lora": (list,),
    "dtype": (str, type(None)),
    "steps": (int,),
    "guidance_scale": (int, float),
    "sampler": (str,),
    "height": (int,),
    "width": (int,),
    "init_image": (str, type(None)),
    "strength": (int, float),
    "mask": (str, type(None)),
    "prompt_syntax": (str,),
}
"""What the `ldm` text chunk of a PNG holds, besides `options.STORED_KINDS`; what a file lacks has its default."""


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    p = argparse.ArgumentParser(prog="ldm-generate", description="Draw images from prompts.", allow_abbrev=False)
    p.add_argument("--prompt", "-p", action="append", default=[], help="what to draw; may be given several times")
    p.add_argument("--prompts-file", "--from-file", metavar="FILE", help="one prompt a line")
    p.add_argument("--negative-prompt", "-n", default=None, help="what to stay away from")
    p.add_argument("--model", "-m", default=None, help="model folder, single file, hub id, emoji or shapes")
    p.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    p.add_argument("--variant", default=None, help="which weight files to read, such as fp16")
    p.add_argument("--allow-pickle", action="store_true", help="read the tensors of .ckpt, .bin and .pt files too")
    p.add_argument("--lora", metavar="PATH[:SCALE]", action="append", default=[], help="may be given several times")
    p.add_argument(
        "--prompt-syntax",
        choices=("plain", "a1111"),
        default="plain",
        help="a1111: (word), (words:1.3) and [word] weight words, \\( is a bracket",
    )
    p.add_argument("--num-images", type=int, default=1, help="pictures a prompt")
    p.add_argument("--steps", "--num-inference-steps", type=int, default=None)
    p.add_argument("--guidance-scale", "--cfg-scale", type=float, default=None)
    p.add_argument(
        "--sampler", "--scheduler", default=None, help=f"one of {', '.join(SAMPLER_NAMES)}, or diffusers:CLASS"
    )
    p.add_argument("--seed", type=int, default=0, help="picture i uses seed + i")
    p.add_argument("--height", type=int, default=None)
    p.add_argument("--width", type=int, default=None)
    p.add_argument("--batch-size", type=int, default=8, help="pictures at once; changes speed and memory only")
    p.add_argument("--init-image", metavar="FILE", help="start from this picture")
    p.add_argument("--strength", type=float, default=0.8, help="how much of --init-image to redo, in (0, 1]")
    p.add_argument("--mask", metavar="FILE", help="with --init-image: white is drawn anew, black is kept")
    p.add_argument(
        "--tiled",
        nargs="?",
        const="strips",
        choices=("strips", "tiles"),
        help="decode large pictures in strips (less memory, the same picture) or in tiles (little memory, near it)",
    )
    options.add_options(p)
    p.add_argument("--from-image", metavar="PNG", help="draw a PNG made here again; given flags win over its settings")
    p.add_argument("--output", "--outdir", "-o", default="outputs", help="folder, or a .png file for a single picture")
    p.add_argument("--grid", action="store_true", help="also write grid.png with the prompts as labels")
    p.add_argument("--metadata", choices=("a1111", "none"), default="a1111", help="text chunks in the PNG files")
    p.add_argument("--device", default=None, help="cpu, cuda, mps (default: the best that is there)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return p


def run(argv: Sequence[str]) -> dict[str, Any]:
    """Draws and writes the pictures; returns what `--json` prints.

    Raises:
        ValueError: one sentence naming the flag or file at fault.
    """
    started = time.perf_counter()
    args = parser().parse_args(list(argv))
    args = _repeated(argv, args.from_image) if args.from_image else args
    prompts = _prompts(args)
    init, mask = _picture(args.init_image, "--init-image"), _picture(args.mask, "--mask")
    if mask is not None and init is None:
        raise ValueError("--mask needs --init-image, the picture whose black part is kept")
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    places = options.parts(args)
    if places is not None:
        options.check_interpolation(prompts, args.num_images, args.best_of)
    count = len(prompts) * args.num_images if places is None else len(places)
    target = Path(args.output)
    if target.suffix.lower() == ".png" and count > 1:
        raise ValueError(f"--output {target} is one file, but {count} pictures were asked for")
    ranking = options.ranking(args, usable_device(args.device))
    pipe = _load(args)
    loaded = time.perf_counter()
    for prompt in prompts:
        cut = pipe.model.text_encoder.truncated(prompt)
        if cut:
            print(f"warning: the prompt is longer than the model reads; left out: {cut!r}", file=sys.stderr)
    pictures = _pictures(args, prompts, places)
    images = _draw(pipe, args, pictures, ranking, init, mask)
    drawn = time.perf_counter()
    files = _write(pipe, args, pictures, images, target)
    return {
        "images": [str(f) for f in files],
        "seconds": {"load": round(loaded - started, 3), "draw": round(drawn - loaded, 3)},
        "settings": _settings(pipe, args),
    }


def main() -> None:
    """Entry point: one sentence and exit code 2 on bad input, 1 for values not finite; 130 when interrupted."""
    with exit_codes():
        result = run(sys.argv[1:])
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        print("\n".join(result["images"]))


def _load(args: argparse.Namespace) -> TextToImage:
    import torch

    from ldm.pipeline import TextToImage

    loras = [_scaled(text) for text in args.lora]
    placed = usable_device(args.device)
    pipe = TextToImage.from_pretrained(
        args.model,
        placed,
        getattr(torch, args.dtype) if args.dtype else None,
        revision=args.revision,
        variant=args.variant,
        allow_pickle=args.allow_pickle,
    )
    for path, scale in loras:
        pipe.load_lora(path, scale)
    return pipe


def _scaled(text: str) -> tuple[str, float]:
    """Path and scale of `PATH[:SCALE]`; a colon that belongs to the path of a file is left there."""
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError as error:
        raise ValueError(f"--lora {text}: the scale {scale!r} is not a number") from error


def _pictures(args: argparse.Namespace, prompts: list[str], places: list[float] | None) -> list[dict[str, Any]]:
    """Prompt, seed and place on an interpolation's way of each picture."""
    if places is not None:
        return [{"prompt": prompts[0], "seed": args.seed, "part": part} for part in places]
    texts = [prompt for prompt in prompts for _ in range(args.num_images)]
    return [{"prompt": text, "seed": args.seed + i, "part": None} for i, text in enumerate(texts)]


def _name(index: int, picture: dict[str, Any]) -> str:
    return f"{index:05d}_seed{picture['seed']}"


def _draw(
    pipe: TextToImage,
    args: argparse.Namespace,
    pictures: list[dict[str, Any]],
    ranking: Ranking,
    init: Image.Image | None,
    mask: Image.Image | None,
) -> list[Image.Image]:
    """The pictures; with several candidates each, `pictures` is told the seeds of those that were kept."""
    from tqdm import tqdm

    candidates = [
        _name(index, {**picture, "seed": seed})
        for index, picture in enumerate(pictures)
        for seed in (ranking.seeds(args.seed, index) if picture["part"] is None else [picture["seed"]])
    ]
    settings = {
        "negative_prompt": args.negative_prompt,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "sampler": args.sampler,
        "height": args.height,
        "width": args.width,
        "batch_size": args.batch_size,
        "init_image": init,
        "strength": args.strength,
        "mask": mask,
        "tiled": args.tiled,
        "prompt_syntax": args.prompt_syntax,
        **options.settings(args, pipe, candidates),
    }
    first = pictures[0]
    with tqdm(total=len(candidates), unit="image", disable=args.json or None, leave=False) as bar:
        if first["part"] is None:
            captions = [picture["prompt"] for picture in pictures]
            chosen = ranking.draw(pipe, captions, args.seed, progress=bar.update, **settings)
            for picture, (_, seed) in zip(pictures, chosen, strict=True):
                picture["seed"] = seed
            return [image for image, _ in chosen]
        prompts = (first["prompt"], first["prompt"] if args.to_prompt is None else args.to_prompt)
        seeds = (args.seed, args.seed if args.to_seed is None else args.to_seed)
        return pipe.interpolate(prompts, seeds, [p["part"] for p in pictures], progress=bar.update, **settings)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {args.prompts_file} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt was given; use --prompt "a red circle" or --prompts-file FILE')
    return prompts


def _picture(path: str | None, flag: str) -> Image.Image | None:
    if path is None:
        return None
    from ldm.data.transforms import BadImage, open_image

    try:
        return open_image(path, path)
    except BadImage as error:
        raise ValueError(f"{flag}: {error}") from error


def _settings(pipe: TextToImage, args: argparse.Namespace) -> dict[str, Any]:
    from ldm.pretrained import DEFAULT_MODEL

    return {
        "negative_prompt": args.negative_prompt,
        "model": args.model or DEFAULT_MODEL,
        "revision": args.revision,
        "variant": args.variant,
        "lora": args.lora,
        "dtype": args.dtype,
        "steps": pipe.setting("num_inference_steps", args.steps),
        "guidance_scale": pipe.setting("guidance_scale", args.guidance_scale),
        "sampler": pipe.setting("sampler", args.sampler),
        "height": pipe.default_size if args.height is None else args.height,
        "width": pipe.default_size if args.width is None else args.width,
        "init_image": args.init_image,
        "strength": args.strength,
        "mask": args.mask,
        "prompt_syntax": args.prompt_syntax,
        **options.stored_options(args),
    }


def _write(
    pipe: TextToImage,
    args: argparse.Namespace,
    pictures: list[dict[str, Any]],
    images: list[Image.Image],
    target: Path,
) -> list[Path]:
    single = target.suffix.lower() == ".png"
    folder = target.parent if single else target
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for index, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        files.append(target if single else folder / f"{_name(index, picture)}.png")
        settings = {**picture, **_settings(pipe, args)}
        image.save(files[-1], pnginfo=png_text(settings) if args.metadata == "a1111" else None)
    if args.grid:
        from ldm.evaluation.grid import image_grid

        files.append(folder / "grid.png")
        image_grid(images, labels=[p["prompt"] for p in pictures], min_side=128).save(files[-1])
    return files


def png_text(settings: dict[str, Any]) -> PngInfo:
    """The settings as text chunks: AUTOMATIC1111's `parameters`, and `ldm`, JSON to make the picture again from."""
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    name = SAMPLER_NAMES.get(settings["sampler"], settings["sampler"])
    lines.append(
        f"Steps: {settings['steps']}, Sampler: {name}, CFG scale: {settings['guidance_scale']}, "
        f"Seed: {settings['seed']}, Size: {settings['width']}x{settings['height']}"
    )
    info = PngInfo()
    info.add_itxt("parameters", "\n".join(lines))
    info.add_itxt("ldm", json.dumps(settings))
    return info


def _repeated(argv: Sequence[str], png: str) -> argparse.Namespace:
    """The flags of `argv`, with what the PNG holds in the place of the defaults."""
    stored = _stored(png)
    if stored.get("model", "") is None:
        stored["model"] = "shapes"  # what drew without a model before its name was written
    prompt, loras = stored.pop("prompt"), stored.pop("lora", [])
    p = parser()
    p.set_defaults(**stored)
    args = p.parse_args(list(argv))
    args.lora = args.lora or loras
    if not args.prompt and not args.prompts_file:
        args.prompt = [prompt]
    return args


def _stored(png: str) -> dict[str, Any]:
    try:
        with Image.open(png, formats=("PNG",)) as image:
            image.load()
            found = json.loads(getattr(image, "text", {})["ldm"])
        kinds = {**STORED_KINDS, **options.STORED_KINDS}
        stored = {key: found[key] for key in kinds if key in found or key in ("prompt", "seed")}
    except (OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"--from-image {png} is not a PNG made by ldm-generate") from error
    for key, value in stored.items():
        loras = value if key == "lora" and isinstance(value, list) else []
        if not isinstance(value, kinds[key]) or not all(isinstance(item, str) for item in loras):
            raise ValueError(f"--from-image {png} holds {key} {value!r}, which ldm-generate does not write")
    return stored


if __name__ == "__main__":
    main()
