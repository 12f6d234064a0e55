"""What of an adapter goes into a file, and what a file cannot hold."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moka_core import plan_layer
from moka_core.adapter import raise_problems
from moka_core.errors import AdapterError
from moka_core.fingerprint import MERGED
from moka_core.seal import adapter_checksum, merge_mark
from moka_torch.config import MokaConfig
from moka_torch.linear import MokaLinear
from moka_torch.loading import CHECKPOINT_PREFIX, adapted_layers, plain_path, to_numpy


def own_tensors(
    found: dict[str, Tensor],
    model: nn.Module,
    config: MokaConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors of an adapter's file by their keys in the model's state dict: PEFT's, and those that it missed.

    Args:
        found: what PEFT takes for the adapter's.
        state_dict: of the model.

    Raises:
        AdapterError: tensors are missing in the state dict, as when it was not gathered; the config was changed since
            the adapter was attached; or the file could not be loaded as it is. Nothing is saved.
    """
    layers = adapted_layers(model, adapter_name)
    check_unchanged(layers, config, adapter_name)
    _check_reloadable(model, layers, adapter_name)
    if any(layer.multiplier(adapter_name) != 1 for layer in layers.values()):
        warnings.warn(
            f"adapter {adapter_name!r} is saved as its config says, without the factor that set_scale or "
            "scale_layer has put on it",
            stacklevel=3,
        )
    own = {}
    for key, tensor in state_dict.items():
        # PEFT goes by the names of modules, into which torch's wrappers put names that their state dicts lack
        path, _, name = plain_path(key).rpartition(".moka_")
        if path in layers and adapter_name in name.split("."):
            own[key] = tensor
    needed = sum(len(layer.tensor_names(adapter_name)) for layer in layers.values())
    if state_dict and len(own) < needed:  # a process that does not gather has an empty one
        raise AdapterError(
            f"adapter {adapter_name!r} has {needed} tensors, and {len(own)} of them are in the state dict; nothing was "
            "saved. Gather the whole state dict of the model first."
        )
    if any(tensor.dtype == torch.float64 for tensor in own.values()):
        warnings.warn(
            f"adapter {adapter_name!r} is in float64, which the format does not hold; it is saved in float32",
            stacklevel=3,
        )
        own = {key: tensor.float() if tensor.dtype == torch.float64 else tensor for key, tensor in own.items()}
    config.taken = None if len(own) < needed else _checksum(config, own, adapter_name)
    return {**found, **own}


def _checksum(config: MokaConfig, own: Mapping[str, Tensor], adapter_name: str) -> str:
    """The checksum that goes into the config, which PEFT and transformers write right after they took the tensors."""
    arrays = {}
    for key, tensor in own.items():
        path, _, name = plain_path(key).rpartition(".moka_")
        parts = [part for part in name.split(".") if part != adapter_name]  # the file's keys do not name the adapter
        arrays[f"{CHECKPOINT_PREFIX}{path}.moka_{'.'.join(parts)}"] = to_numpy(tensor)
    return adapter_checksum(config.seal_text(), arrays)


def merge_marks(model: nn.Module, adapter_names: Sequence[str]) -> list[str]:
    """`moka_core.seal.merge_mark` of the adapters that are merged already, and of these."""
    layers = [layer for layer in model.modules() if isinstance(layer, MokaLinear)]
    before = [name for layer in layers for name in layer.merged_adapters]
    marks = []
    for name in dict.fromkeys([*before, *adapter_names]):
        own = {}
        for path, layer in adapted_layers(model, name).items():
            layer.factors(name)  # refuses those without values, and shards
            config = dataclasses.replace(layer.moka_config[name], scale=layer.merged_scale(name))
            own[path] = config, {key: to_numpy(tensor) for key, tensor in layer.tensors(name).items()}
        if own:
            marks.append(merge_mark(own))
    return marks


def mark_merged(model: nn.Module, marks: Sequence[str]) -> None:
    """Note in a transformers model's config what was merged into it: see `moka_core.base_fingerprint`.

    The config is a new object afterwards, in all modules that shared it: other models may have been made with the old.
    """
    config: Any = getattr(model, "config", None)
    if not marks or not hasattr(config, "to_dict"):
        return  # a model without such a config has no fingerprint
    marked = copy.deepcopy(config)
    setattr(marked, MERGED, [*(getattr(config, MERGED, None) or ()), *marks])
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = marked


def check_unchanged(layers: Mapping[str, MokaLinear], config: MokaConfig, adapter_name: str) -> None:
    """Raise an AdapterError if a config says something else than what its layers were made with and compute."""
    core, problems = config.to_core(), []
    for path, layer in layers.items():
        own, dims = layer.moka_config[adapter_name], (layer.out_features, layer.in_features)
        now = core.for_layer(path, *dims)
        changed = [
            f"{path}: {name} is {getattr(own, name)!r}, the config says {getattr(now, name)!r}"
            for name in ("scale", "scaling", "gate", "identity", "zero_factor")
            if getattr(now, name) != getattr(own, name)
        ]
        if not changed and plan_layer(now, *dims) != layer.moka_plan[adapter_name]:
            changed = [f"{path}: its shapes are others than the config's"]
        problems += changed
    raise_problems(
        problems,
        f"the config of adapter {adapter_name!r} was changed after it was attached, which does not change the adapter; "
        "set it back (model.set_scale changes the scale of a live adapter)",
    )


def _check_reloadable(model: nn.Module, layers: Mapping[str, MokaLinear], adapter_name: str) -> None:
    problems = [
        f"{path}: lies inside an adapter of another method, and would be saved under a path that no base model has"
        for path in layers
        if path.endswith(".base_layer")
    ]
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)()
    problems += [
        f"{path}: the output head is merged, and PEFT saves it as it is: a reloaded adapter would add ΔW again; call "
        "unmerge_adapter first"
        for path, layer in layers.items()
        if layer.merged and outputs is not None and (outputs is layer or outputs is layer.get_base_layer())
    ]
    raise_problems(problems, f"adapter {adapter_name!r} cannot be saved")
