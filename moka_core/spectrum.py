"""What a trained mixture has become: the size of its terms, and the singular values of ΔW."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moka_core.adapter import LayerFactors
from moka_core.config import MokaConfig
from moka_core.oracle import term_coefficients, term_gates
from moka_core.plan import KronShape, LayerPlan, ShapeGroup

# Rounding ΔW to bfloat16 (8 significant bits) changes an entry by at most this share of it, and so ‖ΔW‖_F too.
DEAD = 2.0**-9
# Four factors rounded to bfloat16, each off by 2⁻⁹ at most: two terms no further apart cannot be told from equal ones.
REPEATS = 2.0**-7

Death = Literal["factor_a is zero", "factor_b is zero", "gate", "small factors"]


@dataclass(frozen=True, kw_only=True)
class TermFigures:
    """One term k·A ⊗ B of a layer, k = scale·α·c.

    Args:
        shape: of its factors.
        gate: α.
        norm: ‖k·A ⊗ B‖_F = |k|·‖A‖_F·‖B‖_F.
        share: norm / Σ norm over the layer's terms; 0 if all of them are zero.
        dead: None, or why leaving the term out changes ΔW by no more than rounding ΔW to bfloat16 may:
            norm <= 2⁻⁹·‖ΔW‖_F. "gate" if the term would count with an even gate, α = 1/r.
        repeats: None, or the number of an earlier term of the same shape, not dead either, with (nearly) the same
            direction, so that both together are one term: sin of the angle between them <= 2⁻⁷.
    """

    shape: KronShape
    gate: float
    norm: float
    share: float
    dead: Death | None
    repeats: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFigures:
    """The figures of one layer.

    Args:
        plan: its shapes.
        terms: in gate order.
        norm: ‖ΔW‖_F.
        cosine: the largest |cos| of the angle between two terms of one shape, <A, A'>·<B, B'> / (‖A‖‖A'‖‖B‖‖B'‖);
            None where no two terms share a shape and are not zero.
        singular_values: of ΔW, falling, min(out, in) of them, or None if they were not asked for.
    """

    plan: LayerPlan
    terms: tuple[TermFigures, ...]
    norm: float
    cosine: float | None
    singular_values: np.ndarray | None

    @property
    def untrained(self) -> bool:
        """Whether every term is exactly zero, as `init` leaves them."""
        return not any(term.norm for term in self.terms)

    @property
    def dead(self) -> list[int]:
        """The numbers of its dead terms; none of an untrained layer."""
        return [] if self.untrained else [index for index, term in enumerate(self.terms) if term.dead]

    @property
    def repeated(self) -> list[int]:
        """The numbers of the terms that repeat an earlier one."""
        return [index for index, term in enumerate(self.terms) if term.repeats is not None]


def layer_figures(layer: LayerFactors, config: MokaConfig, *, spectrum: bool = True) -> LayerFigures:
    """The size of every term of a layer, and of their sum ΔW = Σ_i k_i·(A_i ⊗ B_i), computed in float64.

    Args:
        layer: its factors.
        config: its own settings, as `Adapter.layer_config` gives them.
        spectrum: compute the singular values too, which takes nearly all of the time.
    """
    block, times = _repeated_block(layer, config)
    delta = _dense(block, config)
    largest = float(np.abs(delta).max()) or 1.0
    delta /= largest  # no `scale`, however large or small, overflows the squares
    norm = largest * math.sqrt(times) * float(np.linalg.norm(delta))
    values = largest * np.repeat(singular_values(delta), times) if spectrum else None
    terms, cosine = _terms(layer, config, norm)
    return LayerFigures(plan=layer.plan, terms=terms, norm=norm, cosine=cosine, singular_values=values)


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """The singular values of a matrix, falling: √ of the eigenvalues of the smaller of M·Mᵀ and Mᵀ·M.

    Squaring costs the small ones: a value is off by about ε·σ₁²/σ, ε = 2⁻⁵², and what is not above √(n·ε)·σ₁,
    n the smaller dimension (1e-6·σ₁ for 4096), is given as 0. LAPACK's SVD would keep them and takes several times
    as long.

    Args:
        matrix: (rows, columns), float64.

    >>> singular_values(np.array([[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))
    array([5., 0.])
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    squares = np.linalg.eigvalsh(matrix @ matrix.T if wide else matrix.T @ matrix)[::-1]
    floor = len(squares) * np.finfo(np.float64).eps * squares[0]
    return np.sqrt(np.where(squares > floor, squares, 0.0))


def effective_rank(values: np.ndarray) -> float:
    """exp(−Σ_i p_i·ln p_i) with p_i = σ_i / Σσ: n where n equal singular values are all there is; 0 for a zero matrix.

    Args:
        values: singular values, none negative.

    Ref: Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: np.ndarray) -> float:
    """‖M‖_F² / ‖M‖₂² = Σσ² / σ₁², at most the rank; 0 for a zero matrix.

    Args:
        values: singular values, none negative.

    Ref: Rudelson & Vershynin, "Sampling from large matrices", J. ACM 54 (4), 2007.

    >>> stable_rank(np.array([2.0, 1.0, 1.0]))
    1.5
    """
    return float(((values / values.max()) ** 2).sum()) if values.any() else 0.0


def _repeated_block(layer: LayerFactors, config: MokaConfig) -> tuple[LayerFactors, int]:
    """(a layer, n) such that ΔW has the singular values of that layer's ΔW, each n times.

    I_k ⊗ B = I_n ⊗ (I_{k/n} ⊗ B) where n divides k; A ⊗ I_k likewise. Without an identity n is 1.
    """
    if config.identity == "none":
        return layer, 1
    shapes = [group.shape for group in layer.plan.groups]
    times = math.gcd(*(shape.a_out if config.identity == "a" else shape.b_out for shape in shapes))
    divisors = (times, times, 1, 1) if config.identity == "a" else (1, 1, times, times)
    groups = tuple(
        ShapeGroup(
            KronShape(*(side // by for side, by in zip(dataclasses.astuple(group.shape), divisors, strict=True))),
            group.copies,
        )
        for group in layer.plan.groups
    )
    first = groups[0].shape
    plan = LayerPlan(out_features=first.out_features, in_features=first.in_features, groups=groups)
    return dataclasses.replace(layer, plan=plan), times


def _dense(layer: LayerFactors, config: MokaConfig) -> np.ndarray:
    """ΔW as `oracle.dense_delta` has it, but a shape group at a time and without a second array of its size."""
    delta = np.zeros((layer.plan.out_features, layer.plan.in_features))
    coefficients = term_coefficients(layer, config)
    for shape, terms, a, b in _groups(layer):
        blocks = delta.reshape(shape.a_out, shape.b_out, shape.a_in, shape.b_in)
        weights = coefficients[terms]
        if a is None:
            assert b is not None
            every = np.arange(shape.a_out)
            blocks[every, :, every, :] += np.einsum("c,cij->ij", weights, b)
        elif b is None:
            every = np.arange(shape.b_out)
            blocks[:, every, :, every] += np.einsum("c,cpq->pq", weights, a)
        else:
            for row in range(shape.a_out):
                blocks[row] += np.einsum("c,cq,cij->iqj", weights, a[:, row], b)
    return delta


def _groups(layer: LayerFactors) -> Iterator[tuple[KronShape, slice, np.ndarray | None, np.ndarray | None]]:
    """(shape, its terms' numbers, A, B) of every shape group; the factors in float64, None for an identity."""
    first = 0
    for index, group in enumerate(layer.plan.groups):
        a = layer.factor_a[index].astype(np.float64) if layer.factor_a else None
        b = layer.factor_b[index].astype(np.float64) if layer.factor_b else None
        yield group.shape, slice(first, first + group.copies), a, b
        first += group.copies


def _terms(layer: LayerFactors, config: MokaConfig, norm: float) -> tuple[tuple[TermFigures, ...], float | None]:
    """Every term's figures, and the largest |cos| between two terms of one shape; `norm`: ‖ΔW‖_F."""
    gates = term_gates(layer, config)
    gated = np.abs(term_coefficients(layer, config))
    even = np.abs(term_coefficients(layer, dataclasses.replace(config, gate="uniform")))
    norms, cosines = [], []
    deaths: list[Death | None] = []
    repeats: dict[int, int] = {}
    for shape, terms, a, b in _groups(layer):
        size_a, cosine_a = _sizes_and_cosines(a, shape.a_out)
        size_b, cosine_b = _sizes_and_cosines(b, shape.b_out)
        sizes, cosine = size_a * size_b, np.broadcast_to(cosine_a * cosine_b, (terms.stop - terms.start,) * 2)
        for copy, term in enumerate(range(terms.start, terms.stop)):
            norms.append(float(gated[term] * sizes[copy]))
            death: Death | None = None
            if norms[term] <= DEAD * norm or not norms[term]:
                if not sizes[copy]:
                    death = "factor_b is zero" if not np.broadcast_to(size_b, sizes.shape)[copy] else "factor_a is zero"
                else:
                    death = "gate" if even[term] * sizes[copy] > DEAD * norm else "small factors"
            deaths.append(death)
            for before in range(copy):
                earlier = terms.start + before
                if norms[term] and norms[earlier]:
                    cosines.append(abs(float(cosine[copy, before])))
                    if death is None and deaths[earlier] is None and 1 - cosines[-1] ** 2 <= REPEATS**2:
                        repeats.setdefault(term, repeats.get(earlier, earlier))
    total = sum(norms)
    figures = tuple(
        TermFigures(
            shape=shape,
            gate=float(gates[term]),
            norm=norms[term],
            share=norms[term] / total if total else 0.0,
            dead=deaths[term],
            repeats=repeats.get(term),
        )
        for term, shape in enumerate(layer.plan.term_shapes())
    )
    return figures, max(cosines, default=None)


def _sizes_and_cosines(factor: np.ndarray | None, side: int) -> tuple[np.ndarray, np.ndarray]:
    """‖factor‖_F of every copy, and the cosines between copies; those of I_side for None, to be broadcast."""
    if factor is None:
        return np.array([math.sqrt(side)]), np.ones((1, 1))
    flat = factor.reshape(len(factor), -1)
    sizes = np.linalg.norm(flat, axis=1)
    units = flat / np.where(sizes > 0, sizes, 1.0)[:, None]
    return sizes, units @ units.T
