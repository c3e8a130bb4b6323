"""Read a picture of the `shapes` world back and compare it with its caption, without any learnt model.

Reading is analysis by synthesis: the background is the median colour of the picture's rim, every connected
region that differs from it is one shape, its opacity map gives centre and radius by moments, and its kind is
the one whose rendering at that centre and radius, sharp or blurred, leaves the smallest residual. Blurred
edges, JPEG artefacts, noise and stray pixels of a generated picture are tolerated; what resembles nothing in
the vocabulary is read as None.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ldm.data.shapes import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    RGB,
    SIZES,
    SceneSpec,
    ShapeSpec,
    coverage,
    parse_caption,
)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MAX_SIDE: Final = 64
"""Larger pictures are averaged down to this side before they are read."""
MIN_CONTRAST: Final = 40.0
"""Smallest RGB distance from the background that counts as part of a shape."""
MIN_AREA: Final = 0.005
"""Regions below this fraction of the picture are stray pixels; the smallest true shape covers 0.017."""
MAX_SHAPES: Final = 4
"""Only so many regions, the largest, are read."""
COLOR_TOLERANCE: Final = 60.0
BACKGROUND_TOLERANCE: Final = 40.0
SIZE_TOLERANCE: Final = 1.4
"""Largest ratio between a radius and the nominal one."""
BLURS: Final = (0.0, 0.8, 1.6)
"""Standard deviations, in pixels, of the blurs that templates are tried at."""
MAX_GAIN: Final = 1.6
"""Largest factor by which blur may have paled the inside of a shape."""
MAX_RESIDUAL: Final = 0.2
"""Largest squared difference between an opacity map and its best template, relative to the map's square."""


@dataclass(frozen=True)
class ReadShape:
    """One region: its attributes (None where it resembles nothing in the vocabulary), its centre of mass and
    its radius in unit coordinates."""

    kind: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class ReadScene:
    """What a picture shows: its regions from the largest to the smallest, at most `MAX_SHAPES`."""

    shapes: tuple[ReadShape, ...]
    background: str | None


@dataclass(frozen=True)
class Score:
    """Agreement of a picture with a caption; None where the caption does not name the attribute.

    `kind`, `color` and `size` are fractions of the shapes that the caption names, `relation` is 0 or 1.
    `scene` is True only when the number of shapes and every named attribute are right.
    """

    scene: bool
    kind: float
    color: float | None
    size: float | None
    relation: float | None
    background: bool | None


def read_scene(image: Image.Image | npt.NDArray[np.uint8]) -> ReadScene:
    """Find the shapes of a square picture, PIL or uint8 [S, S, 3].

    Raises ValueError for another shape or dtype.
    """
    pixels = _pixels(image)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(rim, axis=0)
    regions = _regions(_foreground(np.linalg.norm(pixels - ground, axis=2)))
    shapes = tuple(_read_shape(pixels, ground, regions, i) for i in range(len(regions)))
    return ReadScene(shapes, _nearest(ground, BACKGROUNDS, BACKGROUND_TOLERANCE))


