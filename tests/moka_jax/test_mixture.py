"""The pure functions against the float64 oracle: every case, both executions, forward and all gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moka_core import ConfigError, LayerFactors, MokaConfig, plan_layer
from moka_core.cost import resolve_execution
from moka_core.oracle import dense_delta, dense_gradients, term_coefficients
from moka_jax.mixture import coefficients, delta_weight, factored_apply
from tests.cases import CASES, LayerCase, random_layer

# Relative error ‖a-b‖/‖b‖ in float32. Measured over 20 seeds x all cases x both executions: y 2.5e-7, x 2.2e-7,
# factor_a 8.4e-7, factor_b 1.4e-6 (where a factor is a single number its gradient is one sum that nearly cancels),
# gate_logits 2.9e-6 (differences of sums that nearly cancel). The mistakes below are off by more than 0.3.
FLOAT32 = {"y": 1e-6, "x": 1e-6, "factor_a": 3e-6, "factor_b": 5e-6, "gate_logits": 1e-5}
TOKENS = 37


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def arguments(tensors: dict[str, jax.Array]) -> tuple[list[jax.Array], list[jax.Array], jax.Array | None]:
    factors = [[value for name, value in tensors.items() if name.startswith(f"factor_{f}.")] for f in "ab"]
    return *factors, tensors.get("gate_logits")


def apply(case: LayerCase, execution: str, x: jax.Array, tensors: dict[str, jax.Array]) -> jax.Array:
    if execution == "factored":
        return factored_apply(case.plan, case.config, *arguments(tensors), x)
    return x @ delta_weight(case.plan, case.config, *arguments(tensors)).T


def errors_of(case: LayerCase, execution: str, seeds: range) -> dict[str, float]:
    """The largest relative error over the seeds of the output and of every gradient, by kind of array."""

    @jax.jit
    def both(x, tensors, dy):
        y, pull = jax.vjp(partial(apply, case, execution), x, tensors)
        return y, *pull(dy)

    worst: dict[str, float] = {}
    for seed in seeds:
        layer, rng = random_layer(case, seed=seed), np.random.default_rng(1000 + seed)
        x = rng.standard_normal((TOKENS, case.in_features)).astype(np.float32)
        dy = rng.standard_normal((TOKENS, case.out_features)).astype(np.float32)
        tensors = dict(layer.tensors())
        y, dx, gradients = both(x, tensors, dy)
        found = {"y": y, "x": dx, **gradients}
        expected = {"y": x.astype(np.float64) @ dense_delta(layer, case.config).T}
        expected |= dense_gradients(layer, case.config, x, dy)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == jnp.float32, name
            if name == "gate_logits" and layer.plan.terms == 1:  # the softmax of one number is constant
                assert np.abs(array).max() == 0
                assert np.abs(found[name]).max() < 1e-4
                continue
            kind = name.partition(".")[0]
            worst[kind] = max(worst.get(kind, 0.0), relative(found[name], array))
    return worst


@pytest.mark.parametrize("execution", ["factored", "merged"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_all_gradients_match_the_float64_oracle(case, execution):
    worst = errors_of(case, execution, range(1))
    assert {kind: error for kind, error in worst.items() if not error <= FLOAT32[kind]} == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_delta_and_coefficients_match_the_float64_oracle(case):
    layer = random_layer(case, seed=3)
    given = arguments(dict(layer.tensors()))
    delta = jax.jit(partial(delta_weight, case.plan, case.config))(*given)
    assert delta.shape == (case.out_features, case.in_features)
    assert delta.dtype == jnp.float32
    assert relative(delta, dense_delta(layer, case.config)) <= 1e-6  # measured: at most 1.7e-7 over 20 seeds
    found = np.concatenate(coefficients(case.plan, case.config, given[2]))
    assert relative(found, term_coefficients(layer, case.config)) <= 1e-6


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
        y = factored_apply(case.plan, case.config, *arguments(tensors), jnp.asarray(x))
        assert y.shape == (*lead, case.out_features)
        assert relative(y, expected) <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bfloat16_input_keeps_its_dtype_and_float32_factors_keep_theirs(case):
    def both(x, tensors):
        y, pull = jax.vjp(partial(apply, case, "factored"), x, tensors)
        return y, *pull(y)

    tensors = dict(random_layer(case).tensors())
    x = np.zeros((8, case.in_features), jnp.bfloat16)
    y, dx, gradients = jax.eval_shape(both, x, tensors)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {name: str(value.dtype) for name, value in gradients.items()} == dict.fromkeys(tensors, "float32")


def test_bfloat16_output_is_near_the_oracle():
    case = next(case for case in CASES if case.name == "stable scaling")
    x = np.random.default_rng(2).standard_normal((8, case.in_features)).astype(jnp.bfloat16)
    y = jax.jit(partial(apply, case, "factored"))(x, dict(random_layer(case).tensors()))
    expected = x.astype(np.float64) @ dense_delta(random_layer(case), case.config).T
    assert relative(y.astype(jnp.float32), expected) <= 1e-2  # measured: at most 4.3e-3 over all cases


def test_auto_chooses_by_the_number_of_tokens_and_unknown_names_are_refused():
    config = MokaConfig()
    plan = plan_layer(config, 2048, 2048)
    assert resolve_execution("auto", plan, config, 1) == "factored"
    assert resolve_execution("auto", plan, config, 4096) == "merged"
    assert resolve_execution("factored", plan, config, 4096) == "factored"
    assert resolve_execution("merged", plan, config, 1) == "merged"
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'dense'"):
        resolve_execution("dense", plan, config, 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gate 'softmax' needs gate_logits"):
        coefficients(plan, config, None)
