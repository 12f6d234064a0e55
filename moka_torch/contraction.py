"""The contractions of a mixture, one shape group at a time: ΔW, products with it, and the pulls on its factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moka_core import LayerPlan

if TYPE_CHECKING:
    from moka_core.config import Factor, Identity


class Mixture(NamedTuple):
    """The terms of one layer as numbers: ΔW = Σ_i k_i (A_i ⊗ B_i).

    Args:
        plan: the shape groups.
        identity: the factor that is a fixed identity and not stored.
        first: for each group, the factor that meets x first (`moka_core.execution.first_factor`).
        weights: k, (terms,).
        factor_a: per group (copies, a_out, a_in); empty if `identity` is "a".
        factor_b: per group (copies, b_out, b_in); empty if `identity` is "b".
    """

    plan: LayerPlan
    identity: Identity
    first: tuple[Factor, ...]
    weights: Tensor
    factor_a: tuple[Tensor, ...]
    factor_b: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Mixture:
        """The same with every tensor in `dtype`."""
        if all(tensor.dtype == dtype for tensor in (self.weights, *self.factor_a, *self.factor_b)):
            return self
        return self._replace(
            weights=self.weights.to(dtype),
            factor_a=tuple(factor.to(dtype) for factor in self.factor_a),
            factor_b=tuple(factor.to(dtype) for factor in self.factor_b),
        )

    def groups(self) -> Iterator[Group]:
        weights = self.weights.split([group.copies for group in self.plan.groups])
        for index, (k, first) in enumerate(zip(weights, self.first, strict=True)):
            a = None if self.identity == "a" else self.factor_a[index]
            b = None if self.identity == "b" else self.factor_b[index]
            yield Group(first, k, a, b)


class Group(NamedTuple):
    """One shape group: k (copies,), A (copies, a_out, a_in), B (copies, b_out, b_in); a fixed identity is None."""

    first: Factor
    weights: Tensor
    a: Tensor | None
    b: Tensor | None

    @property
    def transposed(self) -> Group:
        """The group of ΔWᵀ, Aᵀ and Bᵀ, in the opposite order: what takes dy to dx."""
        first: Factor = "a" if self.first == "b" else "b"
        return Group(first, self.weights, None if self.a is None else self.a.mT, None if self.b is None else self.b.mT)


def form(mixture: Mixture, onto: Tensor | None = None) -> Tensor:
    """ΔW, (out, in), in the mixture's dtype; or `onto` + ΔW, written into `onto`, which is contiguous.

    ΔW[p·b_out + i, q·b_in + j] = Σ_c k_c A[c, p, q] B[c, i, j], elementwise, term by term: a product with inner
    dimension `copies` would write the terms in another order, and then copy them. A fixed identity is not multiplied
    by: its group is the one block Σ_c k_c B_c, laid on the diagonal.
    """
    out, in_ = mixture.plan.out_features, mixture.plan.in_features
    total = onto
    for _, k, a, b in mixture.groups():
        if a is not None and b is not None:
            for left, right in zip(_scaled(k, a)[:, :, None, :, None], b[:, None, :, None, :], strict=True):
                if total is None:
                    total = left * right
                else:
                    total = total.view(left.shape[0], right.shape[1], left.shape[2], right.shape[3])
                    total = (torch.addcmul if _transformed() else Tensor.addcmul_)(total, left, right)
            assert total is not None  # a group has at least one term
            total = total.view(out, in_)
            continue
        block = block_of(k, b if a is None else a)
        rows, columns = block.shape
        size = out // rows
        own = block.new_zeros(out, in_) if total is None or _transformed() else total
        if a is None:
            diagonal = own.view(size, rows, size, columns).diagonal(dim1=0, dim2=2)
        else:
            diagonal = own.view(rows, size, columns, size).diagonal(dim1=1, dim2=3)
        diagonal.add_(block[..., None])
        total = own if total is None or total is own else total + own
    assert total is not None  # a plan has at least one group
    return total


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """total + part, written into `total` but for inside torch.func's transforms, or `part` if there is no total yet."""
    if total is None:
        return part
    return total + part if _transformed() else total.add_(part)


def _transformed() -> bool:
    """Whether a tensor may have an axis of `torch.func.vmap`, with which nothing can be written into one without."""
    return torch._C._are_functorch_transforms_active()


def block_of(weights: Tensor, factor: Tensor | None) -> Tensor:
    """Σ_c k_c F_c: the one block of a group whose other factor is the same identity for all copies."""
    assert factor is not None
    return torch.tensordot(weights, factor, dims=1)


def through(group: Group, x: Tensor) -> Tensor:
    """x ΔWᵀ of one group without ΔW, (tokens, out), for x (tokens, in)."""
    if group.a is None:
        return _right(x, block_of(group.weights, group.b)[None]).flatten(1)
    if group.b is None:
        return _left(x, block_of(group.weights, group.a)[None]).flatten(1)
    return through_second(group, through_first(group, x))


def through_first(group: Group, x: Tensor) -> Tensor:
    """The half product H, without k: X Bᵀ, (tokens, a_in, copies·b_out), or A X, (tokens, a_out·copies, b_in).

    Either lies in memory as (tokens, rows, copies, columns).
    """
    assert group.a is not None
    assert group.b is not None
    return _right(x, group.b) if group.first == "b" else _left(x, group.a)


