"""A frozen linear layer whose weight stays packed in NF4 and is decoded inside the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ModelError, Nf4Weight
from moka_core.nf4 import BLOCK, NESTED_BLOCK, NF4_LEVELS, NestedScales
from moka_jax.contraction import as_cotangent, project, weight_gradient

# Puts the arrays of a sharded weight where the product wants them.
Gather = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


class FrozenWeight(nnx.Variable):
    """A base weight that is never trained: packed codes, scales and tables. Not an `nnx.Param`."""


def decode_scales(
    codes: jax.Array, nested_absmax: jax.Array, nested_levels: jax.Array, nested_offset: jax.Array
) -> jax.Array:
    """The float32 scale of every block: nested_levels[codes]·nested_absmax + nested_offset, in the shape of `codes`."""
    spread = jnp.repeat(nested_absmax, NESTED_BLOCK)[: codes.size].reshape(codes.shape)
    product = nested_levels[codes] * spread
    # A compiler may fuse the product and the sum into one rounding, which bitsandbytes does not do.
    # A selection between them forbids that; it changes no value, since the product is never NaN.
    product = jnp.where(product == product, product, 0.0)
    return product + nested_offset


def decode_nf4(codes: jax.Array, scales: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The weight level[code]·scale, (out, in), float32, equal bit for bit to bitsandbytes' decoding.

    Args:
        codes: (out, in / 2), or flat where a block of 64 crosses rows; two codes a byte, high nibble first.
        scales: float32, (out, in / 64), or flat likewise.
        shape: (out, in).
    """
    pairs = jnp.stack([codes >> 4, codes & 0xF], axis=-1)
    if codes.ndim == 2:  # rows hold whole blocks: never flatten, so that rows and columns can be sharded
        levels = jnp.asarray(NF4_LEVELS)[pairs.reshape(*shape)]
        return (levels.reshape(shape[0], -1, BLOCK) * scales[:, :, None]).reshape(shape)
    entries = shape[0] * shape[1]
    levels = jnp.asarray(NF4_LEVELS)[pairs.reshape(-1)[:entries]]
    return (levels * jnp.repeat(scales, BLOCK)[:entries]).reshape(shape)


