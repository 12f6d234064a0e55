"""Products of a layer and what their gradients need, whole on every device of a mesh."""

from __future__ import annotations

import string
from typing import Any

import jax
import jax.numpy as jnp


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ with W (out, in) cast to the dtype of x."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """G = dyᵀ x, (out, in), the gradient of the weight in y = x Wᵀ; in float32 at least."""
    lead = axes(x)
    return sum_over_tokens(f"{lead}o,{lead}i->oi", dy, x)


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
    return ("stuvwxyz" + string.ascii_uppercase)[: x.ndim - own]