def through_second(group: Group, half: Tensor) -> Tensor:
    """The second product: over the remaining factor and the copies together, k folded into that factor."""
    assert group.a is not None
    assert group.b is not None
    tokens = half.shape[0]
    if group.first == "b":
        copies, a_out, a_in = group.a.shape
        left = _scaled(group.weights, group.a).permute(1, 2, 0).reshape(a_out, a_in * copies)
        return _left_product(left, half.reshape(tokens, a_in * copies, group.b.shape[1])).flatten(1)
    copies, b_out, b_in = group.b.shape
    right = _scaled(group.weights, group.b).transpose(1, 2).reshape(copies * b_in, b_out)
    a_out = group.a.shape[1]
    return (half.reshape(tokens * a_out, copies * b_in) @ right).reshape(tokens, a_out * b_out)


class Pull(NamedTuple):
    """What a gradient of ΔW is along each factor, without k: P like A, Q like B; None where it was not asked for."""

    a: Tensor | None
    b: Tensor | None


def pull_from_weight(group: Group, big: Tensor, want_a: bool, want_b: bool) -> Pull:
    """From G = dyᵀ x, (out, in): P_c[p, q] = Σ_ij G[p, i, q, j] B_c[i, j], Q_c[i, j] = Σ_pq G[p, i, q, j] A_c[p, q]."""
    assert group.a is not None
    assert group.b is not None
    copies, a_out, a_in = group.a.shape
    _, b_out, b_in = group.b.shape
    blocks = big.view(a_out, b_out, a_in, b_in).transpose(1, 2).reshape(a_out * a_in, b_out * b_in)
    p = (group.b.reshape(copies, -1) @ blocks.T).reshape(group.a.shape) if want_a else None
    q = (group.a.reshape(copies, -1) @ blocks).reshape(group.b.shape) if want_b else None
    return Pull(p, q)


def pull_from_halves(
    group: Group, x: Tensor, dy: Tensor, want_a: bool, want_b: bool, dtype: torch.dtype, back: Tensor | None = None
) -> Pull:
    """The same without G, from the half products H of x and L of dy, summed in `dtype`.

    B first: P_c[p, q] = Σ_ti dy[t, p, i] H[t, q, c, i] and Q_c[i, j] = Σ_tq L[t, q, c, i] x[t, q, j].
    A first is the same for ΔWᵀ, with x and dy changed over. With a fixed identity x and dy are halves already.

    Args:
        back: L, `through_first(group.transposed, dy)`, if it is at hand.
    """
    if group.a is None:
        assert group.b is not None
        return Pull(None, _over_rows(dy, x, group.b.shape[1:], dtype)[None])
    if group.b is None:
        return Pull(_over_columns(dy, x, group.a.shape[1:], dtype)[None], None)
    ahead = through_first(group, x) if (want_a if group.first == "b" else want_b) else None
    if back is None and (want_b if group.first == "b" else want_a):
        back = through_first(group.transposed, dy)
    if group.first == "b":
        return _pull(group.a, group.b, x, dy, ahead if want_a else None, back if want_b else None, dtype)
    p, q = _pull(group.a.mT, group.b.mT, dy, x, back if want_a else None, ahead if want_b else None, dtype)
    return Pull(None if p is None else p.mT, None if q is None else q.mT)


def _pull(
    a: Tensor, b: Tensor, x: Tensor, dy: Tensor, ahead: Tensor | None, back: Tensor | None, dtype: torch.dtype
) -> Pull:
    copies, a_out, a_in = a.shape
    _, b_out, b_in = b.shape
    p = q = None
    if ahead is not None:
        p = _over_columns(dy, ahead, (a_out, a_in * copies), dtype).reshape(a_out, a_in, copies).permute(2, 0, 1)
    if back is not None:
        q = _over_rows(back, x, (copies * b_out, b_in), dtype).reshape(copies, b_out, b_in)
    return Pull(p, q)


def _over_rows(left: Tensor, right: Tensor, columns: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Σ_tm left[t, m, i] right[t, m, j], (i, j)."""
    i, j = columns
    return product(left.reshape(left.numel() // i, i).T, right.reshape(right.numel() // j, j), dtype)


def _over_columns(left: Tensor, right: Tensor, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Σ_tn left[t, p, n] right[t, q, n], (p, q)."""
    tokens, width = left.shape[0], left[0:1].numel() // rows[0]
    flat = [
        side.reshape(tokens, count, width).transpose(0, 1).reshape(count, tokens * width)
        for side, count in zip((left, right), rows, strict=True)
    ]
    return product(flat[0], flat[1].T, dtype)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed in `dtype` and left in it: a product of bfloat16 would be rounded to bfloat16."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _scaled(weights: Tensor, factor: Tensor) -> Tensor:
    return weights[:, None, None] * factor


def _right(x: Tensor, stack: Tensor) -> Tensor:
    """x[t] Sᵀ for every S of the stack (copies, n_out, n_in), (tokens, m, copies·n_out)."""
    copies, n_out, n_in = stack.shape
    tokens, rows = x.shape[0], x.shape[1] // n_in
    return (x.reshape(tokens * rows, n_in) @ stack.reshape(copies * n_out, n_in).T).reshape(
        tokens, rows, copies * n_out
    )


def _left(x: Tensor, stack: Tensor) -> Tensor:
    """S x[t] for every S of the stack (copies, m_out, m_in), (tokens, m_out·copies, n)."""
    copies, m_out, m_in = stack.shape
    left = stack.transpose(0, 1).reshape(m_out * copies, m_in)
    return _left_product(left, x.reshape(x.shape[0], m_in, x.shape[1] // m_in))


def _left_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right[t] for every t, (tokens, rows, columns).

    Not `left @ right`: torch.matmul chooses its kernel by requires_grad, so that a loaded adapter would give other
    last bits than the trained one. Nor einsum, which copies `right` to bring t inside.
    """
    return torch.bmm(left.expand(right.shape[0], -1, -1), right)
