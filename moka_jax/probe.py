"""The JAX side of a parity check: see `moka_core.probe.Probe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moka_core import Adapter, Nf4Weight
from moka_core.probe import AdamW, Batch
from moka_jax.attach import import_adapter
from moka_jax.linear import MokaLinear, MokaParam
from moka_jax.llama.load import BaseTensors, load_llama
from moka_jax.nf4 import Nf4Linear
from moka_jax.sites import Site, linear_sites


class JaxProbe:
    """Our LLaMA with an adapter on it, in float32."""

    def __init__(self, base: BaseTensors, adapter: Adapter) -> None:
        self._model = load_llama(base)
        import_adapter(self._model, adapter)
        parts: Any = nnx.split(self._model, MokaParam, ...)
        self._graphdef: nnx.GraphDef = parts[0]
        self._frozen: nnx.State = parts[2]
        # on the base's device by name, as what a step returns will be: a function is compiled anew for arrays that are
        # there by default only
        self._adapter: nnx.State = jax.device_put(parts[1], jax.tree.leaves(self._frozen)[0].sharding)
        self._logits = jax.jit(lambda adapter, frozen, tokens: nnx.merge(self._graphdef, adapter, frozen)(tokens))
        self._gradients = jax.jit(jax.value_and_grad(self._loss))

    def packed(self) -> Iterator[tuple[str, Nf4Weight, np.ndarray]]:
        for site in linear_sites(self._model):
            if isinstance(site.base, Nf4Linear):
                for index, (name, decoded) in enumerate(_each_layer(site, site.base, Nf4Linear.decoded)):
                    yield name, site.base.to_nf4(None if site.layers is None else index), decoded

    def deltas(self) -> Iterator[tuple[str, np.ndarray]]:
        for site in linear_sites(self._model):
            if isinstance(site.module, MokaLinear):
                yield from _each_layer(site, site.module, MokaLinear.delta)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(self._adapter, self._frozen, jnp.asarray(tokens)))

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradient = self._gradients(self._adapter, self._frozen, *_arrays(batch))
        return float(loss), self._by_name(gradient)

    def train(self, batches: Sequence[Batch], optimiser: AdamW) -> list[float]:
        settings = optimiser
        update = optax.adamw(
            settings.learning_rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
        )

        @jax.jit
        def apply(gradient, moments, adapter):
            changes, moments = update.update(gradient, moments, adapter)
            return optax.apply_updates(adapter, changes), moments

        moments, losses = update.init(self._adapter), []
        for batch in batches:
            # the compiled function of `gradients`, which costs far more to compile than to run
            loss, gradient = self._gradients(self._adapter, self._frozen, *_arrays(batch))
            self._adapter, moments = apply(gradient, moments, self._adapter)
            losses.append(float(loss))
        return losses

    def _loss(self, adapter: nnx.State, frozen: nnx.State, tokens: jax.Array, learned: jax.Array) -> jax.Array:
        logits = nnx.merge(self._graphdef, adapter, frozen)(tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        weights = learned[:, 1:].astype(losses.dtype)
        return (losses * weights).sum() / weights.sum()

    def _by_name(self, state: nnx.State) -> dict[str, np.ndarray]:
        """An adapter-shaped state's arrays by "<layer's path>.<tensor's name>"."""
        holder = nnx.merge(self._graphdef, state, self._frozen)
        result: dict[str, np.ndarray] = {}
        for site in linear_sites(holder):
            if isinstance(site.module, MokaLinear):
                for index, name in enumerate(site.names):
                    layer = site.module.to_factors(None if site.layers is None else index)
                    result |= {f"{name}.{tensor}": array for tensor, array in layer.tensors()}
        return result


def _each_layer(site: Site, module: nnx.Module, value: Callable[[Any], jax.Array]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, value(module)) for the module, or for each layer of a stacked one, compiled once."""
    graphdef, state = nnx.split(module)
    compute = jax.jit(lambda state: value(nnx.merge(graphdef, state)))
    for index, name in enumerate(site.names):
        own = state if site.layers is None else jax.tree.map(lambda leaf, index=index: leaf[index], state)
        yield name, np.asarray(compute(own))


def _arrays(batch: Batch) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(batch.tokens), jnp.asarray(batch.learned)
