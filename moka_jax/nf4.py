"""A frozen linear layer whose weight stays packed in NF4 and is decoded inside the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ModelError, Nf4Weight
from moka_core.nf4 import BLOCK, NESTED_BLOCK, NF4_LEVELS, NestedScales
from moka_jax.contraction import as_cotangent, project, weight_gradient


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
    (towards_arrays,) = pull(as_cotangent(weight_gradient(x, dy).astype(weight.dtype), weight))
    return as_cotangent(dx, x), towards_arrays


# x Wᵀ that keeps x and the packed weight for its backward, and decodes again there: left to itself JAX keeps W.
frozen_product = jax.custom_vjp(_product, nondiff_argnums=(0,))
frozen_product.defvjp(_forward, _backward)


class Nf4Linear(nnx.Module):
    """y = W x + b with W (out, in) held as NF4 codes; nothing of it is trained.

    Holds: codes (out, in/2) uint8 and absmax (out, in/64), the scales or their codes, if in is a multiple
    of 64, otherwise both flat; nested_absmax, nested_levels and nested_offset if doubly quantised;
    stacked over layers, every variable has one more leading axis.

    Args:
        weights: one NF4 weight, or a sequence of equal shape to be stacked for a scan over layers.
        bias: (out,) or stacked (layers, out).
        dtype: what the decoded weight is cast to for the product.
    """

    def __init__(
        self,
        weights: Nf4Weight | Sequence[Nf4Weight],
        *,
        bias: np.ndarray | None = None,
        dtype: jnp.dtype = jnp.float32,
    ) -> None:
        single = isinstance(weights, Nf4Weight)
        rows: list[Nf4Weight] = [weights] if isinstance(weights, Nf4Weight) else list(weights)
        parts = [row.parts() for row in rows]
        kinds = {(row.shape, row.dtype, frozenset(part)) for row, part in zip(rows, parts, strict=True)}
        if len(kinds) != 1:
            raise ModelError(
                "Nf4Linear: expected stacked weights of one shape and dtype, all singly or all doubly quantised"
            )
        self.out_features, self.in_features = rows[0].shape
        self.packed_from = rows[0].dtype
        self.dtype = dtype
        whole = self.in_features % BLOCK == 0
        codes_shape = (self.out_features, self.in_features // 2) if whole else (-1,)
        scale_shape = (self.out_features, self.in_features // BLOCK) if whole else (-1,)

        def put(name: str, shape: tuple[int, ...]) -> FrozenWeight:
            arrays = [part[name].reshape(shape) for part in parts]
            return FrozenWeight(jnp.asarray(arrays[0] if single else np.stack(arrays)))

        self.codes = put("codes", codes_shape)
        self.absmax = put("absmax", scale_shape)
        self.nested = "nested absmax" in parts[0]
        if self.nested:
            self.nested_absmax = put("nested absmax", (-1,))
            self.nested_levels = put("nested levels", (-1,))
            self.nested_offset = put("nested offset", ())
        self.bias = None if bias is None else FrozenWeight(jnp.asarray(bias))

    def arrays(self) -> dict[str, jax.Array]:
        """What `frozen_weight` decodes."""
        nested = ("nested_absmax", "nested_levels", "nested_offset") if self.nested else ()
        return {name: getattr(self, name)[...] for name in ("codes", "absmax", *nested)}

    def decoded(self) -> jax.Array:
        """The weight, (out, in), float32."""
        return frozen_weight(self.arrays(), (self.out_features, self.in_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in) to (..., out), in `dtype`."""
        y = frozen_product((self.out_features, self.in_features), x.astype(self.dtype), self.arrays())
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
        shape = (self.out_features, self.in_features)
        return Nf4Weight(shape=shape, codes=take(self.codes).reshape(-1), scales=scales, dtype=self.packed_from)
