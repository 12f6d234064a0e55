"""The mixture as functions on tensors: its coefficients, ΔW, and x ΔWᵀ by either execution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moka_core import LayerPlan, MokaConfig
from moka_core.errors import ConfigError
from moka_core.execution import Execution, Schedule, first_factor, plan_execution
from moka_core.oracle import stable_factor
from moka_torch.contraction import Mixture, form
from moka_torch.product import Job, compute_dtype, moka_product, sum_dtype

# asked for in every forward of every layer, with few different answers
_remembered = functools.lru_cache(maxsize=4096)(plan_execution)


def schedule_for(*args: Any, **kwargs: Any) -> Schedule:
    """`plan_execution`, remembered; torch.compile traces it anew, for it warns of a cache."""
    return plan_execution(*args, **kwargs) if torch.compiler.is_compiling() else _remembered(*args, **kwargs)


def coefficients(
    plan: LayerPlan,
    config: MokaConfig,
    gate_logits: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The weight of every term, (terms,): scale · α_i · c_i.

    α = softmax(gate_logits), or 1/r if the gate is uniform; c_i = `stable_factor` of the term's shape.

    Args:
        plan: the layer's shape groups; terms are counted through the groups in order.
        config: gate, scaling and scale.
        gate_logits: (terms,), or None for a uniform gate.
        dtype: of the result; the softmax itself is computed in float32 at least.
        device: where to put the constants; that of `gate_logits` if there are any.
    """
    constants = [config.scale * stable_factor(config, group.shape) for group in plan.groups]
    copies = [group.copies for group in plan.groups]
    # each group by its own number: a tensor of the numbers would be copied to the device in every forward
    if config.gate == "uniform":
        shares = [
            torch.full((count,), constant / plan.terms, dtype=dtype, device=device)
            for count, constant in zip(copies, constants, strict=True)
        ]
        return torch.cat(shares)
    if gate_logits is None:
        raise ConfigError("gate='softmax' needs gate_logits; got None")
    precise = torch.promote_types(torch.promote_types(gate_logits.dtype, dtype), torch.float32)
    alpha = torch.softmax(gate_logits.to(precise), dim=0)
    return torch.cat([part * constant for part, constant in zip(alpha.split(copies), constants, strict=True)]).to(dtype)


def delta_weight(
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[Tensor],
    factor_b: Sequence[Tensor],
    gate_logits: Tensor | None,
) -> Tensor:
    """ΔW = Σ_i k_i (A_i ⊗ B_i), (out, in), in the factors' dtype, with k = `coefficients`.

    Args:
        factor_a: per group (copies, a_out, a_in); empty if `config.identity` is "a".
        factor_b: per group (copies, b_out, b_in); empty if `config.identity` is "b".
        gate_logits: (terms,), or None for a uniform gate.
    """
    stored = _stored(factor_a, factor_b)
    weights = coefficients(plan, config, gate_logits, dtype=stored.dtype, device=stored.device)
    first = tuple(first_factor(group.shape) for group in plan.groups)
    return form(Mixture(plan, config.identity, first, weights, tuple(factor_a), tuple(factor_b)))


def moka_apply(
    x: Tensor,
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[Tensor],
    factor_b: Sequence[Tensor],
    gate_logits: Tensor | None,
    *,
    execution: Execution | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """dropout(x) ΔWᵀ, (..., out), differentiable in x, the factors and the logits in reverse mode.

    Kept for the backward are x as it is, the factors, their coefficients and `keep`; see `moka_torch.product`.
    Forward mode (`torch.func.jvp`, `jacfwd`) raises NotImplementedError here if a tensor requires a gradient; x times
    `delta_weight` transposed has both.

    Args:
        x: (..., in); it is multiplied in the factors' dtype, or in autocast's, as by `nn.functional.linear`.
        execution: "factored" (never an array of (out, in)), "merged" (x times ΔW), or "auto"
            (`moka_core.execution`); the answer is the same up to rounding. `config.execution` if None.
        keep: the entries of x that dropout keeps, bool, of the shape of x; they are scaled by 1/(1 - config.dropout).
            No dropout if None.

    Returns:
        The product, in the dtype that it was computed in.

    Raises:
        ConfigError: `execution` is none of these, x is not (..., in) or not floating, or `keep` is not bool of its
            shape.

    Example:
        >>> from moka_core import KronShape, LayerPlan, MokaConfig, ShapeGroup
        >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
        >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
        >>> a, b = torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[3.0], [4.0]]])
        >>> moka_apply(torch.tensor([[1.0, 1.0]]), plan, config, [a], [b], torch.zeros(1))
        tensor([[33., 44.]])

    Ref: arXiv 2508.03527.
    """
    stored = _stored(factor_a, factor_b)
    tokens = x.numel() // plan.in_features
    schedule = schedule_for(plan, config, tokens, execution=execution, backend=backend_of(x))
    job = Job(plan, config.identity, schedule, compute_dtype(x, stored.dtype))
    weights = coefficients(plan, config, gate_logits, dtype=sum_dtype(stored.device), device=stored.device)
    if keep is not None:
        weights = weights / (1 - config.dropout)
    return moka_product(job, x, weights, factor_a, factor_b, keep=keep)


def backend_of(tensor: Tensor) -> str:
    """The name under which `moka_core.execution` prices a tensor's device."""
    return "cpu" if tensor.device.type == "cpu" else "gpu"


def _stored(factor_a: Sequence[Tensor], factor_b: Sequence[Tensor]) -> Tensor:
    """A factor that is stored, to take dtype and device from."""
    return factor_b[0] if len(factor_b) else factor_a[0]