def packed_layout(shape: tuple[int, int], *, nested: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that hold a weight of shape (out, in) in NF4.

    codes (out, in/2) uint8 and absmax (out, in/64), the float32 scales or their uint8 codes, if in is a multiple of 64,
    otherwise both flat; doubly quantised also nested_absmax, nested_levels (256,) and nested_offset ().
    """
    entries = math.prod(shape)
    blocks = -(-entries // BLOCK)
    whole = shape[1] % BLOCK == 0
    sizes: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes": ((shape[0], shape[1] // 2) if whole else (-(-entries // 2),), jnp.uint8),
        "absmax": ((shape[0], shape[1] // BLOCK) if whole else (blocks,), jnp.uint8 if nested else jnp.float32),
    }
    if nested:
        sizes["nested_absmax"] = (-(-blocks // NESTED_BLOCK),), jnp.float32
        sizes["nested_levels"] = (256,), jnp.float32
        sizes["nested_offset"] = (), jnp.float32
    return {name: jax.ShapeDtypeStruct(size, dtype) for name, (size, dtype) in sizes.items()}


def packed_arrays(weight: Nf4Weight) -> dict[str, np.ndarray]:
    """The arrays of one weight, in the shapes of `packed_layout`."""
    parts = {name.replace(" ", "_"): array for name, array in weight.parts().items()}
    layout = packed_layout(weight.shape, nested="nested_absmax" in parts)
    return {name: parts[name].reshape(like.shape) for name, like in layout.items()}


# The arrays of a frozen weight: {"kernel"} of shape (in, out), or those of an `Nf4Linear` under their names there.
Frozen = Mapping[str, jax.Array]


def frozen_weight(arrays: Frozen, shape: tuple[int, int]) -> jax.Array:
    """The weight of shape (out, in), decoded if it is packed."""
    return arrays["kernel"].T if "kernel" in arrays else decoded_weight(dict(arrays), shape)


@partial(jax.jit, static_argnames="shape")
def decoded_weight(arrays: dict[str, jax.Array], shape: tuple[int, int]) -> jax.Array:
    """The weight of shape (out, in) that the arrays of an `Nf4Linear` hold, float32."""

    def decode() -> jax.Array:
        scales = arrays["absmax"]
        if "nested_absmax" in arrays:
            scales = decode_scales(scales, arrays["nested_absmax"], arrays["nested_levels"], arrays["nested_offset"])
        return decode_nf4(arrays["codes"], scales, shape)

    if jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return decode()
    # XLA would put the decoding into the loop of whatever reads the weight, which is then no longer vectorised: with ΔW
    # added, 2 times as slow at 4096x4096. On a CPU it drops optimisation barriers; a branch it keeps apart.
    witness = arrays["nested_offset"] if "nested_offset" in arrays else arrays["absmax"].reshape(-1)[0]
    like = jax.eval_shape(decode)
    return jax.lax.cond(witness == witness, decode, lambda: jnp.full_like(like, jnp.nan))


def _product(shape: tuple[int, int], x: jax.Array, arrays: Frozen) -> jax.Array:
    return project(x, frozen_weight(arrays, shape))


def _forward(shape: tuple[int, int], x: jax.Array, arrays: Frozen) -> tuple[jax.Array, Any]:
    return _product(shape, x, arrays), (x, arrays)


def _backward(shape: tuple[int, int], kept: Any, dy: jax.Array) -> tuple[jax.Array, Any]:
    x, arrays = kept
    weight, pull = jax.vjp(partial(frozen_weight, shape=shape), arrays)
    dx = jnp.einsum("...o,oi->...i", dy, weight.astype(dy.dtype))
    # nobody trains these arrays, and a compiler then removes this; but whoever asks gets the true gradient
    (towards_arrays,) = pull(as_cotangent(weight_gradient(x, dy).sum(axis=0).astype(weight.dtype), weight))
    return as_cotangent(dx, x), towards_arrays


# x Wᵀ that keeps x and the packed weight for its backward, and decodes again there: left to itself JAX keeps W.
frozen_product = jax.custom_vjp(_product, nondiff_argnums=(0,))
frozen_product.defvjp(_forward, _backward)


class Nf4Linear(nnx.Module):
    """y = W x + b with W (out, in) held as NF4 codes; nothing of it is trained.

    Holds: the arrays of `packed_layout`; stacked over layers, every one has one more leading axis.

    Args:
        arrays: by the names of `packed_layout`.
        shape: (out, in).
        bias: (out,) or stacked (layers, out).
        packed_from: dtype of the weight before it was packed, which a checkpoint says.
        dtype: what the decoded weight is cast to for the product.
    """

    codes: FrozenWeight
    absmax: FrozenWeight
    nested_absmax: FrozenWeight
    nested_levels: FrozenWeight
    nested_offset: FrozenWeight

    def __init__(
        self,
        arrays: Mapping[str, jax.Array | np.ndarray],
        shape: tuple[int, int],
        *,
        bias: jax.Array | np.ndarray | None = None,
        packed_from: str = "float32",
        dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.out_features, self.in_features = shape
        self.packed_from = packed_from
        self.dtype = dtype
        self.nested = "nested_absmax" in arrays
        self.gather: Gather | None = None
        for name in packed_layout(shape, nested=self.nested):
            setattr(self, name, FrozenWeight(jnp.asarray(arrays[name])))
        self.bias = None if bias is None else FrozenWeight(jnp.asarray(bias))

    @classmethod
    def from_nf4(
        cls,
        weights: Nf4Weight | Sequence[Nf4Weight],
        *,
        bias: np.ndarray | None = None,
        dtype: jnp.dtype = jnp.float32,
    ) -> Nf4Linear:
        """The layer of one NF4 weight, or of a sequence of equal shape, stacked for a scan over layers.

        Raises:
            ModelError: the weights to be stacked differ in more than their numbers.
        """
        rows: list[Nf4Weight] = [weights] if isinstance(weights, Nf4Weight) else list(weights)
        parts = [packed_arrays(row) for row in rows]
        if len({(row.shape, row.dtype, frozenset(part)) for row, part in zip(rows, parts, strict=True)}) != 1:
            raise ModelError(
                "Nf4Linear: expected stacked weights of one shape and dtype, all singly or all doubly quantised"
            )
        single = isinstance(weights, Nf4Weight)
        arrays = {
            name: array if single else np.stack([part[name] for part in parts]) for name, array in parts[0].items()
        }
        return cls(arrays, rows[0].shape, bias=bias, packed_from=rows[0].dtype, dtype=dtype)

    def arrays(self) -> dict[str, jax.Array]:
        """What `frozen_weight` decodes; sharded as the product wants it, if the layer knows how."""
        found = {name: getattr(self, name)[...] for name in packed_layout(self.shape, nested=self.nested)}
        return found if self.gather is None else self.gather(found)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def decoded(self) -> jax.Array:
        """The weight, (out, in), float32."""
        return frozen_weight(self.arrays(), self.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) to (..., out), in `dtype`."""
        y = frozen_product(self.shape, x.astype(self.dtype), self.arrays())
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def to_nf4(self, layer: int | None = None) -> Nf4Weight:
        """The packed weight as NumPy arrays; `layer` chooses one of a stack."""

        def take(variable: nnx.Variable) -> np.ndarray:
            value = variable[...]
            return np.asarray(value if layer is None else value[layer])

        scales: np.ndarray | NestedScales = take(self.absmax).reshape(-1)
        if self.nested:
            scales = NestedScales(
                codes=take(self.absmax).reshape(-1),
                absmax=take(self.nested_absmax),
                levels=take(self.nested_levels),
                offset=np.float32(take(self.nested_offset)),
            )
        return Nf4Weight(shape=self.shape, codes=take(self.codes).reshape(-1), scales=scales, dtype=self.packed_from)
