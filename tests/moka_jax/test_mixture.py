"""The pure functions against the float64 oracle; their gradients are tested with the product (test_product.py)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moka_core import ConfigError, LayerFactors, MokaConfig, plan_layer
from moka_core.oracle import dense_delta, term_coefficients
from moka_jax.mixture import UNROLLED, coefficients, delta_weight
from moka_jax.product import moka_apply
from tests.cases import CASES, LayerCase, random_layer

# numbers of the code as users compile it
pytestmark = pytest.mark.usefixtures("optimised")

TOKENS = 37


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def arguments(tensors: dict[str, jax.Array]) -> tuple[list[jax.Array], list[jax.Array], jax.Array | None]:
    factors = [[value for name, value in tensors.items() if name.startswith(f"factor_{f}.")] for f in "ab"]
    return *factors, tensors.get("gate_logits")


def apply(case: LayerCase, execution: str, x: jax.Array, tensors: dict[str, jax.Array]) -> jax.Array:
    if execution == "factored":
        return moka_apply(x, case.plan, case.config, *arguments(tensors), execution="factored")
    return x @ delta_weight(case.plan, case.config, *arguments(tensors)).T


@pytest.mark.parametrize("execution", ["factored", "merged"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_matches_the_float64_oracle(case, execution):
    layer = random_layer(case)
    x = np.random.default_rng(5).standard_normal((TOKENS, case.in_features)).astype(np.float32)
    y = jax.jit(partial(apply, case, execution))(x, dict(layer.tensors()))
    expected = x.astype(np.float64) @ dense_delta(layer, case.config).T
    assert relative(y, expected) <= 1e-6  # measured: at most 2.5e-7 over 20 seeds


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_delta_and_coefficients_match_the_float64_oracle(case, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # both write ΔW's loop, each in its own way
    layer = random_layer(case, seed=3)
    given = arguments(dict(layer.tensors()))
    delta = jax.jit(partial(delta_weight, case.plan, case.config))(*given)
    assert delta.shape == (case.out_features, case.in_features)
    assert delta.dtype == jnp.float32
    assert relative(delta, dense_delta(layer, case.config)) <= 1e-6  # measured: at most 2.3e-7 over 20 seeds
    found = np.concatenate(coefficients(case.plan, case.config, given[2]))
    assert relative(found, term_coefficients(layer, case.config)) <= 1e-6


def test_the_program_does_not_grow_with_the_copies():
    """Traced only: a line for each of a million copies takes minutes, and compiling them longer."""

    def lines(r: int) -> int:
        config = MokaConfig(r=r, num_shapes=2)
        plan = plan_layer(config, 256, 512)
        factors = [
            [jax.ShapeDtypeStruct(group.factor_shape(name), jnp.float32) for group in plan.groups] for name in "ab"
        ]
        gates = jax.ShapeDtypeStruct((r,), jnp.float32)
        return len(jax.make_jaxpr(partial(delta_weight, plan, config))(*factors, gates).eqns)

    assert lines(2000) == lines(100) < 40
    assert max(group.copies for case in CASES for group in case.plan.groups) > UNROLLED, "one case is such a product"


def published_mistakes(layer: LayerFactors, config: MokaConfig) -> dict[str, np.ndarray]:
    """ΔW by B ⊗ A, and ΔW if the input were folded column by column."""
    swapped = np.zeros((layer.plan.out_features, layer.plan.in_features))
    columns = np.zeros_like(swapped)
    terms = zip(layer.plan.term_shapes(), term_coefficients(layer, config), strict=True)
    pairs = [
        (a, b)
        for a_stack, b_stack in zip(layer.factor_a, layer.factor_b, strict=True)
        for a, b in zip(a_stack, b_stack, strict=True)
    ]
    for (shape, weight), (a, b) in zip(terms, pairs, strict=True):
        product = np.kron(a.astype(np.float64), b.astype(np.float64))
        swapped += weight * np.kron(b.astype(np.float64), a.astype(np.float64))
        order = np.arange(layer.plan.in_features).reshape(shape.a_in, shape.b_in, order="F").ravel()
        columns[:, order] += weight * product
    return {"B ⊗ A": swapped, "column-major": columns}


@pytest.mark.parametrize("execution", ["factored", "merged"])
@pytest.mark.parametrize("mistake", ["B ⊗ A", "column-major"])
@pytest.mark.parametrize("name", ["unequal copies", "tall", "wide", "stable scaling"])
def test_swapped_factors_or_a_column_major_fold_would_be_noticed(name, mistake, execution):
    case = next(case for case in CASES if case.name == name)
    layer = random_layer(case)
    wrong = published_mistakes(layer, case.config)[mistake]
    x = np.random.default_rng(0).standard_normal((TOKENS, case.in_features)).astype(np.float32)
    y = jax.jit(partial(apply, case, execution))(x, dict(layer.tensors()))
    assert relative(y, x @ wrong.T) > 0.3
    assert relative(y, x @ dense_delta(layer, case.config).T) < 1e-6


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_axes_are_kept_and_do_not_change_the_numbers(lead):
    for case in (CASES[7], CASES[13], CASES[14]):
        tensors = dict(random_layer(case).tensors())
        x = np.random.default_rng(1).standard_normal((*lead, case.in_features)).astype(np.float32)
        expected = x @ dense_delta(random_layer(case), case.config).T
        y = moka_apply(jnp.asarray(x), case.plan, case.config, *arguments(tensors), execution="factored")
        assert y.shape == (*lead, case.out_features)
        assert relative(y, expected) <= 1e-6


def test_bfloat16_output_is_near_the_oracle():
    case = next(case for case in CASES if case.name == "stable scaling")
    x = np.random.default_rng(2).standard_normal((8, case.in_features)).astype(jnp.bfloat16)
    y = jax.jit(partial(apply, case, "factored"))(x, dict(random_layer(case).tensors()))
    expected = x.astype(np.float64) @ dense_delta(random_layer(case), case.config).T
    assert relative(y.astype(jnp.float32), expected) <= 1e-2  # measured: at most 4.3e-3 over all cases


def test_a_learned_gate_needs_its_logits():
    config = MokaConfig()
    plan = plan_layer(config, 2048, 2048)
    with pytest.raises(ConfigError, match="gate 'softmax' needs gate_logits"):
        coefficients(plan, config, None)
