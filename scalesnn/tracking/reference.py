"""Published runs to compare with: the top-1 that authors reached epoch by epoch, and under which settings.

The shipped ones are in scalesnn/configs/references. A file of one's own has the same lines: ``source``, the
settings (``model``, ``T``, ``epochs``, ``lr``, ``global_batch``) and ``top1``, epochs done → per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from scalesnn.base import UserError
from scalesnn.configs import find_config

__all__ = ["Reference", "load_reference"]

EARLY, LET_PASS = (
    10,
    (3.0, 1.5),
)  # points below the curve that are let pass: before that epoch, and from it on


@dataclass(frozen=True)
class Reference:
    """A published run.

    Attributes:
        name: of the file.
        source: where the figures are from.
        settings: of the run, by flag: model, T, epochs, lr, global_batch.
        top1: per cent on the validation set, by epochs done.
    """

    name: str
    source: str
    settings: dict[str, Any]
    top1: dict[int, float]

    def expected(self, epoch: int) -> float | None:
        """Top-1 after ``epoch`` epochs, between the known ones linear in the logarithm of the epoch; None
        outside of them."""
        if epoch in self.top1:
            return self.top1[epoch]
        for (before, low), (after, high) in pairwise(self.top1.items()):
            if before < epoch < after:
                share = math.log(epoch / before) / math.log(after / before)
                return low + share * (high - low)
        return None

    def verdict(self, points: Sequence[tuple[int, float]]) -> str:
        """Whether a run is on track, and since when.

        Args:
            points: (epochs done, top-1 in per cent), oldest first.
        """
        compared = [(e, found, wanted) for e, found in points if (wanted := self.expected(e)) is not None]
        if not compared:
            known = list(self.top1)
            return f"nothing to compare yet: no evaluated epoch between {known[0]} and {known[-1]}"
        states = [found >= wanted - let_pass(e) for e, found, wanted in compared]
        turns = [place for place in range(1, len(states)) if states[place] != states[place - 1]]
        since = compared[turns[-1] if turns else 0][0]
        epoch, found, wanted = compared[-1]
        text = f"since epoch {since}: {found:.1f} % after {epoch} epochs, expected {wanted:.1f} %"
        return (
            f"on track {text}"
            if states[-1]
            else f"behind {text}; {let_pass(epoch)} points below are let pass"
        )

    def rate(self, global_batch: int) -> float:
        """The learning rate for another global batch by the linear rule (Goyal et al. 2017)."""
        return float(self.settings["lr"]) * global_batch / int(self.settings["global_batch"])

    def notice(self, lr: float, global_batch: int) -> str:
        """What a run that begins is told."""
        epochs, best = list(self.top1.items())[-1]
        own, batch = self.settings["lr"], self.settings["global_batch"]
        text = f"reference {self.name} ({self.source}): {best} % top-1 after {epochs} epochs"
        text += f"; its --lr {own} is for a global batch of {batch}"
        if global_batch == batch:
            return text
        rate = self.rate(global_batch)
        given = "as given" if math.isclose(lr, rate, rel_tol=1e-3) else f"and not {lr:g}"
        return f"{text}; for this run's {global_batch} the linear rule gives --lr {rate:g}, {given}"

    def differences(self, settings: dict[str, Any]) -> list[str]:
        """The settings in which a run differs from the reference's, as far as both are known."""
        return [
            f"{name} {settings[name]} instead of {value}"
            for name, value in self.settings.items()
            if settings.get(name) not in (None, value)
        ]


def let_pass(epoch: int) -> float:
    """How many points below the curve are let pass after so many epochs: seeds and single epochs differ."""
    return LET_PASS[epoch >= EARLY]


def load_reference(name: str, flag: str = "--reference") -> Reference:
    """Read a reference.

    Args:
        name: a file, or the name of a shipped one such as ``sew_resnet34``.

    Raises:
        UserError: there is none, or it is not such a file.
    """
    path = find_config(flag, name, "references/*.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        top1 = {int(epoch): float(value) for epoch, value in content.pop("top1").items()}
        source = str(content.pop("source"))
        settings = {key: content[key] for key in ("model", "T", "epochs", "lr", "global_batch")}
        good = top1 and min(top1) >= 1 and float(settings["lr"]) > 0 and int(settings["global_batch"]) > 0
    except OSError as error:
        raise UserError(f"{flag} {name}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{flag} {name}: expected source, model, T, epochs, lr, global_batch, and top1 as "
            f"epoch: per cent ({reason})"
        ) from None
    if not good:
        raise UserError(f"{flag} {name}: epochs begin with 1, and lr and global_batch are above 0")
    return Reference(path.stem, source, settings, dict(sorted(top1.items())))
