"""ldm-convert: models between pipeline folders and single files, LoRAs between formats, and which tools open what."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.exits import exit_codes

if TYPE_CHECKING:
    from ldm.interop.checkpoint import Checkpoint
    from ldm.interop.compatibility import Description, Verdict

DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    p = argparse.ArgumentParser(
        prog="ldm-convert",
        description="Convert a model between a diffusers folder and a single file in the original layout, or a LoRA "
        "between the formats of diffusers and kohya.",
        allow_abbrev=False,
    )
    p.add_argument("source", nargs="?", help="model folder, single file, hub id, LoRA file, or run folder")
    p.add_argument("target", nargs="?", help="folder, or a file whose name ends in .safetensors")
    p.add_argument("--to", choices=("diffusers", "single-file", "kohya"), help="what to write")
    p.add_argument("--dtype", choices=DTYPES, default=None, help="of the stored weights (default: as they are)")
    p.add_argument("--check", metavar="MODEL", help="say which tools will open a model and why not, and write nothing")
    p.add_argument("--revision", default=None, help="branch, tag or commit of a hub id")
    p.add_argument("--variant", default=None, help="which weight files to read, and the name of those to write")
    p.add_argument("--max-shard-size", default=None, metavar="SIZE", help="split weight files of a folder, such as 2GB")
    average = p.add_mutually_exclusive_group()
    average.add_argument(
        "--ema-sigma-rel",
        type=float,
        metavar="S",
        help="SOURCE is a run folder of train_ldm.py with snapshots: write its model under another average of its "
        "steps, a power of the step whose standard deviation is S of the training",
    )
    average.add_argument("--ema-decay", type=float, metavar="D", help="the same with a moving average of decay D")
    p.add_argument("--allow-pickle", action="store_true", help="read the tensors of .ckpt, .bin and .pt files too")
    return p


def run(argv: Sequence[str]) -> str:
    """Converts or checks; returns what is printed.

    Raises:
        ValueError: one sentence naming the flag, file or key at fault.
    """
    args = parser().parse_args(list(argv))
    if args.check is not None:
        if any(value is not None for value in (args.source, args.to, args.ema_sigma_rel, args.ema_decay)):
            raise ValueError("--check MODEL writes nothing, so it takes no SOURCE, TARGET, --to and average")
        return report(args.check, args.revision, args.variant, args.allow_pickle)
    if args.source is None or args.target is None or args.to is None:
        raise ValueError("ldm-convert needs SOURCE TARGET --to diffusers|single-file|kohya, or --check MODEL")
    return "\n".join(map(str, _convert(args)))


def main() -> None:
    """Entry point: exit code 2 and one sentence on bad input, 130 when interrupted."""
    with exit_codes():
        print(run(sys.argv[1:]))


def _convert(args: argparse.Namespace) -> list[Path]:
    import torch

    from ldm.interop.checkpoint import write_folder
    from ldm.single_file import write_single_file

    target, source = Path(args.target).expanduser(), Path(args.source).expanduser()
    if args.ema_sigma_rel is not None or args.ema_decay is not None:
        return [_average(source, target, args)]
    if args.to == "kohya" or (source.exists() and _holds_lora(source)):
        return [_convert_lora(source, target, args)]
    _refuse_target(target, args.to)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    checkpoint = read_checkpoint(args.source, args.revision, args.variant, args.allow_pickle)[0]
    if args.to == "single-file":
        return write_single_file(checkpoint, target, dtype)
    write_folder(checkpoint, target, dtype, args.variant, args.max_shard_size)
    return [target]


def _average(source: Path, target: Path, args: argparse.Namespace) -> Path:
    import torch

    from ldm.pretrained import write_model
    from ldm.training.post_hoc_ema import POOR_FIT, average_of_run

    flag = "--ema-decay" if args.ema_sigma_rel is None else "--ema-sigma-rel"
    given = [f"--{name}" for name in ("revision", "variant", "max_shard_size", "allow_pickle") if getattr(args, name)]
    if args.to != "diffusers" or given:
        wrong = given[0].replace("_", "-") if given else f"--to {args.to}"
        raise ValueError(f"{flag} writes a folder, --to diffusers, from a run folder; it does not go with {wrong}")
    _refuse_target(target, args.to)
    try:
        found = average_of_run(source, args.ema_sigma_rel, args.ema_decay)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    dtype = torch.float32 if args.dtype is None else getattr(torch, args.dtype)
    write_model(found.model, target, dtype)
    if found.error > POOR_FIT:
        print(
            f"warning: {found.snapshots} snapshots give this average with an error of {found.error:.0%}; snapshots at "
            "shorter intervals (training.checkpointing_steps) would give it better",
            file=sys.stderr,
        )
    return target


def _holds_lora(source: Path) -> bool:
    from ldm.adapters import holds_lora

    return holds_lora(source)


def _convert_lora(source: Path, target: Path, args: argparse.Namespace) -> Path:
    from ldm.adapters import read_lora, write_diffusers_lora, write_kohya_lora

    given = [f"--{name}" for name in ("dtype", "revision", "variant", "max_shard_size") if getattr(args, name)]
    if args.to == "single-file":
        raise ValueError(f"{source} is a LoRA, so --to is diffusers or kohya")
    if given:
        raise ValueError(f"{given[0].replace('_', '-')} belongs to a model, but {source} is converted as a LoRA")
    if target.suffix != ".safetensors" or target.is_dir():
        raise ValueError(f"TARGET {target} must be a file whose name ends in .safetensors")
    return (write_kohya_lora if args.to == "kohya" else write_diffusers_lora)(read_lora(source), target)


def _refuse_target(target: Path, to: str) -> None:
    if to == "single-file" and (target.suffix != ".safetensors" or target.is_dir()):
        raise ValueError(f"TARGET {target} must be a file whose name ends in .safetensors")
    taken = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if to == "diffusers" and taken and not (target / "model_index.json").is_file():
        raise ValueError(f"TARGET {target} exists and is not a model folder; it is left alone")


def read_checkpoint(
    name: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False
) -> tuple[Checkpoint, Path]:
    """A folder, single file or hub id as configs and tensors, and where it lies. Raises ModelError."""
    from ldm.interop.checkpoint import read_folder
    from ldm.pretrained import resolve
    from ldm.single_file import read_single_file

    path = resolve(name, revision, variant)
    read = read_single_file(path, allow_pickle) if path.is_file() else read_folder(path, variant, allow_pickle)
    return read, path


def report(name: str, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False) -> str:
    """A line for each tool: whether it will open the model, in which form, and why not."""
    from ldm.interop.compatibility import verdicts

    checkpoint, path = read_checkpoint(name, revision, variant, allow_pickle)
    return "\n".join(map(_line, verdicts(describe(checkpoint, path))))


def _line(verdict: Verdict) -> str:
    said = "; ".join(verdict.reasons or verdict.notes)
    return f"{verdict.tool:14s} {'yes' if verdict.opens else 'no ':3s}  {verdict.form}{': ' if said else ''}{said}"


def describe(checkpoint: Checkpoint, path: Path) -> Description:
    """What other tools look at in a model that lies at `path`.

    Raises:
        ModelError: a config is not one of a Stable Diffusion model.
    """
    from ldm.interop.checkpoint import TOKENIZERS, model_index
    from ldm.interop.compatibility import Description
    from ldm.interop.networks import explained, parsed
    from ldm.interop.tensors import read_json
    from ldm.process import DiffusionConfig

    parts = checkpoint.parts
    unet, texts = parsed(parts["unet"], "unet"), {name: parts[name].config for name in TOKENIZERS if name in parts}
    named = model_index(unet.in_channels, checkpoint.scheduler, "text_encoder_2" in parts)
    index = named if path.is_file() else read_json(path / "model_index.json")
    return Description(
        form="single file" if path.is_file() else "folder",
        pipeline=str(index.get("_class_name")),
        unet=unet,
        vae=parsed(parts["vae"], "vae"),
        texts=texts,
        diffusion=explained(path, DiffusionConfig.from_dict, checkpoint.scheduler),
        clip_vocabulary=all(_has_clip_vocabulary(files, path) for files in checkpoint.tokenizers.values()),
        damage=_damage(checkpoint),
    )


def _has_clip_vocabulary(files: Mapping[str, str], path: Path) -> bool:
    from ldm.interop.clip_vocabulary import is_clip_tokenizer
    from ldm.interop.networks import build_tokenizer
    from ldm.interop.tensors import ModelError

    try:
        return is_clip_tokenizer(build_tokenizer(files, path))
    except ModelError:
        return False


def _damage(checkpoint: Checkpoint) -> str | None:
    """The first sentence about tensors that are missing, left over or of another shape than the config says."""
    from ldm.interop.checkpoint import is_clip
    from ldm.interop.networks import check_part
    from ldm.interop.tensors import ModelError

    try:
        for name, part in checkpoint.parts.items():
            if is_clip(part.config):
                check_part(part, name)
    except ModelError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
