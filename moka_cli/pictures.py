"""Pictures of an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moka_core import Adapter, AdapterError


def plot_gates(adapter: Adapter, path: str | Path) -> None:
    """Draw softmax(gate_logits) of every layer, layers × terms, a panel for each kind of layer.

    Raises:
        AdapterError: the adapter has no gates.
    """
    kinds: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[str]] = {}
    for name, layer in adapter.layers.items():
        if layer.gate_logits is None:
            raise AdapterError("plot_gates: this adapter has a uniform gate; there is nothing to draw")
        kind = name.rpartition(".")[2]
        weights = np.exp(layer.gate_logits.astype(np.float64) - layer.gate_logits.max())
        kinds.setdefault(kind, []).append(weights / weights.sum())
        labels[kind] = [
            f"{shape.a_out}×{shape.a_in} ⊗ {shape.b_out}×{shape.b_in}" for shape in layer.plan.term_shapes()
        ]
    furthest = max(float(np.abs(np.stack(rows) - 1 / len(rows[0])).max()) for rows in kinds.values())
    figure = Figure(figsize=(5.2 * len(kinds), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, (kind, rows) in zip(axes, sorted(kinds.items()), strict=True):
        grid = np.stack(rows)
        even = 1 / grid.shape[1]
        image = axis.imshow(
            grid, aspect="auto", cmap="RdBu_r", vmin=even - furthest, vmax=even + furthest, interpolation="nearest"
        )
        axis.set_title(kind)
        axis.set_ylabel("layer")
        axis.set_xticks(range(grid.shape[1]), labels[kind], rotation=90, fontsize=8)
        figure.colorbar(image, ax=axis, label=f"gate (white: {even:.2f}, all terms equal)", shrink=0.8)
    figure.suptitle("Gates: how much each Kronecker term counts")
    figure.savefig(path, dpi=130)
