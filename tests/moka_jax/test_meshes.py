"""Gradients on several devices, simulated on one CPU: the input sharded, weights and adapters on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moka_core import MokaConfig, plan_layer, quantise_nf4
from moka_core.config import Identity
from moka_core.execution import Execution
from moka_jax import MokaLinear, MokaParam, Nf4Linear
from tests.cases import random_factors

# Sums over tokens in another order; measured 8e-6 for the logits, whose gradient is a difference of large sums, and
# below 2e-6 for all else. A sum that is forgotten is off by 1.
LIMIT = 3e-5
TOKENS, OUT, IN = (4, 6), 48, 64
EXECUTIONS: list[tuple[Identity, Execution]] = [("none", "factored"), ("none", "merged"), ("a", "factored")]


def layer_of(identity: Identity) -> MokaLinear:
    config = MokaConfig(r=4, num_shapes=2 if identity == "none" else 1, identity=identity, dropout=0.0)
    rng = np.random.default_rng(0)
    base = Nf4Linear.from_nf4(quantise_nf4(rng.standard_normal((OUT, IN)).astype(np.float32)))
    plan = plan_layer(config, OUT, IN)
    layer = MokaLinear(base, plan, config, key=jax.random.key(0))
    layer.set_factors([random_factors(plan, config, rng)])
    return layer


def on_automatic_axes(*arguments: Any) -> Any:
    return on_mesh(jax.sharding.AxisType.Auto, jax.P("data"), *arguments)


def on_explicit_axes(*arguments: Any) -> Any:
    return on_mesh(jax.sharding.AxisType.Explicit, jax.P("data"), *arguments)


def features_on_explicit_axes(*arguments: Any) -> Any:
    return on_mesh(jax.sharding.AxisType.Explicit, jax.P(None, None, "data"), *arguments)


def on_mesh(
    kind: jax.sharding.AxisType, spec: jax.P, loss: Callable[..., Any], trained: Any, x: jax.Array, frozen: Any
) -> Any:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.NamedSharding(mesh, spec))
        return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x, frozen))


def inside_shard_map(loss: Callable[..., Any], trained: Any, x: jax.Array, frozen: Any) -> Any:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P(), jax.P("data"), jax.P())
    sharded = jax.shard_map(
        lambda *arguments: jax.lax.psum(loss(*arguments), "data"), mesh=mesh, in_specs=specs, out_specs=jax.P()
    )
    return jax.device_get(jax.jit(jax.grad(sharded, argnums=(0, 1)))(trained, x, frozen))


@pytest.mark.parametrize("where", [on_automatic_axes, on_explicit_axes, features_on_explicit_axes, inside_shard_map])
@pytest.mark.parametrize(("identity", "execution"), EXECUTIONS)
def test_gradients_are_those_of_one_device(identity, execution, where):
    assert jax.device_count() >= 4, "tests/conftest.py asks for 4 devices"
    graphdef, trained, frozen = nnx.split(layer_of(identity), MokaParam, ...)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((*TOKENS, IN)), jnp.float32)

    def loss(trained, x, frozen):
        return jnp.sum(nnx.merge(graphdef, trained, frozen)(x, execution=execution) ** 2)

    expected = jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, x, frozen))
    found = jax.tree.leaves(where(loss, trained, x, frozen))
    assert len(expected) == len(found) > 2
    for one, several in zip(expected, found, strict=True):
        scale = float(np.abs(one).max())
        assert scale > 1e-3
        np.testing.assert_allclose(several, one, rtol=0, atol=LIMIT * scale)
