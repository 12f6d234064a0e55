"""The JAX side of a parity check: see `moka_core.probe.Probe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moka_core import Adapter
from moka_core.probe import AdamW, Batch, FrozenTensor
from moka_jax.attach import import_adapter
from moka_jax.linear import MokaLinear, MokaParam, frozen_arrays
from moka_jax.llama.load import BaseTensors, load_llama
from moka_jax.llama.model import Llama
from moka_jax.llama.trace import LlamaTrace
from moka_jax.nf4 import Nf4Linear, frozen_weight
from moka_jax.sites import Path, Site, linear_sites


class JaxProbe:
    """Our LLaMA with an adapter on it, in float32.

    Args:
        allow_other_base: take an adapter that was trained on another base.

    Holds: `model` has the adapter as it is now; what is changed there, every method sees.
    """

    label = "JAX"

    def __init__(self, base: BaseTensors, adapter: Adapter, *, allow_other_base: bool = False) -> None:
        self.model: Llama = import_adapter(load_llama(base), adapter, allow_other_base=allow_other_base)  # type: ignore[assignment]
        self._graphdef: nnx.GraphDef = nnx.graphdef(self.model)
        # on the base's device by name, as what a step returns will be: a function is compiled anew for arrays that are
        # there by default only
        trained, frozen = self._states()
        nnx.update(self.model, jax.device_put(trained, jax.tree.leaves(frozen)[0].sharding))
        self._logits = jax.jit(lambda adapter, frozen, tokens: nnx.merge(self._graphdef, adapter, frozen)(tokens))
        self._trace = LlamaTrace(self.model)
        self._gradients = jax.jit(jax.value_and_grad(self._loss))
        self._of_layer: dict[tuple[Path, str], Callable[[nnx.State], jax.Array]] = {}

    def frozen(self) -> list[str]:
        return list(self._tensors)

    def frozen_tensor(self, name: str) -> FrozenTensor:
        site, index = self._tensors[name]
        if isinstance(site, nnx.Variable):
            return FrozenTensor(value=np.asarray(site[...] if index is None else site[...][index]))
        value = self._layer_value(site, index, site.base, "weight", _weight)
        packed = site.base.to_nf4(index) if isinstance(site.base, Nf4Linear) else None
        return FrozenTensor(value=value, packed=packed)

    def adapted(self) -> list[str]:
        return list(self._adapted)

    def delta(self, path: str) -> np.ndarray:
        site, index = self._adapted[path]
        return self._layer_value(site, index, site.module, "delta", MokaLinear.delta)

    def trace(self, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for name, output in self._trace(jnp.asarray(tokens)):
            yield name, np.asarray(output)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(*self._states(), jnp.asarray(tokens)))

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradient = self._gradients(*self._states(), *_arrays(batch))
        return float(loss), self._by_name(gradient)

    def train(self, batches: Sequence[Batch], optimiser: AdamW) -> list[float]:
        settings = optimiser
        update = optax.adamw(
            settings.learning_rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
        )

        @jax.jit
        def apply(gradient: nnx.State, moments: Any, adapter: nnx.State) -> tuple[Any, Any]:
            changes, moments = update.update(gradient, moments, adapter)
            return optax.apply_updates(adapter, changes), moments

        adapter, frozen = self._states()
        moments, losses = update.init(adapter), []
        for batch in batches:
            # the compiled function of `gradients`, which costs far more to compile than to run
            loss, gradient = self._gradients(adapter, frozen, *_arrays(batch))
            adapter, moments = apply(gradient, moments, adapter)
            losses.append(float(loss))
        nnx.update(self.model, adapter)
        return losses

    def _states(self) -> tuple[nnx.State, nnx.State]:
        """What is trained, and what is frozen."""
        parts: Any = nnx.split(self.model, MokaParam, ...)
        return parts[1], parts[2]

    def _loss(self, adapter: nnx.State, frozen: nnx.State, tokens: jax.Array, learned: jax.Array) -> jax.Array:
        logits = nnx.merge(self._graphdef, adapter, frozen)(tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        weights = learned[:, 1:].astype(losses.dtype)
        return (losses * weights).sum() / weights.sum()

    @cached_property
    def _tensors(self) -> dict[str, tuple[Any, int | None]]:
        """Where every frozen tensor stands, by its name in a checkpoint, with the layer if it is one of a stack."""
        inner = self.model.model
        found: dict[str, tuple[Any, int | None]] = {
            "model.embed_tokens.weight": (inner.embed_tokens.embedding, None),
            "model.norm.weight": (inner.norm.weight, None),
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for index in range(inner.layers.length):
                found[f"model.layers.{index}.{norm}.weight"] = (getattr(inner.layers.block, norm).weight, index)
        for site in linear_sites(self.model):
            for layer, name in _layers(site):
                found[f"{name}.weight"] = (site, layer)
                if site.base.bias is not None:
                    found[f"{name}.bias"] = (site.base.bias, layer)
        return found

    @cached_property
    def _adapted(self) -> dict[str, tuple[Site, int | None]]:
        sites = [site for site in linear_sites(self.model) if isinstance(site.module, MokaLinear)]
        return {name: (site, index) for site in sites for index, name in _layers(site)}

    def _layer_value(
        self, site: Site, index: int | None, module: nnx.Module, what: str, value: Callable[[Any], jax.Array]
    ) -> np.ndarray:
        """value(module), or that of one layer of a stacked module, compiled once for all of its layers."""
        graphdef, state = nnx.split(module)
        key = (site.path, what)
        if key not in self._of_layer:
            self._of_layer[key] = jax.jit(lambda state: value(nnx.merge(graphdef, state)))
        own = state if index is None else jax.tree.map(lambda leaf: leaf[index], state)
        return np.asarray(self._of_layer[key](own))

    def _by_name(self, state: nnx.State) -> dict[str, np.ndarray]:
        """An adapter-shaped state's arrays by "<layer's path>.<tensor's name>"."""
        holder = nnx.merge(self._graphdef, state, self._states()[1])
        result: dict[str, np.ndarray] = {}
        for site in linear_sites(holder):
            if isinstance(site.module, MokaLinear):
                for index, name in _layers(site):
                    layer = site.module.to_factors(index)
                    result |= {f"{name}.{tensor}": array for tensor, array in layer.tensors()}
        return result


def _layers(site: Site) -> Iterator[tuple[int | None, str]]:
    """(which of a stack, name) of every layer of a site; None if it is no stack."""
    for index, name in enumerate(site.names):
        yield None if site.layers is None else index, name


def _weight(base: Any) -> jax.Array:
    """A linear layer's frozen weight, (out, in)."""
    return frozen_weight(frozen_arrays(base)[0], (base.out_features, base.in_features))


def _arrays(batch: Batch) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(batch.tokens), jnp.asarray(batch.learned)
