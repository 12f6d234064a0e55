"""`moka merge`: an adapter and its base as one model folder, and what the rounding cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from moka_cli.bases import open_held
from moka_cli.figures import check_json, text_console, write_json
from moka_core import ConfigError

if TYPE_CHECKING:
    from conversion import MergeError, MergeReport

SHOWN = 5
LOST = 0.1  # a share of the update that is worth a warning


def run_merge(
    adapter: Path,
    out: Path,
    *,
    base: Path,
    dtype: str,
    pack: str | None,
    quantise: str | None,
    max_shard_gb: float,
    allow_other_base: bool,
    json_file: Path | None,
) -> None:
    """Merge, and print what was written and what was lost."""
    from conversion import load_adapter, merge_folder

    check_json(json_file)
    if not max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb: expected more than 0; got {max_shard_gb}")
    console = text_console(json_file)
    trained = load_adapter(adapter)
    opened = open_held(base, quantise, trained)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("merging", total=None)
        report = merge_folder(
            trained,
            opened,
            out,
            dtype=dtype,  # type: ignore[arg-type]
            pack=pack,  # type: ignore[arg-type]
            max_shard_bytes=max_shard_gb * 1e9,
            allow_other_base=allow_other_base,
            on_tensor=lambda name, done, total: progress.update(task, completed=done, total=total),
        )
    show(report, console)
    write_json(json_file, report.to_dict())


def show(report: MergeReport, console: Console) -> None:
    """The table of errors, and in words what was written, what was not, and what to do about losses."""
    console.print(error_table(report))
    files = f"{len(report.files)} file{'s' * (len(report.files) > 1)}"
    console.print(f"[green]{escape(str(report.folder))}[/green]: {report.bytes / 1e9:.2f} GB in {files}")
    console.print(f"taken over as they are: {', '.join(report.copied) or 'nothing'}", highlight=False, markup=False)
    if report.left_out:
        console.print(f"not taken over: {', '.join(report.left_out)}", highlight=False, markup=False)
    for note in report.notes:
        console.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False)
    lost = report.total.lost or 0.0
    if report.pack is not None:
        console.print(
            f"[yellow]warning[/yellow]: quantised again, {lost:.0%} of the update was lost, and the weights are "
            f"{report.total.off:.2f}·‖ΔW‖ away from W + ΔW; the base itself is 1·‖ΔW‖ away. A dense merge, without "
            "--pack, is recommended.",
            highlight=False,
        )
    elif lost > LOST:
        console.print(
            f"[yellow]warning[/yellow]: {lost:.0%} of the update is below what {report.dtype} resolves and was rounded "
            "away. --dtype float32 keeps it.",
            highlight=False,
        )
    held = "" if report.pack else " --quantise none"
    console.print(
        f"next: AutoModelForCausalLM.from_pretrained({str(report.folder)!r}) in transformers, or moka generate --base "
        f"{report.folder}{held} --prompt TEXT",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def error_table(report: MergeReport) -> Table:
    """The layers whose W + ΔW was hit most, and all with an adapter together."""
    made = f"quantised again as {report.pack}" if report.pack else f"rounded to {report.dtype}"
    worst = sorted(report.adapted.items(), key=lambda item: -item[1].relative)
    first = f"the {SHOWN} worst of {len(worst)} layers" if len(worst) > SHOWN else "layer"
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("update", "error", "lost"))
    table = Table(Column(first, overflow="fold"), *numbers, title=f"W + ΔW, {made}", caption_justify="left")
    for path, error in worst[:SHOWN]:
        table.add_row(path, *_cells(error))
    table.add_section()
    table.add_row(f"all {len(worst)} layers with an adapter", *_cells(report.total))
    table.caption = (
        f"W held as {report.base_quantisation}\nupdate ‖ΔW‖/‖W+ΔW‖, error ‖W′−(W+ΔW)‖/‖W+ΔW‖\n"
        "lost 1 − ⟨W′−W, ΔW⟩/‖ΔW‖²; none: from −1 % to 0.005 %; below 0\nrounding went further along ΔW than asked"
    )
    return table


def _cells(error: MergeError) -> tuple[str, str, str]:
    lost = "–" if error.lost is None else "none" if -0.01 <= error.lost <= 5e-5 else f"{error.lost:.2%}"
    return f"{error.size:.2e}", f"{error.relative:.2e}", lost
