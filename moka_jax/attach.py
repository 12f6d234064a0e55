"""The verbs on a whole NNX model: attach, merge, export_adapter, import_adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.bridge import ToNNX

from moka_core import (
    Adapter,
    AdapterError,
    ConfigError,
    LayerPlan,
    MokaConfig,
    TargetError,
    check_base,
    plan_model,
    preset,
)
from moka_core.adapter import SHOWN, raise_problems
from moka_core.execution import Execution
from moka_core.plan import ALL_LINEAR
from moka_jax.general import General, MokaGeneral
from moka_jax.linear import MokaLinear, frozen_arrays, own_ways
from moka_jax.nf4 import frozen_weight
from moka_jax.sites import Site, dotted, linear_sites, parent_of, replace_module


def attach(
    model: nnx.Module, config: MokaConfig | str, *, seed: int = 0, execution: Execution | None = None
) -> nnx.Module:
    """The model with a `MokaLinear` in place of every targeted linear layer; changed in place, and returned.

    y = W x becomes y = W x + ΔW x, with ΔW = 0 at the start. `config.dropout` acts where `with_dropout_key` has set
    a key: in every step of `moka_jax.train`; in a training loop of your own, call it on the model inside the loss.

    Args:
        model: any NNX model, its layers in a loop, in a `Stack`, or stacked by `nnx.vmap` for `nnx.scan`; what can be a
            target, and by what name, `moka_jax.sites.linear_sites` tells.
        config: the adapter's settings, or the name of a preset.
        seed: draws the factors that do not start at zero.
        execution: see `MokaLinear`; None takes `config.execution`.

    Raises:
        TargetError: a target matches no layer, only some layers of a stack, or a layer that cannot be replaced; or the
            layers that are meant are Linen's, behind `nnx.bridge.ToNNX`.
        ConfigError: the model is adapted already, or a shape does not fit, or the execution is unknown.
    """
    _check_model("attach", model)
    if isinstance(config, str):
        config = preset(config, getattr(model, "architecture", None))
    if not isinstance(config, MokaConfig):
        raise ConfigError(f"attach: expected a MokaConfig or a preset's name; got {type(config).__name__}")
    sites = linear_sites(model)
    if any(isinstance(site.module, MokaLinear) for site in sites):
        raise ConfigError("attach: this model has an adapter already; merge it first, or start from the base model")
    _refuse_linen(model, config, sites)
    plans = plan_model(config, {name: site.dims for site in sites for name in site.names})
    key = jax.random.key(seed)
    layers = []  # all of them before any is put in place: what is refused leaves the model as it was
    configs = {name: config.for_layer(name, plan.out_features, plan.in_features) for name, plan in plans.items()}
    for index, (site, plan) in enumerate(_choose(model, sites, plans, configs)):
        own = jax.random.fold_in(key, index)
        layers.append((site, _adapted(site, plan, configs[site.names[0]], key=own, execution=execution)))
    for site, layer in layers:
        replace_module(model, site.path, layer)
    return model


def export_adapter(model: nnx.Module) -> Adapter:
    """The adapter of a model as one value of NumPy arrays, its shapes all explicit.

    Raises:
        AdapterError: the model has no adapter, or a trained entry is not finite.
    """
    sites = [site for site in linear_sites(model) if isinstance(site.module, MokaLinear)]
    if not sites:
        raise AdapterError("export_adapter: this model has no adapter; attach one, or import one, first")
    layers = {}
    settings = {}
    for site in sites:
        assert isinstance(site.module, MokaLinear)
        own = dataclasses.replace(site.module.config, execution="auto")  # how it was computed is no part of it
        for index, name in enumerate(site.names):
            layers[name] = site.module.to_factors(None if site.layers is None else index)
            settings[name] = (own, site.module.plan)
    config = MokaConfig.of_layers(settings)
    return Adapter(
        config=config,
        layers=layers,
        base_fingerprint=getattr(model, "base_fingerprint", None),
        base_model=getattr(model, "base_model", None),
        base_quantisation=getattr(model, "base_quantisation", None),
    ).validate()


def import_adapter(
    model: nnx.Module, adapter: Adapter, *, allow_other_base: bool = False, execution: Execution | None = None
) -> nnx.Module:
    """The model with a trained adapter on it; changed in place, and returned. Nothing changes if it does not fit.

    Args:
        allow_other_base: accept an adapter that was trained on another base model, or one whose base cannot be told
            since this model has no `base_fingerprint`.
        execution: see `MokaLinear`.

    Raises:
        AdapterError: the adapter is not sound, is for other layers or shapes, or for another base.
    """
    _check_model("import_adapter", model)
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"import_adapter: expected an Adapter, as conversion.load_adapter reads from a folder; got "
            f"{type(adapter).__name__}"
        )
    adapter.validate()
    sites = linear_sites(model)
    if any(isinstance(site.module, MokaLinear) for site in sites):
        raise ConfigError("import_adapter: this model has an adapter already; merge it first, or load the base again")
    found = getattr(model, "base_fingerprint", None)
    check_base(adapter.base_fingerprint, found, allow_other_base=allow_other_base)
    dims = {name: site.dims for site in sites for name in site.names}
    problems = [f"{name}: this model has no such linear layer" for name in sorted(set(adapter.layers) - set(dims))]
    for name in sorted(set(adapter.layers) & set(dims)):
        plan = adapter.layers[name].plan
        if (plan.out_features, plan.in_features) != dims[name]:
            problems.append(f"{name}: adapter is for {plan.key}, the model's layer is {dims[name][0]}x{dims[name][1]}")
    raise_problems(problems, "adapter does not fit this model", shown=SHOWN)
    try:
        configs = {name: adapter.layer_config(name) for name in adapter.layers}
        chosen = _choose(model, sites, {name: layer.plan for name, layer in adapter.layers.items()}, configs)
    except TargetError as error:
        raise AdapterError(f"adapter does not fit this model: {error}") from error
    key = jax.random.key(0)
    layers = [
        (site, _adapted(site, plan, configs[site.names[0]], key=key, execution=execution)) for site, plan in chosen
    ]
    for site, layer in layers:
        layer.set_factors([adapter.layers[name] for name in site.names])
        replace_module(model, site.path, layer)
    return model


def merge(model: nnx.Module) -> nnx.Module:
    """The model with W + ΔW in place of every adapted layer, as `nnx.Linear`; changed in place, and returned.

    A packed base is decoded: the merged layer is dense, and nothing is quantised again.

    Raises:
        AdapterError: the model has no adapter, or a layer computes more than x Wᵀ + b.
    """
    sites = [site for site in linear_sites(model) if isinstance(site.module, MokaLinear)]
    if not sites:
        raise AdapterError("merge: this model has no adapter; attach one, or import one, first")
    special = [
        f"{dotted(site.path)} ({', '.join(ways)})"
        for site in sites
        if not isinstance(site.module, MokaGeneral) and (ways := own_ways(site.base))
    ]
    if special:
        raise AdapterError(
            f"merge: {', '.join(special)} multiplies in a way of its own, which a merged weight would not keep; use "
            "the adapter unmerged"
        )
    for site in sites:
        merged = _merged_general if isinstance(site.module, MokaGeneral) else _merged_linear
        replace_module(model, site.path, merged(site))
    for name in ("base_fingerprint", "base_quantisation"):
        if hasattr(model, name):
            setattr(model, name, None)  # it is another model now
    return model


def _check_model(verb: str, model: nnx.Module) -> None:
    if not isinstance(model, nnx.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConfigError(f"{verb}: expected a model, an instance of nnx.Module, as the first argument; got {got}")


def _adapted(
    site: Site, plan: LayerPlan, config: MokaConfig, *, key: jax.Array, execution: Execution | None
) -> MokaLinear:
    kind = MokaLinear if General.of(site.base) is None else MokaGeneral
    try:
        return kind(site.base, plan, config, key=key, layers=site.layers, execution=execution)
    except ConfigError as error:
        raise ConfigError(f"{dotted(site.path)}: {error}") from None


def _merged_linear(site: Site) -> nnx.Linear:
    layer = site.module
    fold = _merged_weight if site.layers is None else nnx.vmap(_merged_weight)
    weight, bias = fold(layer)
    out, in_ = site.dims
    make = partial(nnx.Linear, in_, out, use_bias=bias is not None, dtype=layer.base.dtype)
    dense = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    dense.kernel = nnx.Param(jnp.swapaxes(weight, -1, -2))
    if bias is not None:
        dense.bias = nnx.Param(bias)
    return dense


def _merged_weight(layer: MokaLinear) -> tuple[jax.Array, jax.Array | None]:
    arrays, bias = frozen_arrays(layer.base)
    weight = frozen_weight(arrays, (layer.base.out_features, layer.base.in_features))
    return (weight + layer.delta()).astype(weight.dtype), bias


def _merged_general(site: Site) -> nnx.Module:
    """The layer itself with another kernel: its way to multiply stays."""
    merged = nnx.clone(site.base)
    general = General.of(merged)
    assert general is not None
    kernel = general.kernel_of(merged)
    delta = (MokaLinear.delta if site.layers is None else nnx.vmap(MokaLinear.delta))(site.module)
    weight = general.equation.weight(kernel) + delta
    getattr(merged, general.kernel).set_value(general.equation.to_kernel(weight, kernel).astype(kernel.dtype))
    return merged


def _refuse_linen(model: nnx.Module, config: MokaConfig, sites: list[Site]) -> None:
    """Raise a TargetError if there are Linen modules that the targets may mean."""
    linen = [dotted(path) or "the model" for path, module in nnx.iter_modules(model) if isinstance(module, ToNNX)]
    if linen and (not sites or config.target_modules == ALL_LINEAR):
        raise TargetError(
            f"target_modules: {linen[0]} is a Linen module behind nnx.bridge.ToNNX, and its layers are variables, not "
            "NNX modules that can be replaced; write it in NNX, or target NNX layers beside it by name"
        )


def _choose(
    model: nnx.Module, sites: list[Site], plans: Mapping[str, LayerPlan], configs: Mapping[str, MokaConfig]
) -> list[tuple[Site, LayerPlan]]:
    """The sites that have a plan, all of them replaceable; a stack is chosen whole or not at all, and alike."""
    shared = {tuple(path): paths for paths in nnx.find_duplicates(model) for path in paths}
    chosen = []
    for site in sites:
        hit = [name for name in site.names if name in plans]
        if hit and site.problem is not None:
            raise TargetError(f"target_modules: {hit[0]} cannot be adapted: {site.problem}")
        if hit and len(hit) < len(site.names):
            raise TargetError(
                f"target_modules: {len(hit)} of {len(site.names)} layers of the stack {dotted(site.path)!r} match "
                f"(first that does not: {next(name for name in site.names if name not in plans)}); "
                "a stack shares one structure, so target all of its layers or none"
            )
        other = [n for n in hit if plans[n] != plans[hit[0]] or configs[n].scale != configs[hit[0]].scale]
        if other:
            raise TargetError(
                f"target_modules: {hit[0]} and {other[0]} have other shapes or another scale; here they are layers of "
                f"the stack {dotted(site.path)!r}, which shares one structure, so give all of its layers the same"
            )
        if hit and site.path in shared:
            raise TargetError(
                f"target_modules: one layer stands under {' and '.join(map(dotted, shared[site.path]))}; "
                "an adapter would reach it under one of these only, so make them two layers or do not target it"
            )
        if hit and isinstance(parent_of(model, site.path), tuple):
            raise TargetError(
                f"target_modules: {dotted(site.path)} stands in a tuple, where it cannot be replaced; "
                "hold the layers in an nnx.List"
            )
        if hit:
            chosen.append((site, plans[hit[0]]))
    return chosen
