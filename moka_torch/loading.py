"""Strict loading: what a saved adapter must hold to go into a model's layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moka_core.adapter import DTYPES, raise_problems, tensor_problems
from moka_torch.linear import MokaLinear

CHECKPOINT_PREFIX = "base_model.model."


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, MokaLinear]:
    """The layers that carry an adapter, by the dotted path that they have in a Hugging Face checkpoint."""
    return {
        path.removeprefix(CHECKPOINT_PREFIX): module
        for path, module in model.named_modules()
        if isinstance(module, MokaLinear) and adapter_name in module.moka_plan
    }


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Return if `state_dict`, as it stands in a file, is exactly this adapter's.

    Args:
        model: a model that carries the adapter's layers.
        state_dict: tensors by the names of the file format, `base_model.model.<path>.moka_factor_a.<group>`.

    Raises:
        AdapterError: keys missing or unexpected, shapes, dtypes, or entries that are not finite; all listed.
    """
    layers = adapted_layers(model, adapter_name)
    found: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    problems = []
    for key, tensor in state_dict.items():
        path, _, name = key.removeprefix(CHECKPOINT_PREFIX).rpartition(".moka_")
        if path in found:
            found[path][name] = tensor
        else:
            problems.append(f"{key}: unexpected; the adapter has no such tensor")
    for path, layer in layers.items():
        plan, config = layer.moka_plan[adapter_name], layer.moka_config[adapter_name]
        arrays = {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in found[path].items()}
        problems += tensor_problems(plan, config, arrays, where=path)
        for name, tensor in found[path].items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                problems.append(f"{path}: {name} expected dtype {' or '.join(DTYPES)}, got {dtype}")
    raise_problems(sorted(problems), f"adapter {adapter_name!r} does not fit the model, nothing was loaded")
