"""What a measurement says: JSON for programs, Markdown for people, and a chart of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.distribution import Figure
from ldm.evaluation.grid import image_grid

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


@dataclass(frozen=True)
class Run:
    """The figures of one setting."""

    guidance_scale: float
    steps: int
    figures: Mapping[str, Figure]

    def as_json(self) -> dict[str, Any]:
        return {"guidance_scale": self.guidance_scale, "steps": self.steps, **as_json(self.figures)}


def as_json(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """`metrics` and their `intervals`."""
    return {
        "metrics": {name: figure.value for name, figure in figures.items()},
        "intervals": {name: [figure.low, figure.high] for name, figure in figures.items()},
    }


def markdown(
    report: Mapping[str, Any], runs: Sequence[Run], reference: Mapping[str, Figure], images: Sequence[str]
) -> str:
    """A page: the settings, a table with a column a setting, the pictures."""
    heads = ["metric", *(f"guidance {run.guidance_scale:g}, {run.steps} steps" for run in runs)]
    heads += ["reference"] if reference else []
    rows = [[name, *(cell(run.figures[name]) for run in runs)] for name in runs[0].figures]
    for row in rows if reference else []:
        row.append(cell(reference[row[0]]) if row[0] in reference else "")
    lines = [f"# {report['suite']}, {report['num_samples']} pictures", ""]
    lines += _table(heads, rows)
    lines += ["", "In brackets: 95 % bootstrap intervals over the generated pictures.", ""]
    lines += _table(["setting", "value"], [[name, str(value)] for name, value in report["settings"].items()])
    lines += [line for name in images for line in ("", f"![{name}]({name})")]
    return "\n".join(lines) + "\n"


def cell(figure: Figure) -> str:
    """`0.1234 (0.1200 to 0.1300)`, with four significant digits."""
    return f"{figure.value:.4g} ({figure.low:.4g} to {figure.high:.4g})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def sweep_chart(runs: Sequence[Run]) -> Image.Image:
    """A panel a metric over the guidance scale, one line a number of steps; over the steps where guidance is one."""
    scales = {run.guidance_scale for run in runs}
    over_steps = len(scales) == 1
    panels = []
    for name in runs[0].figures:
        lines: dict[str, list[tuple[float, Figure]]] = {}
        for run in runs:
            label = f"guidance {run.guidance_scale:g}" if over_steps else f"{run.steps} steps"
            place = float(run.steps) if over_steps else run.guidance_scale
            lines.setdefault(label, []).append((place, run.figures[name]))
        panels.append(line_chart(name, "steps" if over_steps else "guidance scale", lines))
    return image_grid(panels, min(2, len(panels)))


@dataclass(frozen=True)
class _Frame:
    """Where the numbers of a chart lie in its picture: ranges of both axes, and the box [left, top, right, bottom]."""

    x: tuple[float, float]
    y: tuple[float, float]
    box: tuple[int, int, int, int]

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        across, up = (
            (value - low) / (high - low) if high > low else 0.5 for value, (low, high) in ((x, self.x), (y, self.y))
        )
        return left + (right - left) * across, bottom - (bottom - top) * up


def line_chart(
    title: str, axis: str, lines: Mapping[str, Sequence[tuple[float, Figure]]], size: tuple[int, int] = (420, 280)
) -> Image.Image:
    """Figures over a number, one line a label, with their intervals as bars."""
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=12)
    pen, points = ImageDraw.Draw(image), [point for line in lines.values() for point in line]
    places, ends = [x for x, _ in points], [end for _, f in points for end in (f.low, f.high)]
    box = (60, 30 + 14 * len(lines), size[0] - 15, size[1] - 40)
    frame = _Frame((min(places), max(places)), (min(ends), max(ends)), box)
    pen.text((box[0], 5), title, fill="black", font=font)
    pen.text(((box[0] + box[2]) / 2 - 40, box[3] + 20), axis, fill="black", font=font)
    _scales(pen, frame, sorted(set(places)), font)
    for index, (label, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        pen.text((box[0], 20 + 14 * index), label, fill=colour, font=font)
        _line(pen, frame, sorted(line, key=lambda point: point[0]), colour)
    return image


def _scales(pen: ImageDraw.ImageDraw, frame: _Frame, places: Sequence[float], font: Any) -> None:
    (left, _, right, bottom), (low, high) = frame.box, frame.y
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = frame.place(frame.x[0], value)[1]
        pen.line([(left, y), (right, y)], fill="#dddddd")
        pen.text((5, y - 7), f"{value:.3g}", fill="black", font=font)
    for x in places:
        pen.text((frame.place(x, low)[0] - 6, bottom + 4), f"{x:g}", fill="black", font=font)


def _line(pen: ImageDraw.ImageDraw, frame: _Frame, line: Sequence[tuple[float, Figure]], colour: str) -> None:
    pen.line([frame.place(x, f.value) for x, f in line], fill=colour, width=2)
    for x, f in line:
        pen.line([frame.place(x, f.low), frame.place(x, f.high)], fill=colour)
        across, up = frame.place(x, f.value)
        pen.ellipse([across - 3, up - 3, across + 3, up + 3], fill=colour)
