"""The charts of a run's report."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moka_cli.pictures import layer_number, panels_of
from moka_core import Adapter
from moka_core.adapter import path_order
from moka_core.oracle import term_gates
from moka_core.spectrum import LayerFigures

Records = Sequence[Mapping[str, Any]]

_COLUMNS = 3  # panels beside each other
_LEAST = 1e-3  # of a gate, that is told from 1/terms: less is no colour
_SERIES = {  # of the train records, beside the loss
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens a second",
}


def training_figure(records: Records) -> Figure | None:
    """The losses, the learning rate, the gradient's norm and the throughput over the steps; records of `read_metrics`.

    None if no loss was recorded yet.
    """
    if not any(record["kind"] in ("train", "eval") for record in records):
        return None
    from moka_jax.train.metrics import draw_losses

    figure, grid = _figure(2, 2, width=5.2, height=2.9)
    draw_losses(records, grid[0])
    trained = [record for record in records if record["kind"] == "train"]
    for axes, (name, label) in zip(grid[1:], _SERIES.items(), strict=True):
        axes.plot([record["step"] for record in trained], [record[name] for record in trained], linewidth=1.2)
        axes.set_ylabel(label)
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    for record in records:
        if record["kind"] == "start" and record["step"] > 0:  # resumed: the clock's figures may jump there
            for axes in grid:
                axes.axvline(record["step"], color="grey", linewidth=0.8, linestyle=":")
    return figure


def gates_figure(records: Records, adapter: Adapter, step: int) -> Figure | None:
    """Every term's gate over the recorded steps, a panel for each kind of layer, a band of rows for each term.

    None if no gates were recorded.

    Args:
        records: of `read_metrics`.
        adapter: of the run, whose gates are the last ones.
        step: after which it is that; later records are left out.
    """
    gates = [record for record in records if record["kind"] == "gates" and record["step"] < step]
    if any(record["kind"] == "gates" for record in records):
        last = {name: term_gates(layer, adapter.config).tolist() for name, layer in adapter.layers.items()}
        gates.append({"step": step, "gates": last})
    plans = {name: layer.plan for name, layer in adapter.layers.items()}
    names = sorted(set(plans).intersection(*(record["gates"] for record in gates)) if gates else (), key=path_order)
    if not names:
        return None
    values = {name: np.array([record["gates"][name] for record in gates]) for name in names}  # (records, terms)
    furthest = max(float(np.abs(array - 1 / array.shape[1]).max()) for array in values.values())
    furthest = max(furthest, _LEAST)
    panels = panels_of({name: plans[name] for name in names})
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = _figure(rows, min(len(panels), _COLUMNS), width=4.4, height=4.2)
    for axes, ((kind, plan), own) in zip(grid, panels.items(), strict=False):
        even = 1 / plan.terms
        image = axes.imshow(
            np.concatenate([np.stack([values[name][:, term] for name in own]) for term in range(plan.terms)]),
            aspect="auto",
            cmap="RdBu_r",
            vmin=even - furthest,
            vmax=even + furthest,
            interpolation="nearest",
        )
        axes.set_title(f"{kind} {plan.key}, {plan.terms} terms", fontsize=10)
        for term in range(1, plan.terms):
            axes.axhline(term * len(own) - 0.5, color="black", linewidth=0.6)
        middles = [(term + 0.5) * len(own) - 0.5 for term in range(plan.terms)]
        shapes = [f"{s.a_out}×{s.a_in}\n⊗ {s.b_out}×{s.b_in}" for s in plan.term_shapes()]
        axes.set_yticks(middles, shapes, fontsize=6)
        columns = range(0, len(gates), -(-len(gates) // 6))
        axes.set_xticks(columns, [str(gates[column]["step"]) for column in columns], fontsize=7)
        axes.set_xlabel("optimiser step", fontsize=8)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def norms_figure(figures: Mapping[str, LayerFigures]) -> Figure:
    """‖ΔW‖_F of every layer, a line for each kind."""
    figure, grid = _figure(1, 1, width=10.4, height=3.4)
    kinds: dict[str, list[str]] = {}
    for name in sorted(figures, key=path_order):
        kinds.setdefault(f"{name.rpartition('.')[2]} {figures[name].plan.key}", []).append(name)
    for label, names in sorted(kinds.items()):
        numbers = [layer_number(name) for name in names]
        places = [int(number) for number in numbers] if all(map(str.isdecimal, numbers)) else range(len(names))
        grid[0].plot(places, [figures[name].norm for name in names], "o-", markersize=3, label=label)
    grid[0].set_xlabel("layer")
    grid[0].set_ylabel("‖ΔW‖F")
    grid[0].set_ylim(bottom=0)
    grid[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].grid(alpha=0.3)
    grid[0].legend(fontsize=8, ncols=4, loc="lower left")
    return figure


def data_uri(figure: Figure) -> str:
    """The figure as an SVG image that stands in the page itself; the same figure gives the same text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "moka"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Iterable[Axes] = figure.subplots(rows, columns, squeeze=False).flat
    return figure, list(grid)
