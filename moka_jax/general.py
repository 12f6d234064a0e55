"""Linear layers over several axes, `nnx.LinearGeneral`, `nnx.Einsum` and others, adapted as the matrices they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moka_core.execution import Execution
from moka_jax.linear import MokaLinear, refuse_out_sharding, tokens_of

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Classes whose call is einsum(equation, x, kernel), plus a bias or not: the attributes of the kernel and the equation.
_EINSUMS: dict[type, tuple[str, str]] = {nnx.Einsum: ("kernel", "einsum_str")}


def register_einsum(module: type, *, kernel: str, equation: str) -> None:
    """Make the modules of a class targets of `attach`: y = einsum(equation, x, kernel), plus a bias or not.

    Holds: `module.__call__(x)` computes that and nothing else; a subclass is another class.

    Args:
        module: a class of NNX modules.
        kernel: the name of the attribute that holds the kernel, an `nnx.Param`.
        equation: the name of the attribute that holds the equation, such as "BTD,DNH->BTNH".

    Example:
        >>> class Projection(nnx.Module):
        ...     def __init__(self):
        ...         self.einsum_str, self.w = "bd,dnh->bnh", nnx.Param(jnp.ones((4, 2, 3)))
        ...     def __call__(self, x):
        ...         return jnp.einsum(self.einsum_str, x, self.w[...])
        >>> register_einsum(Projection, kernel="w", equation="einsum_str")
    """
    _EINSUMS[module] = (kernel, equation)


@dataclass(frozen=True)
class Equation:
    """x, kernel -> y as letters, read as y = x Wᵀ.

    W's columns are the kernel's axes that x has too, its rows those that y has, each in the kernel's order; `rest`
    are the axes of x that the layer leaves alone. An "..." in x and y is one of those.
    """

    x: str
    kernel: str
    y: str

    @classmethod
    def parse(cls, text: Any) -> Equation | None:
        """The equation of an einsum of two operands, or None if it is none that is one matrix."""
        if not isinstance(text, str) or text.count(",") != 1 or text.count("->") != 1:
            return None
        x, kernel, y = text.replace(" ", "").replace("->", ",").split(",")
        equation = cls(x, kernel, y)
        return equation if equation.is_linear() else None

    @property
    def columns(self) -> str:
        """The kernel's axes that are contracted with x."""
        return "".join(letter for letter in self.kernel if letter not in self.y)

    @property
    def rows(self) -> str:
        """The kernel's axes that appear in y."""
        return "".join(letter for letter in self.kernel if letter in self.y)

    @property
    def rest(self) -> str:
        """The axes of x that y has too."""
        return "".join(letter for letter in self.x if letter not in self.columns)

    def is_linear(self) -> bool:
        """Whether it is one matrix for all of x: no axis is a batch of matrices, repeated, or summed away alone."""
        operands = (self.x, self.kernel, self.y)
        letters = [operand.replace("...", "") for operand in operands]
        return (
            all(operand.isalpha() and len(set(operand)) == len(operand) for operand in letters)
            and "." not in self.kernel
            and not set(self.rows) & set(self.x)
            and set(self.columns) <= set(self.x)
            and sorted(self.rest + self.rows) == sorted(self.y)
            and bool(self.columns and self.rows)
        )

    def weight(self, kernel: jax.Array) -> jax.Array:
        """The kernel, stacked or not, as W: (..., out, in)."""
        moved = jnp.einsum(f"...{self.kernel}->...{self.rows}{self.columns}", kernel)
        lead, shape = self._split(moved, len(self.kernel))
        return moved.reshape(*lead, math.prod(shape[: len(self.rows)]), -1)

    def to_kernel(self, weight: jax.Array, like: jax.Array) -> jax.Array:
        """W as a kernel of the shape of `like`."""
        lead, shape = self._split(like, len(self.kernel))
        sizes = dict(zip(self.kernel, shape, strict=True))
        axes = [sizes[letter] for letter in self.rows + self.columns]
        return jnp.einsum(f"...{self.rows}{self.columns}->...{self.kernel}", weight.reshape(*lead, *axes))

    def flatten(self, x: jax.Array) -> jax.Array:
        """x as vectors, (..., in)."""
        moved = jnp.einsum(f"{self.x}->{self.rest}{self.columns}", x)
        return moved.reshape(*self._split(moved, len(self.columns))[0], -1)

    def unflatten(self, y: jax.Array, like: jax.Array) -> jax.Array:
        """Vectors (..., out) in the axes of y, where `like` gives the rows' sizes: a y of the layer."""
        moved = jax.eval_shape(lambda: jnp.einsum(f"{self.y}->{self.rest}{self.rows}", like))
        return jnp.einsum(f"{self.rest}{self.rows}->{self.y}", y.reshape(moved.shape))

    @staticmethod
    def _split(array: jax.Array, last: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return array.shape[: array.ndim - last], array.shape[array.ndim - last :]


@dataclass(frozen=True)
class General:
    """What makes a layer over several axes a linear layer: its equation, and the name and the shape of its kernel."""

    equation: Equation
    kernel: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, module: nnx.Module, ndim: int | None = None) -> General | None:
        """How a module is one matrix, or None if it is not.

        Args:
            ndim: of the input, where its axes are to be told; the kernel's are the same for all.
        """
        if isinstance(module, nnx.LinearGeneral) and type(module).__call__ is nnx.LinearGeneral.__call__:
            shape = (*module.in_features, *module.out_features)
            return None if module.batch_axis else cls(_axes_as_letters(module, ndim), "kernel", shape)
        if type(module) not in _EINSUMS:
            return None
        kernel, attribute = _EINSUMS[type(module)]
        equation = Equation.parse(getattr(module, attribute))
        if equation is None:
            return None
        shape = getattr(module, kernel).get_value().shape[-len(equation.kernel) :]
        return cls(equation, kernel, tuple(module.kernel_shape) if isinstance(module, nnx.Einsum) else shape)

    @property
    def dims(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        sizes = dict(zip(self.equation.kernel, self.shape, strict=True))
        out, in_ = (math.prod(sizes[axis] for axis in axes) for axes in (self.equation.rows, self.equation.columns))
        return out, in_

    def kernel_of(self, module: nnx.Module) -> jax.Array:
        """The kernel, stacked or not."""
        return getattr(module, self.kernel).get_value()


class MokaGeneral(MokaLinear):
    """y = layer(x) + ΔW x for a layer over several axes, its input's and output's axes flattened in the kernel's order.

    ΔW is always added to the output: execution "merged" is refused. Everything else is `MokaLinear`'s.
    """

    def __call__(self, x: jax.Array, *, out_sharding: Any = None, execution: Execution | None = None) -> jax.Array:
        """x to y, in the axes and the dtype of the base layer's output.

        Args:
            execution: for this call, in place of the layer's own.

        Raises:
            ConfigError: as when the layer is made; or `out_sharding` is given, which is for explicit meshes.
        """
        general = General.of(self.base, x.ndim)
        assert general is not None
        refuse_out_sharding(out_sharding)
        y = self.base(x)
        flat = general.equation.flatten(x).astype(y.dtype)
        schedule, _ = self.schedule(tokens_of(flat), execution)
        return y + general.equation.unflatten(self._added(flat, schedule), y)


def _axes_as_letters(module: nnx.LinearGeneral, ndim: int | None) -> Equation:
    """The equation of a LinearGeneral without batch axes, for an input of `ndim` axes (any that it takes if None)."""
    ndim = 2 * max(abs(axis) for axis in module.axis) + 2 if ndim is None else ndim
    x = _LETTERS[:ndim]
    columns = "".join(sorted(x[axis] for axis in module.axis))  # in x's order, whatever that of `axis`
    rows = _LETTERS[ndim : ndim + len(module.out_features)]
    return Equation(x, columns + rows, "".join(letter for letter in x if letter not in columns) + rows)
