"""The mixture of Kronecker products as pure JAX functions: its coefficients, ΔW, and ΔW x without ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moka_core import ConfigError, LayerPlan, MokaConfig, ShapeGroup
from moka_core.config import Factor, Identity
from moka_core.oracle import stable_factor
from moka_jax.contraction import axes

# Up to so many copies, ΔW of a group is formed elementwise. Measured on 2 CPU cores at 1024x4096, elementwise and as a
# product: 8 copies 13 and 21 ms, 12: 22 and 27, 16: 40 and 28, 24: 75 and 21, 32: 124 and 24; at 2048x2048, 128 copies:
# 4.6 s and 29 ms. Compiled at 576x576, 2000 copies: 10 s and 0.2 s.
UNROLLED = 16


def coefficients(plan: LayerPlan, config: MokaConfig, gate_logits: jax.Array | None) -> list[jax.Array]:
    """scale·α_i·c_i of every term, one array (copies,) a shape group; α = softmax(gate_logits) or 1/r.

    In float32 at least: the softmax of bfloat16 logits is not rounded before it is multiplied.
    """
    if config.gate == "softmax":
        if gate_logits is None:
            raise ConfigError("gate 'softmax' needs gate_logits of shape (terms,); got None")
        alpha = jax.nn.softmax(gate_logits.astype(jnp.promote_types(gate_logits.dtype, jnp.float32)))
    else:
        alpha = jnp.full((plan.terms,), 1.0 / plan.terms)  # float64 where that is switched on
    result, start = [], 0
    for group in plan.groups:
        constant = config.scale * stable_factor(config, group.shape)
        result.append(constant * alpha[start : start + group.copies])
        start += group.copies
    return result


def delta_weight(
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[jax.Array],
    factor_b: Sequence[jax.Array],
    gate_logits: jax.Array | None,
) -> jax.Array:
    """ΔW = Σ_i scale·α_i·c_i·(A_i ⊗ B_i), (out, in), in the factors' dtype.

    Args:
        factor_a: for each group (copies, a_out, a_in); empty if A is the fixed identity.
        factor_b: for each group (copies, b_out, b_in); empty if B is the fixed identity.
        gate_logits: (terms,), or None for a uniform gate.
    """
    return form_delta(plan, config.identity, coefficients(plan, config, gate_logits), factor_a, factor_b)


def form_delta(
    plan: LayerPlan,
    identity: Identity,
    weights: Sequence[jax.Array],
    factor_a: Sequence[jax.Array],
    factor_b: Sequence[jax.Array],
) -> jax.Array:
    """ΔW[p·b_out + i, q·b_in + j] = Σ_c weights[c]·A[c, p, q]·B[c, i, j], summed over the groups.

    Elementwise, and not as a product with inner dimension `copies`: a compiler fuses it with the decoding of the
    weight that ΔW is added to, and nothing but the sum is written. That is a line of the program for each copy, so a
    group of more than `UNROLLED` is a product.
    """
    total = None
    blocks: Any
    for index, (group, weight) in enumerate(zip(plan.groups, weights, strict=True)):
        shape = group.shape
        if identity == "none" and group.copies > UNROLLED:
            a, b = _scaled(weight, factor_a[index]), factor_b[index]
            blocks = jnp.einsum("cpq,cij->piqj", a, b, precision=jax.lax.Precision.HIGHEST)
        elif identity == "none":
            a, b = _spread(_scaled(weight, factor_a[index]), factor_b[index])
            blocks = sum(a[copy][:, None] * b[copy][None] for copy in range(group.copies))
        elif identity == "a":
            diagonal = jnp.eye(shape.a_out, dtype=bool)[:, None, :, None]
            blocks = jnp.where(diagonal, weighted_sum(weight, factor_b[index])[None, :, None, :], 0)
        else:
            diagonal = jnp.eye(shape.b_out, dtype=bool)[None, :, None, :]
            blocks = jnp.where(diagonal, weighted_sum(weight, factor_a[index])[:, None, :, None], 0)
        delta = jnp.reshape(blocks, (plan.out_features, plan.in_features))
        total = delta if total is None else total + delta
    assert total is not None  # a plan has at least one group
    return total


def _spread(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A and B with axes such that A[c][:, None]·B[c][None] is A_c ⊗ B_c in the order of its entries.

    On a CPU both have one last axis of length in, A's entries repeated and B's rows repeated, so that the loop over it
    reads all arrays in order: 1.7 times as fast. They are repeated by a product with zeros and ones, which is exact,
    since XLA would merge a `jnp.repeat` into the loop again.
    """
    if jax.default_backend() != "cpu":
        return a[:, :, :, None], b[:, :, None, :]
    a_in, b_in = a.shape[-1], b.shape[-1]
    repeat = np.repeat(np.eye(a_in), b_in, axis=1).astype(a.dtype)
    tile = np.tile(np.eye(b_in), (1, a_in)).astype(b.dtype)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("cpq,qn->cpn", a, repeat, precision=exact), jnp.einsum("cij,jn->cin", b, tile, precision=exact)


