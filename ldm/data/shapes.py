"""Built-in data set: one or two coloured shapes on a plain background, with exact captions.

Every scene is a pure function of (seed, split, index), so the data need no download and no disk. Geometry is
kept in unit coordinates (x to the right, y down, both in [0, 1]) and renders at any resolution.

Held-out rule. Two kinds of fact are kept out of "train" and "validation", and every "heldout" scene shows at
least one of them, so that "heldout" measures composition of what was learnt apart:

- attribute pairs (colour, kind), enumerated kind by kind in the order of `KINDS` and `COLORS`;
- relation triples (kind, relation, kind), enumerated in the order "above" then "to the left of", first kind,
  second kind. "b below a" is the same fact as "a above b", "b to the right of a" as "a to the left of b".

Both lists have 32 entries, and entries 4, 14 and 24 (index mod 10 equal to 4; about 10 %) are held out. That
takes three different colours of three different kinds: purple circle, cyan square, red star; and the triples
square above circle, star above triangle, triangle to the left of circle.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypedDict, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

Split = Literal["train", "validation", "heldout"]
RGB = tuple[int, int, int]
FloatArray = npt.NDArray[np.float64]
_Option = TypeVar("_Option")

KINDS: Final = ("circle", "square", "triangle", "star")
COLORS: Final[dict[str, RGB]] = {
    "red": (215, 25, 35),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (250, 230, 30),
    "purple": (130, 40, 180),
    "orange": (255, 130, 0),
    "cyan": (40, 210, 230),
    "pink": (255, 110, 190),
}
SIZES: Final[dict[str, float]] = {"small": 0.108, "large": 0.17}
"""Nominal radius of each size as a fraction of the image side."""
BACKGROUNDS: Final[dict[str, RGB]] = {
    "white": (255, 255, 255),
    "gray": (175, 175, 175),
    "black": (10, 10, 10),
    "beige": (245, 225, 180),
    "navy": (20, 30, 85),
}
INVERSE: Final = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
RELATIONS: Final = tuple(INVERSE)
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

MIN_RESOLUTION: Final = 24
SINGLE_FRACTION: Final = 0.35
SIZE_JITTER: Final = 0.05
BORDER: Final = 0.025
GAP: Final = 0.05
"""Smallest free space between the bounding boxes of two shapes along the axis of their relation."""
ALONG: Final = 0.05
"""Largest distance of a shape from the middle of its half, along the axis of the relation."""
ACROSS: Final = 0.08
"""Largest distance from the middle of the image, across the axis of the relation."""
ALONE: Final = 0.12
"""Largest distance of a single shape from the middle of the image, along each axis."""


def _every_tenth(facts: Sequence[tuple[str, ...]]) -> frozenset[tuple[str, ...]]:
    return frozenset(facts[4::10])


HELD_OUT_PAIRS: Final = _every_tenth([(color, kind) for kind in KINDS for color in COLORS])
HELD_OUT_TRIPLES: Final = _every_tenth(
    [(a, relation, b) for relation in ("above", "to the left of") for a, b in itertools.product(KINDS, KINDS)]
)


@dataclass(frozen=True)
class Shape:
    """What a caption can say of a shape: a key of `KINDS`, `COLORS` and `SIZES` each."""

    kind: str
    color: str
    size: str


@dataclass(frozen=True)
class Placed:
    """A shape with the centre of its bounding box and its radius, in unit coordinates."""

    shape: Shape
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two shapes; `relation` is that of the first to the second, None for a single shape."""

    shapes: tuple[Placed, ...]
    relation: str | None
    background: str


@dataclass(frozen=True)
class ShapeSpec:
    """A shape as a caption names it; what it leaves out is None."""

    kind: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class SceneSpec:
    """A scene as a caption names it; what it leaves out is None."""

    shapes: tuple[ShapeSpec, ...]
    relation: str | None = None
    background: str | None = None


