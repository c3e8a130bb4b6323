"""ldm-data: look at a data set, encode it once, check the encoded one, or write it as a folder."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from ldm.cli.exits import exit_codes

if TYPE_CHECKING:
    from conditioning import TextEncoder
    from ldm.data.inspection import TokenCounter
    from ldm.data.sources import Source, Stream

Item = TypeVar("Item")


def parser() -> argparse.ArgumentParser:
    """The subcommands and their flags."""
    p = argparse.ArgumentParser(prog="ldm-data", description="Look at, encode, check or convert a data set.")
    commands = p.add_subparsers(dest="command", required=True)
    looked = _with_source(commands, "inspect", "counts, captions, sizes, buckets, tokens and what cannot be used")
    looked.add_argument("--model", default=None, help="model whose tokenizer counts (default: CLIP's, or the bundled)")
    looked.add_argument("--resolution", type=int, default=512, help="side of the square that buckets are made for")
    looked.add_argument("--bucket-step", type=int, default=64)
    looked.add_argument("--max-aspect-ratio", type=float, default=2.0)
    looked.add_argument("--list", type=int, default=20, metavar="N", help="names shown of each kind of unusable sample")
    looked.add_argument("--json", action="store_true", help="print the whole report as JSON")
    cached = _with_source(commands, "cache", "encode a data set once; start it with accelerate for several processes")
    cached.add_argument("--model", required=True, help="model folder, vae folder or hub id")
    cached.add_argument("--output", required=True, metavar="CACHE", help="folder, later latents.folder")
    cached.add_argument(
        "--text-encoder",
        metavar="YAML",
        help="encode the captions too, for latents.cache_text: a frozen text_encoder section, such as "
        "'{type: t5, path: FOLDER}', or '{type: pretrained}' for that of --model",
    )
    cached.add_argument("--resolution", type=int, default=None, help="default: the model's own")
    cached.add_argument("--random-flip", action="store_true", help="also encode every picture's mirror image")
    cached.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    cached.add_argument("--bucket-step", type=int, default=64)
    cached.add_argument("--max-aspect-ratio", type=float, default=1.0, help="over 1: aspect-ratio buckets")
    cached.add_argument("--batch-size", type=int, default=16)
    cached.add_argument("--shard-size", type=int, default=8192, help="samples a file")
    cached.add_argument("--max-bad-fraction", type=float, default=0.01, help="more unusable samples end the run")
    cached.add_argument("--device", default=None, help="cpu, or what accelerate chooses")
    drawn = _with_source(commands, "errors", "what a model gets wrong of each picture's latents, for latent_errors")
    drawn.add_argument("--model", "-m", required=True, help="model folder, single file, hub id, emoji or shapes")
    drawn.add_argument("--output", required=True, metavar="FILE", help="a .safetensors file, later latent_errors")
    drawn.add_argument("--resolution", type=int, default=None, help="default: the model's own")
    drawn.add_argument(
        "--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="how much is drawn anew, in (0, 1]"
    )
    drawn.add_argument("--steps", "--num-inference-steps", type=int, default=10, help="of the whole way")
    drawn.add_argument("--guidance-scale", type=float, default=None)
    drawn.add_argument("--sampler", default=None)
    drawn.add_argument("--batch-size", type=int, default=16)
    drawn.add_argument("--max-bad-fraction", type=float, default=0.01, help="more unusable samples end the run")
    drawn.add_argument("--device", default=None)
    verified = commands.add_parser("verify", help="read every byte of a cache", allow_abbrev=False)
    verified.add_argument("cache", type=Path, metavar="CACHE")
    exported = _with_source(commands, "export", "write PNG pictures with metadata.jsonl")
    exported.add_argument("folder", type=Path, metavar="FOLDER")
    return p


def _with_source(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    p: argparse.ArgumentParser = commands.add_parser(name, help=text, allow_abbrev=False)
    p.add_argument("source", metavar="SOURCE", help="any data.source: shapes, emoji, folder, .parquet, .tar, hub id")
    p.add_argument("--split", default="train")
    p.add_argument("--image-column", default="image", metavar="NAME")
    p.add_argument("--caption-columns", default=["text"], nargs="+", metavar="NAME")
    p.add_argument("--max-samples", type=int, default=None, help="read the first ones only")
    p.add_argument("--streaming", action="store_true", help="read in order, without an index")
    p.add_argument("--seed", type=int, default=0, help="of the built-in shapes")
    return p


def main() -> None:
    """Entry point: exit code 2 and one sentence on bad input, 130 when interrupted."""
    with exit_codes():
        run(sys.argv[1:])


def run(argv: Sequence[str]) -> None:
    """Runs one subcommand.

    Raises:
        ValueError: one sentence naming the flag, file or sample at fault.
    """
    args = parser().parse_args(list(argv))
    for flag in ("max_samples", "resolution", "bucket_step", "max_aspect_ratio", "batch_size", "shard_size"):
        value = getattr(args, flag, None)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "inspect": _inspect,
        "cache": _cache,
        "errors": _errors,
        "verify": _verify,
        "export": _export,
    }
    commands[args.command](args)


def _open(args: argparse.Namespace, resolution: int) -> Source | Stream:
    from ldm.data.sources import Columns, open_source, open_stream

    columns = Columns(args.image_column, tuple(args.caption_columns))
    if not args.streaming:
        return open_source(args.source, args.split, resolution, columns, args.max_samples, seed=args.seed)
    if args.source == "shapes" or args.max_samples is not None:
        raise ValueError("--streaming reads a whole source in its order; it takes no shapes and no --max-samples")
    return open_stream(args.source, args.split, columns, args.seed, shuffle_buffer=1)


def _bar(items: Iterable[Item], total: int | None) -> Iterable[Item]:
    """The items with a progress bar on a terminal."""
    return tqdm(items, total=total, unit="sample", leave=False, disable=None)


def _inspect(args: argparse.Namespace) -> None:
    from ldm.data.buckets import Buckets
    from ldm.data.inspection import as_text, inspect
    from ldm.data.sources import every_sample

    source = _open(args, args.resolution)
    buckets = Buckets(args.resolution, args.bucket_step, args.max_aspect_ratio)
    total = None if args.streaming else len(source)  # type: ignore[arg-type]
    report = inspect(source, buckets, _tokens(args.model), _bar(every_sample(source), total))
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else as_text(report, args.list))


def _tokens(model: str | None) -> TokenCounter:
    """The tokenizer of a model; without one CLIP's where open_clip is installed, else the bundled model's."""
    from conditioning import ClipTokenizer
    from ldm.data.inspection import TokenCounter
    from ldm.pretrained import BUNDLED, DEFAULT_MODEL, resolve

    if model is None and importlib.util.find_spec("open_clip"):
        clip = importlib.import_module("open_clip.tokenizer").SimpleTokenizer()
        return TokenCounter("CLIP", lambda text: len(clip.encode(text)) + 2)
    folder = BUNDLED[DEFAULT_MODEL] if model is None else resolve(model)
    tokenizer = ClipTokenizer.from_pretrained(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    return TokenCounter(model or "bundled model", tokenizer.count, tokenizer.model_max_length)


def _cache(args: argparse.Namespace) -> None:
    from ldm.data.batches import SkipCounter
    from ldm.data.fingerprint import weights_hash
    from ldm.data.latents import CacheSettings
    from ldm.pretrained import read_vae, resolve
    from ldm.training.captions import encode_captions
    from ldm.training.encoding import encode_source, encoding_processes

    accelerator = encoding_processes(args.device)
    text_encoder = None if args.text_encoder is None else _frozen_text_encoder(args).to(accelerator.device)
    vae = read_vae(resolve(args.model)).to(accelerator.device)
    resolution = vae.config.sample_size if args.resolution is None else args.resolution
    for flag, value in (("--resolution", resolution), ("--bucket-step", args.bucket_step)):
        if value % vae.downsample_factor:
            raise ValueError(f"{flag} is {value}; it must be a multiple of {vae.downsample_factor}")
    source = _open(args, resolution)
    settings = CacheSettings(
        source.name,
        source.fingerprint(),
        resolution,
        True,
        args.random_flip,
        weights_hash(vae),
        args.dtype,
        args.bucket_step,
        args.max_aspect_ratio,
    )
    skips, sizes = SkipCounter(args.max_bad_fraction), (args.batch_size, args.shard_size)
    cache = encode_source(source, Path(args.output), settings, vae, accelerator, *sizes, skips)
    if text_encoder is not None:
        encode_captions(itertools.chain(*cache.captions), text_encoder, Path(args.output) / "text", accelerator)
    if accelerator.is_main_process:
        print(f"{args.output}: {len(cache)} entries of {cache.read} samples")
        for name in cache.skipped:
            print(f"skipped {name}", file=sys.stderr)


def _errors(args: argparse.Namespace) -> None:
    import torch

    from ldm.cli.device import usable_device
    from ldm.data.batches import SkipCounter
    from ldm.pipeline import TextToImage
    from ldm.training.redrawing import draw_latent_errors

    if args.streaming:
        raise ValueError("--streaming reads a source once and names no row again; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ldm-data errors is the work of one process; start it without accelerate or torchrun")
    pipe = TextToImage.from_pretrained(args.model, usable_device(args.device), torch.float32)
    side = pipe.default_size if args.resolution is None else args.resolution
    settings = {"steps": args.steps, "guidance_scale": args.guidance_scale, "sampler": args.sampler}
    pipe.plan(height=side, width=side, **settings)
    source, skips = _open(args, side), SkipCounter(args.max_bad_fraction)
    with tqdm(total=len(source), desc="drawing", unit="picture", disable=None) as bar:  # type: ignore[arg-type]
        rows = draw_latent_errors(
            pipe,
            source,  # type: ignore[arg-type]
            side,
            args.output,
            args.strengths,
            skips,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=bar.update,
            **settings,
        )
    print(f"{args.output}: {rows} pictures; {skips.summary()}")


def _frozen_text_encoder(args: argparse.Namespace) -> TextEncoder:
    """The text encoder of `--text-encoder`, a section of a training's config."""
    from ldm.build import build_text_encoder
    from ldm.config.file import read_section
    from ldm.config.text_encoders import PretrainedText, TextEncoderConfig
    from ldm.pretrained import read_model

    config = read_section(TextEncoderConfig, "text_encoder", args.text_encoder)
    if getattr(config, "trainable", True):
        raise ValueError("--text-encoder is one that is trained; only a frozen one's encodings can be kept")
    if isinstance(config, PretrainedText):
        return read_model(args.model).text_encoder
    return build_text_encoder(config, (), 0, Path(args.output) / "tokenizer")


def _verify(args: argparse.Namespace) -> None:
    from ldm.data.latents import LatentCache, verify_cache
    from ldm.data.text_cache import verify_text_cache

    with tqdm(desc="verifying", unit="shard", leave=False, disable=None) as bar:
        problems = verify_cache(args.cache, bar.update) + verify_text_cache(args.cache / "text")
    if problems:
        raise ValueError(f"{args.cache} has {len(problems)} damaged shards: {'; '.join(problems)}")
    cache = LatentCache(args.cache)
    print(f"{args.cache}: {len(cache)} entries intact, {len(cache.skipped)} of {cache.read} samples were skipped")


def _export(args: argparse.Namespace) -> None:
    from ldm.data.export import export_folder
    from ldm.data.sources import every_sample

    source = _open(args, 64)
    count, skipped = export_folder(_bar(every_sample(source), None), args.folder)
    print(f"{args.folder}: {count} pictures")
    for name in skipped:
        print(f"skipped {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
