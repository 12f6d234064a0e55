"""The product with a mixture as one `torch.autograd.Function`: little kept, everything else computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moka_core.errors import ConfigError
from moka_core.execution import Schedule
from moka_core.plan import LayerPlan
from moka_torch.contraction import (
    Group,
    Mixture,
    Pull,
    added,
    form,
    product,
    pull_from_halves,
    pull_from_weight,
    through,
    through_first,
    through_second,
)

# A gradient of this few multiply-adds, tokens·out·in, is summed in float64 on a CPU: there the time is that of calling
# the products, and not of the products.
SMALL = 2**18


class Job(NamedTuple):
    """What is static about one product.

    Args:
        plan, identity, schedule: see `moka_core`.
        compute: the dtype of the large products and of y.
        weight: gives the frozen weight W, (out, in), of the tensor that holds it, in the dtype that it is asked for, as
            a tensor that may be written into; called in the forward and again in the backward. None for the product
            with ΔW alone.
    """

    plan: LayerPlan
    identity: Any
    schedule: Schedule
    compute: torch.dtype
    weight: Callable[[Tensor, torch.dtype], Tensor] | None = None


def moka_product(
    job: Job,
    x: Tensor,
    weights: Tensor,
    factor_a: Sequence[Tensor],
    factor_b: Sequence[Tensor],
    *,
    keep: Tensor | None = None,
    held: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """(x ∘ keep) ΔWᵀ, (..., out), or x (W + ΔW)ᵀ + bias, differentiable any number of times in reverse mode.

    With k = `weights`, ΔW = Σ_i k_i (A_i ⊗ B_i), G = dyᵀ (x ∘ keep), P_i and Q_i as in `moka_torch.contraction`:

        dA_i = k_i P_i    dB_i = k_i Q_i    dk_i = <P_i, A_i>    dx = (dy ΔW) ∘ keep, or dy (W + ΔW)    dW = G

    Kept for the backward: x as it is, k, the factors, `keep` and `held`. ΔW and W are formed again, halves recomputed.
    `torch.func.vmap` may batch any of the tensors. Forward mode (`torch.func.jvp`, `jacfwd`) is there while no tensor
    requires a gradient, and a NotImplementedError otherwise.

    Args:
        x: (..., in), any floating dtype.
        weights: k, (terms,); float64 keeps the gradient of the gate from being rounded before it is subtracted from.
        factor_a, factor_b: as in `moka_torch.mixture.delta_weight`.
        keep: bool, of the shape of x: the entries that dropout lets through. Their scale belongs into `weights`.
        held: what `job.weight` gives W of: W in another dtype, or what has no gradient.
        bias: (out,), with `job.weight` only.

    Returns:
        y in `job.compute`. Gradients have the dtype of what they belong to; those of the factors and of k are summed in
        float32 at least.

    Raises:
        ConfigError: x is not (..., in) or not floating, or `keep` is not bool of its shape.
    """
    if x.shape[-1:] != (job.plan.in_features,):
        raise ConfigError(f"x: expected (..., {job.plan.in_features}); got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ConfigError(f"x: expected a floating dtype; got {x.dtype}")
    if keep is not None and (keep.shape != x.shape or keep.dtype != torch.bool):
        raise ConfigError(f"keep: expected bool of shape {tuple(x.shape)}; got {keep.dtype} of {tuple(keep.shape)}")
    if (job.weight is None) != (held is None):
        raise ValueError("job.weight and what it gives W of are given together or not at all")
    if held is not None and (keep is not None or job.schedule.forward != "merged"):
        raise ValueError("W + ΔW is one weight only if ΔW is formed and nothing is dropped from its input alone")
    flat = x.reshape(-1, job.plan.in_features)
    flat_keep = None if keep is None else keep.reshape(flat.shape)
    tensors = (flat, held, bias, weights, *factor_a, *factor_b)
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    # torch.compile breaks its graph at a Function that needs no gradient
    run = MokaProduct.apply if wanted else MokaProduct.forward
    y = run(job, flat, flat_keep, held, bias, weights, *factor_a, *factor_b)
    return y.reshape(*x.shape[:-1], job.plan.out_features)


class MokaProduct(torch.autograd.Function):
    """The Function under `moka_product`: inputs job, x (tokens, in), keep, held, bias, k, then the factors, A before B.

    Its backward is made of differentiable operations on the inputs that were kept, so that torch differentiates it
    again where a second derivative is asked for.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        job: Job,
        x: Tensor,
        keep: Tensor | None,
        held: Tensor | None,
        bias: Tensor | None,
        weights: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        with _without_autocast(x):
            mixture = _mixture(job, weights, factors)
            given = _masked(x.to(job.compute), keep)
            if job.schedule.forward == "merged":
                return torch.nn.functional.linear(
                    given, _weight(job, mixture, held), None if bias is None else bias.to(job.compute)
                )
            y: Tensor | None = None
            for group in mixture.to(job.compute).groups():
                y = added(y, through(group, given))
            assert y is not None  # a plan has at least one group
            return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        job, x, keep, held, bias, weights, *factors = inputs
        ctx.job, ctx.dtypes = job, [None if tensor is None else tensor.dtype for tensor in (x, held, bias)]
        _, want_x, _, want_held, _, *want = ctx.needs_input_grad
        kept = x if want_held or any(want) else None
        ctx.save_for_backward(kept, keep, held if want_x else None, weights, *factors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        x, keep, held, weights, *factors = ctx.saved_tensors
        x_dtype, held_dtype, bias_dtype = ctx.dtypes
        _, want_x, _, want_held, want_bias, *want = ctx.needs_input_grad
        with _without_autocast(dy):
            mixture = _mixture(job, weights, factors)
            dy = dy.to(job.compute)
            dbias = dy.sum(0, dtype=_precise(dy.dtype)).to(bias_dtype) if want_bias else None
            given = None if x is None else _masked(x.to(job.compute), keep)
            dheld = product(dy.T, given, _precise(dy.dtype)).to(held_dtype) if want_held and given is not None else None
            dx, grads = _backward(job, mixture, held, given if any(want) else None, dy, want_x, want)
            if dx is not None:
                dx = _masked(dx, keep).to(x_dtype)
            cast = [None if g is None else g.to(t.dtype) for g, t in zip(grads, (weights, *factors), strict=True)]
            return None, dx, None, dheld, dbias, *cast


def _mixture(job: Job, weights: Tensor, factors: Sequence[Tensor]) -> Mixture:
    """The inputs of the Function as a mixture, in the factors' dtype but float32 at least."""
    count = 0 if job.identity == "a" else len(job.plan.groups)
    mixture = Mixture(
        job.plan, job.identity, job.schedule.first, weights, tuple(factors[:count]), tuple(factors[count:])
    )
    return mixture.to(_precise(factors[0].dtype))


def _weight(job: Job, mixture: Mixture, held: Tensor | None) -> Tensor:
    """ΔW or W + ΔW, summed in float32 at least and rounded once, to the dtype of the product."""
    if job.weight is None:
        return form(mixture).to(job.compute)
    assert held is not None
    precise = torch.promote_types(mixture.weights.dtype, job.compute)
    return form(mixture.to(precise), onto=job.weight(held, precise)).to(job.compute)


def _backward(
    job: Job,
    mixture: Mixture,
    held: Tensor | None,
    x: Tensor | None,
    dy: Tensor,
    want_x: bool,
    want: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx before the mask, and the gradients of (k, *factors); None where it is not wanted, x being None if none is."""
    count = len(job.plan.groups)
    want_k, *want_factors = want
    stored_a, stored_b = len(mixture.factor_a), len(mixture.factor_b)
    want_a = want_factors[:stored_a] or [False] * count
    want_b = want_factors[stored_a:] or [False] * count
    d_k, d_a, d_b = [], [], []

    dx = dy @ _weight(job, mixture, held) if want_x and job.schedule.forward == "merged" else None
    sums = None if x is None else _Sums.of(job, mixture, x, dy)
    for index, group in enumerate(mixture.to(job.compute).groups()):
        half = None
        if want_x and job.schedule.forward == "factored":
            if job.identity == "none":
                half = through_first(group.transposed, dy)
                part = through_second(group.transposed, half)
            else:
                part = through(group.transposed, dy)
            dx = added(dx, part)
        if sums is None:
            continue
        exact = sums.groups[index]
        # <P, A> = <Q, B>: one of the two does for k
        ask_a = want_a[index] or (want_k and stored_a > 0 and not want_b[index])
        ask_b = want_b[index] or (want_k and stored_a == 0)
        pull = sums.pull(index, ask_a, ask_b, half)
        if want_k:
            d_k.append(_along(exact, pull))
        d_a.append(exact.weights[:, None, None] * pull.a if want_a[index] and pull.a is not None else None)
        d_b.append(exact.weights[:, None, None] * pull.b if want_b[index] and pull.b is not None else None)
    if sums is None:
        return dx, [None] * len(want)
    return dx, [torch.cat(d_k) if want_k else None, *d_a[:stored_a], *d_b[:stored_b]]


class _Sums(NamedTuple):
    """What the gradients of the factors are summed from, and in which dtype.

    Args:
        x, dy: in the dtype of the halves that are made of them.
        thin: the groups in the dtype of x.
        groups: the groups in `dtype`.
        big: G in `dtype`, if the schedule takes it.
    """

    dtype: torch.dtype
    x: Tensor
    dy: Tensor
    thin: tuple[Group, ...]
    groups: tuple[Group, ...]
    big: Tensor | None

    @classmethod
    def of(cls, job: Job, mixture: Mixture, x: Tensor, dy: Tensor) -> _Sums:
        small = x.shape[0] * job.plan.out_features * job.plan.in_features <= SMALL and x.device.type == "cpu"
        dtype = torch.float64 if small else _precise(x.dtype)
        if not x.is_cuda:  # CUDA alone multiplies bfloat16 into float32
            x, dy = x.to(dtype), dy.to(dtype)
        from_weight = job.identity == "none" and job.schedule.gradient == "merged"
        return cls(
            dtype=dtype,
            x=x,
            dy=dy,
            thin=tuple(mixture.to(x.dtype).groups()),
            groups=tuple(mixture.to(dtype).groups()),
            big=product(dy.T, x, dtype) if from_weight else None,
        )

    def pull(self, index: int, want_a: bool, want_b: bool, half: Tensor | None) -> Pull:
        """P and Q of a group; `half` is that of dy, if it is at hand."""
        if self.big is not None:
            return pull_from_weight(self.groups[index], self.big, want_a, want_b)
        half = half if half is not None and half.dtype == self.x.dtype else None
        return pull_from_halves(self.thin[index], self.x, self.dy, want_a, want_b, self.dtype, half)


def _along(group: Group, pull: Pull) -> Tensor:
    """dk, (copies,): <P_c, A_c>, or <Q_c, B_c>, summed in float64: a number a term, and the terms' are subtracted."""
    left, right = (group.a, pull.a) if pull.a is not None else (group.b, pull.b)
    assert left is not None
    assert right is not None
    return (left * right).sum((1, 2), dtype=sum_dtype(left.device))


def _masked(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums that leave one number a term: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_dtype(x: Tensor, stored: torch.dtype) -> torch.dtype:
    """The dtype of x's product with a weight of dtype `stored`: that one, or autocast's as for `functional.linear`."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, stored):
        return torch.get_autocast_dtype(device)
    return stored


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
