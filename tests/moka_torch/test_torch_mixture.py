"""The mixture as functions: coefficients, ΔW and x ΔWᵀ against the float64 oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from moka_core import ConfigError, MokaConfig, plan_layer
from moka_core.execution import EXECUTIONS
from moka_core.oracle import dense_delta, dense_gradients, term_coefficients
from moka_torch.mixture import coefficients, delta_weight, moka_apply, schedule_for
from tests.cases import CASES, random_layer
from tests.moka_torch.tolerances import FLOAT32, FLOAT64, relative

TOKENS = 37


def tensors_of(layer, dtype, requires_grad=False):
    named = {name: torch.tensor(array, dtype=dtype) for name, array in layer.tensors()}
    for tensor in named.values():
        tensor.requires_grad_(requires_grad)
    factor_a = [tensor for name, tensor in named.items() if name.startswith("factor_a")]
    factor_b = [tensor for name, tensor in named.items() if name.startswith("factor_b")]
    return named, (factor_a, factor_b, named.get("gate_logits"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("execution", [*EXECUTIONS, None])
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
    if layer.plan.terms == 1:
        # one term has weight 1 whatever its logit is: nothing to compare, and no gradient
        assert not expected.pop("gate_logits").any()
        assert not found["gate_logits"].any()
    for name, array in expected.items():
        assert relative(found[name], array) <= (FLOAT32 if dtype == torch.float32 else FLOAT64), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_delta_weight_is_differentiable_step_by_step(case):
    layer, config = random_layer(case, seed=1), case.config
    rng = np.random.default_rng(2)
    x = rng.standard_normal((TOKENS, case.in_features))
    dy = rng.standard_normal((TOKENS, case.out_features))
    expected = {"y": x @ dense_delta(layer, config).T, **dense_gradients(layer, config, x, dy)}
    if layer.plan.terms == 1:
        del expected["gate_logits"]
    named, arguments = tensors_of(layer, torch.float64, requires_grad=True)
    given = torch.tensor(x, requires_grad=True)
    y = given @ delta_weight(layer.plan, config, *arguments).T
    y.backward(torch.tensor(dy))
    found = {"y": y.detach(), "x": given.grad, **{name: tensor.grad for name, tensor in named.items()}}
    for name, array in expected.items():
        assert relative(found[name], array) <= FLOAT64, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_delta_weight_matches_the_oracle(case):
    layer = random_layer(case, seed=3)
    _, arguments = tensors_of(layer, torch.float32)
    delta = delta_weight(layer.plan, case.config, *arguments)
    assert delta.shape == (case.out_features, case.in_features)
    # measured: at most 1.7e-7 over 20 seeds
    assert relative(delta, dense_delta(layer, case.config)) <= FLOAT32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_coefficients_match_the_oracle(case):
    layer = random_layer(case, seed=4)
    logits = None if layer.gate_logits is None else torch.tensor(layer.gate_logits)
    found = coefficients(layer.plan, case.config, logits)
    assert relative(found, term_coefficients(layer, case.config)) <= FLOAT32


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
    assert schedule_for(plan, config, 1, own_product=False).forward == "factored"
    assert schedule_for(plan, config, 4096, own_product=False).forward == "merged"
    block = dataclasses.replace(config, r=8, identity="a")
    assert schedule_for(plan_layer(block, 2048, 2048), block, 512).forward == "factored"


def test_errors():
    case = CASES[0]
    _, (factor_a, factor_b, _) = tensors_of(random_layer(case), torch.float32)
    x = torch.randn(2, case.in_features)
    with pytest.raises(ConfigError, match=r"execution: 'dense' is numpy\.kron in float64"):
        moka_apply(x, case.plan, case.config, factor_a, factor_b, None, execution="dense")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs gate_logits"):
        moka_apply(x, case.plan, case.config, factor_a, factor_b, None)


def test_inputs_that_do_not_fit():
    """Among them (4, 32) for 64 columns, whose numbers would make two rows."""
    case = CASES[0]
    _, arguments = tensors_of(random_layer(case), torch.float32)
    x = torch.randn(4, 64)
    for given, message in (
        (x[:, :32], r"x: expected \(\.\.\., 64\); got \(4, 32\)"),
        (x[0, 0], r"x: expected \(\.\.\., 64\); got \(\)"),
        (x.long(), "x: expected a floating dtype; got torch.int64"),
    ):
        for execution in ("factored", "merged"):
            with pytest.raises(ConfigError, match=message):
                moka_apply(given, case.plan, case.config, *arguments, execution=execution)
    for keep in (x, x[:1] > 0):
        with pytest.raises(ConfigError, match=r"keep: expected bool of shape \(4, 64\); got torch\.(float32|bool) of"):
            moka_apply(x, case.plan, case.config, *arguments, keep=keep)
