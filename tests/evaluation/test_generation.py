"""The generation suite with models that copy, repeat or invent, and judges whose features are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.data.batches import Transform
from ldm.data.sources import Example
from ldm.data.transforms import BadImage
from ldm.evaluation.distribution import Figure
from ldm.evaluation.generation import SHOWN, Comparison, Drawn, JudgedSet, Judges, copies_grid, draw, judge_pictures
from ldm.evaluation.label_reader import LabelReader, pixels
from ldm.evaluation.memorisation import QUANTILE, Neighbours, near_duplicates, threshold
from ldm.evaluation.reconstruction import Pictures
from ldm.evaluation.report import Run, markdown, sweep_chart
from ldm.evaluation.sharing import Share

SIDE, DEPTH = 16, 24
COLOURS = np.random.default_rng(0).integers(0, 256, (200, 3))
NONE = Judges("none", None, None)


def flat(index: int) -> Image.Image:
    """The picture of caption `picture {index}`."""
    return Image.new("RGB", (SIDE, SIDE), tuple(int(level) for level in COLOURS[index]))


class Means:
    """Features: the mean of each channel, on [-1, 1]."""

    dim = 3

    def __call__(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Reader:
    """A text-image model that knows every picture of `flat`: both sides are the colour's direction in 24 dimensions."""

    dim = DEPTH

    def images(self, x: Tensor) -> Tensor:
        turn = torch.randn(3, DEPTH, generator=torch.Generator().manual_seed(0)).double()
        return torch.nn.functional.normalize(torch.tanh(x.double().mean((2, 3)) @ turn * 3), dim=1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        colours = torch.tensor(COLOURS[[int(caption.split()[-1]) for caption in captions]]) / 127.5 - 1
        return self.images(colours.view(-1, 3, 1, 1))


@dataclass
class Flats:
    """Pictures `first` to `first + count`, labelled even or odd; the second cannot be read."""

    first: int
    count: int
    name: str = "flats"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if index == 1:
            raise BadImage("flats[1]: damaged")
        number = self.first + index
        return Example(flat(number), (f"picture {number}", ("even", "odd")[number % 2]), str(number))


@dataclass
class Pipe:
    """Draws the picture that a caption names, `shift` later; notes what it was asked for."""

    shift: int = 0
    device: str = "cpu"
    asked: list[tuple[int, list[str], dict[str, Any]]] = field(default_factory=list)

    def __call__(
        self, prompt: str | list[str], num_images: int = 1, *, seed: int, batch_size: int = 1, **settings: Any
    ) -> list[Image.Image]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        assert num_images == 1
        self.asked.append((seed, prompts, settings))
        return [flat(int(prompt.split()[-1]) + self.shift) for prompt in prompts]


def judged(first: int, count: int, judges: Judges, share: Share = Share()) -> tuple[Pictures, JudgedSet]:
    pictures = Pictures(Flats(first, count), Transform(SIDE), 1000, 7)  # type: ignore[arg-type]
    return pictures, judge_pictures(pictures, judges, share, labelled=True)


def measured(pipe: Any, training: int, judges: Judges, **settings: Any) -> tuple[dict[str, Figure], Comparison]:
    """The figures of a model on captions 100 to 149, compared with pictures from `training` on."""
    _, reference = judged(100, 50, judges)
    _, known = judged(training, 50, judges)
    comparison = Comparison(judges, reference, known, **settings)
    drawn = draw(pipe, reference, len(reference), 8, judges, Share(), 0)
    return comparison.figures(drawn.judged), comparison


def test_a_model_that_draws_the_reference_has_the_best_figures() -> None:
    found, comparison = measured(Pipe(), 0, Judges("means", Means(), Reader()))
    best = {"frechet_means": 0.0, "precision_means": 1.0, "recall_means": 1.0, "clip_score": 100.0, "r_precision": 1.0}
    assert {name: found[name].value for name in best} == pytest.approx(best, abs=1e-5)
    assert found["kid_means"].value < 0  # the unbiased estimate of zero, each picture paired with its copy across
    assert found["near_duplicates"].value == pytest.approx(3 / 49)  # those below the 5 % point of the same distances
    reference = comparison.of_reference()
    assert {name: reference[name].value for name in reference} == pytest.approx(
        {"clip_score": 100.0, "r_precision": 1.0}
    )


def test_a_model_that_copies_training_pictures_is_found_out() -> None:
    copied, _ = measured(Pipe(shift=-100), 0, Judges("means", Means(), None))
    assert copied["near_duplicates"].value == 1.0
    new, _ = measured(Pipe(shift=50), 0, Judges("means", Means(), None))
    assert new["near_duplicates"].value < 0.2


def test_a_model_that_ignores_captions_is_right_by_chance() -> None:
    """Every prompt gets the picture of another caption of the pool: never right; unrelated ones: by chance."""
    found, _ = measured(Pipe(shift=50), 0, Judges("none", None, Reader()), candidates=4)
    assert set(found) == {"clip_score", "r_precision"}
    assert found["r_precision"].value == pytest.approx(1 / 4, abs=0.2)
    assert found["clip_score"].value < 80


def test_labels_are_read_by_a_classifier_of_pictures() -> None:
    """It is taught that even pictures have a dark upper half, which no untrained network knows."""

    def drawn(even: bool, seed: int) -> Tensor:
        noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 0.5
        noise[:, :32] += 0.0 if even else 0.5
        return noise * 2 - 1

    known = torch.stack([drawn(i % 2 == 0, i) for i in range(40)])
    reader = LabelReader(["even", "odd"])
    before = reader(known)
    reader.fit(pixels(known), ["even", "odd"] * 20)
    new = torch.stack([drawn(i % 2 == 0, 100 + i) for i in range(20)])
    judges = Judges("none", None, None, reader)
    reference = JudgedSet(judges(new), [""] * 20, ["even", "odd"] * 10)
    figures = Comparison(judges, reference, label="parity").of_reference()
    assert not before.any() and figures["parity_accuracy"].value == 1.0
    assert not reader.correct(reference.vectors.logits, ["odd", "even"] * 10).any()
    assert not reader.correct(reference.vectors.logits, ["neither"] * 20).any()


def test_a_reader_is_a_function_of_its_pictures() -> None:
    """Uniform pictures have no variance in any channel, whose root must not end training; 200 px is read as 128 px."""
    levels = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 200, 100)
    labels = ["dark"] * 3 + ["light"] * 3
    readers = [LabelReader(labels) for _ in range(2)]
    for reader in readers:
        reader.fit(pixels(levels), labels)
    assert pixels(levels).shape == (6, 3, 128, 64) and torch.equal(readers[0](levels), readers[1](levels))
    assert readers[0].correct(readers[0](levels), labels).all()
    with pytest.raises(ValueError, match="two different labels, got only dark"):
        LabelReader(["dark", "dark"])