class ShapesExample(TypedDict):
    """One item of `ShapesDataset`."""

    image: Image.Image
    captions: list[str]
    key: str


# Geometry. A polygon is a set of lines n.p = offset around the centre of its bounding box, for radius 1. Its
# signed distance is the largest of n.p - offset; that of the pentagram is the second largest, since each of
# its five points lies outside exactly one of its five lines. Only IEEE-exact operations are used (sines come
# from square roots), so every machine draws the same.

_COS36, _COS72 = (math.sqrt(5) + 1) / 4, (math.sqrt(5) - 1) / 4
_SIN36, _SIN72 = math.sqrt(10 - 2 * math.sqrt(5)) / 4, math.sqrt(10 + 2 * math.sqrt(5)) / 4
_SQUARE_HALF = 0.9
_TRIANGLE_HALF_WIDTH = 1.2
_TRIANGLE_HALF_HEIGHT = _TRIANGLE_HALF_WIDTH * math.sqrt(3) / 2
_STAR_TIP = 1.3
_STAR_CENTER = _STAR_TIP * (1 - _COS36) / 2


def _star_lines() -> list[tuple[float, float, float]]:
    tips = [(0.0, -1.0), (_SIN72, -_COS72), (_SIN36, _COS36), (-_SIN36, _COS36), (-_SIN72, -_COS72)]
    return [(nx, ny, _STAR_TIP * _COS72 + ny * _STAR_CENTER) for nx, ny in tips]


_LINES: Final = {
    "square": np.array([(nx, ny, _SQUARE_HALF) for nx, ny in ((1, 0), (-1, 0), (0, 1), (0, -1))]),
    "triangle": np.array(
        [(0.0, 1.0, _TRIANGLE_HALF_HEIGHT)]
        + [(side * math.sqrt(3) / 2, -0.5, _TRIANGLE_HALF_HEIGHT / 2) for side in (-1, 1)]
    ),
    "star": np.array(_star_lines()),
}
HALF_EXTENT: Final[dict[str, tuple[float, float]]] = {
    "circle": (1.0, 1.0),
    "square": (_SQUARE_HALF, _SQUARE_HALF),
    "triangle": (_TRIANGLE_HALF_WIDTH, _TRIANGLE_HALF_HEIGHT),
    "star": (_STAR_TIP * _SIN72, _STAR_TIP * (1 + _COS36) / 2),
}
"""Half width and half height of each kind's bounding box, in radii."""


