"""The mixture of Kronecker products of given shapes that is nearest to a matrix: a start that is warm.

A matrix is a sum of c products A ⊗ B of one shape exactly if its rearrangement R, whose row (p, q) is block (p, q) of
the matrix, has rank c; so the nearest such sum is a truncated SVD of R. Several shapes are refined in turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from scipy.linalg.blas import dgemm

from moka_core import AdapterError, KronShape, LayerFactors, LayerPlan, MokaConfig
from moka_core.adapter import expected_tensors
from moka_core.oracle import stable_factor

# A term of less than this share of ‖ΔW‖ is float32's rounding, and so is an error of less.
ROUNDING = 1e-7
# Up to this many rows or columns of R, LAPACK's whole SVD is as fast as an iteration to the last digit.
WHOLE_SVD = 1024
# How far the block Krylov iteration goes that starts several shapes, and how many columns more than terms it takes; the
# sweeps after it go on from there.
START_ROUNDS, START_SPARE = 6, 2
# Exact minimisations by either factor of a shape, in each sweep; a second one costs little beside the rearrangement.
ROUNDS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """A layer's factors, and how near they come to the ΔW that was asked for.

    Args:
        layer: the factors, float32.
        error: ‖ΔW − scale·Σ_t α_t c_t A_t ⊗ B_t‖ / ‖ΔW‖, Frobenius, of these float32 numbers; 0 if ΔW = 0.
        history: that error after the start and after every sweep, before rounding; it never rises.
    """

    layer: LayerFactors
    error: float
    history: tuple[float, ...]

    @property
    def sweeps(self) -> int:
        """How often every shape was refined."""
        return len(self.history) - 1


def nearest_layer(
    delta: np.ndarray,
    plan: LayerPlan,
    config: MokaConfig,
    *,
    tol: float = 2e-5,
    max_sweeps: int = 50,
    seed: int = 0,
) -> Nearest:
    """The factors that make a layer's mixture nearest to a given update, and the error that is left.

    Minimises ‖ΔW − scale·Σ_t α_t c_t A_t ⊗ B_t‖ over A and B, in float64. With one shape the result is the minimum.
    With several, each shape is fitted to what those before it leave, the best one first; then, sweep by sweep, each
    factor of each shape is replaced by its exact minimiser: the error never rises, and may end in a local minimum.

    Gates stand at 0 (α_t = 1/r), as at a fresh start, and the weight of a term in its factors, with ‖A_t‖ = ‖B_t‖:
    the gradient of either is as large as the other, so both learn equally fast from the first step, and no gate is worn
    out by undoing the start. Terms of one shape are orthogonal. A term that nothing is left for starts as a fresh one
    does: `zero_factor` at zero, the other one drawn; were both zero, it would never learn. With an identity, terms that
    share a shape are equal (as they stay in training), and the best block is a mean of blocks.

    Args:
        delta: ΔW (out, in), finite, of any floating dtype.
        plan: the shapes; (out, in) must be `delta`'s.
        config: of this layer (`MokaConfig.for_layer`): gate, scaling, scale, identity, zero_factor.
        tol: refining ends when a sweep lowers the error by less than this share of it.
        max_sweeps: or after this many; 0 for the start alone.
        seed: of the drawn factors.

    Raises:
        AdapterError: `delta` is of another shape, or has NaN or infinity.

    >>> from moka_core import ShapeGroup
    >>> plan = LayerPlan(out_features=4, in_features=6, groups=(ShapeGroup(KronShape(2, 3, 2, 2), 1),))
    >>> delta = np.kron(np.arange(1.0, 7).reshape(2, 3), np.array([[1.0, -2], [3, 0.5]]))
    >>> found = nearest_layer(delta, plan, MokaConfig(r=1, num_shapes=1, shapes=(plan,)))
    >>> found.error < 1e-7, round(float(np.linalg.norm(found.layer.factor_a[0])), 3)
    (True, 6.001)

    Ref: Van Loan and Pitsianis, Approximation with Kronecker products, 1993.
    """
    delta = np.asarray(delta)
    if delta.shape != (plan.out_features, plan.in_features):
        raise AdapterError(
            f"delta: expected shape {plan.out_features, plan.in_features}, the plan's; got {delta.shape}"
        )
    size = float(np.linalg.norm(delta.astype(np.float64)))
    if not np.isfinite(size):
        raise AdapterError("delta: expected finite numbers; it has NaN or infinity, or its norm overflows")
    residual = _Residual(delta, size or 1.0)
    groups = [_Group(group.shape, group.copies, config) for group in plan.groups]
    history = [_start(residual, groups)] if size else [0.0]
    while len(groups) > 1 and len(history) <= max_sweeps and history[-1] > ROUNDING:
        history.append(_sweep(residual, groups))
        if history[-1] > (1 - tol) * history[-2]:
            break
    layer = _factors(plan, config, groups, size, np.random.default_rng(seed))
    if not size:
        return Nearest(layer=layer, error=0.0, history=(0.0,))
    residual.reset(delta)
    return Nearest(layer=layer, error=_error(residual, layer, config, size), history=tuple(history))


class _Residual:
    """ΔW/‖ΔW‖ less the terms so far, as a matrix, and its rearrangement for one shape at a time; two buffers in all."""

    def __init__(self, delta: np.ndarray, size: float) -> None:
        self._size = size
        self._matrix = np.empty(delta.shape)
        self._buffer = np.empty(delta.size)
        self.reset(delta)

    def reset(self, delta: np.ndarray) -> None:
        np.divide(delta, self._size, out=self._matrix, dtype=np.float64)

    def norm(self) -> float:
        return float(np.linalg.norm(self._matrix))

    def rearranged(self, shape: KronShape) -> np.ndarray:
        """R[p·a_in + q, i·b_in + j] = residual[p·b_out + i, q·b_in + j], in the buffer that the next one takes."""
        blocks = self._buffer.reshape(shape.a_out, shape.a_in, shape.b_out, shape.b_in)
        np.copyto(blocks.transpose(0, 2, 1, 3), self._blocks(shape))
        return blocks.reshape(shape.a_out * shape.a_in, -1)

    def take(self, shape: KronShape) -> None:
        """Take over what has become of `rearranged`."""
        blocks = self._buffer.reshape(shape.a_out, shape.a_in, shape.b_out, shape.b_in)
        np.copyto(self._blocks(shape), blocks.transpose(0, 2, 1, 3))

    def _blocks(self, shape: KronShape) -> np.ndarray:
        return self._matrix.reshape(shape.a_out, shape.b_out, shape.a_in, shape.b_in)


class _Group:
    """The terms of one shape as a·bᵀ, a (a_out·a_in, c) and b (b_out·b_in, c), their weights included."""

    def __init__(self, shape: KronShape, copies: int, config: MokaConfig) -> None:
        self.shape = shape
        self.fixed = config.identity
        self.copies = copies if self.fixed == "none" else 1  # equal terms are one
        rows, columns = shape.a_out * shape.a_in, shape.b_out * shape.b_in
        self.a, self.b = np.zeros((rows, self.copies)), np.zeros((columns, self.copies))
        if self.fixed == "a":
            self.a = np.eye(shape.a_out).reshape(-1, 1)
        elif self.fixed == "b":
            self.b = np.eye(shape.b_out).reshape(-1, 1)

    def fit(self, matrix: np.ndarray, *, exact: bool) -> None:
        """Become what is nearest to R; with `exact` to the last digit."""
        if self.fixed == "a":
            self.b = matrix.T @ self.a / self.shape.a_out
        elif self.fixed == "b":
            self.a = matrix @ self.b / self.shape.b_out
        else:
            self.a, self.b = (_truncated_svd if exact else _leading)(matrix, self.copies)

    def refine(self, matrix: np.ndarray) -> None:
        """Replace a and b in turns by what is nearest to R and their product, R being what all terms leave; so is R."""
        a, b = self.a, self.b
        if self.fixed == "a":
            self.b = b + matrix.T @ a / self.shape.a_out
        elif self.fixed == "b":
            self.a = a + matrix @ b / self.shape.b_out
        else:
            for _ in range(ROUNDS):  # with an orthonormal basis of the one, the other's minimiser is a product
                basis = _basis(self.a)
                basis = _basis(matrix.T @ basis + b @ (a.T @ basis))
                self.a, self.b = matrix @ basis + a @ (b.T @ basis), basis
        _subtract(matrix, np.hstack([self.a, -a]), np.hstack([self.b, b]))

    def size(self) -> float:
        """‖a bᵀ‖, right after `fit`: the columns of b are orthonormal then, or there is one."""
        return float(np.linalg.norm(self.a) * (1.0 if self.fixed == "none" else np.linalg.norm(self.b)))

    def directions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(a_out·a_in, n) and (b_out·b_in, n) with orthonormal columns, and the n weights between them, descending."""
        left, first = np.linalg.qr(self.a)
        right, second = np.linalg.qr(self.b)
        u, weights, vt = np.linalg.svd(first @ second.T, full_matrices=False)
        return left @ u, right @ vt.T, weights


