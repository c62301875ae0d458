"""What a checkpoint says of the data that it was trained on, and whether other data may go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scalesnn.base import UserError

__all__ = ["check_data", "describe_data"]


def describe_data(data: Any) -> dict[str, Any]:
    """Plain values for a checkpoint: class names in the order of the labels, numbers of images, fingerprint.

    Args:
        data: ``scalesnn.data.Data``, or what stands in its place.
    """
    return {
        "classes": list(data.classes),
        "train_images": getattr(data.train, "number_of_images", None),
        "test_images": getattr(data.val, "number_of_images", None),
        "fingerprint": getattr(data, "fingerprint", ""),
    }


def check_data(stored: Mapping[str, Any] | None, now: Mapping[str, Any] | None, checkpoint: str) -> list[str]:
    """Compare the data of a checkpoint with today's.

    Args:
        stored: what ``describe_data`` gave when the checkpoint was written; None: it is older than that.
        now: of this run; None: not known.
        checkpoint: its name, for messages.

    Returns:
        a line for the user where images were added, removed or labelled anew; none otherwise.

    Raises:
        UserError: other classes, or the same in another order: a label would mean another class.
    """
    if not stored or not now:
        return []
    if stored["classes"] != now["classes"]:
        raise UserError(
            f"{checkpoint} was trained on other classes than the data has: "
            f"{difference(stored['classes'], now['classes'])}; resume with those classes, or start a new run"
        )
    keys = ("train_images", "test_images", "fingerprint")
    if all(stored[key] == now[key] for key in keys):
        return []
    before, after = (
        f"{d['train_images']} training and {d['test_images']} test images" for d in (stored, now)
    )
    what = f"{before} then, {after} now" if before != after else f"other names or labels of the {after}"
    return [
        f"the data changed since {checkpoint}: {what}; in an epoch that had begun, an image may come twice "
        "or not at all"
    ]


def difference(before: list[str], after: list[str]) -> str:
    """How two lists of class names differ, in a few words."""
    gone, new = ([n for n in a if n not in set(b)] for a, b in ((before, after), (after, before)))
    parts = [f"{len(before)} then, {len(after)} now"] if len(before) != len(after) else []
    parts += [f"{names(gone)} missing now"] * bool(gone) + [f"{names(new)} new"] * bool(new)
    if not gone and not new:
        moved = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
        if moved is not None:
            parts.append(
                f"label {moved} is {names(after[moved : moved + 1])}, was {names(before[moved : moved + 1])}"
            )
    return ", ".join(parts)


def names(some: list[str]) -> str:
    """At most three names, readable also where they are not UTF-8."""
    shown = ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
    return shown.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
