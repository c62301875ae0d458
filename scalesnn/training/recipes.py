"""Recipes: YAML files of lines ``flag: value``, read as if their values had been typed on the command line.

YAML makes a number of 007, False of off and None of ~. Here every value stays the text that stands in the
file, and the flag decides what it means; only a bare ``null``, ``~`` or nothing leaves a flag at its default.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from scalesnn.base import UserError

__all__ = ["read_recipe", "words_of"]

NOTHING = ("", "~", "null", "Null", "NULL")
BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


class _Texts(yaml.BaseLoader):  # which makes nothing but texts, lists and maps
    """Reads every scalar as its text, a bare null as None; refuses a key that stands twice."""

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return None if node.style is None and text in NOTHING else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands twice", node.start_mark)
        return found


def read_recipe(path: str, flag: str = "--config") -> dict[str, Any]:
    """The settings of a recipe: texts, None, or lists and maps of them.

    Raises:
        UserError: the file cannot be read, or is not YAML of that form; names the line.
    """
    try:
        settings = yaml.load(Path(path).read_bytes(), Loader=_Texts)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        reason = " ".join(str(reason).split())
        raise UserError(f"{flag} {path}{line}: not valid YAML in UTF-8: {reason}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot be read: {error}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        kind = "a list" if isinstance(settings, list) else repr(settings)
        raise UserError(f"{flag} {path}: expected lines of the form 'flag: value', got {kind}")
    return settings


def words_of(action: argparse.Action, value: Any) -> list[str]:
    """The words of a command line that give ``value`` to a flag.

    Raises:
        UserError: the flag takes no such value.
    """
    flag = action.option_strings[-1]
    if isinstance(value, dict):
        raise UserError(f"{flag}: expected one value, got a map ({', '.join(map(str, value))})")
    if action.nargs == 0:
        return _switch(action, flag, value)
    if isinstance(value, list):
        if not (isinstance(action.nargs, int) or action.nargs in ("*", "+")):
            raise UserError(f"{flag}: expected one value, got a list of {len(value)}")
        if any(not isinstance(item, str) or item.startswith("-") for item in value):
            raise UserError(f"{flag}: expected a list of plain values that do not begin with -")
        return [flag, *value]
    if value.startswith("-") and action.nargs in ("*", "+"):
        raise UserError(f"{flag}: expected a value that does not begin with -, got {value!r}")
    return [flag, value] if action.nargs in ("*", "+") else [f"{flag}={value}"]


def _switch(action: argparse.Action, flag: str, value: Any) -> list[str]:
    wanted = BOOLEANS.get(value.lower()) if isinstance(value, str) else None
    if wanted is None:
        raise UserError(f"{flag}: expected true or false, got {value!r}")
    off = [option for option in action.option_strings if option.startswith("--no-")]
    if off:  # argparse.BooleanOptionalAction
        return [action.option_strings[0] if wanted else off[0]]
    return [flag] if wanted == (action.const is not False) else []
