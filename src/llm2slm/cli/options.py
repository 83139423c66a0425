"""Options of commands: from a dataclass to a parser, from a YAML recipe to arguments; without torch and transformers.

A field of the dataclass is an option, its default the option's, its annotation the option's type, its metadata the
help. Options are spelled with dashes; [`with_dashes`] lets underscores do too.

transformers' `HfArgumentParser` does as much, and takes three seconds to import with Transformers 4.
"""

import argparse
import dataclasses
import difflib
import json
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..utils import read_text

DTYPES = Literal["auto", "float32", "bfloat16", "float16"]
DATA_HELP = (
    "a folder written by save_to_disk, a .json, .jsonl, .csv or .parquet file (a hash of each prompt splits it into "
    "train, validation and test, and all is all of it), or a data set on the Hub (`name` or `name:configuration`)"
)
DEVICE_HELP = "cpu, cuda, cuda:1, ...; cuda if there is one, if omitted"


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    metavar: str | None = None,
    at_least: int | None = None,
    at_most: int | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """
    A field of a command's options.

    Args:
        help (`str`): One line.
        default (*optional*): Without one the option is required. A list is copied.
        metavar (`str`, *optional*): What the help calls the value.
        at_least, at_most (`int`, *optional*): The least and the greatest whole number it takes.
        choices (`Sequence[str]`, *optional*): What it may be, where that is no `Literal`.
    """
    metadata = {"help": help, "metavar": metavar, "at_least": at_least, "at_most": at_most, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse._ActionsContainer, options: type) -> None:
    r"""
    Adds an option for each field of a dataclass.

    Args:
        parser (`argparse.ArgumentParser` or one of its groups): Where they are added.
        options (`type`):
            A dataclass whose fields are of type `str`, `int`, `float`, `bool`, `Literal`, a list of these, or any of
            them or `None`. A `bool` is a flag that also takes a value, `--truncate` or `--truncate no`; one that is
            not off by default has a `--no-` form too.
    """
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.init:
            _add_option(parser, field, hints[field.name])


def _add_option(parser: argparse._ActionsContainer, field: dataclasses.Field, hint: Any) -> None:
    name, default = field.name.replace("_", "-"), field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    required = default is dataclasses.MISSING
    hint, is_list = _plain_type(hint)
    shown = "" if required or default in (None, "", False, []) else f" (default: {_shown(default)})"
    arguments: dict[str, Any] = {
        "dest": field.name,
        "help": (field.metadata["help"] + shown).replace("%", "%%"),
        "required": required,
        "default": None if required else default,
        "metavar": field.metadata.get("metavar"),
        "choices": field.metadata.get("choices"),
    }
    if get_origin(hint) is Literal:
        arguments["choices"] = get_args(hint)
    elif hint is bool:
        arguments |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "yes|no"}
    else:
        least = field.metadata.get("at_least")
        arguments["type"] = hint if least is None else _whole_number(least, field.metadata.get("at_most"))
        arguments["metavar"] = arguments["metavar"] or {str: "TEXT", int: "N", float: "X"}[hint]
    if is_list:
        arguments["nargs"] = "+"
    parser.add_argument(f"--{name}", **arguments)
    if hint is bool and default is not False:
        parser.add_argument(
            f"--no-{name}", dest=field.name, action="store_false", default=default, help="the opposite"
        )


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments with each option spelled with dashes: `--max_new_tokens=8` becomes `--max-new-tokens=8`."""

    def spell(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if argument.startswith("--") else argument

    return [spell(argument) for argument in arguments]


def _plain_type(hint: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "yes" if value is True else str(value)


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "1", "y", "t"):
        return True
    if text.lower() in ("no", "false", "0", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")


def _whole_number(least: int, most: int | None):
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            end = "" if most is None else f" to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}{end}, got {text!r}")
        return int(text)

    return whole_number


# ------------------------------------------------------------------------------------------------------------- recipes
def read_recipe(path: str, command: str, parser: argparse.ArgumentParser) -> list[str]:
    """
    The options of a YAML recipe as arguments.

    Args:
        path (`str`): The recipe, one `name: value` a line; dashes and underscores are the same.
        command (`str`): What the error calls the command.
        parser (`argparse.ArgumentParser`): The command's, which knows the options.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not a recipe, or the command has no such option.
    """
    import yaml  # Transformers needs it, so it is there

    try:
        recipe = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold options, one `name: value` a line.")
    known = {spelling: action for action in parser._actions for spelling in action.option_strings}
    arguments: list[str] = []
    for name, value in recipe.items():
        spelling = "--" + str(name).replace("_", "-")
        if spelling not in known or spelling in ("--config", "--help"):
            nearest = difflib.get_close_matches(spelling, known, 1, cutoff=0)[0].strip("-").replace("-", "_")
            raise ValueError(f"{path}: {command} has no option {str(name)!r}; the nearest is {nearest!r}.")
        arguments += _as_arguments(spelling, value)
    return arguments


def _as_arguments(spelling: str, value: Any) -> Sequence[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"{spelling}={'yes' if value else 'no'}"]  # `no` without quotes is a boolean in YAML
    if isinstance(value, list):
        return [spelling, *map(str, value)]
    return [f"{spelling}={json.dumps(value) if isinstance(value, dict) else value}"]
