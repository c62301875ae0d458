"""What a check found, and the table of it all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scalesnn.training.hang_watch import short_list

__all__ = ["CHECKS", "Finding", "Report", "exit_code", "print_table"]

# Every check, in the table's order, with what stands there when nothing was found.
CHECKS = {
    "host file": "every host resolves",
    "ranks": "all came",
    "versions": "the same on all ranks",
    "GPUs": "as many as processes, the same on all nodes",
    "compiler": "there is one",
    "kernels": "they compile and run",
    "data": "readable, the same on all nodes",
    "output": "shared and writable, with space",
    "shared memory": "enough for loaders",
    "open files": "the limit is high enough",
    "clock": "the same on all nodes",
    "names": "every rank finds the first node",
    "ports": "every node reaches every other",
    "network": "all-reduce between nodes",
    "speed": "no node is behind",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        check: a key of ``CHECKS``.
        status: fail, warn, or ok (a figure worth showing).
        what: what was found, in one line.
        cure: what to do; empty for ok.
        rank: where; None for all together.
    """

    check: str
    status: str
    what: str
    cure: str = ""
    rank: int | None = None


@dataclass
class Report:
    """What one rank knows: its place, plain facts to compare, its findings, and the checks it has made."""

    rank: int
    host: str
    node_rank: int = 0
    local_rank: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def add(self, check: str, status: str, what: str, cure: str = "") -> None:
        """Note a finding of this rank."""
        self.findings.append(Finding(check, status, what, cure, self.rank))

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``from_json`` takes them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Report:
        """The report that ``to_json`` gave."""
        return cls(**{**values, "findings": [Finding(**finding) for finding in values["findings"]]})


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where anything fails, else 0."""
    return int(any(finding.status == "fail" for finding in findings))


def print_table(
    findings: Sequence[Finding], done: Iterable[str], places: dict[int, str], file: Any = None
) -> None:
    """Print one table: a row for each distinct finding, and one ok for each check that found nothing.

    Args:
        findings: of all ranks; equal ones become one row that names its ranks.
        done: the checks that were made.
        places: host of each rank.
        file: where to print, standard output when None.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows: dict[tuple[str, str, str, str], list[int | None]] = defaultdict(list)
    for finding in findings:
        rows[finding.check, finding.status, finding.what, finding.cure].append(finding.rank)
    for check in done:
        if not any(row[0] == check for row in rows):
            rows[check, "ok", CHECKS[check], ""] = [None]
    order = list(CHECKS)
    colours = {"fail": "bold red", "warn": "yellow", "ok": "green"}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("check", "", "where", "found", "cure"):
        table.add_column(title, overflow="fold")
    for (check, status, what, cure), ranks in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        where = where_of([rank for rank in ranks if rank is not None], places)
        table.add_row(check, Text(status, style=colours[status]), where, Text(what), Text(cure))
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=1000)  # a log: one line for each row
    console.print(table)


def where_of(ranks: list[int], places: dict[int, str]) -> str:
    """``all``, ``rank 3 (node-7)``, ``ranks 0-3 (2 hosts)``."""
    if not ranks or len(set(ranks)) == len(places):
        return "all" if len(places) > 1 else ""
    hosts = sorted({places.get(rank, "?") for rank in ranks})
    name = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
    return f"rank{'s' * (len(ranks) > 1)} {short_list(sorted(set(ranks)))} ({name})"
