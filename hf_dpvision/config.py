"""Command lines of recipes: dataclasses of arguments, an optional YAML file, overrides.

The file's values become the defaults of the command line, so `--config run.yaml --learning_rate 0.1` means the file
with another learning rate.

Every scalar of the file is read as text and converted by the type of the argument it is for. (YAML 1.1 by itself
reads `1e-3` as text and `no` as false, so a learning rate would arrive as a string and a strategy as a bool.)
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from .errors import ArgumentRefused


Default = TypeVar("Default")
_NOTHING = ("", "~", "null", "Null", "NULL", "None")


def argument(default: Default, help: str) -> Default:
    """Declare a field of a dataclass of arguments: its default, and what `--help` says of it."""
    return field(default=default, metadata={"help": help})


def json_object(name: str, value: dict[str, Any] | str | None, example: str) -> dict[str, Any] | None:
    """Return a mapping that came from a file or from Python as it is, one from a command line as JSON says.

    Raises:
        ArgumentRefused: the text is no JSON object; says how the argument `name` is written.
    """
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentRefused(f"{name}={value!r} is no JSON object. Write it as '{example}'.")
    return found


@dataclass(frozen=True)
class ParsedArguments:
    """What was asked for.

    Args:
        groups: one filled dataclass per type.
        config: the configuration file that was read, if any.
        given: names that the file or the command line set; all others have their defaults.
    """

    groups: tuple[Any, ...]
    config: Path | None
    given: frozenset[str]

    def settings(self, leave_out: Collection[str] = ()) -> dict[str, Any]:
        """Return name and value of everything that was set; absolute paths are cut to their last part."""
        values = {field.name: getattr(group, field.name) for group in self.groups for field in fields(group)}
        return {name: without_folders(values[name]) for name in sorted(self.given - set(leave_out))}


def parse_arguments(
    types: Sequence[type],
    command_line: Sequence[str],
    *,
    default_config: Path | None = None,
    path_fields: Collection[str] = (),
    description: str = "",
) -> ParsedArguments:
    """Fill dataclasses from a command line, `--config FILE.yaml`, and the dataclasses' own defaults, in this order.

    Args:
        types: dataclasses; their fields are the arguments.
        command_line: without the program's name.
        default_config: file read when the command line is empty.
        path_fields: arguments that are paths: a relative one *in the file* is resolved against the file's folder.
            The same holds for any other text in the file that starts with `./` or `../`. On the command line paths
            are relative to the working folder, as usual.
        description: first lines of `--help`.

    Raises:
        ArgumentRefused: an unknown name (with the closest known one), a value of the wrong type, or a file that is
            not a YAML mapping.
    """
    parser = _Parser([DataClassType(one) for one in types], description=description, allow_abbrev=False)
    parser.add_argument("--config", default=None, help="YAML file of arguments; the command line overrides it.")
    given = _config_of(command_line)
    config = Path(given) if given is not None else (default_config if not command_line else None)
    in_file = frozenset() if config is None else _set_defaults(parser, config, path_fields)
    _, unknown = parser.parse_known_args(list(command_line))
    if unknown:  # before the dataclasses miss what was misspelt
        _refuse_unknown(parser, unknown[0], "on the command line")
    *groups, _ = parser.parse_args_into_dataclasses(list(command_line), look_for_args_file=False)
    options = {text.split("=", 1)[0] for text in command_line if text.startswith("--")}
    typed = {action.dest for action in parser._actions if options & set(action.option_strings)} - {"config"}
    return ParsedArguments(tuple(groups), config, in_file | typed)


def without_folders(value: Any) -> Any:
    """Return the last part of an absolute path, anything else as it is: folders say something about a machine only."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


class _Refusing(argparse.ArgumentParser):
    """Refuses with one message instead of the list of all arguments."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentRefused(f"{message}. --help lists all arguments.")


class _Parser(_Refusing, HfArgumentParser):
    """Fills dataclasses."""


def _config_of(command_line: Sequence[str]) -> str | None:
    first = _Refusing(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=None)
    return first.parse_known_args(list(command_line))[0].config


def _set_defaults(parser: _Parser, config: Path, path_fields: Collection[str]) -> frozenset[str]:
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values = {}
    for name, content in _read(config).items():
        if name not in actions:
            _refuse_unknown(parser, name, f"in {config}")
        values[name] = _converted(actions[name], _resolved(content, name in path_fields, config.parent), config)
        actions[name].required = False
    parser.set_defaults(**values)
    return frozenset(values)


def _read(config: Path) -> dict[str, Any]:
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # every scalar as text
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentRefused(f"the configuration {str(config)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentRefused(f"the configuration {str(config)!r} must be a list of `name: value` lines.")
    return content


def _resolved(content: Any, is_path: bool, folder: Path) -> Any:
    if isinstance(content, list):
        return [_resolved(item, is_path, folder) for item in content]
    if not isinstance(content, str) or content in _NOTHING:
        return content
    if is_path or content.startswith(("./", "../")):
        return os.path.normpath(folder / Path(content).expanduser())
    return content


def _converted(action: argparse.Action, content: Any, config: Path) -> Any:
    if isinstance(content, dict):
        return _typed(content)
    if content in _NOTHING:
        return None
    if isinstance(content, list):
        return [_scalar(action, item, config) for item in content]
    value = _scalar(action, content, config)
    return [value] if action.nargs == "+" else value


def _scalar(action: argparse.Action, text: str, config: Path) -> Any:
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    try:
        value = convert(text)
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        kind = convert.__name__ if isinstance(convert, type) else "value of the expected kind"
        raise ArgumentRefused(f"{action.dest}: {text!r} in {config} is not a {kind}.") from error
    if action.choices is not None and value not in action.choices:
        raise ArgumentRefused(f"{action.dest}: {text!r} in {config} is not one of {list(action.choices)}.")
    return value


def _typed(content: Any) -> Any:
    """Give the leaves of a nested value the types JSON would."""
    if isinstance(content, dict):
        return {key: _typed(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_typed(value) for value in content]
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        return content


def _refuse_unknown(parser: _Parser, name: str, where: str) -> NoReturn:
    known = [action.dest for action in parser._actions]
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ArgumentRefused(f"unknown argument {name!r} {where}{hint}")
