"""The product with its own backward: every schedule against the float64 oracle, and what it keeps for the backward."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion import open_base
from moka_core import ConfigError, MokaConfig, dequantise_nf4, plan_layer, quantise_nf4
from moka_core.execution import Schedule
from moka_core.oracle import dense_delta, dense_gradients
from moka_jax import MokaParam, Nf4Linear, attach, moka_apply
from moka_jax.llama import load_llama
from moka_jax.mixture import coefficients, form_delta
from moka_jax.product import Mixture, Statics, mixture_product
from tests.cases import CASES, LayerCase, random_factors, random_layer
from tests.tiny import save_tiny_llama

# numbers and memory of the code as users compile it
pytestmark = pytest.mark.usefixtures("optimised")

TOKENS, DROPOUT = 37, 0.2
# Relative error ‖a-b‖/‖b‖ of an array, the factors of one kind in a layer being one array. Measured over 20 seeds x all
# cases x all schedules, with dropout and with a packed base: y 2.4e-7, x 2.2e-7, factor_a 3.5e-7, factor_b 7.2e-7. The
# logits' gradient is a difference of sums that nearly cancel: 2.5e-6, above 1e-6 in 2 of 100 layers. By JAX's own
# differentiation it is 2.9e-6, with <P, A> summed in twice the precision 1.4e-6; see docs/performance.md.
FLOAT32 = {"y": 1e-6, "x": 1e-6, "factor_a": 1e-6, "factor_b": 1e-6, "gate_logits": 5e-6}
# Measured over 5 seeds: 5.8e-3, 5.2e-3, 5.2e-3, 4.4e-3, 2.2e-2; bfloat16 rounds by up to 3.9e-3.
BFLOAT16 = {"y": 1.2e-2, "x": 1.2e-2, "factor_a": 1.2e-2, "factor_b": 1.2e-2, "gate_logits": 5e-2}


def schedules(case: LayerCase) -> list[Schedule]:
    """Every way to compute this case: forward and gradient, with either factor first where halves are taken."""
    groups = len(case.plan.groups)
    if case.config.identity != "none":
        return [Schedule(forward=way, gradient="factored", first=("b",) * groups) for way in ("factored", "merged")]
    chosen = [
        ("factored", "factored", "a"),
        ("factored", "factored", "b"),
        ("factored", "merged", "a"),
        ("merged", "factored", "b"),
        ("merged", "merged", "b"),
    ]
    return [Schedule(forward=way, gradient=gradient, first=(first,) * groups) for way, gradient, first in chosen]


def statics_of(case: LayerCase, schedule: Schedule) -> Statics:
    return Statics(plan=case.plan, identity=case.config.identity, schedule=schedule, keep_rate=1 - DROPOUT)


def mixture_of(case: LayerCase, tensors: dict[str, jax.Array]) -> Mixture:
    factors = [[value for name, value in tensors.items() if name.startswith(f"factor_{f}.")] for f in "ab"]
    return Mixture(coefficients(case.plan, case.config, tensors.get("gate_logits")), *factors)


def base_of(case: LayerCase, kind: str) -> tuple[dict[str, jax.Array] | None, np.ndarray]:
    """The arrays of a frozen weight, and the weight."""
    weight = np.random.default_rng(9).standard_normal((case.out_features, case.in_features)).astype(np.float32)
    if kind == "dense":
        return {"kernel": jnp.asarray(weight.T)}, weight
    if kind == "packed":
        packed = quantise_nf4(weight)
        return Nf4Linear.from_nf4(packed).arrays(), dequantise_nf4(packed)
    return None, np.zeros_like(weight)


def kinds(named: dict[str, Any]) -> dict[str, np.ndarray]:
    """One float64 vector for y, x, the gates, and all factors of one kind."""
    gathered: dict[str, list[np.ndarray]] = {}
    for name, array in named.items():
        gathered.setdefault(name.partition(".")[0], []).append(np.asarray(array, np.float64).ravel())
    return {kind: np.concatenate(arrays) for kind, arrays in gathered.items()}


def errors_of(
    case: LayerCase, schedule: Schedule, seeds: range, *, dropout=False, base="none", dtype=jnp.float32
) -> dict[str, float]:
    """The largest relative error over the seeds of the output and of every gradient, by kind."""
    statics = statics_of(case, schedule)
    arrays, weight = base_of(case, base)

    @jax.jit
    def both(x, keep, tensors, dy):
        def run(x, tensors):
            return mixture_product(statics, x, keep, arrays, mixture_of(case, tensors))

        y, pull = jax.vjp(run, x, tensors)
        return y, *pull(dy)

    worst: dict[str, float] = {}
    for seed in seeds:
        layer, rng = random_layer(case, seed=seed), np.random.default_rng(1000 + seed)
        x = rng.standard_normal((TOKENS, case.in_features)).astype(dtype)
        dy = rng.standard_normal((TOKENS, case.out_features)).astype(dtype)
        keep = rng.random(x.shape) >= DROPOUT if dropout else None
        y, dx, gradients = both(x, keep, dict(layer.tensors()), dy)
        assert (y.dtype, dx.dtype) == (dtype, dtype)
        assert {str(gradient.dtype) for gradient in gradients.values()} == {"float32"}
        x, dy = x.astype(np.float64), dy.astype(np.float64)
        dropped = x if keep is None else np.where(keep, x / (1 - DROPOUT), 0)
        expected = {
            "y": dropped @ dense_delta(layer, case.config).T + x @ weight.T,
            **dense_gradients(layer, case.config, dropped, dy),
        }
        if keep is not None:
            expected["x"] = np.where(keep, expected["x"] / (1 - DROPOUT), 0)
        expected["x"] = expected["x"] + dy @ weight
        found, wanted = kinds({"y": y, "x": dx, **gradients}), kinds(expected)
        assert found.keys() == wanted.keys()
        for kind, array in wanted.items():
            if kind == "gate_logits" and layer.plan.terms == 1:  # the softmax of one number is constant
                assert not array.any()
                assert np.abs(found[kind]).max() < 1e-4
                continue
            error = np.linalg.norm(found[kind] - array) / np.linalg.norm(array)
            worst[kind] = float(np.maximum(worst.get(kind, 0.0), error))  # max() would pass over a NaN
    return worst


def above(worst: dict[str, float], limits: dict[str, float]) -> dict[str, float]:
    return {kind: error for kind, error in worst.items() if not error <= limits[kind]}


EVERY_WAY = [
    pytest.param(case, schedule, id=f"{case.name}-{schedule.forward}-{schedule.gradient}-{schedule.first[0]}")
    for case in CASES
    for schedule in schedules(case)
]


@pytest.mark.parametrize(("case", "schedule"), EVERY_WAY)
def test_output_and_all_gradients_match_the_float64_oracle(case, schedule):
    worst = errors_of(case, schedule, range(3), dropout=True)
    assert above(worst, FLOAT32) == {}


def test_a_nan_does_not_pass(monkeypatch):
    """The guard above can fail."""
    right, case = mixture_product, CASES[0]
    monkeypatch.setitem(globals(), "mixture_product", lambda *arguments: right(*arguments) * jnp.nan)
    assert above(errors_of(case, schedules(case)[0], range(1)), FLOAT32).keys() >= {"y", "x"}


@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_a_merged_product_with_a_frozen_weight_matches_the_float64_oracle(case, base):
    (schedule,) = [way for way in schedules(case) if (way.forward, way.gradient) == ("merged", "factored")]
    assert above(errors_of(case, schedule, range(1), base=base), FLOAT32) == {}


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_bfloat16_is_as_near_as_its_rounding_allows(case):
    for schedule in schedules(case)[::2]:
        assert above(errors_of(case, schedule, range(1), dropout=True, dtype=jnp.bfloat16), BFLOAT16) == {}


def test_the_same_mask_gives_the_same_numbers_in_every_execution():
    case = next(case for case in CASES if case.name == "stable scaling")
    layer, rng = random_layer(case), np.random.default_rng(0)
    config = dataclasses.replace(case.config, dropout=0.5)
    x = rng.standard_normal((2, 9, case.in_features)).astype(np.float32)
    keep = rng.random(x.shape) < 0.5
    given = (case.plan, config, layer.factor_a, layer.factor_b, layer.gate_logits)
    expected = np.where(keep, 2 * x.astype(np.float64), 0) @ dense_delta(layer, config).T
    for execution in ("factored", "merged", "auto", None):
        y = moka_apply(jnp.asarray(x), *given, execution=execution, keep=keep)
        assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)
    without = moka_apply(jnp.asarray(x), *given)
    assert np.linalg.norm(without - expected) > 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("base", ["none", "packed"])
@pytest.mark.parametrize("name", ["square", "identity a"])
def test_only_the_input_the_mask_and_the_factors_are_kept_for_the_backward(name, base, dropout):
    """No ΔW, no decoded weight, no half product, nothing of tokens x in x copies."""
    case = next(case for case in CASES if case.name == name)
    arrays, _ = base_of(case, base)
    tensors = {name: jnp.asarray(array) for name, array in random_layer(case).tensors()}
    x = jnp.ones((TOKENS, case.in_features))
    keep = jnp.ones(x.shape, bool) if dropout else None
    for schedule in schedules(case):
        if base != "none" and (schedule.forward == "factored" or dropout):
            continue
        statics = statics_of(case, schedule)

        def run(x, mixture, statics=statics):
            return mixture_product(statics, x, keep, arrays, mixture)

        mixture = mixture_of(case, tensors)
        _, pull = jax.vjp(run, x, mixture)
        kept = {id(leaf) for leaf in jax.tree.leaves(pull)}
        allowed = {id(leaf) for leaf in jax.tree.leaves((x, keep, arrays, mixture))}
        assert kept <= allowed, "something was kept that is no input"
        assert id(x) in kept


def test_a_frozen_packed_layer_keeps_no_decoded_weight():
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    layer, x = Nf4Linear.from_nf4(quantise_nf4(weight)), jnp.ones((5, 64))
    _, pull = jax.vjp(layer, x)
    assert max(leaf.nbytes for leaf in jax.tree.leaves(pull)) < weight.nbytes
    decoded = np.asarray(layer.decoded(), np.float64)
    dy = np.random.default_rng(1).standard_normal((5, 48)).astype(np.float32)
    (dx,) = pull(jnp.asarray(dy))
    np.testing.assert_allclose(dx, dy @ decoded, rtol=0, atol=1e-6 * np.abs(dy @ decoded).max())


def test_whoever_trains_the_base_too_gets_its_true_gradient():
    """The base is frozen by not being asked for, never by a gradient of zero."""
    case = next(case for case in CASES if case.name == "tall")
    arrays, _ = base_of(case, "dense")
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((5, case.in_features)), rng.standard_normal((5, case.out_features))
    x, dy = x.astype(np.float32), dy.astype(np.float32)
    mixture = mixture_of(case, dict(random_layer(case).tensors()))
    merged = next(schedule for schedule in schedules(case) if schedule.forward == "merged")
    _, pull = jax.vjp(lambda arrays: mixture_product(statics_of(case, merged), x, None, arrays, mixture), arrays)
    (gradient,) = pull(dy)
    np.testing.assert_allclose(gradient["kernel"], x.T @ dy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (2, 1, 3), (1, 2, *(1,) * 8)], ids=str)
def test_leading_axes_are_kept_and_do_not_change_the_numbers(lead):
    for case, dropout in ((CASES[7], True), (CASES[13], False), (CASES[14], True)):
        mixture = mixture_of(case, dict(random_layer(case).tensors()))
        rng = np.random.default_rng(3)
        x = rng.standard_normal((*lead, case.in_features)).astype(np.float32)
        dy = rng.standard_normal((*lead, case.out_features)).astype(np.float32)
        keep = rng.random(x.shape) < 0.5 if dropout else None
        flat = [None if array is None else array.reshape(-1, array.shape[-1]) for array in (x, keep, dy)]
        for schedule in schedules(case)[::3]:
            statics = statics_of(case, schedule)

            @jax.jit
            def both(x, keep, dy, mixture, statics=statics):
                y, pull = jax.vjp(lambda x, m: mixture_product(statics, x, keep, None, m), x, mixture)
                return y, pull(dy)

            y, gradients = both(x, keep, dy, mixture)
            flat_y, flat_gradients = both(*flat, mixture)
            assert y.shape == dy.shape
            np.testing.assert_allclose(y.reshape(flat_y.shape), flat_y, rtol=1e-5, atol=1e-5)
            for found, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(flat_gradients), strict=True):
                scale = float(np.abs(expected).max())
                np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=1e-5 * scale)


def test_it_can_be_differentiated_twice_in_reverse():
    """The backward is JAX code too: the gradient of a gradient is right, not an error and not zero."""
    case = next(case for case in CASES if case.name == "unequal copies")
    mixture = mixture_of(case, dict(random_layer(case).tensors()))
    x = jnp.asarray(np.random.default_rng(4).standard_normal((5, case.in_features)), jnp.float32)

    def squared_gradient(x, run):
        inner = jax.grad(lambda mixture: jnp.sum(run(x, mixture) ** 2))(mixture)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(inner))

    def plain(x, mixture):
        return x @ form_delta(case.plan, case.config.identity, *mixture).T

    twice = jax.jit(jax.grad(squared_gradient), static_argnums=1)
    expected = twice(x, plain)
    for schedule in schedules(case)[::3]:
        statics = statics_of(case, schedule)
        found = twice(x, lambda x, m, s=statics: mixture_product(s, x, None, None, m))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


def test_bad_input_is_refused():
    config = MokaConfig(r=2, num_shapes=1, dropout=0.0)
    plan = plan_layer(config, 16, 12)
    layer = random_factors(plan, config, np.random.default_rng(0))
    x = jnp.ones((3, 12))
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'fast'"):
        moka_apply(x, plan, config, layer.factor_a, layer.factor_b, layer.gate_logits, execution="fast")
    with pytest.raises(ConfigError, match="gate 'softmax' needs gate_logits"):
        moka_apply(x, plan, config, layer.factor_a, layer.factor_b, None)
    with pytest.raises(ConfigError, match=r"x: expected \(..., 12\); got \(3, 16\)"):
        moka_apply(jnp.ones((3, 16)), plan, config, layer.factor_a, layer.factor_b, layer.gate_logits)
    with pytest.raises(
        ConfigError, match="x: expected a floating dtype, in which the products are computed; got int32"
    ):
        moka_apply(jnp.ones((3, 12), jnp.int32), plan, config, layer.factor_a, layer.factor_b, layer.gate_logits)
    with pytest.raises(ConfigError, match=r"keep: expected bool of shape \(3, 12\); got float32 of shape \(3, 12\)"):
        moka_apply(x, plan, config, layer.factor_a, layer.factor_b, layer.gate_logits, keep=jnp.ones((3, 12)))


@pytest.mark.parametrize("remat", [True, False])
def test_depth_adds_no_dense_weight_to_the_memory_of_a_step(remat, tmp_path):
    """W and W + ΔW live for the layer that is being computed, forward and backward, and not until the backward.

    Measured: 4 KB a layer with recomputation and 97 KB without, where the dense weights of a layer are 492 KB.
    """

    def temporary(layers: int) -> int:
        folder = save_tiny_llama(tmp_path / str(layers), num_hidden_layers=layers)
        model = attach(load_llama(open_base(folder), remat=remat), MokaConfig(dropout=0.0, execution="merged"))
        graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)

        def loss(adapter, frozen, tokens):
            return jnp.sum(nnx.merge(graphdef, adapter, frozen)(tokens) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(adapter, frozen, jnp.ones((1, 8), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192)
    assert (temporary(6) - temporary(2)) / 4 < dense / 4
