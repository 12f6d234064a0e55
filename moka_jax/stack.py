"""Layers of one kind as one block with a leading axis, applied by a scan: depth costs no compile time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class Stack(nnx.Module):
    """`length` blocks of one structure, applied one after the other.

    Holds: every variable of `block` has a leading axis of size `length`.

    Args:
        block: a module whose variables are stacked.
        length: number of layers.
        remat: recompute each layer's inside in the backward pass instead of keeping it.
    """

    def __init__(self, block: nnx.Module, length: int, *, remat: bool = True) -> None:
        self.block = block
        self.length = length
        self.remat = remat

    @classmethod
    def create(
        cls, make: Callable[[nnx.Rngs], nnx.Module], length: int, *, rngs: nnx.Rngs, remat: bool = True
    ) -> Stack:
        """A stack of independently initialised blocks."""
        keys = jax.random.split(rngs.params(), length)
        return cls(nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys), length, remat=remat)

    def __call__(self, x: jax.Array, *shared: Any, per_layer: Any = None) -> tuple[jax.Array, Any]:
        """Every layer in turn: x, y_l = block_l(x, per_layer[l], *shared).

        Returns:
            The last x, and the y of all layers stacked.
        """
        graphdef, state = nnx.split(self.block)

        def body(carry: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            layer_state, own = scanned
            return nnx.merge(graphdef, layer_state)(carry, own, *shared)

        step = jax.checkpoint(body, prevent_cse=False) if self.remat else body
        return jax.lax.scan(step, x, (state, per_layer), length=self.length)
