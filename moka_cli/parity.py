"""`moka parity`: what an adapter computes in both backends, or in one and by definition, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from moka_cli.bases import open_held
from moka_cli.figures import check_json, text_console, write_json

if TYPE_CHECKING:
    from conversion.parity import ParityReport

DISAGREE = 3  # the exit status: 1 is for what could not be compared, 2 for a wrong command line

_NAMES = {"JAX": "JAX", "PyTorch": "PyTorch (PEFT, bitsandbytes)", "float64": "the definition in float64 (NumPy)"}


def run_parity(
    adapter: Path, base: Path, *, quantise: str | None, json_file: Path | None, trace: bool, **options: Any
) -> None:
    """Compare, print the table, and exit with status 3 if a figure exceeds its bound.

    Args:
        quantise: see `check_parity`; another than that of a packed base is refused.
        trace: print the difference of every module, too.
        options: of `conversion.parity.check_parity`.
    """
    check_json(json_file)
    console = text_console(json_file)
    open_held(base, quantise)
    report = check(adapter, base, console=console, quantise=quantise, trace=trace, **options)
    if trace:
        console.print(modules_table(report))
    console.print(parity_table(report))
    write_json(json_file, report.to_dict())
    print_verdict(report, console)
    if not report.passed:
        raise SystemExit(DISAGREE)


def check(adapter: Path, base: Path, *, console: Console, **options: Any) -> ParityReport:
    """The parity report, with a line of progress for each stage; `options` are those of `check_parity`."""
    from conversion.parity import check_parity

    with console.status("comparing") as status:

        def tell(stage: str) -> None:
            status.update(stage)
            if not console.is_terminal:  # where a status shows nothing, and the optimiser steps take minutes
                console.print(stage, highlight=False, markup=False, soft_wrap=True)

        return check_parity(adapter, base, on_stage=tell, **options)


def print_verdict(report: ParityReport, console: Console) -> None:
    """Whether the sides agree, and if not, which figures exceed their bounds and where the difference begins."""
    for note in report.notes:
        console.print(f"[dim]{note}[/dim]", highlight=False, soft_wrap=True)
    sides = "both backends" if "float64" not in report.sides else " and ".join(report.sides)
    if report.passed:
        console.print(f"[green]{sides} agree[/green]")
        return
    failed = ", ".join(row.name for row in report.rows if not row.passed)
    console.print(f"[bold red]{sides} disagree[/bold red]: {failed}", soft_wrap=True)
    if report.diagnosis is not None:
        console.print(str(report.diagnosis), markup=False, highlight=False, soft_wrap=True)


def parity_table(report: ParityReport) -> Table:
    """The comparisons, a row each."""
    title = " against ".join(_NAMES[side] for side in report.sides)
    numbers = (Column(name, no_wrap=True) for name in ("figure", "bound", ""))
    table = Table(Column("comparison", overflow="fold"), *numbers, title=title)
    for row in report.rows:
        figure = f"{row.figure:d}" if isinstance(row.figure, int) else f"{row.figure:.2e}"
        verdict = "[green]ok[/green]" if row.passed else "[bold red]FAILS[/bold red]"
        at = f"; worst: {row.worst}" if row.worst else ""
        table.add_row(f"{row.name}\n[dim]{row.unit}{at}[/dim]", figure, f"{row.bound:g}", verdict)
    if "float64" in report.sides:
        table.add_row("gradients, optimiser steps\n[dim]both backends only[/dim]", "–", "", "[dim]left out[/dim]")
    return table


def modules_table(report: ParityReport) -> Table:
    """Every module's difference, in order of computation."""
    table = Table(Column("module", overflow="fold"), Column("relative difference", no_wrap=True), title="outputs")
    for name, figure in report.modules:
        table.add_row(name, f"{figure:.1e}")
    return table
