"""The command line of a stage, made from its dataclass.

A stage is a frozen-in-shape dataclass whose fields are declared with `option(default, help)`. `parse(Stage, __doc__)`
turns the fields into grouped `--options`, shows every default in `--help`, and answers an unknown option or choice
with the nearest name. Nothing else in the repository calls argparse for a stage, so an option exists exactly once.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

Stage = TypeVar("Stage")

REQUIRED = dataclasses.MISSING


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare one command-line option as a dataclass field.

    `default` is `REQUIRED` for an option without one. Lists and tuples may be given directly as defaults. The
    annotation of the field decides the type: `str`, `int`, `float`, `bool` (becomes `--flag/--no-flag`), `Path`,
    any callable class, `X | None`, `list[X]` (one or more values) or `tuple[X, X, X]` (exactly that many).
    """
    metadata = {"help": help, "group": group, "choices": choices, "metavar": metavar, "positional": positional}
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


def build_parser(stage: type, description: str | None = None) -> argparse.ArgumentParser:
    """The argument parser of a stage's dataclass; `description` is usually the script's own docstring."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    groups: dict[str, argparse._ArgumentGroup] = {}
    hints = typing.get_type_hints(stage)
    for field in dataclasses.fields(stage):
        meta = field.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        default = _default_of(field)
        convert, nargs = _value_type(hints[field.name])
        # argparse reads % as a format; the texts here are plain.
        settings: dict[str, Any] = {"help": f"{meta['help']} ({_describe(default)})".replace("%", "%%")}
        if convert is bool:
            group.add_argument(
                f"--{field.name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=default, **settings
            )
            continue
        settings |= {"type": convert, "metavar": meta["metavar"], "choices": meta["choices"]}
        if nargs is not None:
            settings["nargs"] = nargs
        if meta["positional"]:
            group.add_argument(field.name, **settings)
            continue
        settings["required"] = default is REQUIRED
        settings["default"] = None if default is REQUIRED else default
        group.add_argument(f"--{field.name.replace('_', '-')}", **settings)
    return parser


def parse(stage: type[Stage], description: str | None = None, argv: Sequence[str] | None = None) -> Stage:
    """Read the command line (`argv`, default `sys.argv[1:]`) into an instance of the stage's dataclass.

    Exits with code 2 and one line on standard error for an unknown, missing or ill-typed option.
    """
    parser = build_parser(stage, description)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        first = next((word for word in unknown if word.startswith("-")), unknown[0])
        kind = "unknown option" if first.startswith("-") else "unexpected argument"
        parser.error(f"{kind} {first}{_nearest(first.split('=')[0], names)}")
    values = vars(known)
    hints = typing.get_type_hints(stage)
    for name, value in values.items():
        if isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            values[name] = tuple(value)
    return stage(**values)


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
