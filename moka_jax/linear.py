"""A linear layer with a mixture of Kronecker adapters on a frozen base."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ConfigError, LayerFactors, LayerPlan, MokaConfig
from moka_core.execution import Execution, Schedule, check_execution, plan_execution
from moka_jax.contraction import batch_shards
from moka_jax.mixture import coefficients, delta_weight
from moka_jax.nf4 import Frozen, Nf4Linear
from moka_jax.product import Mixture, Statics, mixture_product


class MokaParam(nnx.LoRAParam):
    """A trained entry of a mixture: `nnx.LoRAParam` so that trainers which select that type train it unchanged."""


class DropoutKey(nnx.Variable):
    """The random key of one layer's dropout; absent outside of training."""


class MokaLinear(nnx.Module):
    """y = W x + b + ΔW dropout(x), with ΔW = Σ_i scale·α_i·c_i·(A_i ⊗ B_i); W and b stay frozen.

    Holds, for group g of the plan: factor_a[g] (copies, a_out, a_in), factor_b[g] (copies, b_out, b_in), and
    gate_logits (terms,) if gated; a fixed identity is absent. Stacked over layers, each has one more leading axis.

    Dropout is on only where `with_dropout_key` has set a key, as `moka_jax.train` does in every training step.

    Args:
        base: the frozen layer, `nnx.Linear` or `Nf4Linear`.
        plan: the shapes of the terms.
        config: gate, scaling, identity, initialisation and dropout.
        key: draws the factor that does not start at zero, every copy (and layer) independently.
        layers: length of the leading axis if the layer is part of a stack.
        execution: "factored", "merged", or "auto" to choose by cost from the static shapes; None takes
            `config.execution`. Merged, the layer makes one product with W + ΔW; where dropout gives ΔW another input,
            ΔW has a product of its own.

    Raises:
        ConfigError: the execution is unknown, or it is "merged" and the base computes more than x Wᵀ + b.
    """

    def __init__(
        self,
        base: nnx.Linear | Nf4Linear,
        plan: LayerPlan,
        config: MokaConfig,
        *,
        key: jax.Array,
        layers: int | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.base = base
        self.plan = plan
        self.config = config
        self.layers = layers
        self.execution = config.execution if execution is None else execution
        _check_execution(self.execution, base)
        self.dropout_key: DropoutKey | None = nnx.data(None)
        lead = () if layers is None else (layers,)
        factor_a, factor_b = _start(key, plan, config, lead)
        self.factor_a = nnx.List([MokaParam(factor) for factor in factor_a])
        self.factor_b = nnx.List([MokaParam(factor) for factor in factor_b])
        gated = config.gate == "softmax"
        self.gate_logits = MokaParam(jnp.zeros((*lead, plan.terms), jnp.float32)) if gated else None

    def __getattr__(self, name: str) -> Any:
        """A setting of the base layer, such as `in_features`, for models that read it; never one of its arrays.

        Raises:
            AttributeError: there is none, or it is an array: who computes with W alone would pass the adapter by.
        """
        base = vars(self).get("base")
        if base is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = getattr(base, name)
        if isinstance(value, nnx.Variable | jax.Array):
            raise AttributeError(
                f"{name!r} of an adapted layer is the base's alone, without ΔW: read it from `layer.base`, call the "
                "layer, or `merge` the model first"
            )
        return value

    def delta(self) -> jax.Array:
        """ΔW, (out, in), in the factors' dtype."""
        return delta_weight(self.plan, self.config, *self._factors())

    def __call__(self, x: jax.Array, *, out_sharding: Any = None, execution: Execution | None = None) -> jax.Array:
        """x (..., in) to (..., out), in the dtype of the base layer's output.

        Args:
            out_sharding: None; here because Flax's own modules hand it to their layers.
            execution: for this call, in place of the layer's own.

        Raises:
            ConfigError: as when the layer is made; or `out_sharding` is given, which is for explicit meshes.
        """
        refuse_out_sharding(out_sharding)
        schedule, into_base = self.schedule(tokens_of(x), execution)
        if not into_base:
            y = self.base(x)
            return y + self._added(x.astype(y.dtype), schedule)
        arrays, bias = frozen_arrays(self.base)
        given = [array for array in (arrays.get("kernel"), bias) if array is not None]
        x = x.astype(self.base.dtype or jnp.result_type(x, *given))
        y = mixture_product(self._statics(schedule), x, None, arrays, self._mixture())
        return y if bias is None else y + bias.astype(y.dtype)

    def schedule(self, tokens: int, execution: Execution | None = None) -> tuple[Schedule, bool]:
        """How a call with this many tokens is computed, and whether ΔW is added to the base's weight there."""
        execution = self.execution if execution is None else execution
        _check_execution(execution, self.base)
        plain = not own_ways(self.base) and self.dropout_key is None
        schedule = plan_execution(
            self.plan,
            self.config,
            tokens,
            execution=execution,
            own_product=not plain,
            backend=jax.default_backend(),
        )
        return schedule, plain and schedule.forward == "merged"

    def to_factors(self, layer: int | None = None) -> LayerFactors:
        """The trained numbers as NumPy arrays; `layer` chooses one of a stack."""

        def take(variable: nnx.Variable) -> np.ndarray:
            value = variable[...]
            return np.asarray(value if layer is None else value[layer])

        return LayerFactors(
            plan=self.plan,
            factor_a=tuple(take(factor) for factor in self.factor_a),
            factor_b=tuple(take(factor) for factor in self.factor_b),
            gate_logits=None if self.gate_logits is None else take(self.gate_logits),
        )

    def set_factors(self, layers: list[LayerFactors]) -> None:
        """Take over trained numbers, one entry for each layer of a stack (or just one)."""
        ours = {f"factor_a.{i}": variable for i, variable in enumerate(self.factor_a)}
        ours |= {f"factor_b.{i}": variable for i, variable in enumerate(self.factor_b)}
        if self.gate_logits is not None:
            ours["gate_logits"] = self.gate_logits
        theirs = [dict(layer.tensors()) for layer in layers]
        for name, variable in ours.items():
            arrays = [tensors[name] for tensors in theirs]
            # a copy: on a CPU JAX may otherwise share the caller's memory
            variable.set_value(jnp.array(arrays[0] if self.layers is None else np.stack(arrays), variable.dtype))

    def _added(self, x: jax.Array, schedule: Schedule) -> jax.Array:
        """ΔW dropout(x), as a product of its own."""
        keep = None
        if self.dropout_key is not None:
            keep = jax.random.bernoulli(self.dropout_key[...], 1 - self.config.dropout, x.shape)
        return mixture_product(self._statics(schedule), x, keep, None, self._mixture())

    def _statics(self, schedule: Schedule) -> Statics:
        rate = 1 - self.config.dropout
        return Statics(plan=self.plan, identity=self.config.identity, schedule=schedule, keep_rate=rate)

    def _factors(self) -> tuple[list[jax.Array], list[jax.Array], jax.Array | None]:
        gate = None if self.gate_logits is None else self.gate_logits[...]
        return [factor[...] for factor in self.factor_a], [factor[...] for factor in self.factor_b], gate

    def _mixture(self) -> Mixture:
        factor_a, factor_b, gate = self._factors()
        return Mixture(coefficients(self.plan, self.config, gate), factor_a, factor_b)


def own_ways(base: nnx.Module) -> list[str]:
    """The settings by which a base layer computes more than x Wᵀ + b; without any, a merged weight can serve it."""
    if isinstance(base, Nf4Linear):
        return []
    if not isinstance(base, nnx.Linear):
        return ["over several axes"]
    changed = {
        "dot_general": base.dot_general is not jax.lax.dot_general,
        "precision": base.precision is not None,
        "preferred_element_type": getattr(base, "preferred_element_type", None) is not None,
        "promote_dtype": base.promote_dtype is not nnx.nn.dtypes.promote_dtype,
    }
    return [name for name, is_set in changed.items() if is_set]


def frozen_arrays(base: nnx.Linear | Nf4Linear) -> tuple[Frozen, jax.Array | None]:
    """The arrays of a base layer's frozen weight, as `moka_jax.nf4.frozen_weight` takes them, and its bias (out,)."""
    bias = None if base.bias is None else base.bias[...]
    return (base.arrays() if isinstance(base, Nf4Linear) else {"kernel": base.kernel[...]}), bias


def _check_execution(execution: Execution, base: nnx.Module) -> None:
    if check_execution(execution) == "merged" and (ways := own_ways(base)):
        raise ConfigError(
            "execution: 'merged' puts W + ΔW in the place of W, but this base layer multiplies in a way of its own "
            f"({', '.join(ways)}), which that would pass by; use 'factored' or 'auto'"
        )


def refuse_out_sharding(out_sharding: Any) -> None:
    """Raise a ConfigError if a call asks for its output's sharding, which the mixture's product cannot promise."""
    if out_sharding is not None:
        raise ConfigError(
            f"out_sharding: expected None, got {out_sharding}: an adapted layer leaves its output's sharding to the "
            "compiler; put a sharding constraint on the output instead"
        )


def tokens_of(x: jax.Array) -> int:
    """How many vectors (..., in) the execution is planned for: those of one part of the batch on a mesh."""
    return math.prod(x.shape[:-1]) // batch_shards(x)


def with_dropout_key(model: nnx.Module, key: jax.Array) -> nnx.Module:
    """The model with dropout switched on in every `MokaLinear`, all masks drawn from `key`.

    Meant for a model that was merged inside the function being differentiated: dropout is then a pure function
    of the key, and a resumed run draws the masks that an uninterrupted one would have drawn.

    Args:
        model: changed in place.
        key: a scalar PRNG key, as `jax.random.key` makes it.
    """
    index = 0
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MokaLinear) and module.config.dropout > 0:
            own = jax.random.fold_in(key, index)
            module.dropout_key = DropoutKey(own if module.layers is None else jax.random.split(own, module.layers))
            index += 1
    return model


@partial(jax.jit, static_argnums=(1, 2, 3))
def _start(
    key: jax.Array, plan: LayerPlan, config: MokaConfig, lead: tuple[int, ...]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """All factors at the start: one kind 0, the other Kaiming-uniform with a = √5 over its own columns, ±1/√columns.

    One draw for all entries of a layer: compiling the generator takes seconds for each shape that it is asked for.
    """
    random = "a" if config.zero_factor == "b" else "b"
    shapes = {
        name: [(*lead, *group.factor_shape(name)) for group in plan.groups if config.identity != name]
        for name in ("a", "b")
    }
    sizes = [math.prod(shape) for shape in shapes[random]]
    parts = (
        jnp.split(jax.random.uniform(key, (sum(sizes),), jnp.float32, -1, 1), np.cumsum(sizes)[:-1]) if sizes else []
    )
    drawn = [part.reshape(shape) / math.sqrt(shape[-1]) for part, shape in zip(parts, shapes[random], strict=True)]
    zeros = [jnp.zeros(shape, jnp.float32) for shape in shapes[config.zero_factor]]
    return (drawn, zeros) if random == "a" else (zeros, drawn)
