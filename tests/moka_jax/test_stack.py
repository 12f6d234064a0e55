"""The scan over stacked layers against a plain Python loop over the same layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moka_core import MokaConfig
from moka_jax import MokaParam, attach, with_dropout_key
from moka_jax.stack import Stack
from tests.moka_jax.toys import randomise

LAYERS = 4


class Block(nnx.Module):
    """Not symmetric in anything: the order of the layers and of the arguments shows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, own, shared):
        y = jnp.tanh(self.inner(x) * shared)
        return x + (y if own is None else own * y), y.sum()


def looped(stack: Stack, x, shared, per_layer):
    graphdef, state = nnx.split(stack.block)
    sums = []
    for layer in range(stack.length):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], state))
        x, y = block(x, None if per_layer is None else per_layer[layer], shared)
        sums.append(y)
    return x, jnp.stack(sums)


def scanned(stack: Stack, x, shared, per_layer):
    return stack(x, shared, per_layer=per_layer)


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["per-layer input", "none"])
def test_values_and_gradients_are_those_of_a_loop(remat, own):
    stack = Stack.create(Block, LAYERS, rngs=nnx.Rngs(3), remat=remat)
    graphdef, state = nnx.split(stack)
    rng = np.random.default_rng(0)
    x, shared = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    per_layer = jnp.asarray(rng.uniform(0.5, 2, LAYERS), jnp.float32) if own else None

    def result(apply):
        def loss(state, x, shared):
            y, sums = apply(nnx.merge(graphdef, state), x, shared, per_layer)
            return (y * jnp.arange(8)).sum() + (sums * jnp.arange(LAYERS)).sum(), (y, sums)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(state, x, shared)

    found, expected = jax.tree.leaves(result(scanned)), jax.tree.leaves(result(looped))
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * float(jnp.abs(other).max()))


def test_layers_are_initialised_independently():
    kernels = np.asarray(Stack.create(Block, LAYERS, rngs=nnx.Rngs(3)).block.inner.kernel[...])
    assert kernels.shape == (LAYERS, 8, 8)
    for layer in range(1, LAYERS):
        assert not np.isclose(kernels[0], kernels[layer]).any()


@pytest.mark.parametrize("remat", [True, False])
def test_every_layer_of_a_stack_drops_with_its_own_mask_and_the_backward_pass_with_the_same(remat):
    config = MokaConfig(r=3, num_shapes=2, dropout=0.5, target_modules=("inner",))
    model = Model(remat)
    randomise(attach(model, config))
    with_dropout_key(model, jax.random.key(1))
    keys = model.stack.block.inner.dropout_key[...]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == LAYERS

    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)

    def loss(apply):
        def inner(adapter):
            stack = nnx.merge(graphdef, adapter, frozen).stack
            return (apply(stack, x, jnp.float32(1), None)[0] * jnp.arange(8)).sum()

        return jax.tree.leaves(jax.jit(jax.value_and_grad(inner))(adapter))

    for one, other in zip(loss(scanned), loss(looped), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * float(jnp.abs(other).max()))


class Model(nnx.Module):
    def __init__(self, remat: bool) -> None:
        self.stack = Stack.create(Block, LAYERS, rngs=nnx.Rngs(3), remat=remat)
