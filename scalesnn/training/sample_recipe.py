"""The recipe of the shipped images, which a run without --data-path and --config takes."""

from __future__ import annotations

from typing import Any

import yaml

from scalesnn.configs import FOLDER

__all__ = ["take_sample_recipe"]

SAID = (
    "no --config: these images' own recipe is taken, --config sample: 7 epochs of 28 × 28 pixels, about five "
    "minutes on 2 CPU cores, 78 % top-1; flags that you give win"
)


def take_sample_recipe(args: Any, defaults: dict[str, Any]) -> list[str]:
    """Set what neither the user nor the subclass has set to what the shipped images need.

    Args:
        args: the parsed command line; it is changed.
        defaults: of scalesnn's own flags; a setting that differs is somebody's wish, and is left.

    Returns:
        a line for the user.
    """
    path = FOLDER / "recipes" / "sample.yaml"
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if hasattr(args, name) and name not in args.explicit and getattr(args, name) == defaults.get(name):
            setattr(args, name, value)
    return [SAID]