def _pixels(image: Image.Image | npt.NDArray[np.uint8]) -> FloatArray:
    picture = image if isinstance(image, Image.Image) else _from_array(image)
    if picture.width != picture.height:
        raise ValueError(f"the picture is {picture.width} x {picture.height} pixels; accepted: a square one")
    if picture.width > MAX_SIDE:
        picture = picture.convert("RGB").resize((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _from_array(array: npt.NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"the picture is {array.dtype} {list(array.shape)}; accepted: uint8 [S, S, 3]")
    return Image.fromarray(array)


def _nearest(color: FloatArray, palette: Mapping[str, RGB], tolerance: float) -> str | None:
    distances = {name: math.dist(color, rgb) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= tolerance else None


def _foreground(distance: FloatArray) -> BoolArray:
    """Pixels more than half as far from the background as the farthest pixel of their 5 x 5 neighbourhood."""
    local = sliding_window_view(np.pad(distance, 2), (5, 5)).max(axis=(2, 3))
    return np.asarray((distance > MIN_CONTRAST) & (distance > 0.5 * local))


def _regions(mask: BoolArray) -> list[BoolArray]:
    """Connected regions (8 neighbours) of at least `MIN_AREA`, the largest first."""
    labels = _label(mask)
    areas = np.bincount(labels.ravel())[1:]
    order = [int(i) for i in np.argsort(-areas, kind="stable")[:MAX_SHAPES] if areas[i] >= MIN_AREA * mask.size]
    return [labels == i + 1 for i in order]


def _label(mask: BoolArray) -> npt.NDArray[np.intp]:
    """Number the connected regions from 1 by joining the runs of neighbouring rows."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    roots = _join(runs)
    labels = np.zeros(mask.shape, dtype=np.intp)
    numbers = {root: i + 1 for i, root in enumerate(sorted(set(roots)))}
    for (row, start, end), root in zip(runs, roots, strict=True):
        labels[row, start:end] = numbers[root]
    return labels


def _join(runs: Sequence[tuple[int, int, int]]) -> list[int]:
    """For each run (row, start, end), the first run of its region: union-find over touching runs."""
    parents = list(range(len(runs)))

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    first = 0
    for i, (row, start, end) in enumerate(runs):
        while runs[first][0] < row - 1:
            first += 1
        for j in range(first, i):
            if runs[j][0] == row - 1 and runs[j][1] <= end and start <= runs[j][2]:
                low, high = sorted((root(i), root(j)))
                parents[high] = low
    return [root(i) for i in range(len(runs))]


def _read_shape(pixels: FloatArray, ground: FloatArray, regions: Sequence[BoolArray], index: int) -> ReadShape:
    region, side = regions[index], len(pixels)
    color, box = _interior_color(pixels, region), _box(region, margin=3)
    opacity = _opacity(pixels[box], ground, color, region[box])
    for other in (*regions[:index], *regions[index + 1 :]):
        opacity[_dilate(other)[box]] = 0.0
    kind, fit = _fit(opacity)
    return ReadShape(
        kind=kind if fit.residual <= MAX_RESIDUAL else None,
        color=_nearest(ground + fit.gain * (color - ground), COLORS, COLOR_TOLERANCE),
        size=_size(fit.radius / side),
        x=(box[1].start + fit.x) / side,
        y=(box[0].start + fit.y) / side,
        radius=fit.radius / side,
    )


def _interior_color(pixels: FloatArray, region: BoolArray) -> FloatArray:
    """Median colour of the pixels whose four neighbours are in the region; of all where there are none."""
    padded = np.pad(region, 1)
    inner = region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(np.median(pixels[inner if inner.any() else region], axis=0))


def _dilate(mask: BoolArray) -> BoolArray:
    padded = np.pad(mask, 1)
    return np.asarray(mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:])


def _box(region: BoolArray, margin: int) -> tuple[slice, slice]:
    rows, columns = np.nonzero(region.any(axis=1))[0], np.nonzero(region.any(axis=0))[0]
    top, left = max(int(rows[0]) - margin, 0), max(int(columns[0]) - margin, 0)
    bottom, right = (
        min(int(rows[-1]) + margin + 1, len(region)),
        min(int(columns[-1]) + margin + 1, len(region)),
    )
    return slice(top, bottom), slice(left, right)


def _opacity(pixels: FloatArray, ground: FloatArray, color: FloatArray, region: BoolArray) -> FloatArray:
    """Projection on the line from the background (0) to the interior colour (1), clipped to [0, 1.5].

    A region without one colour, which that line misses, counts as opaque.
    """
    direction = color - ground
    along = (pixels - ground) @ direction / max(float(direction @ direction), MIN_CONTRAST**2)
    opacity = np.clip(along, 0.0, 1.5)
    return opacity if opacity.sum() > region.sum() / 2 else region.astype(np.float64)


@functools.cache
def _moments(kind: str) -> tuple[float, float]:
    """Area and centre of mass below the centre of the bounding box, for radius 1."""
    side, radius = 512, 160.0
    grid = np.arange(0.5, side)
    opacity = coverage(kind, side / 2, side / 2, radius, grid, grid)
    area = float(opacity.sum())
    center = float((opacity.sum(axis=1) * grid).sum() / area)
    return area / radius**2, (center - side / 2) / radius


@functools.cache
def _blur(side: int, sigma: float) -> FloatArray:
    """Gaussian blur of a signal of `side` samples as a matrix, dark outside."""
    offsets = np.subtract.outer(np.arange(side), np.arange(side))
    return np.exp(-np.square(offsets / sigma) / 2) / (sigma * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class _Fit:
    """A template against an opacity map, in its pixels; `gain` is the opacity of the unblurred inside."""

    residual: float
    x: float
    y: float
    radius: float
    gain: float


def _fit(opacity: FloatArray) -> tuple[str, _Fit]:
    """The kind, at the blur, that explains an opacity map best."""
    fits = {(kind, blur): _match(opacity, kind, blur) for kind in KINDS for blur in BLURS}
    kind, blur = min(fits, key=lambda key: fits[key].residual)
    return kind, fits[kind, blur]


def _match(opacity: FloatArray, kind: str, blur: float) -> _Fit:
    """Template with the mass and centre of mass of the map; radius and gain by alternating least squares."""
    rows, columns = (np.arange(0.5, length) for length in opacity.shape)
    (unit_area, below), mass = _moments(kind), float(opacity.sum())
    x, y = float(opacity.sum(axis=0) @ columns) / mass, float(opacity.sum(axis=1) @ rows) / mass
    gain = 1.0
    for _ in range(2):
        radius = math.sqrt(mass / (gain * unit_area))
        template = coverage(kind, x, y - below * radius, radius, columns, rows)
        if blur:
            template = _blur(len(rows), blur) @ template @ _blur(len(columns), blur)
        gain = min(max(float(np.vdot(opacity, template) / np.vdot(template, template)), 0.9), MAX_GAIN)
    residual = float(np.square(opacity - gain * template).sum() / np.square(opacity).sum())
    return _Fit(residual, x, y, radius, gain)


def _size(radius: float) -> str | None:
    ratios = {size: max(radius / nominal, nominal / radius) for size, nominal in SIZES.items()}
    size = min(ratios, key=ratios.__getitem__)
    return size if ratios[size] <= SIZE_TOLERANCE else None


def score(image: Image.Image | npt.NDArray[np.uint8], caption: str) -> Score:
    """Compare a picture (see `read_scene`) with a caption of the `shapes` grammar.

    Read shapes are assigned to named ones so that most attributes agree. A relation counts as right only
    between two shapes that each agree with the caption in kind or colour. Raises ValueError for a caption of
    another grammar.
    """
    spec, read = parse_caption(caption), read_scene(image)
    found = _assign(spec, read)
    fractions = {name: _fraction(spec.shapes, found, name) for name in ("kind", "color", "size")}
    relation = None if spec.relation is None else float(_related(spec, found))
    background = None if spec.background is None else spec.background == read.background
    attributes = [*fractions.values(), relation, background]
    complete = len(read.shapes) == len(spec.shapes) and all(value in (None, 1.0) for value in attributes)
    return Score(
        scene=complete,
        kind=fractions["kind"] or 0.0,
        color=fractions["color"],
        size=fractions["size"],
        relation=relation,
        background=background,
    )


def _assign(spec: SceneSpec, read: ReadScene) -> tuple[ReadShape | None, ...]:
    """The read shape for each named one, None where there are too few."""
    count = len(spec.shapes)
    candidates = list(read.shapes) + [None] * (count - len(read.shapes))

    def agreement(found: tuple[ReadShape | None, ...]) -> tuple[int, bool]:
        pairs = zip(spec.shapes, found, strict=True)
        hits = sum(_hits(named, shape, "kind", "color", "size") for named, shape in pairs)
        return hits, spec.relation is not None and _related(spec, found)

    return max(itertools.permutations(candidates, count), key=agreement)


def _hits(named: ShapeSpec, shape: ReadShape | None, *attributes: str) -> int:
    if shape is None:
        return 0
    return sum(getattr(named, a) is not None and getattr(named, a) == getattr(shape, a) for a in attributes)


def _fraction(named: Sequence[ShapeSpec], found: Sequence[ReadShape | None], attribute: str) -> float | None:
    pairs = [(n, f) for n, f in zip(named, found, strict=True) if getattr(n, attribute) is not None]
    return sum(_hits(n, f, attribute) for n, f in pairs) / len(pairs) if pairs else None


def _related(spec: SceneSpec, found: Sequence[ReadShape | None]) -> bool:
    first, second = found
    if first is None or second is None:
        return False
    known = all(_hits(n, f, "kind", "color") for n, f in zip(spec.shapes, found, strict=True))
    return known and spec.relation == _relation(first, second)


def _relation(first: ReadShape, second: ReadShape) -> str:
    """Relation of the first shape to the second along the axis on which they lie farther apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) >= abs(dx):
        return "above" if dy > 0 else "below"
    return "to the left of" if dx > 0 else "to the right of"


def aggregate(scores: Sequence[Score]) -> dict[str, float | None]:
    """Mean of each attribute over the scores whose caption names it, None where no caption does.

    Raises ValueError for an empty sequence.
    """
    if not scores:
        raise ValueError("scores is empty; accepted: one score or more")
    return {name: _mean([getattr(s, name) for s in scores]) for name in ("scene", "kind", "color", "size", "relation")}


def _mean(values: Sequence[float | None]) -> float | None:
    named = [float(value) for value in values if value is not None]
    return sum(named) / len(named) if named else None
