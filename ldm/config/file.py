"""YAML files and `--section.field VALUE` overrides into the dataclasses of `ldm.config`, and back.

draccus decodes. Before it does, every key and value is checked against the field's type, because draccus lets a null,
a truth value or a text pass where another type is asked. Every mistake ends as a `ConfigError`: one sentence that names
the key and, for a misspelt one, the nearest valid key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import draccus
import yaml

from ldm.config import AutoencoderTraining, ClassifierTraining, ConfigError, LdmTraining, TextEncoderConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What the command line asked for besides the config itself."""

    resume: Literal["auto", "never"]
    allow_config_change: bool
    dry_run: bool


def parse_command_line(kind: type[T], argv: Sequence[str]) -> tuple[T, Launch]:
    """Reads `--config FILE [--section.field VALUE ...] [--dry-run] [--resume auto|never]`.

    Raises:
        ConfigError: naming the file, key or flag at fault and what is accepted.
    """
    parser = argparse.ArgumentParser(description=kind.__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see train_configs/")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: refuse a used folder")
    parser.add_argument("--allow-config-change", action="store_true", help="resume although the config changed")
    parser.add_argument("--dry-run", action="store_true", help="print config, sizes and estimates, then stop")
    known, overrides = parser.parse_known_args(list(argv))
    launch = Launch(known.resume, known.allow_config_change, known.dry_run)
    return load_config(kind, known.config, overrides), launch


def load_config(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads one YAML file and applies `--section.field VALUE` overrides.

    Raises:
        ConfigError: when the file is missing or not YAML, or a key or value is not accepted.
    """
    if not Path(path).is_file():
        raise ConfigError(f"There is no config file {path}")
    try:
        tree = _read_yaml(Path(path))
        for key, text in _pairs(overrides):
            _override(tree, key, text, kind)
        return _build(kind, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_section(kind: type[T], key: str, text: str) -> T:
    """A section of a config from YAML in one line, such as `{type: t5, path: FOLDER}`.

    Raises:
        ConfigError: naming `key`, where the section would stand, and what is wrong with it.
    """
    return _build(kind, _parsed(key, text), f"{key}.")


def dump_config(config: object) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    text: str = draccus.dump(config)
    return text


def completed(kind: type[T], text: str) -> str:
    """A config's YAML with the settings that it lacks at their defaults; as it is if it is no such config."""
    try:
        return dump_config(_build(kind, draccus.cfgparsing.parse_string(text)))
    except (ConfigError, draccus.utils.DraccusException, yaml.YAMLError, ValueError):
        return text


def differences(before: str, after: str) -> list[str]:
    """Dotted keys whose values differ between two YAML configs, as `key: old -> new`."""
    old, new = _flat(draccus.cfgparsing.parse_string(before)), _flat(draccus.cfgparsing.parse_string(after))
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


def flat_settings(config: object) -> dict[str, bool | int | float | str | None]:
    """Dotted keys and plain values of a config, as trackers take them; a list becomes its text."""
    flat = _flat(draccus.cfgparsing.parse_string(dump_config(config)))
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in flat.items()}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = draccus.cfgparsing.load_config(file, file=path)
    except (draccus.utils.DraccusException, ValueError) as error:
        raise ConfigError(f"not a YAML file: {' '.join(str(error.__cause__ or error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"the file holds {tree!r}; it must hold `key: value` lines")
    return tree or {}


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of `--key value` and `--key=value`."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} belongs to no flag; overrides have the form --section.field VALUE")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value")
            value = rest.pop(0)
        pairs.append((flag[2:], value))
    return pairs


def _override(tree: dict[str, Any], key: str, text: str, kind: type) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"`{section}` is {tree!r}; it must be a section of keys and values")
    hint = _keys(kind).get(key)
    if _accepts(hint, text) and not (text == "null" and _accepts(hint, None)):
        tree[name] = text
        return
    tree[name] = _parsed(key, text)