def apply_factored(
    x: jax.Array,
    plan: LayerPlan,
    identity: Identity,
    first: Sequence[Factor],
    weights: Sequence[jax.Array],
    factor_a: Sequence[jax.Array],
    factor_b: Sequence[jax.Array],
) -> jax.Array:
    """Σ over the groups of ravel(Σ_c weights[c]·A_c X B_cᵀ), each row of x being X (a_in, b_in).

    Args:
        first: for each group, the factor that meets x first.
    """
    lead = axes(x)
    total = None
    for index, (group, weight) in enumerate(zip(plan.groups, weights, strict=True)):
        folded = fold_in(x, group)
        if identity == "none":
            a, b = _scaled(weight, factor_a[index]).astype(x.dtype), factor_b[index].astype(x.dtype)
            half = half_product(folded, first[index], a, b)
            second = f"{lead}qci,cpq->{lead}pi" if first[index] == "b" else f"{lead}pcj,cij->{lead}pi"
            y = jnp.einsum(second, half, a if first[index] == "b" else b)
        elif identity == "a":
            y = jnp.einsum(f"{lead}qj,ij->{lead}qi", folded, weighted_sum(weight, factor_b[index]).astype(x.dtype))
        else:
            y = jnp.einsum(f"{lead}qj,pq->{lead}pj", folded, weighted_sum(weight, factor_a[index]).astype(x.dtype))
        y = y.reshape(*x.shape[:-1], plan.out_features)
        total = y if total is None else total + y
    assert total is not None
    return total


def half_product(folded: jax.Array, first: Factor, a: jax.Array, b: jax.Array) -> jax.Array:
    """H = X B_cᵀ, (..., a_in, copies, b_out), if B comes first; H = A_c X, (..., a_out, copies, b_in), if A does."""
    lead = axes(folded, 2)
    if first == "b":
        return jnp.einsum(f"{lead}qj,cij->{lead}qci", folded, b)
    return jnp.einsum(f"{lead}qj,cpq->{lead}pcj", folded, a)


def weighted_sum(weight: jax.Array, factor: jax.Array) -> jax.Array:
    """Σ_c weight[c]·factor[c]: the one block of a group whose other factor is the same identity for all copies."""
    return jnp.einsum("c,cij->ij", weight.astype(factor.dtype), factor)


def fold_in(x: jax.Array, group: ShapeGroup) -> jax.Array:
    """x (..., in) as X (..., a_in, b_in)."""
    return x.reshape(*x.shape[:-1], group.shape.a_in, group.shape.b_in)


def fold_out(y: jax.Array, group: ShapeGroup) -> jax.Array:
    """y (..., out) as Y (..., a_out, b_out)."""
    return y.reshape(*y.shape[:-1], group.shape.a_out, group.shape.b_out)


def _scaled(weight: jax.Array, factor: jax.Array) -> jax.Array:
    return weight.astype(factor.dtype)[:, None, None] * factor
