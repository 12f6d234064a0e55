"""Which modules of a PyTorch model an adapter goes on, decided and checked before any of them is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka_core import LayerPlan, MokaConfig, plan_layer, plan_model
from moka_core.adapter import SHOWN, raise_problems
from moka_core.errors import ConfigError, TargetError
from moka_core.plan import ALL_LINEAR, matches
from moka_torch.linear import MokaLinear
from moka_torch.uncalled import uncalled_layers

_RESERVED = ("base_layer", *MokaLinear.adapter_layer_names, *MokaLinear.other_param_names)


def plan_targets(
    config: MokaConfig, model: nn.Module, excluded: Callable[[str], bool] = lambda path: False
) -> dict[str, LayerPlan]:
    """The plan of every layer that `config` targets, by its path in `model`.

    "all-linear" leaves the `uncalled_layers` out, with a warning.

    Args:
        excluded: whether a module is left out although a target matches its path.

    Raises:
        TargetError: a target matches no linear layer (near misses are given), or matches a module with
            weights of another kind, or one of the `uncalled_layers`.
        ConfigError: see `moka_core.plan_model`.
    """
    kwargs = get_quantization_kwargs(model)
    modules = outer_modules(model)
    layers = linear_layers(model)
    found = uncalled_layers(model)
    uncalled = {
        path: found[path]
        for path in layers
        if path in found and matches(config.target_modules, path) and not excluded(path)
    }
    if config.target_modules == ALL_LINEAR or config.target_modules == (ALL_LINEAR,):
        if uncalled:
            warnings.warn(f"target_modules: {ALL_LINEAR!r} leaves out {_reasons(uncalled)}", stacklevel=2)
        layers = {path: dims for path, dims in layers.items() if path not in uncalled}
    else:
        _refuse_uncalled(uncalled)
        for path, module in modules.items():
            if path in layers or excluded(path) or not matches(config.target_modules, path):
                continue
            if _has_weights(module):
                refuse_module(path, module, **kwargs)
    plans = plan_model(config, layers, excluded={path for path in modules if excluded(path)})
    for path in plans:
        refuse_module(path, modules[path], **kwargs)
    return plans


def plan_stated(config: MokaConfig, stated: Mapping[str, str], model: nn.Module) -> dict[str, LayerPlan]:
    """The plan of exactly the layers that an adapter states, "OUTxIN" by path; its target_modules are not read.

    Raises:
        AdapterError: the model has no such linear layer, or one of other dimensions; the first are listed.
        TargetError: a layer carries an adapter of another method, or is one of the `uncalled_layers`.
    """
    kwargs = get_quantization_kwargs(model)
    modules = outer_modules(model)
    config = config.exact(stated_dims(stated))
    problems, plans = [], {}
    for path, key in sorted(stated.items()):
        dims = linear_dims(modules[path], **kwargs) if path in modules else None
        if dims is None:
            problems.append(f"{path}: the adapter has it, but this model has no such linear layer")
        elif f"{dims[0]}x{dims[1]}" != key:
            problems.append(f"{path}: the adapter is for {key}, the model's layer is {dims[0]}x{dims[1]}")
        else:
            refuse_module(path, modules[path], **kwargs)
            plans[path] = plan_layer(config.for_layer(path, *dims), *dims)
    raise_problems(problems, "the adapter does not fit the model", shown=SHOWN)
    found = uncalled_layers(model)
    _refuse_uncalled({path: found[path] for path in plans if path in found})
    return plans


def _refuse_uncalled(uncalled: Mapping[str, str]) -> None:
    if uncalled:
        raise TargetError(
            f"{_reasons(uncalled)}; an adapter there would do nothing. Take what matches it out of target_modules, or "
            "name it in exclude_modules"
        )


def _reasons(uncalled: Mapping[str, str]) -> str:
    first = next(iter(uncalled))
    return first + (f" (and {len(uncalled) - 1} more)" if uncalled.keys() - {first} else "") + f": {uncalled[first]}"


def stated_dims(stated: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) by path, of "OUTxIN" by path.

    Raises:
        ConfigError: an entry is written otherwise.
    """
    dims = {}
    for path, key in stated.items():
        out_features, _, in_features = str(key).partition("x")
        if not (out_features.isdecimal() and in_features.isdecimal()):
            raise ConfigError(f'layers[{path}]: expected "OUTxIN"; got {key!r}')
        dims[path] = int(out_features), int(in_features)
    return dims


def linear_dims(module: nn.Module, **kwargs: Any) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer, quantised or adapted ones too; None for anything else."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, Conv1D):
        rows, columns = base.weight.shape  # (in, out)
        return int(columns), int(rows)
    if not isinstance(base, nn.Linear):
        backend = resolve_quantization_backend(base, **kwargs)
        if backend is None or backend.layer_type != "linear":
            return None
    out_features, in_features = getattr(base, "out_features", None), getattr(base, "in_features", None)
    return None if out_features is None or in_features is None else (int(out_features), int(in_features))


def refuse_module(path: str, module: nn.Module, **kwargs: Any) -> tuple[int, int]:
    """(out_features, in_features) of a layer that an adapter can go on.

    Raises:
        TargetError: it is no linear layer, or carries an adapter of another method.
    """
    if isinstance(module, BaseTunerLayer) and not isinstance(module, MokaLinear):
        raise TargetError(
            f"{path}: already carries an adapter of another PEFT method ({type(module).__module__}."
            f"{type(module).__name__}); merge or unload it first, MoKA cannot be stacked on it"
        )
    dims = linear_dims(module, **kwargs)
    if dims is None:
        raise TargetError(
            f"{path}: target_modules matches it, but it is a {type(module).__name__}; supported are torch.nn.Linear, "
            "transformers' Conv1D and quantised linear layers that PEFT knows. Narrow target_modules down to linear "
            "layers."
        )
    return dims


def check_adapter_name(name: str, model: nn.Module) -> None:
    """Raise a ConfigError unless an adapter of that name can be told apart in parameter names.

    PEFT finds the parameters of an adapter by its name between dots anywhere in a parameter's path: with an
    adapter called "0" it would leave layer 0 and every group 0 out of what it saves for the other adapters.
    """
    taken = {part for path in outer_modules(model) for part in path.split(".")}.union(_RESERVED)
    taken |= {
        path.rpartition(".")[2]
        for path, _ in (*model.named_parameters(), *model.named_buffers())
        if "moka_" not in path
    }
    if not name or "." in name:
        raise ConfigError(f"adapter_name: expected a name without dots; got {name!r}")
    if name.isdecimal() or name in taken:
        raise ConfigError(
            f"adapter_name: {name!r} is also part of the path of a parameter (a module, or the number of a layer or of "
            "a shape group), and PEFT could not tell the two apart when saving; choose another name"
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ConfigError(f"adapter_name: {name!r} is a method or attribute of torch's modules; choose another name")
    if name in _adapter_names(model):
        raise ConfigError(
            f"adapter_name: this model already carries an adapter {name!r}; choose another name, or delete it first"
        )


def _adapter_names(model: nn.Module) -> set[str]:
    return {name for module in model.modules() if isinstance(module, MokaLinear) for name in module.moka_plan}


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear layer, by path."""
    kwargs = get_quantization_kwargs(model)
    dims = {path: linear_dims(module, **kwargs) for path, module in outer_modules(model).items()}
    return {path: found for path, found in dims.items() if found is not None}


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, but for the insides of adapted layers."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path and not path.startswith(inside or ("\0",)):
            modules[path] = module
            if isinstance(module, BaseTunerLayer):
                inside += (path + ".",)
    return modules


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or isinstance(module, BaseTunerLayer)
