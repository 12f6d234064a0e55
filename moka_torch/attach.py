"""The verbs that both backends share, but for merge: attach, export_adapter, import_adapter."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import moka_core
from moka_core import Adapter, LayerFactors
from moka_core.adapter import DTYPE_NAMES
from moka_core.errors import AdapterError, ConfigError
from moka_core.execution import Execution
from moka_torch.config import MokaConfig
from moka_torch.fingerprint import check_fingerprint
from moka_torch.loading import adapted_layers, check_peft_model, to_numpy
from moka_torch.saving import check_unchanged
from moka_torch.targets import plan_stated


def attach(
    model: nn.Module,
    config: moka_core.MokaConfig | MokaConfig | str,
    adapter_name: str = "default",
    seed: int | None = None,
    execution: Execution | None = None,
) -> PeftModel:
    """`model` with a fresh adapter, ΔW = 0, as a PeftModel; the base is frozen and changed in place.

    Args:
        model: a transformers model, or any module with linear layers.
        config: the settings, or the name of a preset.
        seed: of the factors' start; with one seed the start is the same on every machine and device. Torch's
            global generator if None.
        execution: in place of the config's: "auto", "factored" or "merged"; see `MokaLinear`.

    Raises:
        ConfigError, TargetError, AdapterError: see `MokaModel.inject_adapter`; the model is then as it was.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("model: expected a base model; got a PeftModel. Use its add_adapter for one more adapter")
    if isinstance(config, str):
        config = _preset(config, model)
    if isinstance(config, moka_core.MokaConfig):
        config = MokaConfig.from_core(config, task_type=_task_type(model))
    if execution is not None:
        config = config.as_given()
        config.execution = execution
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for layer in adapted_layers(peft_model, adapter_name).values():
            layer.reset_parameters(adapter_name, generator, init_weights=config.init_weights)
    return peft_model


def export_adapter(peft_model: PeftModel, adapter_name: str = "default") -> Adapter:
    """An adapter's config and numbers as NumPy arrays: float32, or bfloat16 (ml_dtypes) or float16
    where they are held so.

    Layers are keyed by their path in a Hugging Face checkpoint; the config states the plan of each of them.

    Raises:
        AdapterError: there is no MoKA adapter of that name, its parameters are of another dtype, or not finite.
    """
    check_peft_model(peft_model)
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, MokaConfig):
        raise AdapterError(
            f"adapter_name: expected one of {', '.join(sorted(peft_model.peft_config))}, a MoKA adapter; "
            f"got {adapter_name!r}"
        )
    if config.beyond_mixture:
        raise AdapterError(
            f"adapter {adapter_name!r}: {' and '.join(config.beyond_mixture)} make it train more than mixtures, which "
            "an Adapter does not hold; save it with PEFT's save_pretrained"
        )
    check_unchanged(adapted_layers(peft_model, adapter_name), config, adapter_name)
    core = dataclasses.replace(config.to_core(), execution="auto")  # how it was computed is no part of it
    layers = {}
    for path, layer in adapted_layers(peft_model, adapter_name).items():
        if layer.multiplier(adapter_name) != 1.0:
            raise AdapterError(
                f"{path}: set_scale or scale_layer has put the factor {layer.multiplier(adapter_name)} on adapter "
                f"{adapter_name!r}, which is no part of it; undo it with unscale_layer or set_scale(name, 1)"
            )
        layer.factors(adapter_name)  # refuses shards
        arrays = {name: _to_numpy(tensor, f"{path}: {name}") for name, tensor in layer.tensors(adapter_name).items()}
        layers[path] = LayerFactors.from_tensors(layer.moka_plan[adapter_name], core, arrays)
    adapter = Adapter(
        config=core,
        layers=layers,
        base_fingerprint=config.base_fingerprint,
        base_model=config.base_model_name_or_path,
        base_quantisation=config.base_quantisation,
    )
    return adapter.validate()


def import_adapter(
    model: nn.Module | PeftModel,
    adapter: Adapter,
    adapter_name: str = "default",
    execution: Execution | None = None,
    *,
    allow_other_base: bool = False,
) -> PeftModel:
    """`model` with `adapter` on it, value for value, as a PeftModel.

    bfloat16 values are widened to float32, as PEFT does. On a PeftModel the adapter is added to those that
    are there and not made active (`set_adapter` does that), as with PEFT's `load_adapter`.

    Args:
        execution: in place of the config's; see `MokaLinear`.
        allow_other_base: accept an adapter that was trained on another base model; it then states this one's
            fingerprint.

    Raises:
        AdapterError: the adapter is not valid, belongs to another base model, or was made for other layers than
            those that its config names in this model; the model is then as it was.
        ConfigError, TargetError: see `MokaModel.inject_adapter`; the model is then as it was.
    """
    adapter.validate()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_fingerprint(adapter.base_fingerprint, base, allow_other_base=allow_other_base)
    stated = {path: layer.plan.key for path, layer in adapter.layers.items()}
    plan_stated(adapter.config, stated, base)

    config = MokaConfig.from_core(
        adapter.config,
        task_type=_task_type(base),
        base_fingerprint=adapter.base_fingerprint,
        layers=stated,
        allow_other_base=allow_other_base,
    )
    if execution is not None:
        config = dataclasses.replace(config, execution=execution)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        peft_model = model
    else:
        peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    with torch.no_grad():
        for path, layer in adapted_layers(peft_model, adapter_name).items():
            parameters = layer.tensors(adapter_name)
            for name, array in adapter.layers[path].tensors():
                parameters[name].copy_(torch.from_numpy(np.array(array, dtype=np.float32)))
    return peft_model


def _to_numpy(tensor: Tensor, where: str) -> np.ndarray:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AdapterError(
            f"{where}: expected {DTYPE_NAMES}; got {tensor.dtype}. Cast the adapter to float32 first "
            "(PEFT does so by default: autocast_adapter_dtype=True)."
        )
    return to_numpy(tensor)


def _preset(name: str, model: nn.Module) -> moka_core.MokaConfig:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return moka_core.preset(name, None if to_dict is None else moka_core.Architecture.from_hf_config(to_dict()))


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type, which decides the PeftModel's class and what AutoPeftModel can load."""
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