def test_picture_i_has_caption_and_seed_i() -> None:
    pipe, reference = Pipe(), judged(100, 6, NONE)[1]
    drawn = draw(pipe, reference, 12, 5, NONE, Share(), 40, sampler="ddim")  # type: ignore[arg-type]
    numbers = [100, 102, 103, 104, 105]
    captions = [f"picture {i}" for i in [*numbers, *numbers, *numbers[:2]]]
    assert drawn.judged.captions == captions
    assert drawn.judged.labels == [("even", "odd")[int(c.split()[-1]) % 2] for c in captions]
    assert [(seed, len(prompts)) for seed, prompts, _ in pipe.asked] == [(40, 5), (45, 5), (50, 2)]
    assert [p for _, prompts, _ in pipe.asked for p in prompts] == captions
    assert all(settings == {"sampler": "ddim"} for *_, settings in pipe.asked)
    assert len(drawn.shown) == 12
    assert drawn.seeds == list(range(40, 52))


def test_only_the_first_pictures_are_kept() -> None:
    reference = judged(0, 60, NONE)[1]
    drawn = draw(Pipe(), reference, 50, 9, NONE, Share(), 0)  # type: ignore[arg-type]
    expected = [np.asarray(flat(int(caption.split()[-1]))) for caption in reference.captions[:SHOWN]]
    assert np.array_equal(np.stack([np.asarray(image) for image in drawn.shown]), np.stack(expected))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_batches_and_see_what_one_would(size: int) -> None:
    judges = Judges("means", Means(), Reader())
    alone, lists = judged(0, 40, judges)[1], list[list[Any]]()
    for rank in range(size):
        judged(0, 40, judges, Share(rank, size, lambda own: lists.append(own) or own))
    assert sorted(place for own in lists for place, _ in own) == list(range(6))
    everything = [row for own in lists for row in own]
    _, together = judged(0, 40, judges, Share(0, size, lambda own: everything))
    assert together.captions == alone.captions and together.labels == alone.labels
    for one, other in zip(together.vectors, alone.vectors, strict=True):
        assert torch.equal(one, other)


