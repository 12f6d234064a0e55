"""One adapted layer: what it computes, what is trained, and what dropout does."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moka_jax.linear
from moka_core import (
    AdapterError,
    ConfigError,
    KronShape,
    LayerPlan,
    MokaConfig,
    ShapeGroup,
    dequantise_nf4,
    plan_layer,
    quantise_nf4,
)
from moka_core.oracle import dense_delta, dense_gradients
from moka_jax import MokaLinear, MokaParam, Nf4Linear, attach, merge, with_dropout_key
from tests.cases import CASES, random_factors, random_layer
from tests.moka_jax.toys import randomise, run

# numbers of the code as users compile it
pytestmark = pytest.mark.usefixtures("optimised")

OUT, IN = 48, 64
CONFIG = MokaConfig(r=5, num_shapes=2, dropout=0.0)
EXECUTIONS = ("factored", "merged")


def weight_and_bias(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((OUT, IN)).astype(np.float32), rng.standard_normal(OUT).astype(np.float32)


def dense_base(dtype=None, param_dtype=jnp.float32) -> nnx.Linear:
    base = nnx.Linear(IN, OUT, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    weight, bias = weight_and_bias()
    base.kernel[...], base.bias[...] = jnp.asarray(weight.T, param_dtype), jnp.asarray(bias, param_dtype)
    return base


def packed_base(dtype=jnp.float32) -> Nf4Linear:
    weight, bias = weight_and_bias()
    return Nf4Linear.from_nf4(quantise_nf4(weight), bias=bias, dtype=dtype)


BASES = {"dense": dense_base, "packed": packed_base}


def make(base="dense", config=CONFIG, *, trained=True, seed=0, **arguments) -> MokaLinear:
    module = BASES[base]() if isinstance(base, str) else base
    layer = MokaLinear(module, plan_layer(config, OUT, IN), config, key=jax.random.key(seed), **arguments)
    return randomise(layer, seed) if trained else layer


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("base", BASES)
def test_output_and_adapter_gradients_are_the_oracles(base, execution):
    layer = make(base, execution=execution)
    factors = layer.to_factors()
    weight, bias = weight_and_bias()
    weight = weight if base == "dense" else dequantise_nf4(quantise_nf4(weight))
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((7, IN)).astype(np.float32), rng.standard_normal((7, OUT)).astype(np.float32)
    graphdef, adapter, frozen = nnx.split(layer, MokaParam, ...)

    @jax.jit
    def both(adapter, x):
        y, pull = jax.vjp(lambda adapter, x: nnx.merge(graphdef, adapter, frozen)(x), adapter, x)
        return y, *pull(jnp.asarray(dy))

    y, gradient, dx = both(adapter, x)
    expected = x @ (weight + dense_delta(factors, CONFIG)).T + bias
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    oracle = dense_gradients(factors, CONFIG, x, dy)
    expected_dx = oracle["x"] + dy.astype(np.float64) @ weight
    np.testing.assert_allclose(dx, expected_dx, rtol=0, atol=2e-6 * np.abs(expected_dx).max())
    for name in ("factor_a", "factor_b"):
        for group, found in gradient[name].items():
            wanted = oracle[f"{name}.{group}"]
            np.testing.assert_allclose(found[...], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    wanted = oracle["gate_logits"]
    np.testing.assert_allclose(gradient["gate_logits"][...], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES[2::5], ids=lambda case: case.name)
def test_factors_go_in_and_out_unchanged_and_are_copies(case):
    base = nnx.eval_shape(lambda: nnx.Linear(case.in_features, case.out_features, rngs=nnx.Rngs(0)))
    layer = MokaLinear(base, case.plan, case.config, key=jax.random.key(0))
    factors = random_layer(case)
    given = {name: array.copy() for name, array in factors.tensors()}
    layer.set_factors([factors])
    for _, array in factors.tensors():
        array[...] = np.nan  # what was imported is a copy
    found = dict(layer.to_factors().tensors())
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("base", BASES)
def test_the_start_is_exactly_the_base(base, execution):
    x = np.random.default_rng(2).standard_normal((3, IN)).astype(np.float32)
    expected = run(BASES[base](), x)
    for changes in ({}, {"identity": "b", "zero_factor": "a"}):
        layer = make(base, dataclasses.replace(CONFIG, **changes), trained=False, execution=execution)
        assert not np.asarray(layer.delta()).any(), changes
        if base == "dense" and execution == "merged":  # the same weight in another orientation: sums in another order
            np.testing.assert_allclose(run(layer, x), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(run(layer, x), expected)


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("drawn", ["a", "b"])
def test_copies_and_layers_are_drawn_independently_and_kaiming_uniform(drawn, layers):
    """Copies that start equal would get equal gradients, and never separate."""
    config = dataclasses.replace(CONFIG, r=12, num_shapes=3, zero_factor="b" if drawn == "a" else "a")
    layer = make(config=config, trained=False, layers=layers)
    zero, random = (layer.factor_b, layer.factor_a) if drawn == "a" else (layer.factor_a, layer.factor_b)
    assert not any(np.asarray(factor[...]).any() for factor in zero)
    copies = []
    for group, factor in zip(layer.plan.groups, random, strict=True):
        shape = group.factor_shape(drawn)
        array = np.asarray(factor[...])
        assert array.shape == (shape if layers is None else (layers, *shape))
        bound = 1 / math.sqrt(shape[-1])
        assert np.abs(array).max() <= bound
        assert np.abs(array).mean() == pytest.approx(bound / 2, rel=0.25)
        copies += list((array / bound).reshape(-1, math.prod(shape[1:])))
    for one, other in itertools.combinations(copies, 2):
        size = min(one.size, other.size)
        assert np.isclose(one[:size], other[:size], atol=1e-6).mean() < 0.1


def test_the_key_decides_the_start_and_nothing_else_does():
    first, again, other = (make(trained=False, seed=seed) for seed in (0, 0, 1))
    for one, two, three in zip(first.factor_a, again.factor_a, other.factor_a, strict=True):
        np.testing.assert_array_equal(one[...], two[...])
        assert not np.isclose(one[...], three[...]).any()


def test_the_adapter_is_exactly_what_trainers_of_lora_select():
    assert issubclass(MokaParam, nnx.LoRAParam)
    for base in BASES:
        layer = make(base)
        for kind in (MokaParam, nnx.LoRAParam):
            _, adapter, frozen = nnx.split(layer, kind, ...)
            paths = {path[0] for path, _ in nnx.to_flat_state(adapter)}
            assert paths == {"factor_a", "factor_b", "gate_logits"}
            assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"base"}
            trained = sum(leaf.size for leaf in jax.tree.leaves(adapter))
            assert trained == layer.plan.trainable(CONFIG)


@pytest.mark.parametrize(
    ("execution", "tokens", "way"),
    [("factored", 4096, "factored"), ("merged", 1, "merged"), ("auto", 1, "factored"), ("auto", 4096, "merged")],
)
def test_the_execution_that_was_asked_for_is_taken(monkeypatch, execution, tokens, way):
    """By the layer, by the config and by the call; and the schedule that is shown is the one that is computed."""
    used = []
    original = moka_jax.linear.mixture_product
    monkeypatch.setattr(moka_jax.linear, "mixture_product", lambda s, *a: used.append(s.schedule) or original(s, *a))
    x = jnp.ones((tokens, IN))
    by_layer = make(execution=execution)
    by_config = make(config=dataclasses.replace(CONFIG, execution=execution))
    other = "merged" if way == "factored" else "factored"
    by_call = make(execution=other)
    expected = by_layer(x)
    assert jnp.allclose(by_config(x), expected)
    assert jnp.allclose(by_call(x, execution=execution), expected, rtol=1e-5, atol=1e-5)
    assert [schedule.forward for schedule in used] == [way] * 3
    assert by_layer.schedule(tokens) == (used[0], way == "merged")
    assert by_call.schedule(tokens)[0].forward == other


def test_an_unknown_execution_is_refused_when_the_layer_is_made():
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'fast'"):
        make(execution="fast")


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_output_has_the_dtype_of_the_base_whatever_the_execution(x_dtype, dropout):
    bases = [
        dense_base(dtype, param_dtype)
        for dtype in (None, jnp.float32, jnp.bfloat16)
        for param_dtype in (jnp.float32, jnp.bfloat16)
    ]
    bases += [packed_base(dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    x = jax.ShapeDtypeStruct((2, IN), x_dtype)
    config = dataclasses.replace(CONFIG, dropout=dropout)
    for base, execution in itertools.product(bases, EXECUTIONS):
        graphdef, state = nnx.split(base)
        expected = jax.eval_shape(lambda state, x, g=graphdef: nnx.merge(g, state)(x), state, x).dtype
        layer = make(base, config, trained=False, execution=execution)
        if dropout:
            with_dropout_key(layer, jax.random.key(0))
        graphdef, state = nnx.split(layer)
        found = jax.eval_shape(lambda state, x, g=graphdef: nnx.merge(g, state)(x), state, x).dtype
        assert found == expected, (type(base).__name__, base.dtype, execution)


# --- dropout


def identity_layer(dropout: float, execution: str = "auto", layers: int | None = None) -> MokaLinear:
    """ΔW = I and W = 0, so that the output is what ΔW was given."""
    plan = LayerPlan(out_features=IN, in_features=IN, groups=(ShapeGroup(KronShape(1, 1, IN, IN), 1),))
    config = MokaConfig(r=1, num_shapes=1, shapes=(plan,), gate="uniform", dropout=dropout)
    base = nnx.Linear(IN, IN, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    layer = MokaLinear(base, plan, config, key=jax.random.key(0), execution=execution)
    layer.factor_a[0][...] = jnp.ones((1, 1, 1))
    layer.factor_b[0][...] = jnp.eye(IN)[None]
    return layer


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dropout_zeroes_a_share_of_the_inputs_and_keeps_the_expectation(execution):
    graphdef, state = nnx.split(identity_layer(0.25, execution))
    x = np.random.default_rng(3).uniform(1, 2, (200, IN)).astype(np.float32)
    y = jax.jit(lambda key: with_dropout_key(nnx.merge(graphdef, state), key)(x))(jax.random.key(1))
    kept = np.asarray(y) != 0
    np.testing.assert_allclose(y, np.where(kept, x / 0.75, 0), rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)  # 12,800 draws: four standard deviations are 0.015
    assert np.abs(kept.mean(axis=0) - 0.75).max() < 0.15  # no channel is always kept or dropped
    assert len({row.tobytes() for row in kept}) > 190  # every token has its own mask


@pytest.mark.parametrize("base", BASES)
def test_dropout_reaches_the_adapter_only_and_both_executions_drop_the_same(base):
    x = np.random.default_rng(4).standard_normal((6, IN)).astype(np.float32)
    config = dataclasses.replace(CONFIG, dropout=0.5)
    start = with_dropout_key(make(base, config, trained=False), jax.random.key(2))
    np.testing.assert_array_equal(run(start, x), run(BASES[base](), x))
    outputs = [
        run(with_dropout_key(make(base, config, execution=execution), jax.random.key(2)), x) for execution in EXECUTIONS
    ]
    without = run(make(base, config), x)
    scale = np.abs(without).max()
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=2e-6 * scale)
    assert np.abs(outputs[0] - without).max() > 0.1 * scale


def test_the_same_key_gives_the_same_mask_and_another_key_another():
    x = np.ones((4, IN), np.float32)
    one, again, other = (run(with_dropout_key(identity_layer(0.5), jax.random.key(seed)), x) != 0 for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert 0.3 < (one != other).mean() < 0.7


def test_every_layer_of_a_model_has_its_own_mask():
    class Two(nnx.Module):
        def __init__(self):
            self.first, self.second = identity_layer(0.5), identity_layer(0.5)

        def __call__(self, x):
            return self.first(x), self.second(x)

    graphdef, state = nnx.split(with_dropout_key(Two(), jax.random.key(7)))
    first, second = jax.jit(lambda state: nnx.merge(graphdef, state)(jnp.ones((4, IN))))(state)
    assert 0.3 < ((first != 0) != (second != 0)).mean() < 0.7


def test_without_a_key_or_with_dropout_0_nothing_is_dropped():
    x = np.random.default_rng(8).standard_normal((4, IN)).astype(np.float32)
    np.testing.assert_array_equal(run(identity_layer(0.5), x), x)
    layer = with_dropout_key(identity_layer(0.0), jax.random.key(0))
    assert layer.dropout_key is None
    np.testing.assert_array_equal(run(layer, x), x)


def test_random_factors_reach_every_entry_of_delta():
    """The measure of the tests above: an adapter that is non-zero everywhere."""
    factors = random_factors(plan_layer(CONFIG, OUT, IN), CONFIG, np.random.default_rng(0))
    assert np.abs(dense_delta(factors, CONFIG)).min() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("execution", ["factored", "auto"])
def test_a_base_that_asks_for_another_dtype_of_its_product_keeps_it(execution, dropout):
    base = nnx.Linear(IN, OUT, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    layer = make(base, dataclasses.replace(CONFIG, dropout=dropout), execution=execution)
    if dropout:
        with_dropout_key(layer, jax.random.key(0))
    x = jnp.ones((4096, IN))
    assert layer(x).dtype == base(x).dtype == jnp.float32
    with pytest.raises(ConfigError, match="preferred_element_type"):
        layer(x, execution="merged")


def test_a_base_that_multiplies_in_its_own_way_is_asked_and_not_replaced():
    """A merged weight would pass by `dot_general`; the answer must not depend on the number of tokens."""

    def doubled(x, kernel, dimensions, **options):
        return 2 * jax.lax.dot_general(x, kernel, dimensions, **options)

    def model():
        return nnx.Sequential(nnx.Linear(24, 32, dot_general=doubled, rngs=nnx.Rngs(0)))

    config = MokaConfig(r=2, num_shapes=1, target_modules=r"layers\.0")
    x = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    expected = np.asarray(model()(x))
    for execution in ("factored", "auto"):
        adapted = attach(model(), config, execution=execution)
        assert not adapted.layers[0].schedule(64)[1]
        found = np.asarray(adapted(x))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    with pytest.raises(AdapterError, match=r"layers\.0 \(dot_general\) multiplies in a way of its own"):
        merge(attach(model(), config))
    refused = model()
    with pytest.raises(
        ConfigError, match=r"layers\.0: execution: 'merged' puts W \+ ΔW in the place of W, but this base"
    ):
        attach(refused, dataclasses.replace(config, execution="merged"))
    assert type(refused.layers[0]) is nnx.Linear
    with pytest.raises(ConfigError, match=r"\(dot_general\), which that would pass by; use 'factored' or 'auto'"):
        attach(model(), config).layers[0](x, execution="merged")
