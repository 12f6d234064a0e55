"""What a plain LoRA of rank k keeps of a trained adapter: the error of ΔW and of the logits, over k.

    python -m benchmarks.lora_error --adapter report/adapter --base report/base --picture docs/lora_error.png

Of every layer all singular values of ΔW, from which the error of the best rank k follows for every k; at some ranks the
LoRA folder is written, loaded with PEFT, and its logits compared with the adapter's. Results:
results/lora_error_MODEL_DEVICE.*
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, describe, environment, file_name, note, numbers, table, write_results
from conversion import load_adapter, open_base
from conversion.lora import export_lora
from conversion.low_rank import FactoredDelta, relative_errors, singular_values
from moka_cli.lora import measure_logits
from moka_core import Adapter

RANKS = (1, 4, 8, 16, 32, 64, 128, 192, 256, 384, 576)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written."""
    arguments = _arguments(argv)
    described = environment(without_paths(arguments))
    adapter = load_adapter(arguments.adapter)
    kinds = error_curves(adapter)
    logits = _logits(arguments, adapter)
    result = {
        "environment": described,
        "model": arguments.name,
        "moka_parameters": adapter.trainable,
        "columns": sum(layer.plan.out_features + layer.plan.in_features for layer in adapter.layers.values()),
        "kinds": kinds,
        "logits": logits,
    }
    name = file_name("lora_error", arguments, arguments.name)
    write_results(arguments.output, name, result, _markdown(result))
    if arguments.picture:
        plot(result, arguments.picture)
    return result


def without_paths(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options that say what was measured, and not where it lay."""
    return argparse.Namespace(**{key: value for key, value in vars(arguments).items() if not isinstance(value, Path)})


def error_curves(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """For each kind of layer the median and the worst relative error of ΔW at rank 0, 1, …, min(out, in)."""
    curves: dict[str, list[np.ndarray]] = {}
    for path, layer in adapter.layers.items():
        note(path)
        values = singular_values(FactoredDelta.of(layer, adapter.layer_config(path)))
        curves.setdefault(f"{path.rpartition('.')[2]} {layer.plan.key}", []).append(relative_errors(values))
    return {
        kind: {
            "layers": len(own),
            "median": np.median(own, axis=0).tolist(),
            "worst": np.max(own, axis=0).tolist(),
        }
        for kind, own in curves.items()
    }


def _logits(arguments: argparse.Namespace, adapter: Adapter) -> list[dict[str, Any]]:
    most = max(min(layer.plan.out_features, layer.plan.in_features) for layer in adapter.layers.values())
    ranks = [rank for rank in arguments.ranks if rank <= most]
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / f"rank-{rank}" for rank in ranks]
        reports = []
        for rank, target in zip(ranks, folders, strict=True):
            note(f"LoRA of rank {rank}")
            reports.append(export_lora(adapter, target, rank=rank))
        note("logits")
        base = open_base(arguments.base, quantise=arguments.quantise)
        measured = measure_logits(base, arguments.adapter, folders)
    return [
        {
            "rank": report.rank,
            "parameters": report.parameters,
            "delta_total": report.total,
            "delta_median": statistics.median(layer.relative for layer in report.layers),
            "delta_worst": report.worst.relative,
            **error.to_dict(),
        }
        for report, error in zip(reports, measured, strict=True)
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw both errors over the LoRA's number of parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for index, (kind, curve) in enumerate(result["kinds"].items()):
        parameters = np.arange(1, len(curve["median"])) * result["columns"]
        for name, style in (("median", "-"), ("worst", ":")):
            label = f"ΔW, {kind}, {name} of {curve['layers']} layers"
            axis.plot(parameters, curve[name][1:], style, color=f"C{index}", label=label)
    rows = result["logits"]
    axis.plot(
        [row["parameters"] for row in rows],
        [row["lost"] for row in rows],
        "o-",
        color="black",
        label="logits: share of the adapter's effect that is lost (RMS)",
    )
    axis.axvline(result["moka_parameters"], color="grey", linestyle="--", label="parameters of the MoKA adapter")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1e-3, 1.2)
    axis.set_xlabel("parameters of the LoRA")
    axis.set_ylabel("relative error")
    ranks = axis.secondary_xaxis("top", functions=(lambda p: p / result["columns"], lambda k: k * result["columns"]))
    ranks.set_xlabel("rank, the same in every layer")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")
    axis.set_title(f"The best LoRA of a MoKA adapter ({result['model']})")
    figure.savefig(path, dpi=130)


def _markdown(result: dict[str, Any]) -> str:
    rows = result["logits"]
    kinds = result["kinds"]
    effect = rows[0]["effect"]
    head = ["rank", "LoRA parameters", "times MoKA's"]
    head += [f"ΔW, {kind}: median (worst)" for kind in kinds]
    head += ["logits, lost (RMS)", "logits, largest", "next tokens that differ"]
    lines = [
        "# A plain LoRA of rank k for a trained MoKA adapter",
        "",
        describe(result["environment"]),
        "",
        f"ΔW: ‖ΔW - BA‖ / ‖ΔW‖. Logits at {rows[0]['positions']} positions: lost is the RMS difference from the "
        "adapter's, over that of the base without an adapter; largest is the largest difference over the logits' "
        f"range. The adapter itself has {result['moka_parameters']:,} parameters; it moves the logits by "
        f"{effect['largest']:.3g} of their range at most, and changes {effect['changed']} next tokens.",
        "",
        table(head, [_row(row, kinds, result["moka_parameters"]) for row in rows]),
    ]
    return "\n".join(lines)


def _row(row: dict[str, Any], kinds: dict[str, dict[str, Any]], moka_parameters: int) -> list[Any]:
    rank = row["rank"]
    errors = []
    for curve in kinds.values():
        at = min(rank, len(curve["median"]) - 1)
        errors.append(f"{curve['median'][at]:.3g} ({curve['worst'][at]:.3g})")
    times = f"{row['parameters'] / moka_parameters:.2g}"
    logits = [row["lost"], row["error"]["largest"], row["error"]["changed"]]
    return [rank, f"{row['parameters']:,}", times, *errors, *logits]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a MoKA adapter folder")
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--name", default="smollm2-135m", help="of the model, for the files")
    parser.add_argument("--ranks", type=numbers, default=list(RANKS), help="at which the logits are compared")
    parser.add_argument("--quantise", default="nf4-double", choices=["nf4-double", "nf4", "none"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="PNG to draw the curves to")
    arguments = parser.parse_args(argv)
    arguments.device, arguments.dtype, arguments.label, arguments.quick = "cpu", "float32", "", False
    return arguments


if __name__ == "__main__":
    main()
