"""The mixture of Kronecker products as pure JAX functions: two executions, one answer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moka_core import ConfigError, LayerPlan, MokaConfig
from moka_core.oracle import stable_factor


def coefficients(plan: LayerPlan, config: MokaConfig, gate_logits: jax.Array | None) -> list[jax.Array]:
    """scale·α_i·c_i of every term, one array (copies,) a shape group; α = softmax(gate_logits) or 1/r."""
    if config.gate == "softmax":
        if gate_logits is None:
            raise ConfigError("gate 'softmax' needs gate_logits of shape (terms,); got None")
        alpha = jax.nn.softmax(gate_logits)
    else:
        alpha = jnp.full((plan.terms,), 1.0 / plan.terms, jnp.float32)
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
    """ΔW = Σ_i scale·α_i·c_i·(A_i ⊗ B_i), (out, in): for each group one product whose inner dimension is `copies`.

    Args:
        factor_a: for each group (copies, a_out, a_in); empty if A is the fixed identity.
        factor_b: for each group (copies, b_out, b_in); empty if B is the fixed identity.
        gate_logits: (terms,), or None for a uniform gate.

    Returns:
        (out, in), in the factors' dtype.
    """
    total = jnp.zeros((), jnp.float32)
    for index, (group, weight) in enumerate(zip(plan.groups, coefficients(plan, config, gate_logits), strict=True)):
        shape = group.shape
        if config.identity == "a":
            block = jnp.einsum("c,cij->ij", weight.astype(factor_b[index].dtype), factor_b[index])
            blocks = jnp.einsum("pq,ij->piqj", jnp.eye(shape.a_out, dtype=block.dtype), block)
        elif config.identity == "b":
            block = jnp.einsum("c,cpq->pq", weight.astype(factor_a[index].dtype), factor_a[index])
            blocks = jnp.einsum("pq,ij->piqj", block, jnp.eye(shape.b_out, dtype=block.dtype))
        else:
            scaled = weight.astype(factor_a[index].dtype)[:, None, None] * factor_a[index]
            blocks = jnp.einsum("cpq,cij->piqj", scaled, factor_b[index])
        total = total + blocks.reshape(plan.out_features, plan.in_features)
    return total


def factored_apply(
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[jax.Array],
    factor_b: Sequence[jax.Array],
    gate_logits: jax.Array | None,
    x: jax.Array,
) -> jax.Array:
    """x ΔWᵀ without ΔW: for each group two products for all copies at once.

    With x reshaped row-major to X (a_in, b_in), (A ⊗ B) x = ravel(A X Bᵀ): first H = X Bᵀ for all copies,
    then one product that contracts a_in and the copies together, the coefficients folded into A.

    Args:
        x: (..., in).

    Returns:
        (..., out), in the dtype of x.
    """
    lead = x.shape[:-1]
    total = jnp.zeros((), x.dtype)
    for index, (group, weight) in enumerate(zip(plan.groups, coefficients(plan, config, gate_logits), strict=True)):
        shape = group.shape
        folded = x.reshape(*lead, shape.a_in, shape.b_in)
        if config.identity == "a":
            block = jnp.einsum("c,cij->ij", weight.astype(factor_b[index].dtype), factor_b[index])
            y = jnp.einsum("...qj,ij->...qi", folded, block.astype(x.dtype))
        elif config.identity == "b":
            block = jnp.einsum("c,cpq->pq", weight.astype(factor_a[index].dtype), factor_a[index])
            y = jnp.einsum("...qj,pq->...pj", folded, block.astype(x.dtype))
        else:
            scaled = weight.astype(factor_a[index].dtype)[:, None, None] * factor_a[index]
            half = jnp.einsum("...qj,cij->...cqi", folded, factor_b[index].astype(x.dtype))
            y = jnp.einsum("...cqi,cpq->...pi", half, scaled.astype(x.dtype))
        total = total + y.reshape(*lead, plan.out_features)
    return total
