"""The comparisons of a parity check: each a row with its figure and its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conversion.causes import frozen_differences, relative
from conversion.diagnosis import MODULE_BOUND, Diagnosis, Found, Traces
from conversion.oracle_probe import OracleProbe
from moka_core.adapter import LayerFactors
from moka_core.probe import ForwardProbe

# Bounds of the design. What was measured on SmolLM2-135M and on small random models stands in docs/parity.md.
DELTA_BOUND = 1e-6
LOGITS_BOUND = 1e-4
GRADIENT_BOUND = 1e-4
# Of one factor alone: where layers amplify rounding, PyTorch and JAX were 6e-5 and 3e-5 from float64.
FACTOR_BOUND = 1e-3
TRAINING_BOUND = 1e-4
_GATE = ".gate_logits"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: what was compared, the figure, the bound that it must not exceed, and where it was worst."""

    name: str
    figure: float
    bound: float
    unit: str
    worst: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is within its bound; a figure that is not a number is not."""
        return bool(self.figure <= self.bound)


def frozen_rows(ours: ForwardProbe, theirs: ForwardProbe) -> tuple[list[Row], Found]:
    """Bit-equality of every frozen tensor: of every part of the packed ones, and of what is decoded from them."""
    names = theirs.frozen()
    own = set(ours.frozen())
    alone = tuple(sorted(own ^ set(names)))
    frozen, packed, dense = {}, 0, 0
    totals = {"codes": 0, "absmax": 0, "decoded": 0, "dense": 0}
    where = dict.fromkeys(totals, "")
    for name in names:
        if name not in own:
            continue
        counts = frozen_differences(ours.frozen_tensor(name), theirs.frozen_tensor(name))
        packed, dense = packed + ("codes" in counts), dense + ("dense" in counts)
        if any(counts.values()):
            frozen[name] = counts
        for part, count in counts.items():
            totals[part] += count
            where[part] = where[part] or (name if count else "")
    labels = {
        "codes": f"NF4 codes ({packed} layers)",
        "absmax": "NF4 scales (absmax)",
        "decoded": "decoded weights",
        "dense": f"dense tensors ({dense})",
    }
    rows = [
        Row(name="frozen tensors", figure=len(alone), bound=0, unit="on one side only", worst=", ".join(alone[:1])),
        *(
            Row(name=label, figure=totals[part], bound=0, unit="entries that differ", worst=where[part])
            for part, label in labels.items()
            if packed or part == "dense"
        ),
    ]
    return rows, Found(frozen=frozen, alone=alone, totals={"codes": packed, "dense": dense})


def delta_rows(sides: Sequence[ForwardProbe], truth: OracleProbe, found: Found) -> list[Row]:
    """‖ΔW - oracle‖ / ‖oracle‖ (Frobenius), the worst layer of each backend; all of them go into `found`."""
    present = {side.label: set(side.adapted()) for side in sides}
    for path in truth.adapted():
        oracle = truth.delta(path)
        for side in sides:
            error = relative(side.delta(path), oracle) if path in present[side.label] else math.inf
            found.deltas.setdefault(side.label, {})[path] = error
    rows = []
    for label, errors in found.deltas.items():
        path = max(errors, key=lambda path: errors[path])
        name = f"ΔW, {label}, against float64"
        rows.append(Row(name=name, figure=errors[path], bound=DELTA_BOUND, unit="relative error", worst=path))
    return rows


def modules_row(traces: Traces) -> Row:
    module, figure = traces.worst
    name = f"outputs of {len(traces.figures)} modules"
    return Row(name=name, figure=figure, bound=MODULE_BOUND, unit="relative difference", worst=module)


def logits_rows(ours: np.ndarray, theirs: np.ndarray) -> Iterator[Row]:
    gap = np.abs(ours.astype(np.float64) - theirs)
    spread = float(theirs.max() - theirs.min())
    row, position, _ = np.unravel_index(int(np.argmax(gap)), gap.shape)
    yield Row(
        name="logits",
        figure=float(gap.max()) / spread if np.isfinite(gap).all() else float("inf"),
        bound=LOGITS_BOUND,
        unit="of their range",
        worst=f"row {row}, position {position}",
    )
    other = ours.argmax(-1) != theirs.argmax(-1)
    yield Row(
        name=f"next tokens ({other.size} positions)",
        figure=int(other.sum()),
        bound=0,
        unit="that differ",
        worst="row {}, position {}".format(*np.argwhere(other)[0]) if other.any() else "",
    )


def gradient_rows(
    ours: tuple[float, dict[str, np.ndarray]],
    theirs: tuple[float, dict[str, np.ndarray]],
    layers: Mapping[str, LayerFactors],
) -> Iterator[Row]:
    """‖g - g'‖ / ‖g'‖ of all trained arrays as one, of each factor, and of each layer's gates (see `gate_scale`).

    Args:
        layers: the factors at which the gradients were taken.
    """
    own, reference = ours[1], theirs[1]
    missing = sorted(own.keys() ^ reference.keys())
    if missing:
        where = f"{missing[0]}: in one backend only"
        yield Row(name="gradients", figure=math.inf, bound=GRADIENT_BOUND, unit="relative error", worst=where)
        return
    factors = {name: relative(own[name], reference[name]) for name in reference if not name.endswith(_GATE)}
    gates = {}
    for name in (name for name in reference if name.endswith(_GATE)):
        path = name.removesuffix(_GATE)
        scale = gate_scale(layers[path], {part: reference[f"{path}.{part}"] for part, _ in layers[path].tensors()})
        gates[name] = relative(own[name], reference[name], least=scale)
    whole = (np.concatenate([each[name].ravel() for name in reference]) for each in (own, reference))
    yield Row(
        name="gradients",
        figure=relative(*whole),
        bound=GRADIENT_BOUND,
        unit=f"relative error, of {len(reference)} arrays as one",
    )
    for kind, errors, bound in (("factor", factors, FACTOR_BOUND), ("gate", gates, GRADIENT_BOUND)):
        if errors:
            where = max(errors, key=lambda name: errors[name])
            name = f"gradient of each {kind} ({len(errors)})"
            yield Row(name=name, figure=errors[where], bound=bound, unit="relative error", worst=where)


def gate_scale(layer: LayerFactors, gradients: Mapping[str, np.ndarray]) -> float:
    """How large what a gate's gradient is the difference of may be; its rounding goes with that, not with itself.

    ΔW is linear in B_i, so that with α the softmax of the logits and L the loss

        ∂L/∂logit_i = d_i - α_i Σ_j d_j,    d_i = ⟨∂L/∂B_i, B_i⟩ = ⟨∂L/∂A_i, A_i⟩,    |d_i| ≤ ‖∂L/∂B_i‖ ‖B_i‖.

    Where the d_i cancel, or their own terms do, little is left of digits that were right. What is returned is the norm
    over the terms of that last product, for each term of the factor with the smaller one: an error in it of `bound` is
    what errors of `bound` in the factors' gradients, which are let pass, come to.

    Args:
        gradients: by the names of `LayerFactors.tensors`.
    """
    products = []
    for factor in ("factor_a", "factor_b"):
        stored = [(array, gradients[name]) for name, array in layer.tensors() if name.startswith(factor)]
        if stored:
            sizes = [[np.linalg.norm(each.astype(np.float64), axis=(1, 2)) for each in pair] for pair in stored]
            products.append(np.concatenate([own * gradient for own, gradient in sizes]))
    return float(np.linalg.norm(np.min(products, axis=0)))


def training_row(losses: dict[str, list[float]]) -> tuple[Row, Diagnosis | None]:
    """The largest difference of two loss curves, and where they part if they do."""
    jax, torch = (np.array(losses[side]) for side in ("jax", "torch"))
    gaps = np.abs(jax - torch)
    gaps[~np.isfinite(gaps)] = np.inf
    worst = int(np.argmax(gaps))
    row = Row(
        name=f"losses of {len(gaps)} optimiser steps",
        figure=float(gaps[worst]),
        bound=TRAINING_BOUND,
        unit="largest difference",
        worst=f"step {worst}; loss {torch[0]:.3f} to {torch[-1]:.3f}",
    )
    if row.passed:
        return row, None
    first = int(np.argmax(gaps > TRAINING_BOUND))
    cause = "the optimiser: outputs and gradients of the first batch agree"
    return row, Diagnosis(module=f"step {first}", figure=float(gaps[first]), bound=TRAINING_BOUND, cause=cause)
