"""The mixture as pure functions on tensors: ΔW, and ΔW x without forming ΔW."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moka_core import LayerPlan, MokaConfig, ShapeGroup
from moka_core.cost import Execution, resolve_execution
from moka_core.errors import ConfigError
from moka_core.oracle import stable_factor


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
    constants = [config.scale * stable_factor(config, shape) for shape in plan.term_shapes()]
    if config.gate == "uniform":
        return torch.tensor([constant / plan.terms for constant in constants], dtype=dtype, device=device)
    if gate_logits is None:
        raise ConfigError("gate='softmax' needs gate_logits; got None")
    precise = torch.promote_types(gate_logits.dtype, torch.float32)
    alpha = torch.softmax(gate_logits.to(precise), dim=0)
    return (alpha * torch.tensor(constants, dtype=precise, device=gate_logits.device)).to(dtype)


def delta_weight(
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[Tensor],
    factor_b: Sequence[Tensor],
    gate_logits: Tensor | None,
) -> Tensor:
    """ΔW = Σ_i k_i (A_i ⊗ B_i), (out, in), in the factors' dtype, with k = `coefficients`.

    Per group one product with inner dimension `copies`:
    ΔW[p·b_out + i, q·b_in + j] = Σ_c k_c A[c, p, q] B[c, i, j]. A fixed identity is not multiplied by: its
    group is the one block Σ_c k_c B_c laid on the diagonal.

    Args:
        factor_a: per group (copies, a_out, a_in); empty if `config.identity` is "a".
        factor_b: per group (copies, b_out, b_in); empty if `config.identity` is "b".
        gate_logits: (terms,), or None for a uniform gate.
    """
    out, in_ = plan.out_features, plan.in_features
    stored = _stored(factor_a, factor_b)
    total = None
    for index, (group, weights) in enumerate(_groups(plan, config, stored, gate_logits)):
        shape, copies = group.shape, group.copies
        if config.identity == "none":
            scaled = (weights[:, None, None] * factor_a[index]).reshape(copies, shape.a_out * shape.a_in)
            product = scaled.T @ factor_b[index].reshape(copies, shape.b_out * shape.b_in)
            blocks = product.reshape(shape.a_out, shape.a_in, shape.b_out, shape.b_in).transpose(1, 2)
        elif config.identity == "a":
            block = _weighted_sum(weights, factor_b[index])
            blocks = torch.diag_embed(block[..., None].expand(*block.shape, shape.a_out), dim1=0, dim2=2)
        else:
            block = _weighted_sum(weights, factor_a[index])
            blocks = torch.diag_embed(block[..., None].expand(*block.shape, shape.b_out), dim1=1, dim2=3)
        delta = blocks.reshape(out, in_)
        total = delta if total is None else total + delta
    assert total is not None  # a plan has at least one group
    return total


def factored_apply(
    x: Tensor,
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[Tensor],
    factor_b: Sequence[Tensor],
    gate_logits: Tensor | None,
) -> Tensor:
    """x ΔWᵀ, (..., out), without ΔW.

    Per group, with each row of x reshaped to X (a_in, b_in), two matrix products: H = X Bᵀ for all copies
    at once, (a_in, copies·b_out); then Σ_c k_c A_c H_c as one product over a_in and the copies together.
    With a fixed identity one product is left: X (Σ_c k_c B_c)ᵀ, or (Σ_c k_c A_c) X.

    Args:
        x: (..., in), in the factors' dtype. The rest as in `delta_weight`.
    """
    stored = _stored(factor_a, factor_b)
    tokens = x.reshape(-1, plan.in_features)
    count = tokens.shape[0]
    total = None
    for index, (group, weights) in enumerate(_groups(plan, config, stored, gate_logits)):
        shape, copies = group.shape, group.copies
        if config.identity == "none":
            rows = tokens.reshape(count * shape.a_in, shape.b_in)
            hidden = rows @ factor_b[index].reshape(copies * shape.b_out, shape.b_in).T
            scaled = weights[:, None, None] * factor_a[index]
            left = scaled.permute(1, 2, 0).reshape(shape.a_out, shape.a_in * copies)
            part = _left_product(left, hidden.reshape(count, shape.a_in * copies, shape.b_out))
        elif config.identity == "a":
            part = tokens.reshape(count * shape.a_in, shape.b_in) @ _weighted_sum(weights, factor_b[index]).T
        else:
            part = _left_product(_weighted_sum(weights, factor_a[index]), tokens.reshape(count, shape.a_in, shape.b_in))
        part = part.reshape(count, plan.out_features)
        total = part if total is None else total + part
    assert total is not None  # a plan has at least one group
    return total.reshape(*x.shape[:-1], plan.out_features)


def moka_apply(
    x: Tensor,
    plan: LayerPlan,
    config: MokaConfig,
    factor_a: Sequence[Tensor],
    factor_b: Sequence[Tensor],
    gate_logits: Tensor | None,
    *,
    execution: Execution = "auto",
) -> Tensor:
    """x ΔWᵀ, (..., out), differentiable in x, the factors and the logits.

    Args:
        x: (..., in), in the factors' dtype.
        execution: "factored" (`factored_apply`), "merged" (x times `delta_weight`), or "auto"
            (`moka_core.cost`); the answer is the same up to rounding.

    Raises:
        ConfigError: `execution` is none of these.

    Example:
        >>> from moka_core import KronShape, LayerPlan, MokaConfig, ShapeGroup
        >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
        >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
        >>> a, b = torch.tensor([[[1.0, 10.0]]]), torch.tensor([[[3.0], [4.0]]])
        >>> moka_apply(torch.tensor([[1.0, 1.0]]), plan, config, [a], [b], torch.zeros(1))
        tensor([[33., 44.]])

    Ref: arXiv 2508.03527.
    """
    if resolve_execution(execution, plan, config, x.numel() // plan.in_features) == "factored":
        return factored_apply(x, plan, config, factor_a, factor_b, gate_logits)
    return torch.nn.functional.linear(x, delta_weight(plan, config, factor_a, factor_b, gate_logits))


def _groups(
    plan: LayerPlan, config: MokaConfig, stored: Tensor, gate_logits: Tensor | None
) -> Iterator[tuple[ShapeGroup, Tensor]]:
    """Every group with its own slice of the coefficients, (copies,)."""
    weights = coefficients(plan, config, gate_logits, dtype=stored.dtype, device=stored.device)
    return zip(plan.groups, weights.split([group.copies for group in plan.groups]), strict=True)


def _stored(factor_a: Sequence[Tensor], factor_b: Sequence[Tensor]) -> Tensor:
    """A factor that is stored, to take dtype and device from."""
    return factor_b[0] if len(factor_b) else factor_a[0]


def _weighted_sum(weights: Tensor, factor: Tensor) -> Tensor:
    """Σ_c weights[c] · factor[c]: the one block of a group whose other factor is the same identity for all copies."""
    return torch.tensordot(weights, factor, dims=1)


def _left_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right[t] for every t, as one large product.

    Not `left @ right`: torch.matmul chooses its kernel by requires_grad, so that a loaded adapter would give other
    last bits than the trained one. And bmm would write a gradient of `left` for every t.
    """
    return torch.einsum("pk,tki->tpi", left, right)
