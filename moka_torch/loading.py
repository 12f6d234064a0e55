"""Strict loading: what a saved adapter must hold to go into a model's layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from moka_core.adapter import DTYPE_NAMES, DTYPES, raise_problems, tensor_problems
from moka_core.errors import AdapterError
from moka_core.seal import check_seal
from moka_torch.config import MokaConfig
from moka_torch.linear import MokaLinear

CHECKPOINT_PREFIX = "base_model.model."


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, MokaLinear]:
    """The layers that carry an adapter, by the dotted path that they have in a Hugging Face checkpoint."""
    return {
        plain_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, MokaLinear) and adapter_name in module.moka_plan
    }


def plain_path(path: str) -> str:
    """A path or key in a PeftModel as in a Hugging Face checkpoint: without what PEFT and torch's wrappers put in."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        path = path.replace(wrapper, "")
    return path.removeprefix(CHECKPOINT_PREFIX)


def check_peft_model(model: object) -> None:
    """Raise an AdapterError that says what to pass if `model` is not a PeftModel itself."""
    if isinstance(model, PeftModel):
        return
    wrapped = isinstance(getattr(model, "module", None), PeftModel)
    hint = "pass its .module" if wrapped else "get one by moka_torch.attach or PeftModel.from_pretrained"
    raise AdapterError(f"peft_model: expected a PeftModel; got {type(model).__name__}; {hint}")


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], bias: str = "none") -> None:
    """Return if `state_dict` is exactly this adapter's.

    Biases and embeddings of the base are let pass, with a warning: PEFT saves them with `bias`, with
    `save_embedding_layers`, and after the vocabulary was resized, and nothing but the file tells so.

    Args:
        model: a model that carries the adapter's layers.
        state_dict: tensors by the names of the file format, `base_model.model.<path>.moka_factor_a.<group>`. PEFT has
            renamed those of `modules_to_save` to what they are called in the model.
        bias: the config's; biases that it announces come without a warning.

    Raises:
        AdapterError: keys missing or unexpected, shapes, dtypes, or entries that are not finite; all listed.
    """
    layers = adapted_layers(model, adapter_name)
    found: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    whole, parts, embeddings = _module_prefixes(model, adapter_name), _bias_names(model), _embedding_prefixes(model)
    aside = {f"{prefix.removesuffix(adapter_name + '.')}bias" for prefix in whole}
    problems, of_base = [], []
    wrapped = isinstance(model, PeftModel)
    for key, tensor in state_dict.items():
        name = key.removeprefix(CHECKPOINT_PREFIX)
        path, _, own = name.rpartition(".moka_")
        if path in found and (name == key and wrapped):
            problems.append(f"{key}: unexpected; expected it to begin with {CHECKPOINT_PREFIX}")
            continue
        if path in found:
            if own in found[path]:
                problems.append(f"{key}: stands twice, with and without {CHECKPOINT_PREFIX}")
            found[path][own] = tensor
            continue
        if name in aside:
            continue  # a bias that `modules_to_save` holds as well, under the name that is loaded
        of_embedding = name.startswith(embeddings) and ".moka_" not in name
        if (name in parts or of_embedding) and not name.startswith(whole):
            of_base += [] if bias != "none" and name.endswith("bias") else [name]
        elif not name.startswith(whole):
            problems.append(f"{key}: unexpected; the adapter has no such tensor")
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"{key}: has NaN or infinite entries")
    for path, layer in layers.items():
        plan, config = layer.moka_plan[adapter_name], layer.moka_config[adapter_name]
        arrays = {name: tensor.detach().to("cpu", torch.float32).numpy() for name, tensor in found[path].items()}
        problems += tensor_problems(plan, config, arrays, where=path)
        for name, tensor in found[path].items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                problems.append(f"{path}: {name} expected dtype {DTYPE_NAMES}, got {dtype}")
    present = {key.removeprefix(CHECKPOINT_PREFIX) for key in state_dict}
    problems += [f"{name}: missing, though bias is {bias!r}" for name in sorted(announced(model, bias) - present)]
    raise_problems(sorted(problems), f"adapter {adapter_name!r} does not fit the model, nothing was loaded")
    if of_base:
        warnings.warn(
            f"adapter {adapter_name!r} brings {', '.join(sorted(of_base))} of the base model along; they replace what "
            "this model has",
            stacklevel=2,
        )


def check_file(config: MokaConfig, state_dict: Mapping[str, Tensor], adapter_name: str) -> None:
    """Return if a checksum that came with the config is that of its fields and of the mixtures' tensors; forget it.

    A config that comes from no file, or that no tensors were saved with, has none.

    Args:
        state_dict: as in the file, and sound (see `check_state_dict`).

    Raises:
        AdapterError: the file's fields or tensors are not the ones that were written.
    """
    if config.checksum is None:
        return
    assert config.sealed is not None
    arrays = {
        f"{CHECKPOINT_PREFIX}{key.removeprefix(CHECKPOINT_PREFIX)}": to_numpy(tensor)
        for key, tensor in state_dict.items()
        if ".moka_" in key
    }
    check_seal(config.checksum, config.sealed, arrays, where=f"adapter {adapter_name!r}")
    config.checksum = config.sealed = None  # from here on it is trained, scaled and saved as any other


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy with the same bits, row-major; bfloat16 as ml_dtypes has it."""
    tensor = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)  # NumPy pins what it is shown
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _module_prefixes(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """The beginnings of the names of what `modules_to_save` trains."""
    return tuple(
        f"{path.removeprefix(CHECKPOINT_PREFIX)}.modules_to_save.{adapter_name}."
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    )


def _bias_names(model: nn.Module) -> set[str]:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return {plain_path(name) for name, _ in base.named_parameters() if name.rpartition(".")[2] == "bias"}


def _embedding_prefixes(model: nn.Module) -> tuple[str, ...]:
    """The beginnings of the names of the base's embeddings, input's and output's."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [getattr(base, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    wanted = {id(layer) for layer in layers if layer is not None}
    return tuple(f"{plain_path(path)}." for path, module in base.named_modules() if id(module) in wanted)


def announced(model: nn.Module, bias: str) -> set[str]:
    """The names of the biases that an adapter with this `bias` brings along."""
    if bias == "none":
        return set()
    names = {name for name in _bias_names(model) if not re.search(r"\.(modules_to_save|original_module)\.", f".{name}")}
    return names if bias == "all" else {name for name in names if name.endswith("base_layer.bias")}
