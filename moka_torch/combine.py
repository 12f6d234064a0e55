"""The weighted sum of mixtures on one layer, which is a mixture again: its terms are all of theirs."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moka_core import KronShape, LayerPlan, MokaConfig, ShapeGroup
from moka_core.config import Identity
from moka_core.errors import ConfigError
from moka_torch.linear import MokaLinear
from moka_torch.mixture import coefficients

# Of a term of weight 0: e^-100 is 4e-44 of the sum.
SMALLEST_LOGIT = -100.0


def combine_layers(
    layers: Mapping[str, MokaLinear], weights: Mapping[str, float], *, identity: Identity, dropout: float
) -> dict[str, tuple[MokaConfig, LayerPlan, dict[str, Tensor]]]:
    """What `combine` gives for every layer whose sum is not 0, by path; a layer without an adapter is that sum too.

    Raises:
        ConfigError: the sum is 0 in every layer.
    """
    combined = {}
    for path, layer in layers.items():
        own = {
            name: weight
            for name, weight in weights.items()
            if name in layer.moka_plan and weight * layer.multiplier(name) != 0
        }
        if own:
            combined[path] = combine(layer, own, identity=identity, dropout=dropout)
    if not combined:
        raise ConfigError("weights: the sum is 0, every term having the weight 0; there is nothing to combine")
    return combined


@torch.no_grad()
def combine(
    layer: MokaLinear, weights: Mapping[str, float], *, identity: Identity, dropout: float
) -> tuple[MokaConfig, LayerPlan, dict[str, Tensor]]:
    """The mixture whose ΔW is Σ_n weights[n] · ΔW_n, over the adapters n that this layer has.

        ΔW = scale · Σ_t softmax(logits)_t · (±A_t ⊗ B_t),   scale = Σ_t |k_t|,   logits_t = log(|k_t| / scale)

    with k_t the weight of term t in its own adapter times that adapter's weight here; its sign goes into the factor.
    The factors' numbers are those of the adapters, so that the sum is exact but for the rounding of the logits.

    Args:
        weights: by the adapter's name.
        identity: which factor stays a fixed identity: one that all these adapters have as such, or "none".
        dropout: of the sum.

    Returns:
        The layer's own settings (gate "softmax", scaling "none"), its plan, and its tensors by the names of
        `moka_core.LayerFactors.tensors`, float32 at least.

    Raises:
        ConfigError: the sum is 0.
    """
    groups: dict[KronShape, list[tuple[Tensor, Tensor | None, Tensor | None]]] = {}
    for name, weight in weights.items():
        plan, config = layer.moka_plan[name], layer.moka_config[name]
        factor_a, factor_b, logits = layer.factors(name)
        stored = (factor_b or factor_a)[0]
        k = coefficients(plan, config, logits, dtype=torch.float64, device=stored.device)
        k = k * (weight * layer.multiplier(name))
        for index, (group, own) in enumerate(zip(plan.groups, k.split([g.copies for g in plan.groups]), strict=True)):
            a = _factor(factor_a[index] if factor_a else None, group, "a", identity, stored)
            b = _factor(factor_b[index] if factor_b else None, group, "b", identity, stored)
            groups.setdefault(group.shape, []).append((own, a, b))

    k = torch.cat([own for parts in groups.values() for own, _, _ in parts])
    scale = float(k.abs().sum())
    if scale == 0:
        raise ConfigError("weights: the sum is 0, every term having the weight 0; there is nothing to combine")
    tensors: dict[str, Tensor] = {"gate_logits": (k.abs() / scale).log().clamp(min=SMALLEST_LOGIT).float()}
    rows = []
    for index, (shape, parts) in enumerate(groups.items()):
        sign = torch.where(torch.cat([own for own, _, _ in parts]) < 0, -1.0, 1.0)
        rows.append(ShapeGroup(shape, len(sign)))
        signed = "factor_b" if identity == "a" else "factor_a"
        for kind, stack in (("factor_a", [a for _, a, _ in parts]), ("factor_b", [b for _, _, b in parts])):
            present = [factor for factor in stack if factor is not None]
            if present:
                joined = torch.cat(present)
                tensors[f"{kind}.{index}"] = joined * sign[:, None, None].to(joined.dtype) if kind == signed else joined
    plan = LayerPlan(out_features=layer.out_features, in_features=layer.in_features, groups=tuple(rows))
    config = MokaConfig(
        r=plan.terms,
        num_shapes=len(rows),
        shapes=(plan,),
        scale=scale,
        identity=identity,
        zero_factor="a" if identity == "b" else "b",
        dropout=dropout,
    )
    return config, plan, tensors


def check_weights(adapters: Sequence[str], weights: Sequence[float], known: Mapping[str, object]) -> dict[str, float]:
    """The weight of every adapter to be combined, those of weight 0 left out.

    Args:
        weights: real numbers, or scalars of NumPy or torch; a one-dimensional array of them will do.

    Raises:
        ConfigError: a name is unknown or stands twice, there are more weights than names or fewer, a weight is not
            finite, or all are 0.
    """
    if isinstance(adapters, str):
        raise ConfigError(f"adapters: expected a list of names; got {adapters!r}. Write [{adapters!r}]")
    unknown = [name for name in adapters if name not in known]
    if unknown:
        raise ConfigError(f"adapters: expected some of {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    if getattr(weights, "ndim", 1) != 1 or not hasattr(weights, "__len__"):
        raise ConfigError(f"weights: expected a list of numbers, one an adapter; got {weights!r}")
    if len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ConfigError(f"adapters: expected different names, with a weight each; got {adapters!r} and {weights!r}")
    chosen = {name: number for name, number in zip(adapters, map(_number, weights), strict=True) if number}
    if not chosen:
        raise ConfigError(f"weights: expected at least one that is not 0; got {weights!r}")
    return chosen


def _number(weight: Any) -> float:
    plain: Any = weight.item() if getattr(weight, "ndim", None) == 0 else weight  # of NumPy or torch
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        raise ConfigError(f"weights: expected numbers; got {weight!r}, a {type(weight).__name__}")
    size: Any = abs(plain)
    if not size <= sys.float_info.max:
        raise ConfigError(f"weights: expected finite numbers; got {weight!r}")
    return float(plain)


def _factor(given: Tensor | None, group: ShapeGroup, factor: str, identity: str, like: Tensor) -> Tensor | None:
    """A factor as it will be stored: None if it is the identity of the sum too, written out if only of its own."""
    if given is not None:
        return given.detach().to(torch.promote_types(given.dtype, torch.float32))
    if identity == factor:
        return None
    copies, rows, columns = group.factor_shape(factor)
    return torch.eye(rows, columns, device=like.device).expand(copies, rows, columns)