class _Draws:
    """The random numbers of one scene: Philox is keyed by (seed, split) and counts from the index.

    Only its raw 64-bit words are used: NumPy fixes those for all versions, its distributions it does not.
    """

    def __init__(self, seed: int, split: Split, index: int) -> None:
        key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
        self._bits = np.random.Philox(counter=np.array([0, index, 0, 0], dtype=np.uint64), key=key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def choice(self, options: Sequence[_Option]) -> _Option:
        return options[int(self._bits.random_raw()) % len(options)]


def contains_held_out(shapes: Sequence[Shape], relation: str | None) -> bool:
    """Whether a held-out pair or triple (see the module's docstring) is among these shapes."""
    if any((shape.color, shape.kind) in HELD_OUT_PAIRS for shape in shapes):
        return True
    if relation is None:
        return False
    kinds = [shape.kind for shape in shapes]
    triples = {(kinds[0], relation, kinds[1]), (kinds[1], INVERSE[relation], kinds[0])}
    return not triples.isdisjoint(HELD_OUT_TRIPLES)


def scene(index: int, split: str = "train", seed: int = 0, num_shapes: int | None = None) -> Scene:
    """Scene `index` of a split: the same on every machine, whatever was drawn before.

    `num_shapes` forces 1 or 2 shapes; None draws one shape in 35 % of the scenes. A single shape lies near the
    middle, two of them near the middles of the halves that their relation names, with `GAP` between them. They
    differ in kind or colour.

    Raises ValueError for an unknown split, a negative index or seed, or another number of shapes.
    """
    draws = _Draws(_non_negative("seed", seed), _split(split), _non_negative("index", index))
    if num_shapes not in (None, 1, 2):
        raise ValueError(f"num_shapes is {num_shapes!r}; accepted: 1, 2 or None")
    count = num_shapes or (1 if draws.uniform() < SINGLE_FRACTION else 2)
    shapes, relation = _content(draws, split == "heldout", count)
    placed = _place_one(draws, shapes[0]) if relation is None else _place_two(draws, shapes, relation)
    return Scene(placed, relation, draws.choice(tuple(BACKGROUNDS)))


def _non_negative(name: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r}; accepted: 0 to 2**63 - 1")
    return value


def _split(split: str) -> Split:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    return split


def _content(draws: _Draws, held_out: bool, count: int) -> tuple[list[Shape], str | None]:
    colors, sizes = tuple(COLORS), tuple(SIZES)
    while True:
        shapes = [Shape(draws.choice(KINDS), draws.choice(colors), draws.choice(sizes)) for _ in range(count)]
        relation = draws.choice(RELATIONS) if count == 2 else None
        distinct = len({(shape.kind, shape.color) for shape in shapes}) == count
        if distinct and contains_held_out(shapes, relation) == held_out:
            return shapes, relation


def _radius(draws: _Draws, shape: Shape) -> float:
    return SIZES[shape.size] * draws.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER)


def _place_one(draws: _Draws, shape: Shape) -> tuple[Placed, ...]:
    x, y = (draws.uniform(0.5 - ALONE, 0.5 + ALONE) for _ in range(2))
    return (Placed(shape, x, y, _radius(draws, shape)),)


def _place_two(draws: _Draws, shapes: Sequence[Shape], relation: str) -> tuple[Placed, ...]:
    vertical = relation in ("above", "below")
    middles = (0.25, 0.75) if relation in ("above", "to the left of") else (0.75, 0.25)
    placed = []
    for shape, middle in zip(shapes, middles, strict=True):
        radius = _radius(draws, shape)
        room = 0.25 - max(BORDER, GAP / 2) - HALF_EXTENT[shape.kind][vertical] * radius
        along = middle + min(ALONG, room) * draws.uniform(-1, 1)
        across = 0.5 + ACROSS * draws.uniform(-1, 1)
        placed.append(Placed(shape, *((across, along) if vertical else (along, across)), radius))
    return tuple(placed)


