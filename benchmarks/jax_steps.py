"""A whole training step in JAX, by variant, on weights that all variants share; or on shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.harness import Call
from benchmarks.layer_jax import random_nf4, randomised
from benchmarks.models import FIVE, QV, RANK, Model
from moka_core import preset
from moka_jax import Nf4Linear, attach, with_dropout_key
from moka_jax.llama import Llama, load_llama
from moka_jax.llama.config import LlamaConfig, RopeConfig
from moka_jax.sites import Site, linear_sites, replace_module

DROPOUT = 0.1


class LoraKey(nnx.Variable):
    """The random key of one layer's dropout."""


class DroppedLora(nnx.Module):
    """base(x) + lora(dropout(x)): `nnx.LoRA` has no dropout of its own."""

    def __init__(self, base: nnx.Module, lora: nnx.LoRA, layers: int) -> None:
        self.base, self.lora, self.layers = base, lora, layers
        self.key: LoraKey | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        assert self.key is not None
        keep = jax.random.bernoulli(self.key[...], 1 - DROPOUT, x.shape)
        dropped = jnp.where(keep, x / (1 - DROPOUT), jnp.zeros((), x.dtype))
        return self.base(x) + self.lora(dropped)


@dataclass(frozen=True)
class Variant:
    """What a variant does to a model, and whether its adapter drops inputs."""

    adapt: Callable[[Llama, Model], Any] | None
    dropout: bool = False


def _moka(execution: Any = "auto", name: str = "paper") -> Callable[[Llama, Model], Any]:
    return lambda llama, model: attach(llama, preset(name, model=model.sizes), execution=execution)


VARIANTS = {
    "frozen base": Variant(None),
    "LoRA r=32 q,v": Variant(lambda llama, _: attach_lora(llama, QV)),
    "LoRA r=32 q,k,v,up,down": Variant(lambda llama, _: attach_lora(llama, FIVE)),
    "LoRA r=32 q,v, dropout": Variant(lambda llama, _: attach_lora(llama, QV, dropout=True), dropout=True),
    "MoKA auto": Variant(_moka()),
    "MoKA merged": Variant(_moka("merged")),
    "MoKA factored": Variant(_moka("factored")),
    "MoKA auto, dropout": Variant(_moka(), dropout=True),
    "MoKA_s auto": Variant(_moka(name="paper-s")),
}


def attach_lora(llama: Llama, targets: tuple[str, ...], *, dropout: bool = False) -> None:
    """Put flax's own `nnx.LoRA`, stacked over the layers, around every targeted layer; in place."""
    for site in linear_sites(llama):
        if site.path[-1] not in targets:
            continue
        out, in_ = site.dims
        keys = jax.random.split(jax.random.key(0), site.layers)
        lora = nnx.vmap(functools.partial(_lora, (in_, out), llama.dtype))(keys)
        if dropout:
            replace_module(llama, site.path, DroppedLora(site.base, lora, site.layers or 1))
        else:
            lora.base_module = nnx.data(site.base)
            replace_module(llama, site.path, lora)


def _lora(dims: tuple[int, int], dtype: Any, key: jax.Array) -> nnx.LoRA:
    return nnx.LoRA(dims[0], RANK, dims[1], dtype=dtype, rngs=nnx.Rngs(key))


def base_llama(model: Model, *, dtype: str, abstract: bool = False) -> Llama:
    """The frozen NF4 model: a folder's, or random numbers made on the device; with `abstract` shapes only."""
    if model.base is not None and not abstract:
        from conversion import open_base

        return load_llama(open_base(model.base), dtype=jnp.dtype(dtype))
    config = LlamaConfig(
        architecture=model.sizes, rope=RopeConfig(theta=500000.0), rms_norm_eps=1e-5, max_position_embeddings=8192
    )
    width = jnp.dtype(dtype)
    llama = nnx.eval_shape(lambda: Llama(config, dtype=width, rngs=nnx.Rngs(0)))
    key = jax.random.key(0, impl="rbg")
    for index, site in enumerate(linear_sites(llama)):
        if site.layers is not None:
            replace_module(llama, site.path, _packed(site, width, None if abstract else jax.random.fold_in(key, index)))
    graphdef, dense, packed = nnx.split(llama, nnx.Param, ...)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        norm = "norm" in jax.tree_util.keystr(path)
        kind = jnp.float32 if norm else width
        if abstract:
            return jax.ShapeDtypeStruct(leaf.shape, kind)
        if norm:
            return jnp.ones(leaf.shape, kind)
        return 0.02 * jax.random.normal(jax.random.fold_in(key, leaf.shape[0]), leaf.shape, kind)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, dense), packed)


