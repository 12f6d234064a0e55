"""Products of a layer and what their gradients need, whole on every device of a mesh."""

from __future__ import annotations

import math
import string
from typing import Any

import jax
import jax.numpy as jnp

BATCH_AXES = ("data", "fsdp")  # of a mesh: those over which a batch is split


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ with W (out, in) cast to the dtype of x."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """G = dyᵀ x, the gradient of the weight in y = x Wᵀ, in parts (shards, out, in) of which it is the sum; in float32
    at least.

    There is a part for each share of the batch on a mesh (see `batch_shards`): added up, all of G would have to go over
    the network, where the factors' gradients, which are sums over the parts too, are a thousand times smaller.
    """
    shards, lead = batch_shards(x), axes(x)
    x, dy = (array.reshape(shards, -1, *array.shape[1:]) if lead else array[None, None] for array in (x, dy))
    return sum_over_tokens(f"Z{lead or 's'}o,Z{lead or 's'}i->Zoi", dy, x)


def batch_shards(x: jax.Array) -> int:
    """Into how many parts the first axis of x, the batch, is split on a mesh with the automatic axes "data" and "fsdp".

    1 without a mesh, without these axes, or if the batch cannot be divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.auto_axes)
    return shards if x.ndim > 2 and x.shape[0] % shards == 0 else 1


def sum_over_tokens(formula: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum that sums the tokens, in float32 at least; whole on every device of a mesh with explicit axes."""
    wide = jnp.promote_types(left.dtype, jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    whole = jax.NamedSharding(mesh, jax.P()) if mesh.explicit_axes else None
    return jnp.einsum(formula, left, right, preferred_element_type=wide, out_sharding=whole)


def as_cotangent(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """The gradient with the type of its primal: summed over the axes of a `shard_map` along which only the gradient
    varies, and sharded alike on a mesh with explicit axes."""
    over = _varying(gradient) - _varying(primal)
    if over:
        gradient = jax.lax.psum(gradient, tuple(sorted(over)))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:
        gradient = jax.reshard(gradient, jax.NamedSharding(mesh, jax.typeof(primal).sharding.spec))
    return gradient


def _varying(array: jax.Array) -> frozenset[str]:
    kind: Any = jax.typeof(array)
    return kind.manual_axis_type.varying


def axes(x: jax.Array, own: int = 1) -> str:
    """Letters for all axes of x but the last `own`, none of them used for anything else in this package."""
    return ("stuvwxyz" + string.ascii_uppercase[:-1])[: x.ndim - own]