def coverage(kind: str, x: float, y: float, radius: float, columns: FloatArray, rows: FloatArray) -> FloatArray:
    """Fraction of each pixel that a shape covers, [len(rows), len(columns)] in [0, 1].

    All lengths are in pixels; `columns` and `rows` are the coordinates of the pixel centres. The edge is a
    linear ramp, one pixel wide, of the signed distance.
    """
    dx, dy = columns - x, rows - y
    if kind == "circle":
        distance = np.sqrt(dx[None, :] * dx[None, :] + dy[:, None] * dy[:, None]) - radius
    else:
        nx, ny, offset = _LINES[kind].T
        lines = (nx[:, None] * dx)[:, None, :] + (ny[:, None] * dy - offset[:, None] * radius)[:, :, None]
        distance = np.partition(lines, 3, axis=0)[3] if kind == "star" else lines.max(axis=0)
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, resolution: int) -> npt.NDArray[np.uint8]:
    """Draw a scene, anti-aliased: uint8 [resolution, resolution, 3], sRGB.

    Raises ValueError when the resolution is below `MIN_RESOLUTION`, where kinds can no longer be told apart.
    """
    if resolution < MIN_RESOLUTION:
        raise ValueError(f"resolution is {resolution}; accepted: {MIN_RESOLUTION} or more")
    image = np.empty((resolution, resolution, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for placed in scene.shapes:
        _draw(image, placed)
    return image


def _draw(image: npt.NDArray[np.uint8], placed: Placed) -> None:
    side = image.shape[0]
    half_width, half_height = HALF_EXTENT[placed.shape.kind]
    x, y, radius = placed.x * side, placed.y * side, placed.radius * side
    columns, rows = _pixels(x, half_width * radius, side), _pixels(y, half_height * radius, side)
    centers = np.arange(0.5, side)
    opacity = coverage(placed.shape.kind, x, y, radius, centers[columns], centers[rows])[:, :, None]
    box = image[rows, columns]
    box[:] = np.rint(box + opacity * (np.array(COLORS[placed.shape.color]) - box))


def _pixels(center: float, half: float, side: int) -> slice:
    """The pixels within half a pixel of an interval."""
    return slice(max(math.floor(center - half - 0.5), 0), min(math.ceil(center + half + 0.5), side))


def captions(scene: Scene) -> list[str]:
    """Equivalent captions of a scene: first the full one, then forms that leave out the background or the
    sizes or turn the relation round ("b below a" for "a above b")."""
    shapes = [placed.shape for placed in scene.shapes]
    ground = f" on {_article(scene.background)} background"
    full = _phrase(shapes, scene.relation, sized=True)
    short = _phrase(shapes, scene.relation, sized=False)
    if scene.relation is None:
        return [full + ground, full, short + ground, short]
    turned = _phrase(shapes[::-1], INVERSE[scene.relation], sized=True)
    return [full + ground, full, turned + ground, turned, short + ground]


def _phrase(shapes: Sequence[Shape], relation: str | None, sized: bool) -> str:
    names = [_article(f"{s.size} {s.color} {s.kind}" if sized else f"{s.color} {s.kind}") for s in shapes]
    return names[0] if relation is None else f"{names[0]} {relation} {names[1]}"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _alternatives(words: Iterable[str]) -> str:
    return "(" + "|".join(words) + ")"


_SHAPE = rf"an? (?:{_alternatives(SIZES)} )?(?:{_alternatives(COLORS)} )?{_alternatives(KINDS)}"
_GROUND = rf"on an? {_alternatives(BACKGROUNDS)} background"
_CAPTION: Final = re.compile(rf"{_SHAPE}(?: {_alternatives(RELATIONS)} {_SHAPE})?(?: {_GROUND})?")


def parse_caption(text: str) -> SceneSpec:
    """Read back any caption of `captions`; what it leaves out is None.

    Case, repeated spaces and a final full stop do not matter. Raises ValueError with the text when it is not
    of this grammar.
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"not a shapes caption: {text!r}; accepted: [size] [color] kind [relation [size] [color] kind] "
            "[background], for example 'a small red circle above a large blue square on a white background'"
        )
    size, color, kind, relation, other_size, other_color, other_kind, background = match.groups()
    first = ShapeSpec(kind, color, size)
    if relation is None:
        return SceneSpec((first,), None, background)
    return SceneSpec((first, ShapeSpec(other_kind, other_color, other_size)), relation, background)


class ShapesDataset:
    """Map-style data set over the first `size` scenes of a split; see `scene` and `render`."""

    def __init__(self, split: str, size: int, resolution: int, seed: int = 0, num_shapes: int | None = None) -> None:
        self.split = _split(split)
        self.size = _non_negative("size", size)
        self.resolution = resolution
        self.seed = seed
        self.num_shapes = num_shapes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ShapesExample:
        """Image (PIL, RGB), captions (the full one first) and key, for example "train-00000012".

        Raises IndexError outside 0 <= index < size.
        """
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside a data set of {self.size} examples")
        drawn = scene(index, self.split, self.seed, self.num_shapes)
        image = Image.fromarray(render(drawn, self.resolution))
        return ShapesExample(image=image, captions=captions(drawn), key=f"{self.split}-{index:08d}")
