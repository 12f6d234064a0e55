"""The product with a mixture and its own backward: what is kept for it is x and the factors, and nothing large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moka_core import ConfigError, LayerPlan, MokaConfig, ShapeGroup
from moka_core.config import Factor, Identity
from moka_core.execution import Execution, Schedule, plan_execution
from moka_jax.contraction import as_cotangent, axes, project, sum_over_tokens, weight_gradient
from moka_jax.mixture import (
    apply_factored,
    coefficients,
    fold_in,
    fold_out,
    form_delta,
    half_product,
    weighted_sum,
)
from moka_jax.nf4 import Frozen, frozen_weight


class Mixture(NamedTuple):
    """The numbers of one layer's mixture, a list entry for each shape group; a fixed identity's list is empty."""

    weights: Sequence[jax.Array]
    factor_a: Sequence[jax.Array]
    factor_b: Sequence[jax.Array]


@dataclass(frozen=True, kw_only=True)
class Statics:
    """What `mixture_product` needs to know when it is traced. `keep_rate` is 1 - dropout."""

    plan: LayerPlan
    identity: Identity
    schedule: Schedule
    keep_rate: float = 1.0


def moka_apply(
    x: jax.Array,
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[jax.Array],
    factor_b: Sequence[jax.Array],
    gate_logits: jax.Array | None,
    *,
    execution: Execution | None = None,
    keep: jax.Array | None = None,
) -> jax.Array:
    """y = dropout(x) ΔWᵀ, (..., out), differentiable in x, the factors and the logits in reverse mode.

        dropout(x) = x·keep / (1 - config.dropout)

    Args:
        x: (..., in); products are computed in its dtype, the factors' gradients summed in float32 at least.
        plan: the shapes.
        factor_a: for each group (copies, a_out, a_in); empty if A is the fixed identity.
        factor_b: for each group (copies, b_out, b_in); empty if B is the fixed identity.
        gate_logits: (terms,), or None for a uniform gate.
        execution: see `moka_core.execution.plan_execution`; None takes `config.execution`. Same numbers up to rounding.
        keep: (..., in), bool: the entries of x that dropout keeps; None for no dropout.

    Raises:
        ConfigError: the execution is unknown, the gate is learned and there are no logits, or x or keep has another
            shape or dtype.

    Example:
        >>> from moka_core import KronShape, LayerPlan, MokaConfig, ShapeGroup
        >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
        >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
        >>> a, b = jnp.array([[[1.0, 10.0]]]), jnp.array([[[3.0], [4.0]]])
        >>> moka_apply(jnp.ones((1, 2)), plan, config, [a], [b], jnp.zeros(1)).tolist()
        [[33.0, 44.0]]

    Ref: arXiv 2508.03527.
    """
    if x.ndim == 0 or x.shape[-1] != plan.in_features:
        raise ConfigError(f"x: expected (..., {plan.in_features}); got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ConfigError(f"x: expected a floating dtype, in which the products are computed; got {x.dtype}")
    if keep is not None and (keep.shape != x.shape or keep.dtype != bool):
        raise ConfigError(f"keep: expected bool of shape {x.shape}; got {keep.dtype} of shape {keep.shape}")
    tokens = math.prod(x.shape[:-1])
    schedule = plan_execution(plan, config, tokens, execution=execution, backend=jax.default_backend())
    statics = Statics(plan=plan, identity=config.identity, schedule=schedule, keep_rate=1 - config.dropout)
    mixture = Mixture(coefficients(plan, config, gate_logits), list(factor_a), list(factor_b))
    return mixture_product(statics, x, keep, None, mixture)


def _product(
    statics: Statics, x: jax.Array, keep: jax.Array | None, base: Frozen | None, mixture: Mixture
) -> jax.Array:
    """y = dropout(x) ΔWᵀ, or y = x (W + ΔW)ᵀ with a base; (..., out), in the dtype of x.

    Its backward decodes W and forms ΔW again, computes the half products again, and does by
    `statics.schedule.gradient` what is cheaper for the factors.

    Args:
        keep: which entries dropout keeps, or None.
        base: what `frozen_weight` takes; only with a merged forward and without dropout.
    """
    plan, identity, schedule = statics.plan, statics.identity, statics.schedule
    dropped = _drop(x, keep, statics.keep_rate)
    if schedule.forward == "factored":
        assert base is None
        return apply_factored(dropped, plan, identity, schedule.first, *mixture)
    return project(dropped, _merged_weight(statics, base, mixture))


def _forward(statics: Statics, x: Any, keep: Any, base: Any, mixture: Mixture) -> tuple[jax.Array, Any]:
    return _product(statics, x, keep, base, mixture), (x, keep, base, mixture)


def _backward(statics: Statics, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, keep, base, mixture = kept
    plan, identity, schedule = statics.plan, statics.identity, statics.schedule
    dropped = _drop(x, keep, statics.keep_rate)
    full = None
    if base is not None or (identity == "none" and schedule.gradient == "merged"):
        # the gradient of a base that nobody trains is removed by the compiler
        full = weight_gradient(dropped, dy)
    parts = []
    dx = jnp.zeros((), x.dtype)
    for index, group in enumerate(plan.groups):
        own = Mixture(*(list(array[index : index + 1]) for array in mixture))
        if identity != "none":
            mixture_gradient, through = _block_gradient(identity, group, own, dropped, dy)
        elif schedule.gradient == "merged":
            assert full is not None
            mixture_gradient, through = _gradient_from_full(group, own, full), None
        else:
            mixture_gradient, through = _gradient_from_halves(group, schedule.first[index], own, dropped, dy), None
        parts.append(mixture_gradient)
        if schedule.forward == "factored":
            if through is None:
                through = _input_gradient(group, schedule.first[index], own, dy)
            dx = dx + through.reshape(x.shape)
    base_gradient = None
    if schedule.forward == "merged":
        weight = _merged_weight(statics, base, mixture)
        dx = jnp.einsum("...o,oi->...i", dy, weight.astype(dy.dtype))
        if base is not None:
            assert full is not None
            decoded, pull = jax.vjp(partial(frozen_weight, shape=(plan.out_features, plan.in_features)), base)
            (base_gradient,) = pull(as_cotangent(full.sum(axis=0).astype(decoded.dtype), decoded))
    gradients = Mixture(*([part[kind][0] for part in parts if part[kind]] for kind in range(3)))
    dx = as_cotangent(_drop(dx, keep, statics.keep_rate), x)
    return dx, None, base_gradient, jax.tree.map(as_cotangent, gradients, mixture)


mixture_product = jax.custom_vjp(_product, nondiff_argnums=(0,))
mixture_product.defvjp(_forward, _backward)


def _drop(x: jax.Array, keep: jax.Array | None, keep_rate: float) -> jax.Array:
    return x if keep is None else jnp.where(keep, x / keep_rate, jnp.zeros((), x.dtype))


def _merged_weight(statics: Statics, base: Frozen | None, mixture: Mixture) -> jax.Array:
    delta = form_delta(statics.plan, statics.identity, *mixture)
    plan = statics.plan
    return delta if base is None else frozen_weight(base, (plan.out_features, plan.in_features)) + delta


def _gradient_from_full(group: ShapeGroup, own: Mixture, full: jax.Array) -> Mixture:
    """With G[p, i, q, j] = Σ_t dY[t, p, i] X[t, q, j], which is `full` summed over its first axis: P_c = Σ_ij G B_c and
    Q_c = Σ_pq G A_c."""
    (weight,), (a,), (b,) = own
    shape = group.shape
    blocks = full.reshape(-1, shape.a_out, shape.b_out, shape.a_in, shape.b_in).transpose(0, 1, 3, 2, 4)
    # as one matrix (a_out·a_in, b_out·b_in): left to einsum, it would be rearranged once for P and once for Q
    matrix = blocks.reshape(-1, shape.a_out * shape.a_in, shape.b_out * shape.b_in)
    # the parts are added up last, when they are as small as the factors
    p = jnp.einsum("zmn,cn->zcm", matrix, b.astype(full.dtype).reshape(group.copies, -1)).sum(axis=0).reshape(a.shape)
    q = jnp.einsum("cm,zmn->zcn", a.astype(full.dtype).reshape(group.copies, -1), matrix).sum(axis=0).reshape(b.shape)
    return _gradients(own, p, weight[:, None, None] * q)


def _gradient_from_halves(group: ShapeGroup, first: Factor, own: Mixture, x: jax.Array, dy: jax.Array) -> Mixture:
    """The same without G, from one half of the product with x and one half of the product with dy.

    B first: P_c = Σ_ti dY H_c with H_c = X B_cᵀ, and Q_c = Σ_tq L_c X with L_c = A_cᵀ dY.
    A first: P_c = Σ_tj L_c X with L_c = dY B_c, and Q_c = Σ_tp dY H_c with H_c = A_c X.
    """
    (weight,), (a,), (b,) = own
    lead = axes(x)
    folded_x, folded_dy = fold_in(x, group), fold_out(dy, group)
    scaled, a, b = (weight[:, None, None] * a).astype(x.dtype), a, b.astype(x.dtype)
    half_x = half_product(folded_x, first, scaled, b)
    half_dy = _half_of_dy(folded_dy, first, scaled, b)
    if first == "b":
        p = sum_over_tokens(f"{lead}pi,{lead}qci->cpq", folded_dy, half_x)
        q = sum_over_tokens(f"{lead}qci,{lead}qj->cij", half_dy, folded_x)
    else:
        p = sum_over_tokens(f"{lead}pcj,{lead}qj->cpq", half_dy, folded_x)
        q = sum_over_tokens(f"{lead}pi,{lead}pcj->cij", folded_dy, half_x)
    return _gradients(own, p, q)


def _block_gradient(
    identity: Identity, group: ShapeGroup, own: Mixture, x: jax.Array, dy: jax.Array
) -> tuple[Mixture, jax.Array]:
    """One block S = Σ_c weights[c]·B_c (or A_c) stands for all copies: dS = Σ_tq dYᵀ X, and dX = dY S."""
    (weight,) = own.weights
    (stored,) = own.factor_b if identity == "a" else own.factor_a
    lead = axes(x)
    folded_x, folded_dy = fold_in(x, group), fold_out(dy, group)
    block = weighted_sum(weight, stored).astype(x.dtype)
    letters = (f"{lead}qi", f"{lead}qj", "ij") if identity == "a" else (f"{lead}pj", f"{lead}qj", "pq")
    out, in_, both = letters
    gradient = sum_over_tokens(f"{out},{in_}->{both}", folded_dy, folded_x)
    dx = jnp.einsum(f"{out},{both}->{in_}", folded_dy, block)
    towards_weight = jnp.einsum("ij,cij->c", gradient, stored.astype(gradient.dtype)).astype(weight.dtype)
    towards_stored = [(weight.astype(gradient.dtype)[:, None, None] * gradient).astype(stored.dtype)]
    return Mixture([towards_weight], *(([], towards_stored) if identity == "a" else (towards_stored, []))), dx


def _input_gradient(group: ShapeGroup, first: Factor, own: Mixture, dy: jax.Array) -> jax.Array:
    """dX = Σ_c weights[c]·A_cᵀ dY B_c, the half product with dy being the one that the factors' gradients use."""
    (weight,), (a,), (b,) = own
    scaled, b = (weight[:, None, None] * a).astype(dy.dtype), b.astype(dy.dtype)
    half = _half_of_dy(fold_out(dy, group), first, scaled, b)
    lead = axes(dy)
    if first == "b":
        return jnp.einsum(f"{lead}qci,cij->{lead}qj", half, b)
    return jnp.einsum(f"{lead}pcj,cpq->{lead}qj", half, scaled)


def _half_of_dy(folded: jax.Array, first: Factor, a: jax.Array, b: jax.Array) -> jax.Array:
    """L = A_cᵀ dY, (..., a_in, copies, b_out), if B met x first; L = dY B_c, (..., a_out, copies, b_in), if A did."""
    lead = axes(folded, 2)
    if first == "b":
        return jnp.einsum(f"{lead}pi,cpq->{lead}qci", folded, a)
    return jnp.einsum(f"{lead}pi,cij->{lead}pcj", folded, b)


def _gradients(own: Mixture, p: jax.Array, db: jax.Array) -> Mixture:
    """dA_c = weights[c]·P_c, dB_c as given, dweights[c] = <P_c, A_c>."""
    (weight,), (a,), (b,) = own
    towards_weight = jnp.einsum("cpq,cpq->c", p, a.astype(p.dtype)).astype(weight.dtype)
    return Mixture(
        [towards_weight], [(weight.astype(p.dtype)[:, None, None] * p).astype(a.dtype)], [db.astype(b.dtype)]
    )
