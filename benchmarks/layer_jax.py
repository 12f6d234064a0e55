"""One linear layer in JAX, by variant: forward, and gradients by the input and by the adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.harness import Call
from benchmarks.models import RANK, layer_configs
from moka_core import Nf4Weight, plan_layer
from moka_core.nf4 import BLOCK, NESTED_BLOCK, NestedScales, dynamic_levels
from moka_jax import MokaLinear, Nf4Linear


def random_nf4(out: int, in_: int, seed: int = 0) -> Nf4Weight:
    """A doubly quantised weight of random codes; its entries are within ±0.04."""
    source = np.random.default_rng(seed)
    blocks = out * in_ // BLOCK
    scales = NestedScales(
        codes=source.integers(0, 256, blocks, dtype=np.uint8),
        absmax=np.full(-(-blocks // NESTED_BLOCK), 0.01, np.float32),
        levels=dynamic_levels(),
        offset=np.float32(0.03),
    )
    return Nf4Weight(shape=(out, in_), codes=source.integers(0, 256, out * in_ // 2, dtype=np.uint8), scales=scales)


def materialise(layer: MokaLinear, x: jax.Array) -> jax.Array:
    """W x, and beside it the product with the sum of `kron`s: what PEFT's LoKr does, for a mixture."""
    delta = sum(weight * jnp.kron(a, b) for weight, a, b in _terms(layer))
    return layer.base(x) + jnp.einsum("ti,oi->to", x, delta.astype(x.dtype))


def term_by_term(layer: MokaLinear, x: jax.Array) -> jax.Array:
    """W x + Σ_i α_i A_i X B_iᵀ, one term after the other."""
    y = layer.base(x)
    for weight, a, b in _terms(layer):
        folded = x.reshape(x.shape[0], a.shape[1], b.shape[1])
        half = jnp.einsum("tqj,ij->tqi", folded, b.astype(x.dtype))
        y = y + jnp.einsum("tqi,pq->tpi", half, (weight * a).astype(x.dtype)).reshape(y.shape)
    return y


def _terms(layer: MokaLinear) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """(α_i, A_i, B_i) of every term."""
    assert layer.gate_logits is not None
    pairs = [
        pair for a, b in zip(layer.factor_a, layer.factor_b, strict=True) for pair in zip(a[...], b[...], strict=True)
    ]
    return [(weight, a, b) for weight, (a, b) in zip(jax.nn.softmax(layer.gate_logits[...]), pairs, strict=True)]


def _run(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


class JaxLayer:
    """The variants of one layer shape, on one NF4 base.

    Args:
        dtype: of inputs and products; the adapters' parameters are float32.
    """

    def __init__(self, out: int, in_: int, dtype: str) -> None:
        self.out, self.in_, self.dtype = out, in_, jnp.dtype(dtype)
        base = Nf4Linear.from_nf4(random_nf4(out, in_), dtype=self.dtype)
        paper, blocks = layer_configs(out, in_)

        def moka(config: Any = paper, execution: Any = "auto") -> MokaLinear:
            return MokaLinear(base, plan_layer(config, out, in_), config, key=jax.random.key(0), execution=execution)

        self.variants: dict[str, tuple[Callable[[], nnx.Module], Callable[[Any, jax.Array], jax.Array]]] = {
            "frozen base": (lambda: base, _run),
            "LoRA r=32": (
                lambda: nnx.LoRA(in_, RANK, out, base_module=base, dtype=self.dtype, rngs=nnx.Rngs(0)),
                _run,
            ),
            "MoKA auto": (moka, _run),
            "MoKA factored": (lambda: moka(execution="factored"), _run),
            "MoKA merged": (lambda: moka(execution="merged"), _run),
            "MoKA_s auto": (lambda: moka(blocks), _run),
            "materialise": (moka, materialise),
            "term by term": (moka, term_by_term),
        }

    def calls(self, tokens: int, names: Sequence[str]) -> dict[str, Call]:
        """The compiled variants on one random input."""
        x, dy = (jax.random.normal(key, (tokens, size), self.dtype) for key, size in self._inputs())
        return {name: self._call(*self.variants[name], x, dy) for name in names}

    def _inputs(self) -> list[tuple[jax.Array, int]]:
        return list(zip(jax.random.split(jax.random.key(1)), (self.in_, self.out), strict=True))

    def _call(
        self,
        make: Callable[[], nnx.Module],
        apply: Callable[[Any, jax.Array], jax.Array],
        x: jax.Array,
        dy: jax.Array,
    ) -> Call:
        graphdef, trained, frozen = nnx.split(make(), nnx.LoRAParam, ...)
        trained = randomised(trained)

        @jax.jit
        def job(trained: Any, frozen: Any, x: jax.Array, dy: jax.Array) -> Any:
            y, back = jax.vjp(lambda trained, x: apply(nnx.merge(graphdef, trained, frozen), x), trained, x)
            return y, back(dy)

        compiled = job.lower(trained, frozen, x, dy).compile()
        return Call(lambda: compiled(trained, frozen, x, dy), jax.block_until_ready)


def randomised(trained: nnx.State) -> nnx.State:
    """The same state with small random numbers: a factor of zeros could be cheaper than a trained one."""
    source = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.02 * source.standard_normal(leaf.shape), leaf.dtype), trained)
