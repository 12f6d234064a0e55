"""Pictures of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moka_core import Adapter, AdapterError, LayerPlan
from moka_core.adapter import path_order
from moka_core.oracle import term_gates
from moka_core.spectrum import LayerFigures


def plot_gates(adapter: Adapter, path: str | Path) -> None:
    """Draw softmax(gate_logits) of every layer, layers × terms, a panel for each kind of layer.

    Raises:
        AdapterError: the adapter has no gates.
    """
    if adapter.config.gate == "uniform":
        raise AdapterError("plot_gates: this adapter has a uniform gate; there is nothing to draw")
    gates = {name: (layer.plan, term_gates(layer, adapter.config)) for name, layer in adapter.layers.items()}
    _draw(gates, path, title="Gates: the weight of each Kronecker term", what="gate")


def plot_shares(figures: Mapping[str, LayerFigures], path: str | Path) -> None:
    """Draw every term's share, ‖k·A ⊗ B‖_F / Σ ‖k·A ⊗ B‖_F, layers × terms, a panel for each kind of layer."""
    shares = {name: (layer.plan, np.array([term.share for term in layer.terms])) for name, layer in figures.items()}
    _draw(shares, path, title="Shares: how much each Kronecker term counts", what="share")


def _draw(layers: Mapping[str, tuple[LayerPlan, np.ndarray]], path: str | Path, *, title: str, what: str) -> None:
    """One number a term, coloured by how far it is from 1/terms; a panel for each kind and plan."""
    panels = panels_of({name: plan for name, (plan, _) in layers.items()})
    furthest = max(float(np.abs(values - 1 / len(values)).max()) for _, values in layers.values())
    furthest = furthest or 1e-9  # all even: one colour, and no division by zero
    figure = Figure(figsize=(5.2 * len(panels), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((kind, plan), names) in zip(axes, panels.items(), strict=True):
        even = 1 / plan.terms
        image = axis.imshow(
            np.stack([layers[name][1] for name in names]),
            aspect="auto",
            cmap="RdBu_r",
            vmin=even - furthest,
            vmax=even + furthest,
            interpolation="nearest",
        )
        axis.set_title(f"{kind} {plan.key}")
        axis.set_ylabel("layer")
        rows = range(0, len(names), -(-len(names) // 20))
        axis.set_yticks(rows, [layer_number(names[row]) for row in rows], fontsize=8)
        labels = [f"{shape.a_out}×{shape.a_in} ⊗ {shape.b_out}×{shape.b_in}" for shape in plan.term_shapes()]
        axis.set_xticks(range(plan.terms), labels, rotation=90, fontsize=8)
        figure.colorbar(image, ax=axis, label=f"{what} (white: {even:.2f}, all terms equal)", shrink=0.8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130, format="png")


def panels_of(plans: Mapping[str, LayerPlan]) -> dict[tuple[str, LayerPlan], list[str]]:
    """The layers of each kind and plan, in the model's order; the kinds by their names."""
    panels: dict[tuple[str, LayerPlan], list[str]] = {}
    for name in sorted(plans, key=path_order):
        panels.setdefault((name.rpartition(".")[2], plans[name]), []).append(name)
    return dict(sorted(panels.items(), key=lambda panel: (panel[0][0], panel[0][1].key)))


def layer_number(path: str) -> str:
    """The layer's number as it stands in its path, or the path where there is none."""
    return next((part for part in path.split(".") if part.isdecimal()), path)