def _packed(site: Site, dtype: Any, key: jax.Array | None) -> nnx.Module:
    """A stack of NF4 layers with random codes; without a key, shapes only."""
    graphdef, state = nnx.split(Nf4Linear.from_nf4(random_nf4(*site.dims), dtype=dtype))

    def stack(leaf: jax.Array) -> Any:
        shape = (site.layers, *leaf.shape)
        if key is None:
            return jax.ShapeDtypeStruct(shape, leaf.dtype)
        if leaf.dtype == jnp.uint8:
            return jax.random.bits(jax.random.fold_in(key, leaf.size), shape, jnp.uint8)
        return jnp.array(jnp.broadcast_to(leaf, shape))

    return nnx.merge(graphdef, jax.tree.map(stack, state))


class JaxStep:
    """One variant's training step: forward, backward and AdamW, compiled for (batch, length) tokens.

    The frozen base is differentiated by a zero added to its first norms, so that the backward runs through every
    layer; nothing of it is updated.

    Args:
        llama: of `base_llama`; not changed, and its arrays are shared.
        variant: a name of `VARIANTS`.
    """

    def __init__(self, llama: Llama, model: Model, variant: str, *, batch: int, length: int, remat: bool) -> None:
        chosen = VARIANTS[variant]
        llama = nnx.merge(*nnx.split(llama))
        llama.model.layers.remat = remat
        optimiser: optax.GradientTransformation = optax.adamw(1e-4)
        if chosen.adapt is None:
            optimiser = optax.set_to_zero()
            graphdef, self.frozen = nnx.split(llama)
            self.trained: Any = jnp.zeros(llama.model.layers.block.input_layernorm.weight.shape, jnp.float32)
        else:
            chosen.adapt(llama, model)
            graphdef, trained, self.frozen = nnx.split(llama, nnx.LoRAParam, ...)
            self.trained = randomised(trained)
        self.moments = optimiser.init(self.trained)
        self.tokens = jax.random.randint(jax.random.key(3), (batch, length + 1), 0, model.sizes.vocab_size)
        self.key = jax.random.key(4)

        def build(trained: Any, frozen: Any, key: jax.Array) -> Any:
            if chosen.adapt is None:
                built = nnx.merge(graphdef, frozen)
                norm = built.model.layers.block.input_layernorm
                norm.weight = nnx.Param(norm.weight[...] + trained)
                return built
            built = nnx.merge(graphdef, trained, frozen)
            return _with_keys(built, key) if chosen.dropout else built

        def step(trained: Any, moments: Any, frozen: Any, tokens: jax.Array, key: jax.Array) -> Any:
            def loss_of(trained: Any) -> jax.Array:
                logits = build(trained, frozen, key)(tokens[:, :-1])
                return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

            loss, gradient = jax.value_and_grad(loss_of)(trained)
            changes, moments = optimiser.update(gradient, moments, trained)
            return optax.apply_updates(trained, changes), moments, loss, gradient if chosen.adapt is None else None

        self.function = jax.jit(step, donate_argnums=(0, 1))

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.trained, self.moments, self.frozen, self.tokens, self.key

    def lower(self) -> Any:
        """The step lowered for these shapes; no weights are needed."""
        return self.function.lower(*self.arguments)

    def call(self) -> Call:
        """One step from where the last one ended, compiled here."""
        compiled = self.lower().compile()

        def run() -> Any:
            self.trained, self.moments, loss, _ = compiled(*self.arguments)
            return loss, self.trained

        return Call(run, jax.block_until_ready)


def _with_keys(model: nnx.Module, key: jax.Array) -> nnx.Module:
    """The model with dropout on in every adapter, masks drawn from `key`."""
    for index, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(module, DroppedLora):
            module.key = LoraKey(jax.random.split(jax.random.fold_in(key, index), module.layers))
    return with_dropout_key(model, key)
