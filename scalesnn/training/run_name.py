"""What tells runs apart: the settings on which a run's numbers depend, and the name made of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalesnn.base import UserError

__all__ = ["check_name", "default_name", "plain", "run_settings", "settings_that_differ"]

# Where a run is, how long, how fast and how it is shown. Every other flag, also one of a user's own Trainer,
# is a setting on which the numbers depend.
# fmt: off
NOT_OF_THE_RUN = frozenset((
    "config", "print_config", "help", "explicit", "output_dir", "run_name", "print_logdir", "clean",
    "resume", "start_epoch", "max_steps", "save_every", "keep_checkpoints", "background_checkpoints",
    "test_only", "device", "workers", "cache_dataset", "loader_tune", "disable_pinmemory",
    "bad_image_list", "activation_checkpoint", "memory_budget", "cupy", "strategy", "deepspeed_config",
    "deepspeed", "fsdp_config", "local_rank", "rank", "gpu", "distributed", "world_size", "dist_url",
    "dist_timeout", "verbose", "ddp_static_graph", "max_requeues", "no_requeue", "hang_timeout",
    "preflight", "no_cpu_binding", "prototype", "wandb", "wandb_project", "wandb_entity", "wandb_name",
    "wandb_group", "wandb_tags", "wandb_notes", "wandb_log_model", "metrics_every",
    "spike_metrics_every", "profile", "reference", "compile", "cuda_graph",
))
# fmt: on
LENGTH = "epochs"  # of the run too, but no part of its name: a longer run goes on where the shorter one ended

# How a setting is written in a name; {} is its value. Settings that are not here are written NAME-VALUE.
SHORT = {
    "data_path": "{}",
    "neuron": "{}",
    "tau": "tau{}",
    "surrogate": "{}",
    "cnf": "{}",
    "batch_size": "b{}",
    "global_batch": "gb{}",
    "opt": "{}",
    "lr": "lr{}",
    "weight_decay": "wd{}",
    "momentum": "m{}",
    "seed": "seed{}",
    "label_smoothing": "ls{}",
    "auto_augment": "aug-{}",
    "train_crop_size": "crop{}",
    "sync_bn": "syncbn",
    "model_ema": "ema",
    "pretrained": "pretrained",
    "init_from": "from-{}",
}
LONGEST = 44  # letters of model and settings; hash and T come after them
MOST_BYTES = 230  # file systems allow 255; a number and a hidden name's prefix need some


def run_settings(args: Any) -> dict[str, Any]:
    """The settings on which a run's numbers depend, and its number of epochs, as plain values."""
    settings = {k: plain(v) for k, v in sorted(vars(args).items()) if k not in NOT_OF_THE_RUN}
    if settings.get("global_batch"):
        settings.pop("gradient_accumulation", None)  # follows from it, and from the number of devices
    if settings.get("data_path"):
        settings["data_path"] = os.path.abspath(os.path.expanduser(settings["data_path"]))
    return settings


def settings_that_differ(args: Any, parser: ArgumentParser) -> dict[str, Any]:
    """Those of ``run_settings`` that are not at the parser's defaults."""
    defaults = {action.dest: plain(action.default) for action in parser._actions}
    return {k: v for k, v in run_settings(args).items() if k not in defaults or v != defaults[k]}


def default_name(args: Any, parser: ArgumentParser) -> str:
    """A name of a run: model, what differs from the defaults, and six digits that change with any of it."""
    settings = settings_that_differ(args, parser)
    settings.pop(LENGTH, None)
    settings["model"] = args.model
    if "data_path" in settings:  # the same data set may lie elsewhere tomorrow, on a node's own disk
        settings["data_path"] = Path(settings["data_path"]).name
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    name = word(settings.pop("model"))[:LONGEST]
    places = {key: place for place, key in enumerate(SHORT)}
    for key in sorted((k for k in settings if k != "T"), key=lambda k: (places.get(k, len(places)), k)):
        part = "_" + SHORT.get(key, f"{key}-{{}}").format(word(settings[key]))
        if len(name) + len(part) <= LONGEST:
            name += part
    return f"{name}_{digest}"


def check_name(name: str, source: str) -> None:
    """Refuse a name that cannot be that of one folder below --output-dir.

    Args:
        name: of the run.
        source: what gave it, for the message: ``--run-name``.

    Raises:
        UserError: it is empty or too long, has a slash, begins with a dot, or cannot be printed.
    """
    problem = None
    if not name.strip():
        problem = "it is empty"
    elif "/" in name:
        above, _, last = name.rstrip("/").rpartition("/")
        problem = "it has a slash, and a run is one folder"
        if above and last:
            problem += f": give --output-dir …/{above.lstrip('/')} and the name {last}"
    elif name.startswith("."):
        problem = "it begins with a dot, so its folder would be hidden"
    elif not name.isprintable():
        problem = "it has characters that cannot be printed"
    elif len(name.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        problem = f"it is longer than {MOST_BYTES} bytes"
    if problem:
        raise UserError(f"{source} {name[:80]!r} cannot name a run: {problem}")


def word(value: Any) -> str:
    """A value as part of a file's name: letters, digits and ``.+-`` only."""
    return re.sub(r"[^\w.+-]+", "-", f"{value:g}" if isinstance(value, float) else str(value)).strip("-.")


def plain(value: Any) -> Any:
    """Reduce to what YAML and JSON hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
