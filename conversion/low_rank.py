"""The best approximation of a mixture's ΔW by a matrix of low rank, from its factors, in float64.

Three ways, one answer: the singular value decomposition (SVD) of the factors where ΔW is a single Kronecker product,
LAPACK's SVD of ΔW, and Lanczos iterations (ARPACK) that only multiply by ΔW in factored form and never hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import ArpackError, LinearOperator, svds

from moka_core import LayerFactors, MokaConfig
from moka_core.oracle import term_coefficients

Way = Literal["kronecker", "lapack", "lanczos", "lapack, since lanczos failed"]

# What Lanczos costs over one SVD by LAPACK; see `lanczos_pays`.
_PRODUCTS = (200, 10)
_PRODUCT_SECONDS = 4e-5
_MULTIPLY_ADD_SECONDS = 2.5e-10
_LAPACK_SECONDS = 8e-10
# A triplet is taken for found if ‖ΔW v - σ u‖ is below this share of σ₁. Measured on 192x576 to 1024x4096, ranks 8 to
# 128: at most 6e-15.
_RESIDUAL = 1e-10
# What Lanczos left over may not be larger than the smallest singular value that it found, up to this share, which is
# a thousand times the accuracy that the left over is computed to.
_LEFT_OVER = 1e-3
_LEFT_OVER_ACCURACY = 1e-6
# ΔW has no more than the rank asked for if less than this share of its norm is left: some 1e-15 is rounding.
_NOTHING = 1e-12
# 1 - Σσ²/‖ΔW‖² is off by some 1e-15: below this error it would not be known to three digits.
_CANCELS = 1e-5
_PANEL_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class _Group:
    """Terms of one shape, Σ_c A_c ⊗ B_c: a is (copies, a_out, a_in), b is (copies, b_out, b_in)."""

    a: np.ndarray
    b: np.ndarray

    @property
    def transposed(self) -> _Group:
        return _Group(self.a.transpose(0, 2, 1), self.b.transpose(0, 2, 1))


class FactoredDelta:
    """ΔW of one layer as its factors, in float64: products with it, its rows and its norm, never all of it at once.

    Holds: ΔW = Σ_g Σ_c A_gc ⊗ B_gc, with scale, gates and constants multiplied into the A; terms that share a fixed
    identity are one term, since Σ (I ⊗ B_c) = I ⊗ Σ B_c.

    >>> from moka_core import KronShape, LayerPlan, ShapeGroup
    >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
    >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
    >>> layer = LayerFactors(plan=plan, factor_a=(np.array([[[1.0, 10.0]]]),),
    ...                      factor_b=(np.array([[[3.0], [4.0]]]),), gate_logits=np.zeros(1))
    >>> FactoredDelta.of(layer, config) @ np.array([1.0, 2.0])
    array([63., 84.])
    """

    def __init__(self, groups: tuple[_Group, ...]) -> None:
        self.groups = groups
        a, b = groups[0].a, groups[0].b
        self.shape = (a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])

    @classmethod
    def of(cls, layer: LayerFactors, config: MokaConfig) -> FactoredDelta:
        """That of a layer.

        Args:
            config: the layer's own settings, as `Adapter.layer_config` gives.
        """
        coefficients = term_coefficients(layer, config)
        groups = []
        first = 0
        for index, group in enumerate(layer.plan.groups):
            own = coefficients[first : first + group.copies, None, None]
            first += group.copies
            a = np.eye(group.shape.a_out)[None] if config.identity == "a" else layer.factor_a[index].astype(np.float64)
            b = np.eye(group.shape.b_out)[None] if config.identity == "b" else layer.factor_b[index].astype(np.float64)
            if config.identity == "a":
                b = (own * b).sum(0, keepdims=True)
            elif config.identity == "b":
                a = (own * a).sum(0, keepdims=True)
            else:
                a = own * a
            groups.append(_Group(a, b))
        return cls(tuple(groups))

    @cached_property
    def T(self) -> FactoredDelta:
        """ΔWᵀ = Σ Aᵀ ⊗ Bᵀ."""
        return FactoredDelta(tuple(group.transposed for group in self.groups))

    @property
    def is_product(self) -> bool:
        """Whether ΔW is a single A ⊗ B."""
        return len(self.groups) == 1 and len(self.groups[0].a) == 1

    @cached_property
    def multiply_adds(self) -> int:
        """Of one product with a vector: Σ copies · (a_in·b_in·b_out + a_out·a_in·b_out)."""
        return sum(
            len(group.a) * group.a.shape[2] * group.b.shape[1] * (group.b.shape[2] + group.a.shape[1])
            for group in self.groups
        )

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        """ΔW x, (out,): Σ ravel(A X Bᵀ), for all terms of a shape at once."""
        y = np.zeros(self.shape[0])
        for group in self.groups:
            copies, a_out, a_in = group.a.shape
            half = x.reshape(a_in, -1) @ group.b.transpose(0, 2, 1)
            a = group.a.transpose(1, 0, 2).reshape(a_out, copies * a_in)
            y += (a @ half.reshape(copies * a_in, -1)).ravel()
        return y

    def rows(self, start: int, stop: int) -> np.ndarray:
        """ΔW[start:stop], (stop - start, in)."""
        panel = np.zeros((stop - start, self.shape[1]))
        for group in self.groups:
            (copies, _, a_in), (_, b_out, b_in) = group.a.shape, group.b.shape
            for p in range(start // b_out, -(-stop // b_out)):
                low, high = max(start, p * b_out), min(stop, (p + 1) * b_out)
                b = group.b[:, low - p * b_out : high - p * b_out]
                part = (group.a[:, p].T @ b.reshape(copies, -1)).reshape(a_in, high - low, b_in)
                panel[low - start : high - start] += part.transpose(1, 0, 2).reshape(high - low, -1)
        return panel

    def panels(self) -> Iterator[tuple[slice, np.ndarray]]:
        """ΔW by bands of rows, each with the slice of `out` where it stands."""
        height = max(1, _PANEL_ENTRIES // self.shape[1])
        for start in range(0, self.shape[0], height):
            rows = slice(start, min(start + height, self.shape[0]))
            yield rows, self.rows(rows.start, rows.stop)

    def dense(self) -> np.ndarray:
        """ΔW, (out, in)."""
        return self.rows(0, self.shape[0])

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return math.hypot(*(float(np.linalg.norm(panel)) for _, panel in self.panels()))

    def distance(self, b: np.ndarray, a: np.ndarray) -> float:
        """‖ΔW - b a‖ (Frobenius), from the entries, so that a small one is known as well as a large one.

        Args:
            b: (out, rank). a: (rank, in). Both of any float dtype; the product is in float64.
        """
        b, a = b.astype(np.float64), a.astype(np.float64)
        return math.hypot(*(float(np.linalg.norm(panel - b[rows] @ a)) for rows, panel in self.panels()))


@dataclass(frozen=True, kw_only=True, eq=False)
class TruncatedSvd:
    """The k largest singular triplets of a ΔW, and what they leave over.

    Holds: U diag(values) Vt is the best approximation of rank k, in both norms (Eckart and Young). u is (out, k), vt
    is (k, in), values descend; in every column of u the entry of the largest magnitude is positive.

    Args:
        next_value: σ_{k+1}, the spectral norm of the rest; 0 if there is none.
        way: how it was computed.
    """

    u: np.ndarray
    values: np.ndarray
    vt: np.ndarray
    next_value: float
    way: Way

    def balanced(self) -> tuple[np.ndarray, np.ndarray]:
        """(U √S, √S Vᵀ): the factors b (out, k) and a (k, in), equally large."""
        root = np.sqrt(self.values)
        return self.u * root, root[:, None] * self.vt


def truncated_svd(delta: FactoredDelta, rank: int) -> TruncatedSvd:
    """The `rank` largest singular triplets of ΔW; fewer if it has fewer.

    Lanczos is checked: every triplet must solve ΔW v = σ u, and what they leave over must not have a larger singular
    value than they, which would be one that was missed (of equal ones a single start vector may see one). If it fails,
    LAPACK does it, and `way` says so.

    Args:
        rank: at least 1.

    Ref: Eckart and Young 1936; Lehoucq, Sorensen and Yang 1998 (ARPACK).
    """
    way: Way = "kronecker" if delta.is_product else "lapack"
    if lanczos_pays(delta, rank):
        found = lanczos(delta, rank)
        if found is not None:
            return _signed(found)
        way = "lapack, since lanczos failed"
    if way == "kronecker":
        u, values, vt, rest = _kronecker_svd(delta, rank)
    else:
        full_u, full, full_vt = scipy.linalg.svd(delta.dense(), full_matrices=False, overwrite_a=True)
        u, values, vt, rest = full_u[:, :rank].copy(), full[:rank], full_vt[:rank].copy(), full[rank : rank + 1]
    return _signed(TruncatedSvd(u=u, values=values, vt=vt, next_value=float(rest.sum()), way=way))


def singular_values(delta: FactoredDelta) -> np.ndarray:
    """All min(out, in) singular values of ΔW, descending."""
    if delta.is_product:
        group = delta.groups[0]
        a, b = (scipy.linalg.svdvals(factor[0]) for factor in (group.a, group.b))
        values = np.zeros(min(delta.shape))
        products = np.sort(np.outer(a, b).ravel())[::-1]
        values[: len(products)] = products
        return values
    return scipy.linalg.svdvals(delta.dense(), overwrite_a=True)


def relative_errors(values: np.ndarray) -> np.ndarray:
    """‖ΔW - best rank k‖ / ‖ΔW‖ for k = 0..n, from all n singular values; zeros if ΔW = 0.

    √(Σ_{i>k} σ_i²) / √(Σ σ_i²), summed from the smallest on: nothing cancels.

    >>> relative_errors(np.array([4.0, 3.0])).tolist()
    [1.0, 0.6, 0.0]
    """
    squares = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)
    return np.sqrt(squares / squares[0]) if squares[0] else squares


def rank_for(delta: FactoredDelta, error: float) -> int:
    """The smallest k whose best approximation has a relative error (Frobenius) of at most `error`.

    Args:
        error: 0 < error < 1.
    """
    if delta.norm == 0:
        return 0
    rank = 16
    while error > _CANCELS and lanczos_pays(delta, rank):
        found = lanczos(delta, rank)
        if found is None:
            break
        left = 1 - np.cumsum((found.values / delta.norm) ** 2)
        if left[-1] <= error**2:
            return int(np.argmax(left <= error**2)) + 1
        rank *= 2
    return int(np.argmax(relative_errors(singular_values(delta)) <= error))


def lanczos_pays(delta: FactoredDelta, rank: int) -> bool:
    """Whether Lanczos iterations for `rank` triplets are expected to take less time than LAPACK's SVD of ΔW.

    Lanczos needs about 200 + 10·rank products with ΔW, each orthogonalised against 2·rank vectors; LAPACK
    about out·in·min(out, in) multiply-adds. The constants are measured on mixtures with random factors, whose singular
    values fall slowly, which is hard for Lanczos: benchmarks/lora_svd.py, and the table in docs/lora.md.
    """
    if delta.is_product or delta.norm == 0 or 3 * rank >= min(delta.shape):
        return False
    products = _PRODUCTS[0] + _PRODUCTS[1] * rank
    each = _PRODUCT_SECONDS + _MULTIPLY_ADD_SECONDS * (delta.multiply_adds + 4 * rank * min(delta.shape))
    return products * each < _LAPACK_SECONDS * math.prod(delta.shape) * min(delta.shape)


def lanczos(delta: FactoredDelta, rank: int) -> TruncatedSvd | None:
    """The `rank` largest triplets by ARPACK, or None if it does not converge or its result does not pass the checks."""
    start = np.random.default_rng(0).standard_normal(min(delta.shape))
    try:
        u, values, vt = svds(_operator(delta), k=rank, v0=start)
        order = np.argsort(-values, kind="stable")
        u, values, vt = u[:, order], values[order], vt[order]
        gaps = [float(np.linalg.norm(delta @ vt[i] - values[i] * u[:, i])) for i in range(rank)]
        if not max(gaps) <= _RESIDUAL * values[0]:
            return None
        next_value = 0.0
        if delta.distance(u * values, vt) > _NOTHING * delta.norm:
            again = np.random.default_rng(1).standard_normal(min(delta.shape))
            rest = _operator(delta, u, values, vt)
            tolerance = math.sqrt(_LEFT_OVER_ACCURACY)
            next_value = float(svds(rest, k=1, v0=again, tol=tolerance, return_singular_vectors=False)[0])
    except ArpackError:
        return None
    if next_value > values[-1] * (1 + _LEFT_OVER):
        return None
    return TruncatedSvd(u=u, values=values, vt=vt, next_value=next_value, way="lanczos")


def _operator(
    delta: FactoredDelta, u: np.ndarray | None = None, values: np.ndarray | None = None, vt: np.ndarray | None = None
) -> LinearOperator:
    """Products with ΔW, or with ΔW - U diag(values) Vt."""

    def product(x: np.ndarray) -> np.ndarray:
        y = delta @ x.ravel()
        return y if u is None else y - u @ (values * (vt @ x.ravel()))

    def transposed(y: np.ndarray) -> np.ndarray:
        x = delta.T @ y.ravel()
        return x if u is None else x - vt.T @ (values * (u.T @ y.ravel()))  # type: ignore[union-attr]

    return LinearOperator(delta.shape, matvec=product, rmatvec=transposed, dtype=np.float64)


def _kronecker_svd(delta: FactoredDelta, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The largest triplets of A ⊗ B, and the next value: σ_i(A)·σ_j(B), with u_i ⊗ u_j and v_i ⊗ v_j."""
    group = delta.groups[0]
    (ua, a, va), (ub, b, vb) = (scipy.linalg.svd(factor[0], full_matrices=False) for factor in (group.a, group.b))
    products = np.outer(a, b).ravel()
    order = np.argsort(-products, kind="stable")
    kept, rest = order[:rank], order[rank : rank + 1]
    i, j = np.divmod(kept, len(b))
    u = np.einsum("pk,qk->pqk", ua[:, i], ub[:, j]).reshape(-1, len(kept))
    vt = np.einsum("kp,kq->kpq", va[i], vb[j]).reshape(len(kept), -1)
    return u, products[kept], vt, products[rest]


def _signed(found: TruncatedSvd) -> TruncatedSvd:
    """The same with the sign of each pair of vectors fixed, which an SVD leaves open."""
    signs = np.sign(found.u[np.abs(found.u).argmax(0), np.arange(found.u.shape[1])])
    signs[signs == 0] = 1.0
    return TruncatedSvd(
        u=found.u * signs,
        values=found.values,
        vt=found.vt * signs[:, None],
        next_value=found.next_value,
        way=found.way,
    )
