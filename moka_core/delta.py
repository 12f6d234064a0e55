"""ΔW of a layer, rows at a time, in float64: what files are merged from without holding a whole ΔW."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moka_core.adapter import LayerFactors
from moka_core.config import MokaConfig
from moka_core.oracle import term_coefficients
from moka_core.plan import KronShape


def delta_rows(layer: LayerFactors, config: MokaConfig, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of ΔW = Σ_i scale·α_i·c_i·(A_i ⊗ B_i), (stop − start, in), float64.

    Row p·b_out + i is Σ_t k_t · (A_t[p] ⊗ B_t[i]): for each group of terms one matrix product with inner dimension
    `copies`, of which only the rows that are asked for are formed.

    Args:
        config: the layer's own, `Adapter.layer_config`.
        start, stop: rows, 0 ≤ start < stop ≤ out; all by default.

    >>> from moka_core import KronShape, LayerPlan, ShapeGroup
    >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
    >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
    >>> layer = LayerFactors(plan=plan, factor_a=(np.array([[[1.0, 10.0]]]),),
    ...                      factor_b=(np.array([[[3.0], [4.0]]]),), gate_logits=np.zeros(1))
    >>> delta_rows(layer, config, 1, 2)
    array([[ 4., 40.]])
    """
    stop = layer.plan.out_features if stop is None else stop
    delta = np.zeros((stop - start, layer.plan.in_features))
    coefficients = term_coefficients(layer, config)
    first = 0
    for index, group in enumerate(layer.plan.groups):
        own = coefficients[first : first + group.copies]
        first += group.copies
        shape = group.shape
        for done, rows_a, rows_b in _spans(shape, start, stop):
            if config.identity == "a":
                a = np.eye(shape.a_out)[None, rows_a]
                b = _folded(own, layer.factor_b[index][:, rows_b]).sum(axis=0, keepdims=True)
            elif config.identity == "b":
                a = _folded(own, layer.factor_a[index][:, rows_a]).sum(axis=0, keepdims=True)
                b = np.eye(shape.b_out)[None, rows_b]
            else:
                a, b = layer.factor_a[index][:, rows_a], layer.factor_b[index][:, rows_b]
                a, b = (_folded(own, a), b) if a.size < b.size else (a, _folded(own, b))
            _add_product(delta[done - start :], a.astype(np.float64, copy=False), b.astype(np.float64, copy=False))
    return delta


def _spans(shape: KronShape, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """(first row, rows of A, rows of B) of the parts of [start, stop) that are products: within one row of A, or whole
    rows of A."""
    while start < stop:
        p, i = divmod(start, shape.b_out)
        if i or stop - start < shape.b_out:
            rows = min(stop - start, shape.b_out - i)
            yield start, slice(p, p + 1), slice(i, i + rows)
        else:
            whole = (stop - start) // shape.b_out
            rows = whole * shape.b_out
            yield start, slice(p, p + whole), slice(0, shape.b_out)
        start += rows


def _folded(coefficients: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Every copy times its coefficient, float64."""
    return coefficients[:, None, None] * factor.astype(np.float64)


def _add_product(into: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Add Σ_t a[t] ⊗ b[t] to the first rows."""
    copies, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    product = (a.reshape(copies, -1).T @ b.reshape(copies, -1)).reshape(a_out, a_in, b_out, b_in)
    into[: a_out * b_out].reshape(a_out, b_out, a_in, b_in)[...] += product.transpose(0, 2, 1, 3)
