"""Names in a DeepSpeed JSON that DeepSpeed does not know: it ignores most of them without a word.

There is no list of names to keep up to date. DeepSpeed reads the configuration once from a dictionary that
remembers what it was asked for: what stands in the JSON and was never asked for is unknown, and what was
asked for are the candidates for what was meant. Sections that DeepSpeed hands to pydantic check their own
names; those errors get a place and a candidate, too.
"""

from __future__ import annotations

import difflib
import inspect
import json
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from scalesnn.base import UserError

__all__ = ["check_names"]

ASKED_LATER = {"sequence_parallel_size"}  # only with a process group
CHECKED_OTHERWISE = ("zero_optimization", "optimizer.params", "scheduler.params")  # though some are asked for
KINDS = {bool: "true or false", int: "a number", float: "a number", dict: "an object {…}"}


class _Asked(dict[str, Any]):
    """A dictionary that remembers the keys that it was asked for."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__({k: _Asked(v) if isinstance(v, dict) else v for k, v in section.items()})
        self.asked: set[str] = set()
        self.defaults: dict[str, Any] = {}

    def __copy__(self) -> _Asked:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        self.defaults.setdefault(key, default)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.asked.add(key)
        return super().pop(key, *default)

    def keys(self) -> Any:
        return self


def check_names(config: dict[str, Any], path: str) -> None:
    """Have DeepSpeed read the configuration, and refuse names that it does not know, at every level.

    Args:
        config: complete, as ``resolve_config`` returns it; it is not changed. Names that begin with ``_`` are
            comments.
        path: of the JSON, for messages.

    Raises:
        UserError: an unknown name, with what may have been meant, or a value that DeepSpeed refuses.
    """
    from deepspeed.runtime import config as deepspeed_config

    batch = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 1)
    asked = _Asked({**config, **batch})
    asked.pop("train_batch_size", None)  # the product, which is checked elsewhere, for all ranks
    refused: Exception | None = None
    try:
        deepspeed_config.DeepSpeedConfig(asked)
    except Exception as error:  # DeepSpeed's own classes have no common base
        refused = error
    for place, section in _sections(asked):
        for key, value in dict.items(section):
            default = section.defaults.get(key)
            if type(default) in KINDS and value is not None and not _fits(value, default):
                where = f"{place}.{key}" if place else key
                raise UserError(f"{path}: {where} must be {KINDS[type(default)]}, got {json.dumps(value)}")
    if refused is not None:
        raise UserError(f"{path}: {_explain(refused, config)}") from refused
    for place, section in _sections(asked):
        unknown = [k for k in section if k not in section.asked | ASKED_LATER and not k.startswith("_")]
        if unknown and section.asked and place not in CHECKED_OTHERWISE:
            raise UserError(f"{path}: {_unknown(place, unknown[0], section.asked)}")
    for name, classes in {"optimizer": torch.optim, "scheduler": _schedules()}.items():
        _check_parameters(config.get(name) or {}, name, classes, path)


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind."""
    if isinstance(default, bool | dict):
        return isinstance(value, type(default))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sections(section: _Asked, place: str = "") -> Iterator[tuple[str, _Asked]]:
    yield place, section
    for key, value in dict.items(section):
        if isinstance(value, _Asked):
            yield from _sections(value, f"{place}.{key}" if place else key)


def _unknown(place: str, name: str, known: Iterable[str]) -> str:
    where = f"{place}.{name}" if place else name
    return f"DeepSpeed does not know {where!r}{_hint(name, known)}"


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _schedules() -> Any:
    from deepspeed.runtime import lr_schedules

    return lr_schedules


def _check_parameters(section: dict[str, Any], name: str, classes: Any, path: str) -> None:
    """``params`` of an optimizer of torch's or a schedule of DeepSpeed's, which are its arguments."""
    made = getattr(classes, str(section.get("type")), None)
    if not inspect.isclass(made) or not isinstance(section.get("params"), dict):
        return
    own = {"torch_adam", "adam_w_mode"} if name == "optimizer" else set()  # DeepSpeed's additions
    known = list(inspect.signature(made).parameters)[1:]
    for key in section["params"]:
        if key not in own | set(known):
            raise UserError(f"{path}: {_unknown(f'{name}.params', key, known)} (of {section['type']})")


def _explain(error: Exception, config: dict[str, Any]) -> str:
    """What DeepSpeed, or its pydantic, says of a configuration, in a line with the place."""
    details = getattr(error, "errors", None)
    if not callable(details):
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"DeepSpeed refuses it: {said[0]}"
    detail, model = details()[0], str(getattr(error, "title", ""))
    *inner, last = [str(part) for part in detail["loc"]] or [model]
    place = ".".join([*_place_of(config, detail["loc"]), *inner])
    if detail["type"] == "extra_forbidden":
        return _unknown(place, last, _fields(model, inner))
    where = f"{place}.{last}" if place else last
    said, given = detail["msg"], json.dumps(detail["input"], default=str)
    return f"{where}: {said[:1].lower()}{said[1:]}, got {given}"


def _place_of(config: dict[str, Any], loc: tuple[Any, ...]) -> list[str]:
    """The section in which the names of ``loc`` stand one below the other."""
    for key, section in config.items():
        if not isinstance(section, dict):
            continue
        value: Any = section
        for name in loc:
            value = value.get(name, _place_of) if isinstance(value, dict) else _place_of
        if value is not _place_of:
            return [key]
        if below := _place_of(section, loc):
            return [key, *below]
    return []


def _fields(model: str, inner: list[str]) -> list[str]:
    """The names that the class ``model`` of DeepSpeed's knows, or that of its field ``inner``."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    waiting = [DeepSpeedConfigModel]
    while waiting:
        found = waiting.pop()
        if found.__name__ == model:
            break
        waiting += found.__subclasses__()
    else:
        return []
    for name in inner:
        annotation = found.model_fields[name].annotation if name in found.model_fields else None
        classes = [c for c in (annotation, *typing.get_args(annotation)) if hasattr(c, "model_fields")]
        if not classes:
            return []
        found = classes[0]
    return list(found.model_fields)
