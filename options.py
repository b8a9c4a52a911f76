"""The command line of a stage, made from its dataclass.

A stage is a frozen-in-shape dataclass whose fields are declared with `option(default, help)`. `parse(Stage, __doc__)`
turns the fields into grouped `--options`, shows every default in `--help`, and answers an unknown option or choice
with the nearest name. Nothing else in the repository calls argparse for a stage, so an option exists exactly once.
"""

import argparse
import dataclasses
import difflib
import importlib
import itertools
import math
import operator
import re
import stat
import sys
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import utils
from utils import InputError

Stage = TypeVar("Stage")

REQUIRED = dataclasses.MISSING


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Sequence[Any] | str | None = None,
    metavar: str | None = None,
    positional: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    searched: bool = False,
) -> Any:
    """Declare one command-line option as a dataclass field.

    `default` is `REQUIRED` for an option without one. Lists and tuples may be given directly as defaults. The
    annotation of the field decides the type: `str`, `int`, `float`, `bool` (becomes `--flag/--no-flag`), `Path`,
    any callable class, `X | None`, `list[X]` (one or more values) or `tuple[X, X, X]` (exactly that many).

    `choices` may be a text `module:NAME`: a list, or a dictionary of names and what they mean, for `--help`. It belongs
    to a module above this one and is looked up when a command line is read.

    `at_least`, `above`, `at_most` and `below` bound a number, or each number of a list; a bounded number is finite.
    `searched` says that whatever lies in a folder is taken for data: nothing is written into it.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "metavar": metavar,
        "positional": positional,
        "bounds": bounds,
        "searched": searched,
    }
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata, kw_only=True)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest option or choice."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\n(see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r} is not one of {', '.join(names)}{_nearest(str(value), names)}"
            )


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _value_type(annotation: Any) -> tuple[Any, int | str | None]:
    """The converter and the argparse `nargs` of a field's annotation."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return _value_type(inner[0])
    if origin is list:
        return typing.get_args(annotation)[0], "+"
    if origin is tuple:
        return typing.get_args(annotation)[0], len(typing.get_args(annotation))
    return annotation, None


def _choices(field: dataclasses.Field) -> Sequence[Any] | Mapping[str, str] | None:
    """What an option can be; see `option`."""
    choices = field.metadata["choices"]
    if not isinstance(choices, str):
        return choices
    module, _, name = choices.partition(":")
    return getattr(importlib.import_module(module), name)


_INSIDE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def _check_bounds(stage: Any) -> None:
    """Raise `InputError` for the first number out of its declared range, or path that is a device or a pipe.

    A pipe can be read once, where files are hashed, too; /dev/zero has no end; writing replaces what is there.
    """
    for field in dataclasses.fields(stage):
        bounds = field.metadata["bounds"]
        values = getattr(stage, field.name)
        for value in values if isinstance(values, list | tuple) else [values]:
            if isinstance(value, Path) and _is_special(value):
                named = "" if field.metadata["positional"] else f"{_flag(field)} "
                raise InputError(f"{named}{value}: a device or a pipe, neither a file nor a folder")
            if value is None or not bounds:
                continue
            if not math.isfinite(value) or not all(_INSIDE[words](value, bound) for words, bound in bounds.items()):
                wanted = " and ".join(f"{words} {bound:,}" for words, bound in bounds.items())
                raise InputError(f"{_flag(field)} {value}: must be {wanted}")


def _check_outputs(stage: Any) -> None:
    """Raise `InputError` for an output that is an input, too, or lies in a folder all of which is data."""
    paths = [
        (field, value)
        for field in dataclasses.fields(stage)
        for values in [getattr(stage, field.name)]
        for value in (values if isinstance(values, list) else [values])
        if isinstance(value, Path)
    ]
    written = [(field, value) for field, value in paths if field.name in _WRITTEN]
    for (field, value), (other, given) in itertools.product(written, paths):
        if other.name in _WRITTEN:
            continue
        place, target = given.resolve(), value.resolve()
        if given.is_file() and place == target:
            raise InputError(f"{_flag(field)} {value}: is {_flag(other)}, too, and would be overwritten")
        if other.metadata["searched"] and target.is_relative_to(place) and not (given / "train.rec").is_file():
            raise InputError(
                f"{_flag(field)} {value}: lies in {_flag(other)} {given}, where it would be taken for data; "
                "choose another place"
            )


_WRITTEN = ("out", "dst", "cache", "scores")


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _flag(field: dataclasses.Field) -> str:
    """What a user types; a field may end in `_` where its name is a word of Python's."""
    return field.name.upper() if field.metadata["positional"] else f"--{field.name.rstrip('_').replace('_', '-')}"


