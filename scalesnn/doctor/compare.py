"""From the reports of all ranks to findings: what differs, which clock is off, which node is slow."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from scalesnn.doctor.findings import Finding, Report
from scalesnn.doctor.local import Settings

__all__ = ["compare", "slow_ones"]

SLOW = 1.5  # times the median: a device that takes so long is called slow
NARROW = 0.5  # times the median: a node with so little bandwidth is called slow


def compare(reports: Sequence[Report], settings: Settings) -> list[Finding]:
    """All findings: those of each rank, and those that only the comparison shows."""
    return [
        *(finding for report in reports for finding in report.findings),
        *compare_versions(reports),
        *compare_data(reports),
        *compare_gpus(reports),
        *compare_clocks(reports, settings),
        *compare_speed(reports),
        *compare_network(reports),
    ]


def odd_ones(values: Mapping[int, Any]) -> tuple[Any, dict[int, Any]]:
    """The most frequent value, and those that differ from it, by rank."""
    if not values:
        return None, {}
    usual = Counter(map(repr, values.values())).most_common(1)[0][0]
    common = next(value for value in values.values() if repr(value) == usual)
    return common, {rank: value for rank, value in values.items() if repr(value) != usual}


def compare_versions(reports: Sequence[Report]) -> list[Finding]:
    """Every package has one version."""
    findings = []
    names = dict.fromkeys(name for report in reports for name in report.facts.get("versions", {}))
    for name in names:
        usual, odd = odd_ones(
            {r.rank: r.facts["versions"].get(name, "none") for r in reports if "versions" in r.facts}
        )
        for rank, version in odd.items():
            cure = f"install {name} {usual} there, or start all ranks from one shared environment"
            if name == "scalesnn":
                cure = "bring the checkout there to the same commit, or start from a shared folder"
            findings.append(Finding("versions", "fail", f"{name} {version}, elsewhere {usual}", cure, rank))
    return findings


def compare_data(reports: Sequence[Report]) -> list[Finding]:
    """Every node sees the same files."""
    usual, odd = odd_ones({r.rank: r.facts["data"] for r in reports if "data" in r.facts})
    return [
        Finding("data", "fail", f"the data differ: {mark}, elsewhere {usual}",
                "copy the data to that node again; every rank must see the same classes and files", rank)
        for rank, mark in odd.items()
    ]  # fmt: skip


def compare_gpus(reports: Sequence[Report]) -> list[Finding]:
    """Every node has the same GPUs, and as many."""
    usual, odd = odd_ones({r.rank: r.facts.get("GPUs") for r in reports})
    findings = []
    for rank, gpus in odd.items():
        have = f"{gpus[2]} × {gpus[0]}, {gpus[1]} GiB" if gpus else "no GPU"
        others = f"{usual[2]} × {usual[0]}, {usual[1]} GiB" if usual else "none"
        findings.append(
            Finding("GPUs", "fail" if bool(gpus) != bool(usual) else "warn", f"{have}, elsewhere {others}",
                    "ask for nodes of one kind (sbatch --constraint); the slowest sets the pace", rank)
        )  # fmt: skip
    return findings


def compare_clocks(reports: Sequence[Report], settings: Settings) -> list[Finding]:
    """Every clock is near the first node's."""
    return [
        Finding("clock", "fail", f"the clock is {abs(r.facts['clock']):.1f} s "
                f"{'ahead of' if r.facts['clock'] > 0 else 'behind'} rank 0's",
                "start time synchronisation there (systemctl restart chronyd); file times and logs "
                "mislead", r.rank)
        for r in reports
        if abs(r.facts.get("clock", 0.0)) > settings.max_skew
    ]  # fmt: skip


def slow_ones(values: Mapping[int, float], times: float = SLOW) -> dict[int, float]:
    """Keys whose value is more than ``times`` the lower median, with how many times it is."""
    if len(values) < 2:
        return {}
    usual = statistics.median_low(values.values())
    return {key: value / usual for key, value in values.items() if value > times * usual}


def compare_speed(reports: Sequence[Report]) -> list[Finding]:
    """No device takes much longer than the others for the same work."""
    slow = slow_ones({r.rank: r.facts["work"] for r in reports if "work" in r.facts})
    return [
        Finding("speed", "warn", f"the same work takes {times:.1f} times as long as elsewhere",
                "look for another job, heat or a power limit there (nvidia-smi -q -d PERFORMANCE), or "
                "leave the node "
                "out (sbatch --exclude)", rank)
        for rank, times in slow.items()
    ]  # fmt: skip


def compare_network(reports: Sequence[Report]) -> list[Finding]:
    """Latency and bandwidth over all pairs, and the nodes whose pairs are all slow."""
    leaders = {r.node_rank: r for r in reports if r.local_rank == 0 and r.facts.get("network")}
    if not leaders:
        return []
    latency: dict[int, list[float]] = defaultdict(list)
    speed: dict[int, list[float]] = defaultdict(list)
    pairs: dict[tuple[int, int], float] = {}
    for node, report in leaders.items():
        for other, (seconds, rate) in report.facts["network"].items():
            latency[node].append(seconds)
            speed[node].append(rate)
            pairs[node, int(other)] = rate
    median = statistics.median(rate for rates in speed.values() for rate in rates)
    (a, b), worst = min(pairs.items(), key=lambda pair: pair[1])
    between = statistics.median(s for values in latency.values() for s in values)
    text = f"{len(leaders)} nodes: {median / 1e9:.2f} GB/s and {between * 1e6:.0f} µs between two"
    text += (
        f"; slowest pair {leaders[a].host}–{leaders[b].host if b in leaders else b}: {worst / 1e9:.2f} GB/s"
    )
    findings = [Finding("network", "ok", text)]
    if len(leaders) < 3:
        return findings
    medians = {node: statistics.median(rates) for node, rates in speed.items()}
    usual = statistics.median(medians.values())
    findings += [
        Finding("network", "warn", f"{rate / 1e9:.2f} GB/s to the other nodes, elsewhere {usual / 1e9:.2f}",
                "look at the cable, the port's rate (ibstat, ethtool) and the switch, or leave the node out "
                "(sbatch --exclude)", leaders[node].rank)
        for node, rate in medians.items()
        if rate < NARROW * usual
    ]  # fmt: skip
    return findings
