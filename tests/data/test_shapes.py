"""The built-in scenes: geometry, captions, held-out rule and rendering, against independent computations."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.data import shapes
from ldm.data.shapes import Placed, Scene, SceneSpec, Shape, ShapesDataset, ShapeSpec

SPLITS = ("train", "validation", "heldout")


def scenes(split: str, count: int = 600) -> list[Scene]:
    return [shapes.scene(index, split) for index in range(count)]


def facts(scene: Scene) -> tuple[set[tuple[str, str]], set[tuple[str, str, str]]]:
    """Pairs and triples of a scene, each triple in both directions, from the positions of the shapes."""
    pairs = {(placed.shape.color, placed.shape.kind) for placed in scene.shapes}
    triples = set()
    for a, b in itertools.permutations(scene.shapes, 2):
        horizontal = abs(a.x - b.x) > abs(a.y - b.y)
        before = a.x < b.x if horizontal else a.y < b.y
        words = ("to the left of", "to the right of") if horizontal else ("above", "below")
        triples.add((a.shape.kind, words[0 if before else 1], b.shape.kind))
    return pairs, triples


def box(placed: Placed) -> tuple[float, float, float, float]:
    half_width, half_height = (half * placed.radius for half in shapes.HALF_EXTENT[placed.shape.kind])
    return placed.x - half_width, placed.y - half_height, placed.x + half_width, placed.y + half_height


def test_a_scene_is_a_function_of_its_index_in_another_process() -> None:
    code = "from ldm.data.shapes import scene; print([scene(i, 'heldout', 5) for i in (7, 3)])"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str([shapes.scene(7, "heldout", 5), shapes.scene(3, "heldout", 5)])


def test_the_published_stream_never_changes() -> None:
    pixels = b"".join(shapes.render(shapes.scene(i, split), 64).tobytes() for split in SPLITS for i in range(50))
    assert hashlib.sha256(pixels).hexdigest() == "5574093455330c7434de88b51e8cf3b39693058643394f683f85ade0959b2cd1"


def test_splits_seeds_and_indices_give_different_scenes() -> None:
    keys = itertools.product(range(100), ("train", "validation"), range(3))
    drawn = [shapes.scene(index, split, seed) for index, split, seed in keys]
    assert len(set(drawn)) == len(drawn)


def test_proportions_of_the_training_split() -> None:
    drawn = scenes("train", 4000)
    assert np.mean([len(s.shapes) == 1 for s in drawn]) == pytest.approx(0.35, abs=0.03)
    for values, count in (
        ([s.background for s in drawn], len(shapes.BACKGROUNDS)),
        ([s.relation for s in drawn if s.relation], 4),
        ([p.shape.size for s in drawn for p in s.shapes], 2),
        ([p.shape.kind for s in drawn for p in s.shapes], 4),
        ([p.shape.color for s in drawn for p in s.shapes], 8),
    ):
        share = np.array(sorted(Counter(values).values())) / len(values)
        assert len(share) == count
        assert share.min() > 0.75 / count and share.max() < 1.25 / count


@pytest.mark.parametrize("num_shapes", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_the_number_of_shapes_can_be_forced(split: str, num_shapes: int) -> None:
    drawn = [shapes.scene(i, split, num_shapes=num_shapes) for i in range(50)]
    assert {len(s.shapes) for s in drawn} == {num_shapes}
    assert all((s.relation is None) == (num_shapes == 1) for s in drawn)


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_keep_clear_of_the_border_and_of_each_other(split: str) -> None:
    for drawn in scenes(split):
        boxes = [box(placed) for placed in drawn.shapes]
        assert min(value for b in boxes for value in b) >= shapes.BORDER - 1e-9
        assert max(value for b in boxes for value in b) <= 1 - shapes.BORDER + 1e-9
        for a, b in itertools.combinations(boxes, 2):
            gaps = (b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
            assert max(gaps) >= shapes.GAP - 1e-9


@pytest.mark.parametrize("split", SPLITS)
def test_the_relation_is_true_and_its_axis_dominates(split: str) -> None:
    for drawn in scenes(split):
        if drawn.relation is None:
            continue
        a, b = drawn.shapes
        right, down = b.x - a.x, b.y - a.y
        along = {"above": down, "below": -down, "to the left of": right, "to the right of": -right}[drawn.relation]
        across = right if drawn.relation in ("above", "below") else down
        assert along > 0
        assert abs(across) <= 0.4 * along + 1e-9


@pytest.mark.parametrize("split", SPLITS)
def test_sizes_and_identities_are_unambiguous(split: str) -> None:
    radii: dict[str, list[float]] = {"small": [], "large": []}
    for drawn in scenes(split):
        assert len({(p.shape.color, p.shape.kind) for p in drawn.shapes}) == len(drawn.shapes)
        for placed in drawn.shapes:
            radii[placed.shape.size].append(placed.radius)
    assert min(radii["large"]) > 1.4 * max(radii["small"])


def test_palettes_are_well_separated() -> None:
    colors, grounds = shapes.COLORS.values(), shapes.BACKGROUNDS.values()
    assert len(colors) == 8 and len(grounds) >= 4
    assert min(math.dist(a, b) for a, b in itertools.combinations(colors, 2)) > 100
    assert min(math.dist(a, b) for a, b in itertools.product(colors, grounds)) > 100
    assert min(math.dist(a, b) for a, b in itertools.combinations(grounds, 2)) > 75


def test_the_held_out_facts_are_a_tenth_and_spread() -> None:
    colors, kinds = zip(*shapes.HELD_OUT_PAIRS, strict=True)
    assert len(shapes.HELD_OUT_PAIRS) == len(shapes.HELD_OUT_TRIPLES) == round(0.1 * 32)
    assert len(set(colors)) == len(set(kinds)) == 3
    assert set(shapes.HELD_OUT_PAIRS) == {("purple", "circle"), ("cyan", "square"), ("red", "star")}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_training_never_shows_a_held_out_fact(split: str, seed: int) -> None:
    for index in range(1500):
        pairs, triples = facts(shapes.scene(index, split, seed))
        assert pairs.isdisjoint(shapes.HELD_OUT_PAIRS)
        assert triples.isdisjoint(shapes.HELD_OUT_TRIPLES)


def test_every_held_out_scene_shows_one_and_all_of_them_occur() -> None:
    seen_pairs, seen_triples = set(), set()
    for drawn in scenes("heldout"):
        pairs, triples = facts(drawn)
        novel = (pairs & shapes.HELD_OUT_PAIRS, triples & shapes.HELD_OUT_TRIPLES)
        assert any(novel)
        seen_pairs |= novel[0]
        seen_triples |= novel[1]
    assert seen_pairs == shapes.HELD_OUT_PAIRS and seen_triples == shapes.HELD_OUT_TRIPLES


def test_training_covers_everything_that_is_not_held_out() -> None:
    pairs, triples = set(), set()
    for drawn in scenes("train", 4000):
        scene_pairs, scene_triples = facts(drawn)
        pairs |= scene_pairs
        triples |= scene_triples
    assert len(pairs) == 32 - 3
    assert len(triples) == 64 - 2 * 3


@pytest.mark.parametrize(
    ("shapes_", "relation", "expected"),
    [
        (
            (Shape("star", "green", "large"),),
            None,
            [
                "a large green star on a black background",
                "a large green star",
                "a green star on a black background",
                "a green star",
            ],
        ),
        (
            (Shape("circle", "red", "small"), Shape("square", "orange", "large")),
            "to the left of",
            [
                "a small red circle to the left of a large orange square on a black background",
                "a small red circle to the left of a large orange square",
                "a large orange square to the right of a small red circle on a black background",
                "a large orange square to the right of a small red circle",
                "a red circle to the left of an orange square on a black background",
            ],
        ),
    ],
)
def test_caption_forms(shapes_: tuple[Shape, ...], relation: str | None, expected: list[str]) -> None:
    drawn = Scene(tuple(Placed(shape, 0.5, 0.5, 0.1) for shape in shapes_), relation, "black")
    assert shapes.captions(drawn) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_captions_read_back_as_true_statements(split: str) -> None:
    inverse = {"above": "below", "below": "above", "to the left of": "to the right of"}
    inverse |= {"to the right of": "to the left of"}
    for drawn in scenes(split, 300):
        named = tuple(ShapeSpec(p.shape.kind, p.shape.color, p.shape.size) for p in drawn.shapes)
        for i, caption in enumerate(shapes.captions(drawn)):
            spec = shapes.parse_caption(caption)
            turned = spec.relation != drawn.relation
            truth = named[::-1] if turned else named
            assert spec.relation == (inverse[drawn.relation or ""] if turned else drawn.relation)
            assert [(s.kind, s.color) for s in spec.shapes] == [(s.kind, s.color) for s in truth]
            assert all(s.size in (None, t.size) for s, t in zip(spec.shapes, truth, strict=True))
            assert spec.background in (None, drawn.background)
            assert i > 0 or spec == SceneSpec(named, drawn.relation, drawn.background)


def test_parsing_tolerates_case_spaces_and_missing_attributes() -> None:
    spec = shapes.parse_caption("  A Circle  above an orange STAR. ")
    assert spec == SceneSpec((ShapeSpec("circle"), ShapeSpec("star", "orange")), "above")


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "a red circle above", "a red circle beside a blue star", "a huge red circle", "red circle"],
)
def test_other_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not a shapes caption") as error:
        shapes.parse_caption(text)
    assert repr(text) in str(error.value)


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a kind around the centre of its bounding box, from textbook polygons."""
    if kind == "square":
        return [(x + sx * 0.9 * radius, y + sy * 0.9 * radius) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if kind == "triangle":
        height = 1.2 * math.sqrt(3) * radius
        return [(x, y - height / 2), (x + 1.2 * radius, y + height / 2), (x - 1.2 * radius, y + height / 2)]
    inner = math.cos(math.radians(72)) / math.cos(math.radians(36))
    center = y + 1.3 * radius * (1 - math.cos(math.radians(36))) / 2
    angles = [math.radians(36 * k - 90) for k in range(10)]
    reach = [1.3 * radius * (1 if k % 2 == 0 else inner) for k in range(10)]
    return [(x + r * math.cos(a), center + r * math.sin(a)) for a, r in zip(angles, reach, strict=True)]


@pytest.mark.parametrize("resolution", [24, 32, 64, 200])
@pytest.mark.parametrize("kind", shapes.KINDS)
def test_rendering_matches_pillow_supersampled(kind: str, resolution: int) -> None:
    placed = Placed(Shape(kind, "red", "large"), 0.47, 0.55, 0.165)
    fine = resolution * 16
    drawing = Image.new("RGB", (fine, fine), shapes.BACKGROUNDS["white"])
    x, y, radius = (value * fine for value in (placed.x, placed.y, placed.radius))
    if kind == "circle":
        ImageDraw.Draw(drawing).ellipse((x - radius, y - radius, x + radius, y + radius), fill=shapes.COLORS["red"])
    else:
        ImageDraw.Draw(drawing).polygon(outline(kind, x, y, radius), fill=shapes.COLORS["red"])
    expected = np.asarray(drawing.resize((resolution, resolution), Image.Resampling.BOX), dtype=float)
    difference = np.abs(shapes.render(Scene((placed,), None, "white"), resolution) - expected)
    assert difference.max() < 90
    assert difference.mean() < 40 / resolution


@pytest.mark.parametrize("split", SPLITS)
def test_a_drawn_shape_fills_its_bounding_box_and_nothing_else(split: str) -> None:
    for drawn in scenes(split, 60):
        image = shapes.render(drawn, 64).astype(int)
        changed = (image != shapes.BACKGROUNDS[drawn.background]).any(axis=2)
        inside = np.zeros_like(changed)
        for left, top, right, bottom in (box(placed) for placed in drawn.shapes):
            rows = slice(math.floor(64 * top - 0.5), math.ceil(64 * bottom + 0.5))
            window = (rows, slice(math.floor(64 * left - 0.5), math.ceil(64 * right + 0.5)))
            inside[window] = True
            assert changed[window].any(axis=1).sum() >= math.floor(64 * (bottom - top)) - 1
            assert changed[window].any(axis=0).sum() >= math.floor(64 * (right - left)) - 1
        assert not (changed & ~inside).any()


def test_colours_are_exact_at_the_centre_and_in_the_corner() -> None:
    for drawn in scenes("train", 100):
        image = shapes.render(drawn, 64)
        assert tuple(image[0, 0]) == shapes.BACKGROUNDS[drawn.background]
        for placed in drawn.shapes:
            assert tuple(image[int(placed.y * 64), int(placed.x * 64)]) == shapes.COLORS[placed.shape.color]


@pytest.mark.parametrize("resolution", [32, 64])
def test_resolutions_show_the_same_scene(resolution: int) -> None:
    for drawn in scenes("train", 40):
        large = Image.fromarray(shapes.render(drawn, resolution * 8))
        reduced = np.asarray(large.resize((resolution, resolution), Image.Resampling.BOX), dtype=float)
        assert np.abs(shapes.render(drawn, resolution) - reduced).mean() < 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "index is -1"),
        ({"index": 0, "seed": -2}, "seed is -2"),
        ({"index": 0, "split": "test"}, "split is 'test'; accepted: train, validation, heldout"),
        ({"index": 0, "num_shapes": 3}, "num_shapes is 3; accepted: 1, 2 or None"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.scene(**arguments)  # type: ignore[arg-type]


def test_a_resolution_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="resolution is 23; accepted: 24 or more"):
        shapes.render(shapes.scene(0), 23)


def test_the_data_set_is_the_sequence_of_its_scenes() -> None:
    data = ShapesDataset("heldout", 13, 48, seed=3, num_shapes=2)
    examples = list(data)  # type: ignore[call-overload]
    assert len(data) == len(examples) == 13
    drawn = shapes.scene(12, "heldout", 3, 2)
    assert examples[12]["key"] == "heldout-00000012"
    assert examples[12]["captions"] == shapes.captions(drawn)
    assert examples[12]["image"].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(examples[12]["image"]), shapes.render(drawn, 48))
    with pytest.raises(IndexError, match="13"):
        data[13]