def _describe(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    if value is None:
        return "default: none"
    if isinstance(value, list | tuple):
        return f"default: {' '.join(map(str, value)) or 'none'}"
    return f"default: {value}"


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def build_parser(
    stage: type, description: str | None = None, configured: Mapping[str, Any] = MappingProxyType({})
) -> argparse.ArgumentParser:
    """The argument parser of a stage's dataclass; `description` is usually the script's own docstring.

    `configured` are values that take the place of defaults; an option that has one is no longer required.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(stage)
    # What a stage works on comes before where it runs, though a dataclass has the fields of its base first.
    for field in sorted(dataclasses.fields(stage), key=lambda field: field.metadata["group"] == "machine"):
        meta = field.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        default = configured.get(field.name, _default_of(field))
        convert, nargs = _value_type(hints[field.name])
        choices, text = _choices(field), meta["help"]
        if isinstance(choices, Mapping):
            text += ": " + "; ".join(f"{name} {meaning}" for name, meaning in choices.items())
        # argparse reads % as a format; the texts here are plain.
        settings: dict[str, Any] = {"help": f"{text} ({_describe(default)})".replace("%", "%%")}
        if convert is bool:
            settings |= {"action": argparse.BooleanOptionalAction, "default": default, "dest": field.name}
            group.add_argument(_flag(field), **settings)
            continue
        settings |= {"type": convert, "metavar": meta["metavar"], "choices": choices and list(choices)}
        if nargs is not None:
            settings["nargs"] = nargs
        if meta["positional"]:
            if field.name in configured:
                settings |= {"nargs": "*", "default": default}
            group.add_argument(field.name, **settings)
            continue
        settings["required"] = default is REQUIRED
        settings["default"] = None if default is REQUIRED else default
        group.add_argument(_flag(field), dest=field.name, **settings)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="options from a .toml file, or from the run.json of an earlier run; the command line wins (default: none)",
    )
    return parser


def _read_config(path: Path) -> dict[str, Any]:
    """Options by name from a TOML file, or from a run.json, which holds them under "options"."""
    try:
        text = utils.read_bytes(path).decode("utf-8")
        content = utils.parse_json(text)["options"] if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(error.strerror) from error
    except InputError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"neither TOML nor a run.json with options: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("holds no options")
    return {name.replace("-", "_"): value for name, value in content.items()}


def _convert(field: dataclasses.Field, annotation: Any, value: Any) -> Any:
    """A configuration file's value as the command line would give it; `ValueError` if it is of no such kind."""
    convert, nargs = _value_type(annotation)
    if convert is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    values = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool | list | dict) for item in values):
        raise ValueError(f"{value!r} is no value of this option")
    if len(values) != (nargs if isinstance(nargs, int) else max(1, len(values)) if nargs else 1):
        raise ValueError(f"{len(values)} values instead of {nargs or 1}")
    choices = _choices(field)
    try:
        converted = [convert(str(item)) for item in values]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{value!r} is no value of this option") from error
    for item in converted:
        if choices is not None and item not in choices:
            raise ValueError(
                f"{item!r} is not one of {', '.join(map(str, choices))}{_nearest(str(item), list(choices))}"
            )
    return converted if nargs else converted[0]


def _configured(stage: type, path: Path) -> dict[str, Any]:
    """The values that a configuration file gives, by field. Raises `ValueError` naming what does not fit."""
    hints = typing.get_type_hints(stage)
    fields = {field.name: field for field in dataclasses.fields(stage)}
    values = {}
    for name, value in _read_config(path).items():
        name = f"{name}_" if f"{name}_" in fields else name
        if name not in fields:
            raise ValueError(f"{name}: no such option{_nearest(name, list(fields))}")
        if value is None or value == []:  # what a run.json says of an option that was not given
            continue
        try:
            values[name] = _convert(fields[name], hints[name], value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return values


def plain_options(options: Any) -> dict[str, Any]:
    """The options of a stage as JSON and checkpoints can hold them; `--config` reads them back from a run.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value if isinstance(value, bool | int | float | str | type(None)) else str(value)

    return {field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _config_named_on(argv: Sequence[str]) -> Path | None:
    """The file of the last --config on a command line that is not checked yet."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    only.add_argument("--config", type=Path)
    try:
        return only.parse_known_args(argv)[0].config
    except (argparse.ArgumentError, SystemExit):  # --config without a file: the real parser says so
        return None


def refuse_useless(options: Any, rules: Sequence[tuple[bool, str, Sequence[str]]]) -> None:
    """Raise `InputError` for an option that was given and would do nothing: whoever gave it wanted something else.

    Each rule is whether it applies, why that makes the options useless, and their fields' names.
    """
    for applies, why, names in rules:
        for field in dataclasses.fields(options):
            usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if applies and field.name in names and getattr(options, field.name) != usual:
                raise InputError(f"{_flag(field)}: {why}")


def parse(stage: type[Stage], description: str | None = None, argv: Sequence[str] | None = None) -> Stage:
    """Read the command line (`argv`, default `sys.argv[1:]`) into an instance of the stage's dataclass.

    `--config FILE` gives options that the command line does not. Exits with code 2 and one line on standard error for
    an unknown, missing or ill-typed option. Raises `InputError` for a number out of its declared range.
    """
    parser = build_parser(stage, description)
    path = _config_named_on(sys.argv[1:] if argv is None else argv)
    if path is not None:
        try:
            parser = build_parser(stage, description, _configured(stage, path))
        except ValueError as error:
            parser.error(f"--config {path}: {error}")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        first = next((word for word in unknown if word.startswith("-")), unknown[0])
        kind = "unknown option" if first.startswith("-") else "unexpected argument"
        parser.error(f"{kind} {first}{_nearest(first.split('=')[0], names)}")
    values = vars(known)
    del values["config"]
    hints = typing.get_type_hints(stage)
    for name, value in values.items():
        if isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            values[name] = tuple(value)
    made = stage(**values)
    _check_bounds(made)
    _check_outputs(made)
    return made


class Interval:
    """How often something happens: `500` (optimiser steps), `10min`, `90s` or `2h` of wall-clock time."""

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", text.strip())
        if match is None or float(match[1]) <= 0 or (match[2] is None and not match[1].isdigit()):
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps (500) nor a time (90s, 10min, 2h)")
        self.text = text.strip()
        self.steps = None if match[2] else int(match[1])
        self.seconds = float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]] if match[2] else None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Interval({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interval) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)
