"""What one logged record is, and the names its numbers have in TensorBoard and W&B.

A record is a flat dict of plain values. Step records (``kind`` "step") describe the last ``--metrics-every``
steps, epoch records (``kind`` "epoch") one whole pass over a split. Both have ``step`` (optimizer steps
done), ``epoch`` and ``split``; everything else is a metric. A metric is a number, or a list of numbers, one a
time-step; lists stay lists in metrics.jsonl and become ``name/t0``, ``name/t1``, … elsewhere.

| record | metric | name elsewhere |
| --- | --- | --- |
| step | ``loss`` | ``train/loss`` (its split) |
| step | ``spikes/layer1.0.sn1/firing_rate`` (has a slash) | the same |
| epoch | ``loss``, ``acc1``, ``acc5`` | ``train_loss``, ``test_acc1``, ``ema_test_acc5``, … |
| epoch | any other | ``epoch/test_images_per_s``, … |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["AXES", "named_scalars", "plain", "strict_json"]

AXES = ("step", "epoch", "images_seen")
_NOT_METRICS = {*AXES, "kind", "split", "time", "epochs", "total_steps"}


def plain(value: Any) -> Any:
    """``value`` as Python numbers, strings, lists and dicts: tensors and numpy values are unwrapped."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor, a numpy array or scalar
        return value.tolist()
    return str(value)


def strict_json(value: Any) -> Any:
    """``value`` with NaN and infinities as strings "NaN", "Infinity", "-Infinity": JSON has no such numbers.

    ``float()`` and JavaScript's ``Number()`` read all three back.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict_json(item) for item in value]
    return value


def named_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under the names that TensorBoard and W&B show (see the module's table)."""
    split = record.get("split", "train")
    of_an_epoch = record.get("kind") == "epoch"
    named: dict[str, float] = {}
    for key, value in record.items():
        if key in _NOT_METRICS:
            continue
        if of_an_epoch:
            name = f"{split}_{key}" if key in ("loss", "acc1", "acc5") else f"epoch/{split}_{key}"
        else:
            name = key if "/" in key else f"{split}/{key}"
        if isinstance(value, list):
            named.update((f"{name}/t{t}", float(item)) for t, item in enumerate(value) if _is_number(item))
        elif _is_number(value):
            named[name] = float(value)
    return named


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
