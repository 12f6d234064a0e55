"""The mixture by its definition, with `numpy.kron` in float64: slow, obvious, and what everything else is held to."""

from __future__ import annotations

import numpy as np

from moka_core.adapter import LayerFactors
from moka_core.config import MokaConfig
from moka_core.plan import KronShape


def term_gates(layer: LayerFactors, config: MokaConfig) -> np.ndarray:
    """α of every term, (terms,), float64: softmax(gate_logits), or 1/r."""
    if config.gate == "uniform":
        return np.full(layer.plan.terms, 1.0 / layer.plan.terms)
    assert layer.gate_logits is not None
    logits = layer.gate_logits.astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def term_coefficients(layer: LayerFactors, config: MokaConfig) -> np.ndarray:
    """scale · α_i · c_i for every term, (terms,), float64; see `term_gates` and `stable_factor`."""
    constants = [config.scale * stable_factor(config, shape) for shape in layer.plan.term_shapes()]
    return term_gates(layer, config) * np.array(constants)


def stable_factor(config: MokaConfig, shape: KronShape) -> float:
    """c_i of a term: 1 for scaling "none"; √r / √(columns of the zero factor) for "stable".

    Ref: generalises α/√(r·r₂) of arXiv 2602.01267.
    """
    if config.scaling == "none":
        return 1.0
    columns = shape.b_in if config.zero_factor == "b" else shape.a_in
    return float(np.sqrt(config.r / columns))


def dense_delta(layer: LayerFactors, config: MokaConfig) -> np.ndarray:
    """ΔW = Σ_i scale·α_i·c_i·(A_i ⊗ B_i), (out, in), float64, with `numpy.kron`.

    >>> from moka_core import KronShape, LayerPlan, ShapeGroup
    >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
    >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
    >>> layer = LayerFactors(plan=plan, factor_a=(np.array([[[1.0, 10.0]]]),),
    ...                      factor_b=(np.array([[[3.0], [4.0]]]),), gate_logits=np.zeros(1))
    >>> dense_delta(layer, config)
    array([[ 3., 30.],
           [ 4., 40.]])
    """
    coefficients = iter(term_coefficients(layer, config))
    delta = np.zeros((layer.plan.out_features, layer.plan.in_features))
    for index, group in enumerate(layer.plan.groups):
        for copy in range(group.copies):
            a = np.eye(group.shape.a_out) if config.identity == "a" else layer.factor_a[index][copy].astype(np.float64)
            b = np.eye(group.shape.b_out) if config.identity == "b" else layer.factor_b[index][copy].astype(np.float64)
            delta += next(coefficients) * np.kron(a, b)
    return delta


def dense_gradients(layer: LayerFactors, config: MokaConfig, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of <dy, x ΔWᵀ> by every stored array and by x, in float64.

    With G = dyᵀ x, (out, in), and G rearranged to G[p, i, q, j] = G[p·b_out + i, q·b_in + j]:
    dA_i = k_i Σ_ij G B, dB_i = k_i Σ_pq G A, dα_i = scale·c_i·<G, A_i ⊗ B_i>, through the softmax
    to the logits; dx = dy ΔW.

    Args:
        x: (tokens, in). dy: (tokens, out).

    Returns:
        "factor_a.g", "factor_b.g", "gate_logits" as they are stored, and "x".
    """
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    big = dy.T @ x
    coefficients = term_coefficients(layer, config)
    grads: dict[str, np.ndarray] = {"x": dy @ dense_delta(layer, config)}
    pull = []
    term = 0
    for index, group in enumerate(layer.plan.groups):
        shape = group.shape
        blocks = big.reshape(shape.a_out, shape.b_out, shape.a_in, shape.b_in)
        d_a, d_b = [], []
        for copy in range(group.copies):
            a = np.eye(shape.a_out) if config.identity == "a" else layer.factor_a[index][copy].astype(np.float64)
            b = np.eye(shape.b_out) if config.identity == "b" else layer.factor_b[index][copy].astype(np.float64)
            through_b = np.einsum("piqj,ij->pq", blocks, b)
            d_a.append(coefficients[term] * through_b)
            d_b.append(coefficients[term] * np.einsum("piqj,pq->ij", blocks, a))
            pull.append(config.scale * stable_factor(config, shape) * float((through_b * a).sum()))
            term += 1
        if config.identity != "a":
            grads[f"factor_a.{index}"] = np.stack(d_a)
        if config.identity != "b":
            grads[f"factor_b.{index}"] = np.stack(d_b)
    if config.gate == "softmax":
        assert layer.gate_logits is not None
        constants = np.array([config.scale * stable_factor(config, shape) for shape in layer.plan.term_shapes()])
        alpha = coefficients / constants
        grads["gate_logits"] = alpha * (np.array(pull) - float(alpha @ np.array(pull)))
    return grads
