"""The nearest mixture: exact where it can be, never worse from sweep to sweep, and what the oracle says it is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.linalg

from conversion.nearest import _leading, _truncated_svd, nearest_layer
from moka_core import AdapterError, KronShape, LayerPlan, MokaConfig, ShapeGroup, plan_layer
from moka_core.oracle import dense_delta
from tests.cases import CASES, LayerCase, random_layer

BY_NAME = {case.name: case for case in CASES}


def error_of(found, delta, config):
    return np.linalg.norm(delta - dense_delta(found.layer, config)) / np.linalg.norm(delta)


def rearranged(delta, shape):
    """R by its definition, block by block."""
    blocks = (
        delta[p * shape.b_out : (p + 1) * shape.b_out, q * shape.b_in : (q + 1) * shape.b_in]
        for p, q in itertools.product(range(shape.a_out), range(shape.a_in))
    )
    return np.stack([block.ravel() for block in blocks])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mixture_of_the_same_shapes_is_found_again(case: LayerCase):
    """One shape: by the SVD alone. Several: within the sweeps; measured at most 1.1e-7, which is float32's rounding."""
    delta = dense_delta(random_layer(case), case.config)
    found = nearest_layer(delta, case.plan, case.config, tol=1e-6, max_sweeps=300)
    assert error_of(found, delta, case.config) == pytest.approx(found.error, abs=1e-9)
    assert found.error < 3e-7
    assert found.sweeps == 0 or len(case.plan.groups) > 1
    assert all(array.dtype == np.float32 for _, array in found.layer.tensors())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_error_is_the_oracles_and_never_rises(case: LayerCase):
    rng = np.random.default_rng(1)
    delta = rng.normal(size=(case.out_features, case.in_features)) * 1e-3
    found = nearest_layer(delta, case.plan, case.config, tol=0, max_sweeps=8)
    assert found.error == pytest.approx(error_of(found, delta, case.config), abs=1e-7)
    assert found.error == pytest.approx(found.history[-1], abs=1e-6)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(found.history))
    assert found.error <= 1


@pytest.mark.parametrize("name", ["one term", "many copies", "prime dims", "identity a", "identity b"])
def test_one_shape_is_optimal(name):
    """What is left is what the SVD of R leaves (Eckart and Young), or, with an identity, the mean of the blocks."""
    case = BY_NAME[name]
    plan = dataclasses.replace(case.plan, groups=case.plan.groups[:1])
    config = dataclasses.replace(case.config, shapes=(plan,), r=plan.terms)
    (group,) = plan.groups
    delta = np.random.default_rng(2).normal(size=(plan.out_features, plan.in_features))
    matrix = rearranged(delta, group.shape)
    if config.identity == "none":
        left = scipy.linalg.svdvals(matrix)[group.copies :]
    else:
        eye = np.eye(group.shape.a_out if config.identity == "a" else group.shape.b_out).ravel()
        eye /= np.linalg.norm(eye)
        left = matrix - (np.outer(eye, eye @ matrix) if config.identity == "a" else np.outer(matrix @ eye, eye))
    expected = np.linalg.norm(left) / np.linalg.norm(delta)
    assert nearest_layer(delta, plan, config).error == pytest.approx(expected, abs=1e-7)


def test_no_step_away_from_the_result_comes_nearer():
    """At the end of the sweeps no factor alone can be bettered: the gradient by every one of them is nothing."""
    case = BY_NAME["tall"]
    delta = np.random.default_rng(3).normal(size=(case.out_features, case.in_features))
    found = nearest_layer(delta, case.plan, case.config, tol=0, max_sweeps=3000)
    left = (delta - dense_delta(found.layer, case.config)) / np.linalg.norm(delta)
    slopes = []
    for group, a, b in zip(case.plan.groups, found.layer.factor_a, found.layer.factor_b, strict=True):
        matrix = rearranged(left, group.shape)
        for one, other in zip(a, b, strict=True):
            slopes += [matrix @ other.ravel() / np.linalg.norm(other), one.ravel() @ matrix / np.linalg.norm(one)]
    assert max(map(np.linalg.norm, slopes)) < 1e-6  # measured: 1.5e-8; 0.05 after the start alone


def test_refining_helps_where_shapes_compete():
    case = BY_NAME["square"]
    delta = np.random.default_rng(4).normal(size=(64, 64))
    start = nearest_layer(delta, case.plan, case.config, max_sweeps=0)
    refined = nearest_layer(delta, case.plan, case.config)
    assert start.sweeps == 0
    assert refined.error < start.error - 0.02  # measured: 0.737 after the start, 0.676 after 50 sweeps


def test_a_start_for_training_balanced_with_gates_at_zero_and_no_dead_term():
    case = BY_NAME["stable, zero a, uniform"]
    config = dataclasses.replace(case.config, gate="softmax")
    delta = np.random.default_rng(5).normal(size=(48, 80))
    layer = nearest_layer(delta, case.plan, config).layer
    assert not layer.gate_logits.any()
    for a, b in zip(layer.factor_a, layer.factor_b, strict=True):
        norms = np.linalg.norm(a, axis=(1, 2))
        np.testing.assert_allclose(norms, np.linalg.norm(b, axis=(1, 2)), rtol=1e-5)
        assert (norms > 0).all()
        gram = np.einsum("cpq,dpq->cd", a, a) / np.outer(norms, norms)
        np.testing.assert_allclose(gram, np.eye(len(a)), atol=1e-5)


