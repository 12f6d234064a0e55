"""`moka lora`: an adapter as a plain LoRA folder, and what that loses."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from moka_cli.bases import open_held
from moka_cli.figures import check_json, text_console, write_json
from moka_core import Adapter, AdapterError, ConfigError

if TYPE_CHECKING:
    from conversion import BaseFolder
    from conversion.logits_error import LogitsError
    from conversion.lora import LoraLayer, LoraReport

# The tokens that logits are compared on: 512 positions.
BATCHES, BATCH_SIZE, LENGTH = 4, 2, 64
WORST = 5


def run_lora(
    adapter: Path,
    out: Path,
    *,
    rank: int | None,
    max_error: float | None,
    max_rank: int | None,
    dtype: str,
    base: Path | None,
    quantise: str | None,
    allow_other_base: bool,
    json_file: Path | None,
) -> None:
    """Write the folder, print its errors, and with a base measure what they do to the logits."""
    from conversion import load_adapter
    from conversion.lora import export_lora

    check_json(json_file)
    console = text_console(json_file)
    if base is None and quantise is not None:
        raise ConfigError(
            f"--quantise {quantise}: says how the base is held where logits are compared; expected together with "
            "--base FOLDER"
        )
    loaded = load_adapter(adapter)
    found: list[LogitsError] = []
    opened = linear_layers = None
    if base is not None:
        opened = open_held(base, quantise, loaded)
        linear_layers = base_layers(loaded, opened, allow_other_base=allow_other_base)
        loaded = dataclasses.replace(loaded, base_model=os.path.abspath(base))
    with console.status("approximating") as status:

        def measure(draft: Path, report: LoraReport) -> None:
            if opened is not None:
                status.update("comparing logits")
                found.extend(measure_logits(opened, adapter, [draft], allow_other_base=allow_other_base))

        report = export_lora(
            loaded,
            out,
            rank=rank,
            max_error=max_error,
            max_rank=max_rank,
            dtype=dtype,
            linear_layers=linear_layers,
            on_layer=lambda path: status.update(f"approximating {path}"),
            on_written=measure,
        )
    console.print(kinds_table(report))
    console.print(worst_table(report))
    for note in report.notes:
        console.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False)
    values: dict[str, Any] = report.to_dict()
    for measured in found:
        values["logits"] = {**measured.to_dict(), "quantise": opened and opened.quantisation}
        console.print(logits_table(measured))
    write_json(json_file, values)
    console.print(
        f"{out}: LoRA of rank {report.rank}, {report.parameters:,} parameters in {report.dtype} "
        f"({report.parameters / report.moka_parameters:.1f} times the {report.moka_parameters:,} of the adapter); "
        f"relative error of ΔW {report.total:.2g} in all, {report.worst.relative:.2g} in the worst layer",
        highlight=False,
        markup=False,
    )


def base_layers(adapter: Adapter, base: BaseFolder, *, allow_other_base: bool) -> list[str]:
    """The paths of the base's linear layers.

    Raises:
        AdapterError: the adapter belongs to another base, or adapts a layer that this one does not have.
    """
    from moka_core import Architecture, check_base

    check_base(adapter.base_fingerprint, base.fingerprint, allow_other_base=allow_other_base)
    known = Architecture.from_hf_config(base.config).linear_layers()
    foreign = [
        path
        for path, layer in adapter.layers.items()
        if known.get(path) != (layer.plan.out_features, layer.plan.in_features)
    ]
    if foreign:
        raise AdapterError(
            f"--base {base.folder}: expected a base with every layer of this adapter; it has no {foreign[0]} of "
            f"{adapter.layers[foreign[0]].plan.key}" + (f", and {len(foreign) - 1} more" if foreign[1:] else "")
        )
    return list(known)


def measure_logits(
    base: BaseFolder,
    adapter: Path,
    loras: Sequence[str | os.PathLike[str]],
    *,
    allow_other_base: bool = False,
) -> list[LogitsError]:
    """What each LoRA folder loses of the adapter in logits, by PEFT on the same base and tokens."""
    from conversion.logits_error import logits_error
    from conversion.parity import token_batches
    from moka_torch.adapter_logits import adapter_logits

    vocab_size = base.config["vocab_size"]
    batches = token_batches(base.folder, vocab_size, count=BATCHES, batch_size=BATCH_SIZE, length=LENGTH, seed=0)
    tokens = [batch.tokens for batch in batches]
    found = adapter_logits(
        base.folder, [adapter, *loras], tokens, quantise=base.quantise, allow_other_base=allow_other_base
    )
    alone, adapted = next(found), next(found)
    return [logits_error(alone, adapted, logits) for logits in found]


def kinds_table(report: LoraReport) -> Table:
    """The errors of each kind of layer, a row each."""
    kinds: dict[tuple[str, str], list[LoraLayer]] = {}
    for layer in report.layers:
        dims = f"{layer.out_features}x{layer.in_features}"
        kinds.setdefault((layer.path.rpartition(".")[2], dims), []).append(layer)
    numbers = ("out x in", "layers", "median error", "worst error", "worst σ_k+1/σ_1")
    table = Table(Column("layer", overflow="fold"), *(Column(name, no_wrap=True) for name in numbers))
    table.title, table.caption = f"LoRA of rank {report.rank} for ΔW", "error ‖ΔW − BA‖/‖ΔW‖"
    for (name, dims), layers in kinds.items():
        errors = [layer.relative for layer in layers]
        spectral = max(layer.spectral for layer in layers)
        table.add_row(
            name, dims, str(len(layers)), f"{statistics.median(errors):.3g}", f"{max(errors):.3g}", f"{spectral:.3g}"
        )
    return table


def worst_table(report: LoraReport) -> Table:
    """The layers with the largest errors, a row each."""
    count = len(report.layers)
    first = f"the {WORST} worst of {count} layers" if count > WORST else "layer"
    table = Table(Column(first, overflow="fold"), *(Column(name, no_wrap=True) for name in ("error", "σ_k+1/σ_1")))
    for layer in sorted(report.layers, key=lambda layer: -layer.relative)[:WORST]:
        table.add_row(layer.path, f"{layer.relative:.3g}", f"{layer.spectral:.3g}")
    return table


def logits_table(measured: LogitsError) -> Table:
    """The error in logits beside the adapter's own effect."""
    numbers = ("largest", "RMS", "other next tokens")
    table = Table("against the adapter", *(Column(name, no_wrap=True) for name in numbers), title="In logits")
    for name, gap in {"the LoRA": measured.error, "the base": measured.effect}.items():
        changed = f"{gap.changed} of {measured.positions}"
        table.add_row(name, f"{gap.largest:.2e}", f"{gap.rms:.2e}", changed)
    told = "the adapter has no effect on these logits, the LoRA has"
    if measured.lost is not None:
        told = f"the LoRA loses {measured.lost:.1%} of the adapter's effect (RMS)"
    table.caption = f"largest, RMS: of the logits' range\n{told}"
    return table