def _parsed(key: str, text: str) -> Any:
    """What a value means that was given in one line."""
    try:
        return draccus.cfgparsing.parse_string(text)
    except Exception as error:
        raise ConfigError(f"`{key}` is {text!r}; that is not YAML") from error


def _build(kind: type[T], tree: Any, prefix: str = "") -> T:
    """Checks every key and value of a section, then builds it."""
    if not isinstance(tree, dict):
        raise ConfigError(f"`{prefix[:-1]}` is {tree!r}; it must be a section of keys and values")
    chosen = _chosen(kind, tree, prefix)
    hints = _hints(chosen)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"`{key}` is not a key of the config{_nearest(str(name), prefix, hints)}")
        if value is False and "no" in typing.get_args(hints[name]):
            tree[name] = value = "no"  # YAML 1.1 takes a bare no for false
        if _sections(hints[name]):
            _build(hints[name], value, f"{key}.")
        elif not _accepts(hints[name], value):
            raise ConfigError(f"`{key}` is {value!r}; it must be {_described(hints[name])}")
    try:
        built: T = draccus.decode(chosen if len(_sections(kind)) > 1 else kind, tree)
        return built
    except draccus.utils.DraccusException as error:
        cause = error.__cause__ or error
        section = f"`{prefix[:-1]}`: " if prefix and not isinstance(cause, ConfigError) else ""
        raise ConfigError(f"{section}{cause}") from error


def _chosen(kind: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass that a section's `type` names, where it names one."""
    sections = _sections(kind)
    if kind is TextEncoderConfig:
        choices = kind.get_known_choices()
    elif len(sections) > 1:
        choices = {typing.get_args(_hints(s)["type"])[0]: s for s in sections if "type" in _hints(s)}
        if "type" not in tree:
            return next(section for section in sections if section not in choices.values())
    else:
        return kind
    if tree.get("type") not in choices:
        found = f"is {tree['type']!r}" if "type" in tree else "is missing"
        raise ConfigError(f"`{prefix}type` {found}; it must be one of {', '.join(choices)}")
    return choices[tree["type"]]


def _sections(hint: Any) -> list[Any]:
    """The dataclasses that a section of this type can be: none for a plain value, several for a union of them."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return list(options) if all(dataclasses.is_dataclass(option) for option in options) else []


def _hints(kind: Any) -> dict[str, Any]:
    """Names and types of a section's keys."""
    hints = typing.get_type_hints(kind)
    kinds = {"type": str} if issubclass(kind, TextEncoderConfig) else {}
    return kinds | {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def _keys(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and types of every key, those of all kinds of a section included."""
    keys: dict[str, Any] = {}
    for option in TextEncoderConfig.get_known_choices().values() if kind is TextEncoderConfig else [kind]:
        for name, hint in _hints(option).items():
            keys[f"{prefix}{name}"] = hint
            for section in _sections(hint):
                keys |= _keys(section, f"{prefix}{name}.")
    return keys


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value read from YAML is one of the type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_accepts(argument, value) for argument in arguments)
    if typing.get_origin(hint) is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_accepts(arguments[0], entry) for entry in value)
    if hint is float:
        return isinstance(value, (int, float, str)) and not isinstance(value, bool) and _is_number(value)
    return type(value) is hint


def _is_number(value: int | float | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _described(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_described(argument) for argument in arguments)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        return f"a list, each entry of it {_described(arguments[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, str(hint))


def _nearest(name: str, prefix: str, hints: Mapping[str, Any]) -> str:
    """A hint at the key that was meant: in this section, or else in any section."""
    elsewhere = {
        key.rsplit(".", 1)[-1]: key
        for root in (ClassifierTraining, LdmTraining, AutoencoderTraining)
        for key in _keys(root)
    }
    near, far = difflib.get_close_matches(name, hints, 1), difflib.get_close_matches(name, elsewhere, 1)
    if near:
        return f"; did you mean `{prefix}{near[0]}`?"
    if far and elsewhere[far[0]] != f"{prefix}{name}":
        return f"; did you mean `{elsewhere[far[0]]}`?"
    return f"; accepted here: {', '.join(hints)}"
