"""DeepSpeed's JSON and the command line: one value for each thing.

A number in the JSON must agree with the flag of the same meaning where the user gave that flag. A flag left
at its default takes the JSON's value, and ``"auto"`` (or nothing) in the JSON takes the flag's. What
DeepSpeed would choose by itself is written out: left unset, it clips gradients at norm 1.0.
"""

from __future__ import annotations

import json
from typing import Any

from scalesnn.base import UserError
from scalesnn.configs import find_config

__all__ = ["read_config", "resolve_config"]

# (place in the JSON, flag): both set the same thing.
PAIRS = {
    ("train_micro_batch_size_per_gpu",): "batch_size",
    ("gradient_accumulation_steps",): "gradient_accumulation",
    ("gradient_clipping",): "clip_grad_norm",
    ("optimizer", "params", "lr"): "lr",
    ("optimizer", "params", "weight_decay"): "weight_decay",
    ("optimizer", "params", "momentum"): "momentum",
    ("scheduler", "params", "warmup_max_lr"): "lr",
}
SECTIONS = ("optimizer", "scheduler", "torch_autocast", "bf16", "bfloat16", "fp16")
COUNTED = ("warmup_num_steps", "total_num_steps")  # of a schedule: nobody but the user knows them
FLAG_NAMES = {"weight_decay": "--weight-decay", "lr": "--lr", "momentum": "--momentum"}


def read_config(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON.

    Raises:
        UserError: the file cannot be read or is not a JSON object.
    """
    try:
        config = json.loads(find_config("--deepspeed_config", path, "*.json").read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--deepspeed_config {path}: not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"--deepspeed_config {path}, line {error.lineno}: not valid JSON: {error.msg}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: expected a JSON object, got {type(config).__name__}")
    return config


def resolve_config(
    config: dict[str, Any], args: Any, world_size: int, *, path: str = "the JSON"
) -> dict[str, Any]:
    """Bring JSON and flags together: returns the complete configuration, and writes the JSON's values to
    ``args``.

    Args:
        config: as read; it is not changed.
        args: the parsed command line; ``args.explicit`` holds the destinations that the user gave.
        world_size: number of processes.
        path: of the JSON, for messages.

    Raises:
        UserError: the JSON and a flag the user gave disagree (both values are shown), or a setting cannot
            work.
    """
    config = json.loads(json.dumps(config))
    for section in SECTIONS:
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{path}: {section} must be an object {{…}}, got {json.dumps(config[section])}")
    for section in ("optimizer", "scheduler"):
        for key, kind in {"type": str, "params": dict}.items():
            value = config.get(section, {}).get(key, kind())
            if not isinstance(value, kind):
                wanted = "a name" if kind is str else "an object {…}"
                raise UserError(f"{path}: {section}.{key} must be {wanted}, got {json.dumps(value)}")
    explicit: set[str] = set(getattr(args, "explicit", None) or ())
    for place, flag in PAIRS.items():
        settle(config, place, args, flag, explicit, path)
    check_sections(config, args, explicit, path)
    config = without_auto(config)
    config["train_micro_batch_size_per_gpu"] = args.batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation
    product = args.batch_size * args.gradient_accumulation * world_size
    total = config.get("train_batch_size", product)
    if total != product:
        raise UserError(
            f"{path}: train_batch_size is {total}, but batch size {args.batch_size} × gradient accumulation "
            f"{args.gradient_accumulation} × {world_size} process(es) is {product}"
        )
    config["train_batch_size"] = product
    config["gradient_clipping"] = float(args.clip_grad_norm or 0.0)
    config["zero_allow_untested_optimizer"] = True
    every = config.setdefault("steps_per_print", 10**12)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UserError(
            f"{path}: steps_per_print must be a whole number of at least 1, got {json.dumps(every)}"
        )
    zero = config.get("zero_optimization", {})
    if zero.get("offload_optimizer") and "optimizer" not in config:
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def settle(
    config: dict[str, Any], place: tuple[str, ...], args: Any, flag: str, explicit: set[str], path: str
) -> None:
    """Settle one value that both the JSON (at ``place``) and a flag can set."""
    section: Any = config
    for key in place[:-1]:
        section = section.get(key) if isinstance(section, dict) else None
    key = place[-1]
    if not isinstance(section, dict) or key not in section or not hasattr(args, flag):
        return
    value, given = section[key], getattr(args, flag)
    if value == "auto":
        section[key] = given if given is not None else 0.0
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f'{path}: {".".join(place)} must be a number or "auto", got {json.dumps(value)}')
    if flag in ("batch_size", "gradient_accumulation") and (value < 1 or value != int(value)):
        raise UserError(f"{path}: {key} must be a whole number of at least 1, got {value}")
    if flag in explicit and (given or 0) != value:
        raise UserError(
            f"{path} says {'.'.join(place)}: {value}, but {option(flag)} says {given}; "
            'leave one of them out, or write "auto" in the JSON'
        )
    setattr(args, flag, value)


def without_auto(value: Any) -> Any:
    """The sections without what is still ``"auto"``: no flag sets it, so DeepSpeed's default holds."""
    if not isinstance(value, dict):
        return value
    return {key: without_auto(inner) for key, inner in value.items() if inner != "auto"}


def check_sections(config: dict[str, Any], args: Any, explicit: set[str], path: str) -> None:
    """Refuse sections that contradict flags or cannot train a network with BatchNorm."""
    for section, flags in {"optimizer": ("opt",), "scheduler": ("lr_scheduler", "lr_warmup_epochs")}.items():
        for flag in flags:
            if section in config and flag in explicit:
                raise UserError(
                    f"{path} defines its own {section}, but {option(flag)} {getattr(args, flag)} was given; "
                    "leave one of them out"
                )
    for name in COUNTED:
        if config.get("scheduler", {}).get("params", {}).get(name) == "auto":
            raise UserError(
                f'{path}: scheduler.params.{name} cannot be "auto": write the number of steps, or leave '
                "the scheduler out for --lr-scheduler and --lr-warmup-epochs"
            )
    for section in ("bf16", "bfloat16", "fp16"):
        if config.get(section, {}).get("enabled") not in (None, False, "auto"):
            raise UserError(
                f"{path}: DeepSpeed's {section} section turns BatchNorm's weights to half precision, and its "
                'statistics with them; write "torch_autocast": {"enabled": true, "dtype": "bfloat16"} instead'
            )
    autocast = config.get("torch_autocast", {})
    if str(autocast.get("dtype")).replace("torch.", "") in ("float16", "fp16"):
        raise UserError(
            f"{path}: torch_autocast.dtype {autocast['dtype']} needs its gradients scaled, which scalesnn "
            'does not do; write "bfloat16", which has the range of float32'
        )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else zero
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {json.dumps(stage)}")


def option(flag: str) -> str:
    """``batch_size`` → ``--batch-size``."""
    return FLAG_NAMES.get(flag, "--" + flag.replace("_", "-"))
