"""The pure functions against the float64 oracle: every case, both executions, forward and all gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from moka_core import ConfigError, MokaConfig, plan_layer
from moka_core.cost import choose_execution
from moka_core.oracle import dense_delta, dense_gradients, term_coefficients
from moka_torch.mixture import coefficients, delta_weight, moka_apply
from tests.cases import CASES, random_layer

# Relative error ‖a-b‖/‖b‖ in float32. Measured over 20 seeds x all cases x both executions: y 2.5e-7, x 2.5e-7,
# factors 7.8e-7 (1.7e-6 where a factor is a single number: its gradient is one sum with cancellation), logits 4.4e-6
# (differences of sums that nearly cancel). It is rounding: in float64 the same code agrees to 5.6e-15.
FLOAT32 = {"y": 1e-6, "x": 1e-6, "factor_a": 5e-6, "factor_b": 5e-6, "gate_logits": 2e-5}
FLOAT64 = 1e-12
TOKENS = 37


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def tensors_of(layer, dtype, requires_grad=False):
    named = {name: torch.tensor(array, dtype=dtype) for name, array in layer.tensors()}
    for tensor in named.values():
        tensor.requires_grad_(requires_grad)
    factor_a = [tensor for name, tensor in named.items() if name.startswith("factor_a")]
    factor_b = [tensor for name, tensor in named.items() if name.startswith("factor_b")]
    return named, (factor_a, factor_b, named.get("gate_logits"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("execution", ["factored", "merged", "auto"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_gradients_match_the_oracle(case, execution, dtype):
    layer, config = random_layer(case, seed=1), case.config
    rng = np.random.default_rng(2)
    x = rng.standard_normal((TOKENS, case.in_features)).astype(np.float32)
    dy = rng.standard_normal((TOKENS, case.out_features)).astype(np.float32)
    named, arguments = tensors_of(layer, dtype, requires_grad=True)
    given = torch.tensor(x, dtype=dtype, requires_grad=True)

    y = moka_apply(given, layer.plan, config, *arguments, execution=execution)
    y.backward(torch.tensor(dy, dtype=dtype))

    assert y.dtype == dtype
    found = {"y": y.detach(), "x": given.grad, **{name: tensor.grad for name, tensor in named.items()}}
    expected = {"y": x.astype(np.float64) @ dense_delta(layer, config).T, **dense_gradients(layer, config, x, dy)}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        limit = FLOAT32[name.partition(".")[0]] if dtype == torch.float32 else FLOAT64
        if name == "gate_logits" and layer.plan.terms == 1:
            assert np.abs(array).max() == 0
            assert found[name].abs().max() < 1e-4
        else:
            assert relative(found[name], array) <= limit, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_delta_weight_matches_the_oracle(case):
    layer = random_layer(case, seed=3)
    _, arguments = tensors_of(layer, torch.float32)
    delta = delta_weight(layer.plan, case.config, *arguments)
    assert delta.shape == (case.out_features, case.in_features)
    # measured: at most 1.7e-7 over 20 seeds
    assert relative(delta, dense_delta(layer, case.config)) <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_coefficients_match_the_oracle(case):
    layer = random_layer(case, seed=4)
    logits = None if layer.gate_logits is None else torch.tensor(layer.gate_logits)
    found = coefficients(layer.plan, case.config, logits)
    assert relative(found, term_coefficients(layer, case.config)) <= 1e-6


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_b_kron_a_would_be_noticed(execution):
    """The measure tells A ⊗ B from B ⊗ A, the mistake of a published version."""
    case = next(case for case in CASES if case.name == "unequal copies")
    layer = random_layer(case)
    swapped = np.zeros((case.out_features, case.in_features))
    weights = iter(term_coefficients(layer, case.config))
    for a_stack, b_stack in zip(layer.factor_a, layer.factor_b, strict=True):
        for a, b in zip(a_stack, b_stack, strict=True):
            swapped += next(weights) * np.kron(b.astype(np.float64), a.astype(np.float64))
    x = np.random.default_rng(0).standard_normal((TOKENS, case.in_features)).astype(np.float32)
    _, arguments = tensors_of(layer, torch.float32)
    y = moka_apply(torch.tensor(x), layer.plan, case.config, *arguments, execution=execution)
    assert relative(y, x @ swapped.T) > 0.5


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_last_bits_do_not_depend_on_requires_grad(execution):
    for case in CASES:
        layer = random_layer(case)
        x = torch.randn(5, case.in_features, generator=torch.Generator().manual_seed(0))
        _, frozen = tensors_of(layer, torch.float32)
        _, trained = tensors_of(layer, torch.float32, requires_grad=True)
        results = [moka_apply(x, layer.plan, case.config, *a, execution=execution) for a in (frozen, trained)]
        assert torch.equal(results[0], results[1].detach()), case.name


def test_leading_axes_are_kept():
    case = CASES[0]
    _, arguments = tensors_of(random_layer(case), torch.float32)
    x = torch.randn(2, 3, case.in_features)
    for execution in ("factored", "merged"):
        y = moka_apply(x, case.plan, case.config, *arguments, execution=execution)
        assert y.shape == (2, 3, case.out_features)
        flat = moka_apply(x.reshape(6, -1), case.plan, case.config, *arguments, execution=execution)
        assert torch.allclose(y.reshape(6, -1), flat, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_cheaper_execution_of_the_two():
    config = MokaConfig()
    plan = plan_layer(config, 2048, 2048)
    assert choose_execution(plan, config, 1) == "factored"
    assert choose_execution(plan, config, 512) == "merged"
    block = dataclasses.replace(config, r=8, identity="a")
    assert choose_execution(plan_layer(block, 2048, 2048), block, 512) == "factored"


def test_errors():
    case = CASES[0]
    _, (factor_a, factor_b, _) = tensors_of(random_layer(case), torch.float32)
    x = torch.randn(2, case.in_features)
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'dense'"):
        moka_apply(x, case.plan, case.config, factor_a, factor_b, None, execution="dense")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs gate_logits"):
        moka_apply(x, case.plan, case.config, factor_a, factor_b, None)
