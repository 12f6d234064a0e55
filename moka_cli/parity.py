"""`moka parity`: the comparison of both backends as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moka_core import ConfigError

if TYPE_CHECKING:
    from conversion.parity import ParityReport


def run_parity(adapter: Path, base: Path, *, quantise: str, steps: int, json_file: Path | None) -> None:
    """Compare, print the table, and exit with status 1 if a figure exceeds its bound."""
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: expected an existing folder; {json_file.parent} is none")
    console = Console()
    report = check(adapter, base, quantise=quantise, steps=steps, console=console)
    console.print(parity_table(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if not report.passed:
        failed = ", ".join(row.name for row in report.rows if not row.passed)
        console.print(f"[bold red]the backends disagree[/bold red]: {failed}")
        raise SystemExit(1)
    console.print("[green]both backends agree[/green]")


def check(adapter: Path, base: Path, *, quantise: str, steps: int, console: Console) -> ParityReport:
    """The parity report, with a line of progress for each stage."""
    from conversion.parity import check_parity

    with console.status("comparing") as status:
        return check_parity(adapter, base, quantise=quantise, steps=steps, on_stage=status.update)  # type: ignore[arg-type]


def parity_table(report: ParityReport) -> Table:
    """The comparisons, a row each."""
    table = Table("comparison", "figure", "bound", "", title="JAX against PyTorch (PEFT, bitsandbytes)")
    for row in report.rows:
        figure = f"{row.figure:d}" if isinstance(row.figure, int) else f"{row.figure:.2e}"
        verdict = "[green]ok[/green]" if row.passed else "[bold red]FAILS[/bold red]"
        at = f"; worst: {row.worst}" if row.worst else ""
        table.add_row(f"{row.name}\n[dim]{row.unit}{at}[/dim]", figure, f"{row.bound:g}", verdict)
    return table
