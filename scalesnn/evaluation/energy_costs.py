"""Picojoules of one operation, and what the operations of a net's layers add up to.

Two ways of counting stand side by side. Exact: every spike costs one addition for each output that it
reaches, borders included; layers that are not fed with spikes multiply. The papers' convention: additions =
MACs × T × firing rate of the layer's input, which takes the mean rate for every place and no border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from scalesnn.base import UserError
from scalesnn.tracking.energy import PJ_PER_AC, PJ_PER_MAC

__all__ = ["COSTS", "Costs", "Row", "Totals", "costs_of", "totals_of"]


@dataclass(frozen=True)
class Costs:
    """Energy of a multiply-accumulate and of an addition, in pJ."""

    name: str
    mac: float
    ac: float


COSTS = {  # 45 nm, 0.9 V (Horowitz 2014); a multiply-accumulate is a multiplication and an addition
    "fp32": Costs("fp32", PJ_PER_MAC, PJ_PER_AC),
    "fp16": Costs("fp16", 1.1 + 0.4, 0.4),
    "int8": Costs("int8", 0.2 + 0.03, 0.03),
}


def costs_of(text: str) -> Costs:
    """The preset of that name, or a YAML file with ``mac`` and ``ac`` in pJ.

    Raises:
        UserError: it is neither.
    """
    if text in COSTS:
        return COSTS[text]
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(f"--costs {text}: expected {', '.join(COSTS)}, or a YAML file with mac and ac in pJ")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        mac, ac = float(values["mac"]), float(values["ac"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(f"--costs {text}: expected two lines, 'mac: 4.6' and 'ac: 0.9' (pJ)") from None
    if not (0 < mac < float("inf") and 0 < ac < float("inf")):
        raise UserError(f"--costs {text}: mac and ac must be above 0, got {mac} and {ac}")
    return Costs(path.name, mac, ac)


@dataclass(frozen=True)
class Row:
    """One layer's work for one image.

    Attributes:
        name: path in the net.
        fed: ``spikes`` (or sums of spikes), ``averages`` of spikes, or ``values`` such as an image's.
        macs: of one time-step: those of the ANN.
        steps: T.
        rate_T: mean input at each step: spikes for each input neuron.
        synops: additions over T steps, exactly; 0 where the layer multiplies.
        once: the input is the same at every step, so the layer is computed once.
    """

    name: str
    fed: str
    macs: float
    steps: int
    rate_T: tuple[float, ...]
    synops: float
    once: bool

    @property
    def rate(self) -> float | None:
        """Mean of ``rate_T``; None where the input is no rate."""
        return None if self.fed == "values" else sum(self.rate_T) / len(self.rate_T)

    @property
    def convention(self) -> float | None:
        """The papers' additions, MACs × T × rate; None where the input is no rate."""
        return None if self.rate is None else self.macs * self.steps * self.rate

    def exact_pj(self, costs: Costs, *, once: bool = True) -> float:
        """Energy over T steps by exact counting.

        Args:
            once: compute a layer with the same input at every step once; else T times.
        """
        if self.fed == "spikes":
            return self.synops * costs.ac
        return self.macs * (1 if self.once and once else self.steps) * costs.mac

    def convention_pj(self, costs: Costs, *, once: bool = True) -> float:
        """Energy over T steps by the papers' convention; ``once`` as for ``exact_pj``."""
        if self.convention is not None:
            return self.convention * costs.ac
        return self.macs * (1 if self.once and once else self.steps) * costs.mac


@dataclass(frozen=True)
class Totals:
    """Sums over all layers, for one image; energies in mJ.

    Attributes:
        macs: of the ANN.
        synops, convention: additions, exactly and by the papers' convention.
        ann: energy of the ANN.
        exact_once, exact_T, convention_once, convention_T: energy of the SNN by either way of counting, with
            the first layer computed once and T times.
    """

    macs: float
    synops: float
    convention: float
    ann: float
    exact_once: float
    exact_T: float
    convention_once: float
    convention_T: float


def totals_of(rows: Sequence[Row], costs: Costs) -> Totals:
    """Add up the layers."""
    mj = 1e-9
    macs = sum(row.macs for row in rows)
    return Totals(
        macs,
        sum(row.synops for row in rows),
        sum(row.convention or 0.0 for row in rows),
        macs * costs.mac * mj,
        *(sum(row.exact_pj(costs, once=once) for row in rows) * mj for once in (True, False)),
        *(sum(row.convention_pj(costs, once=once) for row in rows) * mj for once in (True, False)),
    )
