"""The optimizers that DeepSpeed compiles on a machine at the first start, and what to do where it cannot.

An optimizer of DeepSpeed's own in the JSON needs a compiler, on a GPU an nvcc of exactly torch's CUDA
version. Torch has an Adam as good.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scalesnn.kernels.build import cache_folder
from scalesnn.parallel.devices import first_line

__all__ = ["build_problem", "builder_of", "use_writable_extensions_folder"]

ON_DEVICE = {
    "adam": "FusedAdamBuilder",
    "adamw": "FusedAdamBuilder",
    "lamb": "FusedLambBuilder",
    "lion": "FusedLionBuilder",
}
OFFLOADED = {
    "adam": "CPUAdamBuilder",
    "adamw": "CPUAdamBuilder",
    "adagrad": "CPUAdagradBuilder",
    "lamb": "FusedLambBuilder",
    "lion": "CPULionBuilder",
}


def builder_of(config: dict[str, Any]) -> str | None:
    """The name of the op that DeepSpeed compiles for the JSON's optimizer; None where it compiles none."""
    own = config.get("optimizer")
    if not isinstance(own, dict) or (own.get("params") or {}).get("torch_adam"):
        return None
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    builders = OFFLOADED if offload.get("device") in ("cpu", "nvme") else ON_DEVICE
    return builders.get(str(own.get("type")).lower())


def build_problem(builder: str) -> str | None:
    """Compile and load an op of DeepSpeed's; why that fails, in one line, or None. Takes minutes at the first
    start on a machine."""
    from deepspeed.accelerator import get_accelerator

    try:
        get_accelerator().create_op_builder(builder).load(verbose=False)
    except Exception as error:  # a missing nvcc, another one's version, a compiler's errors: all kinds
        return first_line(error).removeprefix(">- DeepSpeed Op Builder: ")
    return None


def use_writable_extensions_folder() -> None:
    """Where torch's own folder for compiled extensions cannot be written (a read-only home), take one in our
    cache."""
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "torch_extensions"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return
    except OSError:
        pass
    os.environ["TORCH_EXTENSIONS_DIR"] = str(cache_folder() / "torch_extensions")
