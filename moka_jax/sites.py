"""The linear layers of an NNX model: where each stands, and what it is called in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax import nnx

from moka_jax.general import General
from moka_jax.linear import MokaLinear
from moka_jax.nf4 import Nf4Linear, packed_layout
from moka_jax.stack import Stack

Path = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A linear layer of a model: where it stands, and what it is called in a checkpoint.

    Holds: `names` has one dotted path, or, inside a stack of `layers` layers, one for each layer. `problem` says why it
    cannot have an adapter, if it cannot.
    """

    path: Path
    names: tuple[str, ...]
    layers: int | None
    dims: tuple[int, int]  # (out_features, in_features)
    module: Any = field(repr=False)
    problem: str | None = None

    @property
    def base(self) -> Any:
        """The frozen layer: the module itself, or what its adapter stands on."""
        return self.module.base if isinstance(self.module, MokaLinear) else self.module


def linear_sites(model: nnx.Module) -> list[Site]:
    """Every linear layer of an NNX model, in the order of its paths; one inside a `MokaLinear` stands for both.

    These are `nnx.Linear`, `Nf4Linear`, `nnx.LinearGeneral` without batch axes, and `nnx.Einsum` and classes made known
    by `register_einsum` where the equation is one matrix. A subclass that computes something else
    (`nnx.LoRALinear`) is none of them.

    Layers of one kind that are stacked along a first axis, by a `Stack` or by `nnx.vmap` for `nnx.scan`, are called
    p.0.…, p.1.…, as in a checkpoint that is not stacked; p is the path of the `Stack`, or of the outermost module below
    the model whose parameters are all stacked.
    """
    modules: dict[Any, Any] = dict(nnx.iter_modules(model))
    adapted = {path for path, module in modules.items() if isinstance(module, MokaLinear)}
    found: dict[Path, _Linear] = {}
    for path, module in modules.items():
        if path[:-1] not in adapted and (linear := _linear(module)) is not None:
            found[path] = linear
    sites = [_site(path, found, modules) for path in found]
    return sorted(sites, key=lambda site: tuple(map(str, site.path)))


def dotted(path: Sequence[Any]) -> str:
    """A path as a checkpoint writes it."""
    return ".".join(map(str, path))


def parent_of(model: nnx.Module, path: Path) -> Any:
    """What holds the module at `path`."""
    parent: Any = model
    for part in path[:-1]:
        parent = parent[part] if isinstance(part, int) or isinstance(parent, dict) else getattr(parent, part)
    return parent


def replace_module(model: nnx.Module, path: Path, module: nnx.Module) -> None:
    """Put a module in the place of the one at `path`, the `path` of a `Site`."""
    parent, last = parent_of(model, path), path[-1]
    if isinstance(last, int) or isinstance(parent, dict):
        parent[last] = module
    else:
        setattr(parent, last, module)


@dataclass(frozen=True)
class _Linear:
    """A linear layer's dims (out, in), its weight's own shape, and the shape that the weight has."""

    dims: tuple[int, int]
    own: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[: len(self.shape) - len(self.own)]


def _linear(module: nnx.Module) -> _Linear | None:
    if isinstance(module, MokaLinear):
        return _linear(module.base)
    if isinstance(module, Nf4Linear):
        own = packed_layout(module.shape, nested=module.nested)["codes"].shape
        return _Linear(module.shape, own, module.codes.get_value().shape)
    if isinstance(module, nnx.Linear):
        dims = (module.out_features, module.in_features)
        own_call = type(module).__call__ is not nnx.Linear.__call__
        return None if own_call else _Linear(dims, dims[::-1], module.kernel.get_value().shape)
    general = General.of(module)
    return None if general is None else _Linear(general.dims, general.shape, general.kernel_of(module).shape)


def _site(path: Path, found: Mapping[Path, _Linear], modules: Mapping[Path, Any]) -> Site:
    module, linear = modules[path], found[path]
    lead, layers, problem = linear.lead, None, None
    names: tuple[str, ...] = (dotted(path),)
    if len(lead) > 1 or linear.shape[len(lead) :] != linear.own:
        problem = f"its weight has the shape {linear.shape}, expected {linear.own}, or that behind one axis of layers"
    elif lead:
        prefix, inner = _stack_of(path, found, modules)
        layers = lead[0]
        names = tuple(dotted((*prefix, index, *inner)) for index in range(layers))
    return Site(path=path, names=names, layers=layers, dims=linear.dims, module=module, problem=problem)


def _stack_of(path: Path, found: Mapping[Path, _Linear], modules: Mapping[Path, Any]) -> tuple[Path, Path]:
    """The path of the module whose layers are stacked, and the way from there to the one at `path`."""
    prefixes = [path[:length] for length in range(1, len(path) + 1)]
    for prefix in prefixes:
        if isinstance(modules.get(prefix), Stack):
            return prefix, path[len(prefix) + 1 :]
    lead = found[path].lead
    for prefix in filter(modules.__contains__, prefixes):
        inside = [linear.lead for other, linear in found.items() if other[: len(prefix)] == prefix]
        inside += [shape[:1] for shape in _parameter_shapes(modules[prefix])]
        if set(inside) == {lead}:
            return prefix, path[len(prefix) :]
    return path, ()


def _parameter_shapes(module: nnx.Module) -> list[tuple[int, ...]]:
    return [variable.get_value().shape for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))]
