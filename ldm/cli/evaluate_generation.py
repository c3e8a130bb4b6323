"""The `generation` suite of ldm-evaluate: from flags to a report, its page and its pictures."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.cli import options
from ldm.cli.device import usable_device
from ldm.data.batches import Transform
from ldm.data.fingerprint import weights_hash
from ldm.data.sources import Columns, RowSource, open_source
from ldm.evaluation.distribution import Figure
from ldm.evaluation.features import Decoded, feature_net
from ldm.evaluation.generation import Comparison, Drawn, JudgedSet, Judges, copies_grid, draw, judge_pictures
from ldm.evaluation.grid import image_grid
from ldm.evaluation.judged_cache import JudgedCache, cached_reader, judges_key
from ldm.evaluation.label_reader import LabelReader, pixels
from ldm.evaluation.reconstruction import Pictures
from ldm.evaluation.report import Run, as_json, markdown, sweep_chart
from ldm.evaluation.text_image import OpenClip
from ldm.pipeline import TextToImage
from ldm.training.shared_evaluation import process_share

Setting = Mapping[str, Any]
"""What one column of the report draws with: `guidance_scale` and `steps`."""


class GenerationSuite:
    """One run of the suite: its flags, this process's share of the work, the model and the judges.

    Raises:
        ValueError: one sentence naming the flag or file at fault.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        check(args)
        self.args = args
        self.share, device = process_share(args.device == "cpu")
        self.device = device if self.share.size > 1 else usable_device(args.device)
        if args.feature_cache is not None and self.share.size > 1:
            raise ValueError("--feature-cache is read and written by one process; leave it out with several")
        self.cache = None if args.feature_cache is None else Path(args.feature_cache)
        self.judges = judges(args).to(self.device)
        self.ranking = options.ranking(args, self.device)
        self.pipe = TextToImage.from_pretrained(args.model, self.device, revision=args.revision, variant=args.variant)
        side = self.pipe.default_size if args.resolution is None else args.resolution
        self.fixed: Setting = {"sampler": args.sampler, "height": side, "width": side}
        self.side, self.settings = side, self._settings()

    def report(self) -> dict[str, Any]:
        """Measures every setting and writes what `--output` says; in all processes but the first, nothing: {}."""
        args = self.args
        reader = None if args.label_column is None else self._label_reader(args.label_column)
        reference, held_out = self._judged(args.split, args.num_reference or args.num_samples)
        wanted = args.num_training and self.judges.features is not None
        training, known = self._judged(args.training_split, args.num_training) if wanted else (None, None)
        if reader is not None:
            self.judges = replace(self.judges, reader=reader)
            held_out = self._with_labels(held_out, reference.count, reader)
        prompts = self._prompts(held_out)
        comparison = Comparison(
            self.judges,
            held_out,
            known,
            args.label_column,
            args.candidates,
            prompts.captions,
            args.bootstrap,
            args.seed,
        )
        attained = comparison.of_reference()  # before anything is drawn: it refuses sets that are too small
        runs, pictures = list[Run](), dict[str, Image.Image]()
        for setting in self.settings:
            drawn = self._draw(prompts, setting)
            if self.share.rank == 0:
                runs.append(Run(setting["guidance_scale"], setting["steps"], comparison.figures(drawn.judged)))
                pictures |= self._pictures(comparison, drawn, training, setting)
        if self.share.rank:
            return {}
        if len(runs) > 1:
            pictures["sweep"] = sweep_chart(runs)
        return self._written(runs, attained, comparison, pictures, len(reference.skipped))

    def _settings(self) -> list[Setting]:
        """Every guidance scale with every number of steps, each checked before anything is drawn."""
        scales, counts = self.args.guidance_scale or [None], self.args.steps or [None]
        found: list[Setting] = [
            {
                "guidance_scale": float(self.pipe.setting("guidance_scale", scale)),
                "steps": int(self.pipe.setting("num_inference_steps", steps)),
            }
            for scale, steps in itertools.product(scales, counts)
        ]
        for setting in found:
            self.pipe.plan(**setting, **self.fixed)
        return found

    def _judged(self, split: str, count: int) -> tuple[Pictures, JudgedSet]:
        """The first `count` readable pictures of a split of `--data`, as the judges see them."""
        pictures, labelled = self._read(split, count), self.args.label_column is not None

        def judge() -> JudgedSet:
            return judge_pictures(pictures, self.judges, self.share, labelled, self._bar(split))

        judged = JudgedCache(self.cache, cache_key(self.args)).get(pictures, self.side, labelled, judge)
        if pictures.skipped:
            self._warn(f"{len(pictures.skipped)} samples could not be used, such as {pictures.skipped[0]}")
        return pictures, judged

    def _label_reader(self, column: str) -> LabelReader:
        """A classifier of labels, trained on the training pictures as the model's autoencoder gives them back.

        Generated pictures have been through its decoder too.

        Raises:
            ValueError: naming the flag, when it cannot be made.
        """
        args, vae = self.args, self.pipe.model.vae
        pictures = self._read(args.training_split, args.num_training)

        def trained() -> LabelReader:
            batches = self._bar(f"{args.training_split}, decoded")(pictures.batches())
            images = torch.cat(self.share.map(batches, Decoded(vae, pixels)))
            labels = [row[-1] for row in pictures.captions]
            reader = LabelReader(labels).to(self.device)

            def weights() -> dict[str, Tensor]:
                reader.fit(images, labels, self._bar(column))
                return {name: value.cpu() for name, value in reader.state_dict().items()}

            reader.load_state_dict(self.share.from_first(weights))
            return reader

        try:
            reader = cached_reader(self.cache, pictures, [self.side, column, weights_hash(vae)], trained)
        except ValueError as error:
            raise ValueError(f"--label-column {column}: {error}") from error
        return reader.to(self.device)

    def _with_labels(self, judged: JudgedSet, count: int, reader: LabelReader) -> JudgedSet:
        """The reference of `count` pictures with the labels read from what the model's autoencoder makes of them."""
        pictures, vae = self._read(self.args.split, count), self.pipe.model.vae
        read = self.share.map(pictures.batches(), lambda x: Decoded(vae, reader)(x).cpu())
        return replace(judged, vectors=judged.vectors._replace(logits=torch.cat(read)))

    def _prompts(self, reference: JudgedSet) -> JudgedSet:
        """The captions to draw: the reference's, or the first of another split, whose pictures no judge sees."""
        args = self.args
        if args.caption_split in (None, args.split):
            return reference
        pictures = self._read(args.caption_split, args.num_samples)
        return judge_pictures(pictures, Judges("none", None, None), self.share, args.label_column is not None)

    def _read(self, split: str, count: int) -> Pictures:
        """The first `count` readable pictures of a split of `--data`, with their captions and labels."""
        args, label = self.args, self.args.label_column
        columns = Columns(args.image_column, (args.caption_column, *([label] if label else [])))
        source = open_source(args.data, split, self.side, columns, seed=args.seed)
        if label and not (isinstance(source, RowSource) and label in source.columns.captions):
            raise ValueError(f"--label-column is {label}, and {args.data} has no such column")
        return Pictures(source, Transform(self.side), count, args.batch_size, self.device)

    def _draw(self, prompts: JudgedSet, setting: Setting) -> Drawn:
        args, bar = self.args, self._bar(f"guidance {setting['guidance_scale']:g}, {setting['steps']} steps")
        size, settings = args.batch_size, {**setting, **self.fixed, "ranking": self.ranking}
        return draw(self.pipe, prompts, args.num_samples, size, self.judges, self.share, args.seed, bar, **settings)

    def _pictures(
        self, comparison: Comparison, drawn: Drawn, training: Pictures | None, setting: Setting
    ) -> dict[str, Image.Image]:
        """Samples of a setting, and its nearest copies of training pictures, by the end of their file's name."""
        end = f"guidance_{setting['guidance_scale']:g}_steps_{setting['steps']}" if len(self.settings) > 1 else ""
        labels = drawn.judged.captions[: len(drawn.shown)]
        found = {f"samples_{end}".rstrip("_"): image_grid(drawn.shown, 8, labels, min_side=96)}
        if training is not None:
            copies = copies_grid(self.pipe, comparison, drawn, training, **setting, **self.fixed)
            found[f"copies_{end}".rstrip("_")] = copies
        return found

    def _written(
        self,
        runs: Sequence[Run],
        reference: Mapping[str, Figure],
        comparison: Comparison,
        pictures: Mapping[str, Image.Image],
        skipped: int,
    ) -> dict[str, Any]:
        """The report; with `--output`, written with its page and its pictures."""
        report = {
            "suite": "generation",
            "num_samples": self.args.num_samples,
            **as_json(runs[0].figures),
            "reference": as_json(reference),
            "runs": [run.as_json() for run in runs],
            "settings": self._described(comparison) | {"skipped": skipped},
        }
        if self.args.output is None:
            print(markdown(report, runs, reference, []))
            return report
        path = report_path(self.args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {end: path.with_name(f"{path.stem}_{end}.png") for end in pictures}
        for end, picture in pictures.items():
            picture.save(names[end])
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        page = markdown(report, runs, reference, [name.name for name in names.values()])
        path.with_suffix(".md").write_text(page, encoding="utf-8")
        print(page)
        return report

    def _described(self, comparison: Comparison) -> dict[str, Any]:
        """All that decides the figures besides guidance and steps."""
        args = self.args
        known = comparison.training
        dim = comparison.reference.vectors.features.shape[1]
        if self.judges.features is not None and args.num_samples < dim:
            self._warn(
                f"{args.num_samples} pictures are fewer than the {dim} features of {args.features}: compare this "
                "Frechet distance only with one of as many pictures"
            )
        return {
            "model": args.model,
            "revision": args.revision,
            "data": args.data,
            "split": args.split,
            "caption_split": args.caption_split or args.split,
            "caption_column": args.caption_column,
            "resolution": self.side,
            "sampler": self.pipe.setting("sampler", args.sampler),
            "seed": args.seed,
            "features": args.features,
            "feature_dimensions": dim or None,
            "clip": args.clip,
            "candidates": args.candidates if self.judges.text_image is not None else None,
            "best_of": args.best_of,
            "ranker": args.ranker,
            "ranker_weights": args.ranker_weights,
            "num_reference": len(comparison.reference),
            "num_training": 0 if known is None else len(known),
            "label_column": args.label_column,
            "bootstrap": args.bootstrap,
        }

    def _bar(self, name: str) -> Any:
        def bar(batches: Iterable[Any]) -> Any:
            return tqdm(batches, desc=name, unit="batch", disable=self.share.rank > 0)

        return bar

    def _warn(self, sentence: str) -> None:
        if self.share.rank == 0:
            print(f"warning: {sentence}", file=sys.stderr)


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError naming a flag whose value cannot be meant."""
    for flag, value, least in (
        ("--num-reference", args.num_reference, 1),
        ("--num-training", args.num_training, 0),
        ("--bootstrap", args.bootstrap, 0),
        ("--candidates", args.candidates, 2),
        ("--resolution", args.resolution, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}")
    if args.label_column is not None and (args.features == "none" or args.num_training == 0):
        raise ValueError("--label-column trains a classifier: it needs --features and --num-training above 0")
    if args.output is not None and Path(args.output).suffix == ".png":
        raise ValueError(f"--output is {args.output}; it must be a .json file or a folder")
    if args.features == "none" and args.clip == "none":
        raise ValueError("--features and --clip are none, so there is nothing to measure: name one of them")


def judges(args: argparse.Namespace) -> Judges:
    """The networks that `--features` and `--clip` name.

    Raises:
        ValueError: naming the flag whose network cannot be had.
    """
    flag, name = "--features", args.features
    try:
        features = None if name == "none" else feature_net(name, args.features_weights)
        flag, name = "--clip", args.clip
        text_image = None if name == "none" else OpenClip(name, args.clip_weights)
        return Judges(args.features, features, text_image)
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from error


def cache_key(args: argparse.Namespace) -> str:
    """What tells the judges of these flags from others."""
    names = (args.features, args.clip)
    folder = args.clip.partition("local-dir:")[2] or None
    return judges_key(names, (args.features_weights, args.clip_weights, folder))


def report_path(output: str) -> Path:
    """The JSON file: what `--output` names, or `report.json` in the folder that it names."""
    return Path(output) if Path(output).suffix == ".json" else Path(output) / "report.json"
