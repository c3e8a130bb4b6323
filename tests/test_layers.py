"""Imports run downwards only; what needs a heavy library says so where it needs it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = ("autoencoder", "conditioning", "ldm", "train_autoencoder", "train_classifier", "train_ldm")
LAYERS = {
    1: ("autoencoder", "conditioning", "ldm.process", "ldm.networks", "ldm.seeds"),
    2: ("ldm.sampling", "ldm.adapters", "ldm.data", "ldm.interop"),
    3: ("ldm.tasks", "ldm.canvas", "ldm.pipeline", "ldm.pretrained", "ldm.single_file"),
    4: ("ldm.config", "ldm.build", "ldm.training", "ldm.evaluation"),
    5: ("ldm", "ldm.cli", "ldm.serving", "train_autoencoder", "train_classifier", "train_ldm"),
}
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}
NEIGHBOURS = {
    ("ldm.adapters", "ldm.interop"),
    ("ldm.pipeline", "ldm.canvas"),
    ("ldm.pipeline", "ldm.pretrained"),
    ("ldm.pretrained", "ldm.single_file"),
    ("ldm.build", "ldm.config"),
    ("ldm.training", "ldm.config"),
    ("ldm.training", "ldm.evaluation"),
    ("ldm", "ldm.pipeline"),
}
"""The imports within a layer that the plan allows below the top: the parts of a room that spans several files."""

EXCHANGE = {
    "ldm.sampling.diffusers_adapter": {"diffusers"},
    "conditioning.t5_text": {"transformers"},
    "conditioning.transformers_text": {"transformers"},
}
"""The files whose purpose is to use one of the two libraries that we exchange models with."""

GENERATION = {"torch", "numpy", "PIL", "safetensors", "tokenizers"}


def modules() -> dict[str, Path]:
    """Dotted names of our own modules."""
    files = [*ROOT.glob("train_*.py")]
    for package in ("autoencoder", "conditioning", "ldm"):
        files.extend((ROOT / package).rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that a piece of code imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (full if full in MODULES else base for full in names)


def at_import(name: str) -> Iterator[str]:
    """What is imported when the module is, without functions' own imports and those for the type checker."""
    for node in ast.parse(MODULES[name].read_text()).body:
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not guarded and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from imported(name, node)


def room(module: str) -> str:
    """The longest room name that the module lies in."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((n for n in names if n in LAYER_OF), module)


def everything(name: str) -> set[str]:
    return set(imported(name, ast.parse(MODULES[name].read_text())))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_what_lies_below_it(name: str) -> None:
    here = room(name)
    assert here in LAYER_OF and (here != "ldm" or name == "ldm"), f"{name} lies in no room of the plan"
    for other in sorted(everything(name)):
        there = room(other)
        if other.split(".")[0] not in OWN or there == here or (here, there) in NEIGHBOURS:
            continue
        assert there in LAYER_OF and (there != "ldm" or other == "ldm"), (
            f"{name} imports {other}, which lies in no room"
        )
        below = LAYER_OF[there] < LAYER_OF[here] or LAYER_OF[here] == 5
        assert below, f"{name} (layer {LAYER_OF[here]}) imports {other} (layer {LAYER_OF[there]})"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_third_parties_stay_in_their_rooms(name: str) -> None:
    roots = {module.split(".")[0] for module in everything(name)}
    assert not (roots - EXCHANGE.get(name, set())) & {"diffusers", "transformers"}
    if "accelerate" in roots:
        assert room(name) in ("ldm.training", "train_autoencoder", "train_classifier", "train_ldm")


def reached(start: str) -> set[str]:
    """All our modules that importing one of them runs, packages above included."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found and name in MODULES:
            found.add(name)
            waiting += [*at_import(name), *([name.rpartition(".")[0]] if "." in name else [])]
    return found


def test_drawing_a_picture_needs_five_libraries() -> None:
    outside = {m.split(".")[0] for name in reached("ldm.pipeline") for m in at_import(name)} - set(OWN)
    assert outside - set(sys.stdlib_module_names) == GENERATION


def test_the_readers_of_imports_see_what_they_should() -> None:
    assert "ldm.networks.config" in everything("ldm.networks.unet")
    assert "ldm.pipeline" in everything("ldm") and "ldm.pipeline" not in set(at_import("ldm"))
    assert {"ldm.data.transforms", "ldm.process", "ldm.process.schedule"} <= reached("ldm.pipeline")