def _start(residual: _Residual, groups: list[_Group]) -> float:
    """Fit each group to what those before it leave, the one that leaves least first; returns the error."""
    exact = len(groups) == 1
    order = groups
    if not exact:
        for group in groups:
            group.fit(residual.rearranged(group.shape), exact=False)
        order = sorted(groups, key=lambda group: -group.size())
    for group in order:
        matrix = residual.rearranged(group.shape)
        group.fit(matrix, exact=exact)
        _subtract(matrix, group.a, group.b)
        residual.take(group.shape)
    return residual.norm()


def _sweep(residual: _Residual, groups: list[_Group]) -> float:
    """Refine every group once; returns the error."""
    for group in groups:
        group.refine(residual.rearranged(group.shape))
        residual.take(group.shape)
    return residual.norm()


def _truncated_svd(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest a bᵀ with `count` columns, or fewer if the matrix has no more rows or columns."""
    count = min(count, *matrix.shape)
    if min(matrix.shape) > WHOLE_SVD and count < min(matrix.shape) // 8:
        start = np.random.default_rng(0).normal(size=min(matrix.shape))
        u, weights, vt = scipy.sparse.linalg.svds(matrix, k=count, v0=start)
    else:
        u, weights, vt = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
        u, weights, vt = u[:, :count], weights[:count], vt[:count]
    return u * weights, vt.T


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nearly the same, by a few rounds of block Krylov iteration where the matrix is large for the count.

    Ref: Musco and Musco, Randomized block Krylov methods, 2015.
    """
    wide = count + START_SPARE
    if 2 * (START_ROUNDS + 1) * wide > min(matrix.shape):
        return _truncated_svd(matrix, count)
    basis = _basis(np.random.default_rng(0).normal(size=(matrix.shape[1], wide)))
    for _ in range(START_ROUNDS):
        basis = _basis(np.hstack([basis, matrix.T @ (matrix @ basis[:, -wide:])]))
    u, weights, vt = np.linalg.svd(matrix @ basis, full_matrices=False)
    return (u * weights)[:, :count], basis @ vt.T[:, :count]


def _basis(columns: np.ndarray) -> np.ndarray:
    return np.linalg.qr(columns)[0]


def _subtract(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """matrix -= a bᵀ, in place: a product of this size would be as large as the layer."""
    result = dgemm(-1.0, b, a, 1.0, matrix.T, trans_b=True, overwrite_c=True)
    assert np.shares_memory(result, matrix)


def _coefficients(plan: LayerPlan, config: MokaConfig) -> list[float]:
    """scale·α·c of a term of each group, with gates at zero."""
    return [config.scale * stable_factor(config, group.shape) / plan.terms for group in plan.groups]


def _factors(
    plan: LayerPlan, config: MokaConfig, groups: list[_Group], size: float, rng: np.random.Generator
) -> LayerFactors:
    """The groups' products, times `size`, as factors."""
    shapes = expected_tensors(plan, config)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for index, (group, coefficient) in enumerate(zip(groups, _coefficients(plan, config), strict=True)):
        a, b = tensors.get(f"factor_a.{index}"), tensors.get(f"factor_b.{index}")
        if a is None or b is None:
            stored = b if a is None else a
            assert stored is not None
            block = group.b if a is None else group.a
            stored[:] = (size / (coefficient * len(stored)) * block).reshape(stored.shape[1:])
            continue
        left, right, weights = group.directions()
        found = int((weights > ROUNDING).sum())
        balance = np.sqrt(size * weights[:found] / abs(coefficient))
        a[:found] = (left[:, :found] * balance).T.reshape(-1, *a.shape[1:])
        b[:found] = (right[:, :found] * balance * np.sign(coefficient)).T.reshape(-1, *b.shape[1:])
        drawn = a if config.zero_factor == "b" else b
        drawn[found:] = rng.uniform(-1, 1, drawn[found:].shape) / np.sqrt(drawn.shape[-1])  # as a fresh one
    return LayerFactors.from_tensors(plan, config, tensors | _gates(plan, config))


def _gates(plan: LayerPlan, config: MokaConfig) -> dict[str, np.ndarray]:
    return {"gate_logits": np.zeros(plan.terms, np.float32)} if config.gate == "softmax" else {}


def _error(residual: _Residual, layer: LayerFactors, config: MokaConfig, size: float) -> float:
    """What float32 factors leave, of a residual that is still whole."""
    coefficients = _coefficients(layer.plan, config)
    for index, (group, coefficient) in enumerate(zip(layer.plan.groups, coefficients, strict=True)):
        shape = group.shape
        a, b = (
            np.stack(group.copies * [np.eye(rows)]) if config.identity == name else stored[index].astype(np.float64)
            for name, rows, stored in (("a", shape.a_out, layer.factor_a), ("b", shape.b_out, layer.factor_b))
        )
        matrix = residual.rearranged(shape)
        _subtract(matrix, coefficient / size * a.reshape(group.copies, -1).T, b.reshape(group.copies, -1).T)
        residual.take(shape)
    return residual.norm()
