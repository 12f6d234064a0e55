"""The float64 oracle: held to plain loops and to finite differences, and able to see the usual mistakes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from moka_core import LayerFactors
from moka_core.oracle import dense_delta, dense_gradients, term_coefficients
from tests.cases import CASES, random_layer

SMALL = [case for case in CASES if case.out_features * case.in_features <= 2600]


def terms_of(case: Any, layer: LayerFactors) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """(shape, A, B) of every term in gate order, identities written out."""
    terms = []
    for index, group in enumerate(case.plan.groups):
        for copy in range(group.copies):
            a = np.eye(group.shape.a_out) if case.config.identity == "a" else layer.factor_a[index][copy]
            b = np.eye(group.shape.b_out) if case.config.identity == "b" else layer.factor_b[index][copy]
            terms.append((group.shape, a.astype(float), b.astype(float)))
    return terms


def looped_delta(case: Any, layer: LayerFactors) -> np.ndarray:
    """ΔW entry by entry, from the definition and with the standard library's arithmetic."""
    config, plan = case.config, case.plan
    if config.gate == "softmax":
        logits = [float(logit) for logit in layer.gate_logits]  # type: ignore[union-attr]
        total = math.fsum(math.exp(logit) for logit in logits)
        gates = [math.exp(logit) / total for logit in logits]
    else:
        gates = [1 / plan.terms] * plan.terms
    delta = np.zeros((plan.out_features, plan.in_features))
    for gate, (shape, a, b) in zip(gates, terms_of(case, layer), strict=True):
        columns = shape.b_in if config.zero_factor == "b" else shape.a_in
        c = math.sqrt(plan.terms) / math.sqrt(columns) if config.scaling == "stable" else 1.0
        for row, column in itertools.product(range(plan.out_features), range(plan.in_features)):
            p, i = divmod(row, shape.b_out)
            q, j = divmod(column, shape.b_in)
            delta[row, column] += config.scale * gate * c * a[p, q] * b[i, j]
    return delta


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_dense_delta_is_the_definition_written_as_loops(case: Any) -> None:
    layer = random_layer(case)
    expected = looped_delta(case, layer)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(dense_delta(layer, case.config), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_mixture_is_row_major_a_x_bt(case: Any) -> None:
    layer = random_layer(case)
    x = np.random.default_rng(1).standard_normal(case.in_features)
    y = sum(
        k * (a @ x.reshape(shape.a_in, shape.b_in) @ b.T).reshape(-1)
        for k, (shape, a, b) in zip(term_coefficients(layer, case.config), terms_of(case, layer), strict=True)
    )
    np.testing.assert_allclose(dense_delta(layer, case.config) @ x, y, rtol=1e-11, atol=1e-12)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# A ⊗ B = B ⊗ A for a number times anything and for a column times a row: there neither mistake exists.
TELLING = [
    case for case in CASES if any(min(s.a_out, s.b_out) > 1 or min(s.a_in, s.b_in) > 1 for s in case.plan.term_shapes())
]


def test_most_cases_can_tell_the_swapped_product_from_the_right_one() -> None:
    assert len(TELLING) >= 12


@pytest.mark.parametrize("case", TELLING, ids=lambda case: case.name)
def test_the_swapped_product_and_the_column_major_reshape_give_other_numbers(case: Any) -> None:
    layer = random_layer(case)
    x = np.random.default_rng(1).standard_normal(case.in_features)
    coefficients = term_coefficients(layer, case.config)
    terms = terms_of(case, layer)
    swapped = sum(k * np.kron(b, a) for k, (_, a, b) in zip(coefficients, terms, strict=True))
    column_major = sum(
        k * (a @ x.reshape((shape.a_in, shape.b_in), order="F") @ b.T).reshape(-1, order="F")
        for k, (shape, a, b) in zip(coefficients, terms, strict=True)
    )
    right = dense_delta(layer, case.config)
    assert relative(swapped @ x, right @ x) > 0.1
    assert relative(np.asarray(column_major), right @ x) > 0.1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_coefficients_add_up_to_the_scale_where_nothing_else_scales(case: Any) -> None:
    config = dataclasses.replace(case.config, scaling="none")
    coefficients = term_coefficients(random_layer(case), config)
    assert coefficients.shape == (case.plan.terms,)
    assert math.isclose(coefficients.sum(), config.scale, rel_tol=1e-12)


def test_large_logits_do_not_overflow_the_gate() -> None:
    case = CASES[0]
    layer = random_layer(case)
    shifted = dataclasses.replace(layer, gate_logits=layer.gate_logits.astype(np.float64) + 5000)  # type: ignore[union-attr]
    np.testing.assert_allclose(
        term_coefficients(shifted, case.config), term_coefficients(layer, case.config), rtol=1e-9
    )


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_dense_gradients_are_the_central_differences(case: Any) -> None:
    """Central differences in float64 with step 1e-5: truncation and rounding both stay near 1e-9."""
    config, plan = case.config, case.plan
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((3, case.in_features)), rng.standard_normal((3, case.out_features))
    tensors = {name: array.astype(np.float64) for name, array in random_layer(case).tensors()}

    def value(changed: dict[str, np.ndarray], inputs: np.ndarray = x) -> float:
        layer = LayerFactors.from_tensors(plan, config, changed)
        return float((dy * (inputs @ dense_delta(layer, config).T)).sum())

    grads = dense_gradients(LayerFactors.from_tensors(plan, config, tensors), config, x, dy)
    assert set(grads) == {*tensors, "x"}
    step = 1e-5
    for name, array in tensors.items():
        assert grads[name].shape == array.shape
        for position in rng.choice(array.size, min(array.size, 4), replace=False):
            bump = np.zeros(array.size)
            bump[position] = step
            bump = bump.reshape(array.shape)
            slope = (value({**tensors, name: array + bump}) - value({**tensors, name: array - bump})) / (2 * step)
            assert math.isclose(slope, grads[name].reshape(-1)[position], rel_tol=1e-6, abs_tol=1e-7), name
    bump = np.zeros_like(x)
    bump[1, case.in_features // 2] = step
    slope = (value(tensors, x + bump) - value(tensors, x - bump)) / (2 * step)
    assert math.isclose(slope, grads["x"][1, case.in_features // 2], rel_tol=1e-6, abs_tol=1e-7)
