"""The scorer against ground truth: rendered scenes, also degraded, with true and with false captions."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFilter

from ldm.data import shapes
from ldm.data.shapes import Placed, Scene, Shape
from ldm.evaluation.shapes_scorer import Score, aggregate, read_scene, score

Picture = npt.NDArray[np.uint8]
RED, WHITE = shapes.COLORS["red"], shapes.BACKGROUNDS["white"]


def jpeg(image: Picture) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer).convert("RGB"))


def noise(image: Picture) -> Picture:
    rng = np.random.default_rng(int(image.sum()))
    return np.clip(np.rint(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def blur(image: Picture) -> Picture:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)))


def specks(image: Picture) -> Picture:
    rng = np.random.default_rng(int(image.sum()))
    spotted = image.copy()
    spotted[tuple(rng.integers(0, len(image), (2, 12)))] = rng.integers(0, 256, (12, 3))
    return spotted


def unchanged(image: Picture) -> Picture:
    return image


def ground_truth(
    split: str, resolution: int, count: int, degrade: Callable[[Picture], Picture] = unchanged
) -> list[Score]:
    drawn = [shapes.scene(index, split) for index in range(count)]
    return [score(degrade(shapes.render(s, resolution)), shapes.captions(s)[0]) for s in drawn]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("resolution", "count"), [(24, 100), (32, 200), (48, 200), (64, 400), (256, 100)])
def test_ground_truth_scores_one(split: str, resolution: int, count: int) -> None:
    result = aggregate(ground_truth(split, resolution, count))
    assert set(result) == {"scene", "kind", "color", "size", "relation"}
    assert all(value is not None and value >= 0.995 for value in result.values())


@pytest.mark.parametrize("degrade", [jpeg, noise, blur, specks])
def test_degraded_ground_truth_scores_one(degrade: Callable[[Picture], Picture]) -> None:
    scores = ground_truth("train", 64, 250, degrade) + ground_truth("heldout", 64, 250, degrade)
    assert np.mean([s.scene for s in scores]) >= 0.995


def test_every_form_of_the_caption_is_true() -> None:
    for index in range(40):
        drawn = shapes.scene(index)
        image = shapes.render(drawn, 64)
        assert all(score(image, caption).scene for caption in shapes.captions(drawn))


def test_positions_and_radii_are_measured_to_half_a_pixel() -> None:
    for index in range(60):
        drawn = shapes.scene(index, num_shapes=1)
        (read,) = read_scene(shapes.render(drawn, 64)).shapes
        (placed,) = drawn.shapes
        assert abs(read.x - placed.x) < 0.5 / 64
        assert abs(read.radius - placed.radius) < 0.5 / 64


def other(value: str, values: Sequence[str]) -> str:
    return values[(list(values).index(value) + 1) % len(values)]


def with_first(drawn: Scene, shape: Shape) -> str:
    first = dataclasses.replace(drawn.shapes[0], shape=shape)
    return shapes.captions(dataclasses.replace(drawn, shapes=(first, *drawn.shapes[1:])))[0]


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("kind", shapes.KINDS), ("color", tuple(shapes.COLORS)), ("size", tuple(shapes.SIZES))],
)
@pytest.mark.parametrize("num_shapes", [1, 2])
def test_one_wrong_attribute_is_found(attribute: str, values: Sequence[str], num_shapes: int) -> None:
    for index in range(40):
        drawn = shapes.scene(index, num_shapes=num_shapes)
        truth = drawn.shapes[0].shape
        wrong = dataclasses.replace(truth, **{attribute: other(getattr(truth, attribute), values)})
        result = score(shapes.render(drawn, 64), with_first(drawn, wrong))
        fractions = {"kind": result.kind, "color": result.color, "size": result.size}
        if num_shapes == 1:
            assert fractions == {name: float(name != attribute) for name in fractions}
        assert not result.scene and min(value for value in fractions.values() if value is not None) < 1.0


def test_a_turned_relation_is_found() -> None:
    for index in range(60):
        drawn = shapes.scene(index, num_shapes=2)
        image = shapes.render(drawn, 64)
        for wrong in set(shapes.RELATIONS) - {drawn.relation}:
            result = score(image, shapes.captions(dataclasses.replace(drawn, relation=wrong))[0])
            assert not result.scene and result.relation == 0.0
            assert (result.kind, result.color, result.size) == (1.0, 1.0, 1.0)


def test_colours_swapped_between_two_shapes_are_found() -> None:
    drawn = Scene(
        (
            Placed(Shape("circle", "red", "small"), 0.5, 0.2, 0.1),
            Placed(Shape("square", "blue", "small"), 0.5, 0.8, 0.1),
        ),
        "above",
        "white",
    )
    result = score(shapes.render(drawn, 64), "a small blue circle above a small red square")
    assert not result.scene and result.relation == 1.0
    assert result.kind == 1.0 and result.color == 0.0


def test_a_wrong_background_spoils_the_scene_only() -> None:
    drawn = shapes.scene(2)
    wrong = other(drawn.background, tuple(shapes.BACKGROUNDS))
    result = score(shapes.render(drawn, 64), shapes.captions(dataclasses.replace(drawn, background=wrong))[0])
    assert result == Score(False, 1.0, 1.0, 1.0, 1.0, False)


@pytest.mark.parametrize("ground", [WHITE, (10, 10, 10), (120, 30, 90)])
def test_a_blank_picture_scores_zero(ground: shapes.RGB) -> None:
    result = score(Image.new("RGB", (64, 64), ground), "a small red circle above a large blue star")
    assert result == Score(False, 0.0, 0.0, 0.0, 0.0, None)


@pytest.mark.parametrize(("count", "expected"), [(1, 0.5), (3, 1.0)])
def test_the_number_of_shapes_must_be_right(count: int, expected: float) -> None:
    places = [
        Placed(Shape("circle", "red", "small"), 0.2, 0.2, 0.1),
        Placed(Shape("star", "blue", "small"), 0.7, 0.2, 0.1),
        Placed(Shape("square", "green", "small"), 0.5, 0.7, 0.1),
    ]
    image = shapes.render(Scene(tuple(places[:count]), None, "white"), 64)
    result = score(image, "a small red circle to the left of a small blue star")
    assert not result.scene
    assert (result.kind, result.color, result.size) == (expected, expected, expected)
    assert result.relation == float(count == 3)


def test_what_the_caption_leaves_out_is_not_scored() -> None:
    image = shapes.render(Scene((Placed(Shape("star", "cyan", "large"), 0.5, 0.5, 0.165),), None, "navy"), 64)
    assert score(image, "a star") == Score(True, 1.0, None, None, None, None)
    assert score(image, "a cyan star on a navy background") == Score(True, 1.0, 1.0, None, None, True)


def drawing(paint: Callable[[ImageDraw.ImageDraw], object], ground: shapes.RGB = WHITE) -> Image.Image:
    image = Image.new("RGB", (256, 256), ground)
    paint(ImageDraw.Draw(image))
    return image


@pytest.mark.parametrize(
    "paint",
    [
        lambda d: d.rectangle((60, 60, 160, 105), fill=RED),
        lambda d: d.ellipse((60, 60, 140, 140), outline=RED, width=12),
        lambda d: d.polygon([(50, 60), (150, 60), (100, 147)], fill=RED),
        lambda d: d.pieslice((50, 50, 150, 150), 0, 180, fill=RED),
        lambda d: d.line((60, 60, 60, 160, 160, 160), fill=RED, width=24),
    ],
    ids=["bar", "ring", "upside-down triangle", "half disc", "corner"],
)
def test_a_foreign_outline_has_no_kind(paint: Callable[[ImageDraw.ImageDraw], object]) -> None:
    (read,) = read_scene(drawing(paint)).shapes
    assert read.kind is None and read.color == "red"


def test_a_foreign_colour_or_background_has_no_name() -> None:
    read = read_scene(drawing(lambda d: d.ellipse((60, 60, 120, 120), fill=(110, 110, 110)), (120, 200, 140)))
    assert read.background is None
    assert [(s.kind, s.color) for s in read.shapes] == [("circle", None)]


@pytest.mark.parametrize("seed", range(8))
def test_random_pixels_never_count_as_a_scene(seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not score(image, "a circle").scene


def test_a_picture_and_its_array_read_alike() -> None:
    image = shapes.render(shapes.scene(5), 64)
    assert read_scene(image) == read_scene(Image.fromarray(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64, 3), dtype=np.float32), r"float32 \[64, 64, 3\]; accepted: uint8 \[S, S, 3\]"),
        (np.zeros((64, 64), dtype=np.uint8), r"uint8 \[64, 64\]"),
        (np.zeros((32, 64, 3), dtype=np.uint8), "64 x 32 pixels; accepted: a square one"),
    ],
)
def test_other_arrays_are_refused_by_name(image: Picture, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scene(image)


def test_an_unknown_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="a dog"):
        score(Image.new("RGB", (64, 64)), "a dog")


def test_aggregate_averages_what_is_named() -> None:
    scores = [Score(True, 1.0, 1.0, None, None, True), Score(False, 0.5, 0.0, None, 0.0, False)]
    assert aggregate(scores) == {"scene": 0.5, "kind": 0.75, "color": 0.5, "size": None, "relation": 0.0}
    with pytest.raises(ValueError, match="scores is empty"):
        aggregate([])
