"""The figures of a trained mixture: against LAPACK's SVD of the oracle's ΔW, and planted terms are found."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moka_core import LayerFactors, MokaConfig, plan_layer
from moka_core.oracle import dense_delta, term_coefficients
from moka_core.spectrum import DEAD, REPEATS, effective_rank, layer_figures, singular_values, stable_rank
from tests.cases import CASES, random_factors, random_layer

CONFIG = MokaConfig(r=6, num_shapes=3)
PLAN = plan_layer(CONFIG, 24, 36)  # terms 0 and 1 share a shape, 2 and 3, 4 and 5


def trained(config: MokaConfig = CONFIG, *, seed: int = 0) -> LayerFactors:
    return random_factors(plan_layer(config, 24, 36), config, np.random.default_rng(seed))


def gated(layer: LayerFactors, **logits: float) -> LayerFactors:
    """The layer with the gate logits of some terms, such as t3=-20."""
    gate_logits = layer.gate_logits.copy()  # type: ignore[union-attr]
    for name, logit in logits.items():
        gate_logits[int(name[1:])] = logit
    return dataclasses.replace(layer, gate_logits=gate_logits)


def without(layer: LayerFactors, config: MokaConfig, term: int) -> np.ndarray:
    """ΔW without one of its terms: its gate stays what it is, its factor_b becomes zero."""
    group, copy = divmod(term, 2)
    factors = [factor.copy() for factor in layer.factor_b]
    factors[group][copy] = 0
    return dense_delta(dataclasses.replace(layer, factor_b=tuple(factors)), config)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_and_singular_values_are_those_of_the_oracles_delta(case: Any, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in random_layer(case).tensors()}
    layer = LayerFactors.from_tensors(case.plan, case.config, tensors)
    delta = dense_delta(layer, case.config)
    exact = np.linalg.svd(delta, compute_uv=False)
    found = layer_figures(layer, case.config)
    assert found.norm == pytest.approx(np.linalg.norm(delta), rel=1e-12)
    assert found.singular_values is not None
    # Worst over the cases: 7e-12 of σ for what is above 1e-6·σ₁; the rest is exactly zero, in the oracle 1e-16·σ₁.
    np.testing.assert_allclose(found.singular_values, exact, rtol=5e-11, atol=1e-13 * exact[0])
    assert np.count_nonzero(found.singular_values) == np.linalg.matrix_rank(delta)
    assert effective_rank(found.singular_values) == pytest.approx(effective_rank(exact), rel=1e-10)
    assert stable_rank(found.singular_values) == pytest.approx((np.linalg.norm(delta) / exact[0]) ** 2, rel=1e-10)
    assert not found.untrained
    assert found.dead == found.repeated == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_terms_figures_are_those_of_each_term_alone(case: Any) -> None:
    layer, config = random_layer(case), case.config
    coefficients = term_coefficients(layer, config)
    found = layer_figures(layer, config, spectrum=False)
    assert found.singular_values is None
    norms, directions = [], []
    for index, group in enumerate(case.plan.groups):
        for copy in range(group.copies):
            a = np.eye(group.shape.a_out) if config.identity == "a" else layer.factor_a[index][copy]
            b = np.eye(group.shape.b_out) if config.identity == "b" else layer.factor_b[index][copy]
            term = coefficients[len(norms)] * np.kron(a.astype(np.float64), b.astype(np.float64))
            norms.append(np.linalg.norm(term))
            directions.append((index, term.ravel() / norms[-1]))
    assert [term.norm for term in found.terms] == pytest.approx(norms, rel=1e-12)
    assert [term.share for term in found.terms] == pytest.approx(norms / np.sum(norms), rel=1e-12)
    constants = term_coefficients(layer, dataclasses.replace(config, gate="uniform")) * case.plan.terms
    assert [term.gate for term in found.terms] == pytest.approx(coefficients / constants, rel=1e-12)
    assert [term.shape for term in found.terms] == case.plan.term_shapes()
    cosines = [
        abs(direction @ other)
        for term, (group, direction) in enumerate(directions)
        for other_group, other in directions[:term]
        if group == other_group
    ]
    assert found.cosine == (pytest.approx(max(cosines), rel=1e-9) if cosines else None)


@pytest.mark.parametrize("scale", [1.2e-38, -3.4e38])
def test_an_absurd_scale_changes_norms_and_nothing_else(scale: float) -> None:
    plain, found = (layer_figures(trained(), dataclasses.replace(CONFIG, scale=value)) for value in (1.0, scale))
    assert found.norm == pytest.approx(abs(scale) * plain.norm, rel=1e-12)
    assert [term.share for term in found.terms] == pytest.approx([term.share for term in plain.terms], rel=1e-12)
    assert found.singular_values is not None
    assert plain.singular_values is not None
    assert effective_rank(found.singular_values) == pytest.approx(effective_rank(plain.singular_values), rel=1e-10)
    assert found.dead == []


def test_an_untrained_layer_is_called_so_and_has_no_rank() -> None:
    layer = trained()
    fresh = dataclasses.replace(layer, factor_b=tuple(np.zeros_like(factor) for factor in layer.factor_b))
    found = layer_figures(fresh, CONFIG)
    assert found.untrained
    assert (found.norm, found.dead, found.repeated, found.cosine) == (0.0, [], [], None)
    assert found.singular_values is not None
    assert (effective_rank(found.singular_values), stable_rank(found.singular_values)) == (0.0, 0.0)
    assert {term.dead for term in found.terms} == {"factor_b is zero"}


@pytest.mark.parametrize("factor", ["factor_a", "factor_b"])
def test_a_zero_factor_is_a_dead_term(factor: str) -> None:
    layer = trained()
    getattr(layer, factor)[1][0] = 0
    found = layer_figures(layer, CONFIG)
    assert found.dead == [2]
    assert found.terms[2].dead == f"{factor} is zero"
    assert (found.terms[2].norm, found.terms[2].share) == (0.0, 0.0)


@pytest.mark.parametrize("logit", [-12.0, -2000.0], ids=["small", "underflows"])
def test_a_closed_gate_is_a_dead_term(logit: float) -> None:
    layer = gated(trained(), t3=logit)
    found = layer_figures(layer, CONFIG)
    assert found.dead == [3]
    assert found.terms[3].dead == "gate"


def test_small_factors_are_a_dead_term_and_an_open_gate_does_not_save_it() -> None:
    layer = trained()
    layer.factor_b[2][1] *= np.float32(1e-6)
    found = layer_figures(gated(layer, t5=2.0), CONFIG)
    assert found.dead == [5]
    assert found.terms[5].dead == "small factors"


def test_the_bound_of_a_dead_term_is_what_rounding_to_bfloat16_may_change() -> None:
    """Just below the bound and just above it; rounding ΔW changes it by less than the bound, 1.7e-3 when measured."""
    layer = trained()
    delta = dense_delta(layer, CONFIG)
    rounded = delta.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert DEAD / 2 < np.linalg.norm(rounded - delta) / np.linalg.norm(delta) <= DEAD
    whole = layer_figures(layer, CONFIG)
    for factor, dead in ((0.98, [4]), (1.02, [])):
        smaller = dataclasses.replace(layer, factor_b=tuple(array.astype(np.float64) for array in layer.factor_b))
        rest = np.linalg.norm(without(smaller, CONFIG, 4))
        smaller.factor_b[2][0] *= factor * DEAD * rest / whole.terms[4].norm
        found = layer_figures(smaller, CONFIG)
        assert found.dead == dead
        change = np.linalg.norm(dense_delta(smaller, CONFIG) - without(smaller, CONFIG, 4)) / found.norm
        assert change == pytest.approx(found.terms[4].norm / found.norm, rel=1e-9)


@pytest.mark.parametrize("sign", [1, -1], ids=["same", "opposite"])
def test_a_repeated_term_is_found_whatever_its_size_and_sign(sign: int) -> None:
    layer = trained()
    layer.factor_a[1][1] = np.float32(sign * 0.3) * layer.factor_a[1][0]
    layer.factor_b[1][1] = np.float32(1.7) * layer.factor_b[1][0]
    found = layer_figures(layer, CONFIG)
    assert found.repeated == [3]
    assert found.terms[3].repeats == 2
    assert found.cosine == pytest.approx(1, abs=1e-6)
    only_a = trained()
    only_a.factor_a[1][1] = only_a.factor_a[1][0]
    assert layer_figures(only_a, CONFIG).repeated == []


@pytest.mark.parametrize(("angle", "repeated"), [(0.9 * REPEATS, [1]), (1.1 * REPEATS, [])])
def test_the_bound_of_a_repeated_term_is_an_angle(angle: float, repeated: list[int]) -> None:
    layer = trained()
    layer = dataclasses.replace(layer, factor_b=tuple(array.astype(np.float64) for array in layer.factor_b))
    layer.factor_a[0][1] = layer.factor_a[0][0]
    first, second = (layer.factor_b[0][copy] / np.linalg.norm(layer.factor_b[0][copy]) for copy in (0, 1))
    across = second - (second * first).sum() * first
    layer.factor_b[0][1] = np.cos(angle) * first + np.sin(angle) * across / np.linalg.norm(across)
    assert layer_figures(layer, CONFIG).repeated == repeated


def test_terms_told_apart_by_bfloat16_alone_are_repeated() -> None:
    """Where two copies hold the same numbers up to their rounding, they are one."""
    layer = trained()
    for factor in (layer.factor_a[0], layer.factor_b[0]):
        factor[1] = factor[0]
        # each copy rounded on its own, after a shift of half a step
        factor[1] = (factor[1] * np.float32(1 + 2**-9)).astype(ml_dtypes.bfloat16).astype(np.float32)
        factor[0] = factor[0].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (layer.factor_a[0][0] != layer.factor_a[0][1]).any()
    assert layer_figures(layer, CONFIG).repeated == [1]


def test_equal_blocks_of_moka_s_are_one_term() -> None:
    """As the preset paper-s leaves them: one shape, all terms equal."""
    config = MokaConfig(r=4, num_shapes=1, identity="a", block_entries=24)
    layer = trained(config)
    layer.factor_b[0][1:] = layer.factor_b[0][0]
    found = layer_figures(layer, config)
    assert found.repeated == [1, 2, 3]
    assert {found.terms[term].repeats for term in found.repeated} == {0}
    assert found.cosine == pytest.approx(1, abs=1e-12)


def test_terms_that_cancel_are_repeated_and_not_dead() -> None:
    config = MokaConfig(r=2, num_shapes=1, gate="uniform")
    layer = trained(config)
    layer.factor_a[0][1], layer.factor_b[0][1] = layer.factor_a[0][0], -layer.factor_b[0][0]
    found = layer_figures(layer, config)
    assert found.norm == 0
    assert not found.untrained
    assert (found.dead, found.repeated) == ([], [1])


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)])
def test_a_matrix_of_low_rank_has_exact_zeros(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
    values = singular_values(matrix)
    assert np.count_nonzero(values) == 3
    np.testing.assert_allclose(values[:3], np.linalg.svd(matrix, compute_uv=False)[:3], rtol=1e-13)


def test_effective_rank_of_a_falling_spectrum() -> None:
    """Roy & Vetterli's definition, written out for two values."""
    p, q = 0.75, 0.25
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(1 / (p**p * q**q), rel=1e-14)
    assert effective_rank(np.full(7, 0.3)) == pytest.approx(7, rel=1e-14)