def test_more_processes_than_batches() -> None:
    own = [Share(rank, 5).map("abc", str.upper) for rank in range(5)]
    assert own == [["A"], ["B"], ["C"], [], []]


def test_the_grid_of_copies_shows_the_nearest_pairs() -> None:
    judges, pipe = Judges("means", Means(), None), Pipe(shift=-100)
    _, reference = judged(100, 20, judges)
    training, known = judged(0, 20, judges)
    comparison = Comparison(judges, reference, known)
    drawn = draw(pipe, reference, 4, 4, judges, Share(), 7)  # type: ignore[arg-type]
    sheet = np.asarray(copies_grid(pipe, comparison, drawn, training))  # type: ignore[arg-type]
    upper, lower = sheet[50, 8 + 48 :: 104], sheet[50 + 96 + 13 + 8, 8 + 48 :: 104]
    assert np.array_equal(upper, lower) and len(np.unique(upper, axis=0)) == 4
    assert [(seed, prompts) for seed, prompts, _ in pipe.asked[1:]] == [
        (7 + i, [drawn.judged.captions[i]]) for i in (s - 7 for s, *_ in pipe.asked[1:])
    ]


def test_without_training_pictures_there_are_no_copies() -> None:
    judges = Judges("means", Means(), None)
    pictures, reference = judged(0, 10, judges)
    comparison = Comparison(judges, reference)
    assert set(comparison.figures(reference)) == {f"{m}_means" for m in ("frechet", "kid", "precision", "recall")}
    with pytest.raises(ValueError, match="one of both is missing"):
        copies_grid(Pipe(), comparison, Drawn(reference, [], []), pictures)  # type: ignore[arg-type]


def test_as_many_held_out_pictures_are_near_duplicates_as_the_quantile_says() -> None:
    held_out = Neighbours(torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(1000))
    assert near_duplicates(held_out, held_out).double().mean() == QUANTILE
    assert threshold(held_out) == pytest.approx(QUANTILE * 999)


def runs() -> list[Run]:
    return [Run(g, s, {"clip_score": Figure(g + s, g + s - 1, g + s + 1)}) for g in (1.0, 3.0) for s in (5, 10)]


def test_the_page_has_a_column_a_setting_and_every_picture() -> None:
    report = {"suite": "generation", "num_samples": 9, "settings": {"model": "a|b", "seed": 3}}
    lines = markdown(report, runs(), {"clip_score": Figure(50.123456, 49, 51)}, ["x_samples.png"]).splitlines()
    heads = ["metric", "guidance 1, 5 steps", "guidance 1, 10 steps", "guidance 3, 5 steps", "guidance 3, 10 steps"]
    assert lines[2] == "| " + " | ".join([*heads, "reference"]) + " |"
    assert lines[4].split(" | ")[1] == "6 (5 to 7)" and lines[4].endswith("| 50.12 (49 to 51) |")
    assert r"| model | a\|b |" in lines and "| seed | 3 |" in lines and "![x_samples.png](x_samples.png)" in lines


def test_the_chart_has_a_line_a_number_of_steps() -> None:
    """Colours of two lines are there; over one guidance scale the steps lie along the axis, one line."""

    def colours(chart: Image.Image) -> set[tuple[int, int, int]]:
        return {pixel for _, pixel in chart.getcolors(1 << 20)}

    first, second = (31, 119, 180), (214, 39, 40)
    assert {first, second} <= colours(sweep_chart(runs()))
    assert first in colours(sweep_chart(runs()[:2])) and second not in colours(sweep_chart(runs()[:2]))
    even = [Run(1.0, s, {"r_precision": Figure(0.5, 0.5, 0.5)}) for s in (5, 10)]
    assert first in colours(sweep_chart(even))