@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_term_that_nothing_is_left_for_starts_fresh(zero):
    plan = LayerPlan(out_features=12, in_features=20, groups=(ShapeGroup(KronShape(3, 4, 4, 5), 3),))
    config = MokaConfig(r=3, num_shapes=1, shapes=(plan,), zero_factor=zero)
    rng = np.random.default_rng(6)
    delta = np.kron(rng.normal(size=(3, 4)), rng.normal(size=(4, 5)))
    found = nearest_layer(delta, plan, config)
    assert found.error < 1e-7
    a, b = found.layer.factor_a[0], found.layer.factor_b[0]
    zeros, drawn = (a, b) if zero == "a" else (b, a)
    assert (zeros[0] != 0).all()
    assert not zeros[1:].any()
    assert (drawn != 0).all()
    assert not np.array_equal(drawn[1], drawn[2])


def test_no_change_at_all_gives_a_fresh_layer():
    case = BY_NAME["square"]
    found = nearest_layer(np.zeros((64, 64)), case.plan, case.config)
    assert (found.error, found.sweeps) == (0.0, 0)
    assert not dense_delta(found.layer, case.config).any()
    assert all(a.all() for a in found.layer.factor_a)


def test_a_lora_is_held_exactly_by_terms_of_its_own_shape_and_the_others_are_left_fresh():
    shapes = (KronShape(4, 8, 16, 6), KronShape(64, 1, 1, 48))
    plan = LayerPlan(out_features=64, in_features=48, groups=tuple(ShapeGroup(shape, 3) for shape in shapes))
    config = MokaConfig(r=6, shapes=(plan,))
    rng = np.random.default_rng(7)
    delta = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 48))
    found = nearest_layer(delta, plan, config)
    assert found.error < 1e-7
    assert not found.layer.factor_b[0].any()


def test_rounding_scale_and_dtype_do_not_matter():
    case = BY_NAME["square"]
    delta = np.random.default_rng(8).normal(size=(64, 64))
    one = nearest_layer(delta, case.plan, case.config)
    for other in (
        nearest_layer(delta * 1e-20, case.plan, case.config),
        nearest_layer(delta * 1e20, case.plan, case.config),
    ):
        assert other.error == pytest.approx(one.error, abs=1e-6)
    half = delta.astype(np.float16)
    assert nearest_layer(half, case.plan, case.config).error == pytest.approx(one.error, abs=1e-3)


def test_large_matrices_take_an_iteration_and_agree_with_lapack(monkeypatch):
    import conversion.nearest

    rng = np.random.default_rng(9)
    matrix = rng.normal(size=(90, 5)) * 0.8 ** np.arange(5) @ rng.normal(size=(5, 100))
    matrix += 0.01 * rng.normal(size=matrix.shape)
    a, b = _truncated_svd(matrix, 3)
    monkeypatch.setattr(conversion.nearest, "WHOLE_SVD", 8)
    for approximate, rtol in ((_truncated_svd, 1e-9), (_leading, 1e-9)):
        c, d = approximate(matrix, 3)
        np.testing.assert_allclose(c @ d.T, a @ b.T, atol=rtol * np.linalg.norm(matrix))
        np.testing.assert_allclose(d.T @ d, np.eye(3), atol=1e-12)


@pytest.mark.parametrize("rank", [3, 256], ids=["a LoRA", "full rank"])
def test_several_shapes_take_no_svd_of_a_whole_matrix_and_come_as_near(monkeypatch, rank):
    """Where R is large for its terms. Measured: 7e-6 farther for the LoRA, 1.3e-5 nearer for the other one."""
    import conversion.nearest

    config = MokaConfig(r=4, num_shapes=2)
    rng = np.random.default_rng(10)
    delta = rng.normal(size=(256, rank)) @ rng.normal(size=(rank, 256))
    plan = plan_layer(config, 256, 256)
    with monkeypatch.context() as patch:
        patch.setattr(conversion.nearest, "_leading", _truncated_svd)
        exact = nearest_layer(delta, plan, config)
        patch.setattr(conversion.nearest, "_leading", _leading)
        patch.setattr(conversion.nearest, "_truncated_svd", None)
        found = nearest_layer(delta, plan, config)
    assert found.history[0] < exact.history[0] + 1e-3  # measured: 1.6e-4
    assert found.error < exact.error + 3e-4


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (np.ones((4, 5)), "delta: expected shape (4, 6), the plan's; got (4, 5)"),
        (np.full((4, 6), np.nan), "delta: expected finite numbers; it has NaN"),
        (np.full((4, 6), np.inf), "delta: expected finite numbers; it has NaN"),
    ],
)
def test_refusals(delta, message):
    config = MokaConfig(r=2, num_shapes=1)
    with pytest.raises(AdapterError) as caught:
        nearest_layer(delta, plan_layer(config, 4, 6), config)
    assert message in str(caught.value)
