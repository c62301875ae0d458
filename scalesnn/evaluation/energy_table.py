"""The table of ``scalesnn energy``: for the terminal, as CSV, as LaTeX."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scalesnn.evaluation.energy_costs import Costs, Row, totals_of
from scalesnn.evaluation.writing import opened

__all__ = ["print_table", "write_csv", "write_latex"]

COLUMNS = ("layer", "fed with", "MACs", "rate", "SynOps", "µJ", "MACs·T·rate", "µJ ")


def cells_of(row: Row, costs: Costs) -> list[str]:
    """A line of the table."""
    convention = "" if row.convention is None else count(row.convention)
    return [
        row.name,
        row.fed,
        count(row.macs),
        "" if row.rate is None else f"{row.rate:.4f}",
        count(row.synops) if row.fed == "spikes" else "",
        f"{row.exact_pj(costs) * 1e-6:.4g}",
        convention,
        f"{row.convention_pj(costs) * 1e-6:.4g}",
    ]


def sums_of(rows: Sequence[Row], costs: Costs) -> list[tuple[str, float]]:
    """What the table ends with: a name, and mJ an image."""
    totals, first = totals_of(rows, costs), "first layer"
    same = [row.name for row in rows if row.once]
    if same:
        first = ", ".join(same)
    found = [("ANN: every MAC once", totals.ann)]
    for way, once, every in (
        ("exact", totals.exact_once, totals.exact_T),
        ("MACs·T·rate", totals.convention_once, totals.convention_T),
    ):
        if same:
            found += [(f"SNN, {way}, {first} once", once), (f"SNN, {way}, {first} T times", every)]
        else:
            found.append((f"SNN, {way}", every))
    return found


def print_table(rows: Sequence[Row], costs: Costs, title: str, means: dict[str, float]) -> None:
    """Show the table and the sums."""
    table = Table(title=escape(title))
    for name in COLUMNS:
        table.add_column(name.strip(), justify="left" if name in COLUMNS[:2] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells_of(row, costs))
    totals = totals_of(rows, costs)
    table.add_section()
    table.add_row("all", "", count(totals.macs), "", count(totals.synops), "", count(totals.convention), "")
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        "For one image. MACs: of one time-step. rate: mean input, spikes a step. SynOps and the µJ beside "
        "them: exact, borders included. MACs·T·rate: the papers' convention."
    )
    console.print(
        f"{costs.name}: {costs.mac:g} pJ a multiply-accumulate, {costs.ac:g} pJ an addition", markup=False
    )
    for name, energy in sums_of(rows, costs):
        share = "" if name.startswith("ANN") else f"  ({100 * energy / totals.ann:.1f} % of the ANN's)"
        console.print(f"  {name:<44} {energy:.4g} mJ{share}")
    console.print(
        f"top-1 {means['acc1']:.2f} %; memory traffic, neurons and BatchNorm are in none of the figures"
    )


def write_csv(rows: Sequence[Row], costs: Costs, path: str) -> None:
    """Write every figure of every layer, then the sums."""
    with opened(path, "--csv") as file:
        writer = csv.writer(file)
        steps = max(row.steps for row in rows)
        rates = [f"rate_t{t + 1}" for t in range(steps)]
        head = ["layer", "fed_with", "macs_per_step", "T", "rate", "synops", "exact_pj", "macs_T_rate"]
        writer.writerow([*head, "macs_T_rate_pj", *rates])
        for row in rows:
            exact = row.exact_pj(costs)
            figures = [row.macs, row.steps, blank(row.rate), row.synops, exact, blank(row.convention)]
            shown = row.rate_T if row.rate is not None else [""] * row.steps
            writer.writerow([row.name, row.fed, *figures, row.convention_pj(costs), *shown])
        for name, energy in sums_of(rows, costs):
            writer.writerow([f"{name} (pJ)", "", "", "", "", "", energy * 1e9])


def write_latex(rows: Sequence[Row], costs: Costs, path: str) -> None:
    """Write a ``tabular`` for a paper (needs the package booktabs)."""
    with opened(path, "--latex") as file:
        lines = ["\\begin{tabular}{llrrrrrr}", "\\toprule"]
        heads = [
            "layer",
            "input",
            "MACs",
            "rate",
            "SynOps",
            "\\textmu J",
            "MACs$\\cdot T\\cdot$rate",
            "\\textmu J",
        ]
        lines += [" & ".join(heads) + " \\\\", "\\midrule"]
        lines += [" & ".join(escaped(cell) for cell in cells_of(row, costs)) + " \\\\" for row in rows]
        lines += ["\\midrule"]
        for name, energy in sums_of(rows, costs):
            lines.append(f"\\multicolumn{{7}}{{l}}{{{escaped(name)}}} & {energy:.4g} mJ \\\\")
        lines += ["\\bottomrule", "\\end{tabular}"]
        file.write("\n".join(lines) + "\n")


def escaped(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    for letter in "\\&%$#_{}":
        text = text.replace(letter, f"\\{letter}" if letter != "\\" else "\\textbackslash ")
    return text.replace("µ", "\\textmu ").replace("·", "$\\cdot$")


def count(value: float) -> str:
    """A number of operations: 12.3 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def blank(value: float | None) -> float | str:
    """The value, or an empty cell."""
    return "" if value is None else value
