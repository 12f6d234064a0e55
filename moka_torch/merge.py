"""The verb `merge`: W + ΔW in place of W, in the base's own format or, better, in a dense copy of it."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from moka_core.adapter import raise_problems
from moka_core.errors import AdapterError, ConfigError
from moka_torch.exactness import refuse_repacked
from moka_torch.linear import MokaLinear
from moka_torch.loading import check_peft_model


def merge(peft_model: PeftModel, dtype: torch.dtype | None = None) -> nn.Module:
    """The base model with W + ΔW of the active adapters in place of W, and no adapters.

    The sum is taken in float32 at least and rounded once. On a quantised base there are two ways:

    - With a `dtype`, such as torch.bfloat16 (recommended): every quantised layer is decoded, and the model that comes
      back is dense, in that dtype throughout. The only error is one rounding of W + ΔW.
    - Without: W + ΔW is quantised again, with a warning. Every entry of a block of NF4 is then off by at most
      0.152·s, half of the widest gap between two levels times the block's new scale s, and by what double
      quantisation changes s. W stands on those levels already: an update that is small against the gaps is rounded
      away, and the merged model is little else than the base. It cannot be taken back.

    Args:
        peft_model: changed in place, and of no use afterwards.
        dtype: of the dense model; None leaves every layer in the format that it has.

    Raises:
        AdapterError: an adapter has NaN or infinite entries, or no adapter is active. Nothing has been merged.
        ConfigError: `dtype` is no floating dtype.
    """
    check_peft_model(peft_model)
    layers = {path: layer for path, layer in peft_model.named_modules() if isinstance(layer, MokaLinear)}
    _check(layers)
    if dtype is None:
        return peft_model.merge_and_unload(safe_merge=True)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype: expected a floating dtype such as torch.bfloat16; got {dtype!r}")
    for layer in layers.values():
        layer.base_layer = _decoded(layer.get_base_layer(), layer.quantization_backend)
        layer.quantization_backend = None
        layer.merge()
        layer.base_layer.to(dtype)
    model = peft_model.unload()
    _decode_others(model)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype
    return model


def _check(layers: dict[str, MokaLinear]) -> None:
    problems = []
    active = {name for layer in layers.values() for name in layer.active_adapters if name in layer.moka_plan}
    if not active and not any(layer.merged for layer in layers.values()):
        raise AdapterError("merge: no adapter is active, so there is nothing to merge; set_adapter makes one active")
    for path, layer in layers.items():
        refuse_repacked(layer.get_base_layer())
        for name in layer.active_adapters:
            if name in layer.moka_plan:
                for key, tensor in layer.tensors(name).items():
                    if not torch.isfinite(tensor).all():
                        problems.append(f"{path}: {key} of adapter {name!r} has NaN or infinite entries")
    raise_problems(problems, "nothing was merged")


def _decode_others(model: nn.Module) -> None:
    """Put a dense layer in place of every quantised linear layer that had no adapter."""
    kwargs = get_quantization_kwargs(model)
    for path, module in list(model.named_modules()):
        backend = None if type(module) is nn.Linear else resolve_quantization_backend(module, **kwargs)
        if backend is not None and backend.layer_type == "linear":
            model.set_submodule(path, _decoded(module, backend))


def _decoded(base: Any, backend: Any) -> nn.Module:
    """A dense float32 copy of a quantised linear layer; a layer of another kind is returned as it is."""
    if backend is None:
        return base.float()
    refuse_repacked(base)
    weight = backend.get_base_weight(base).float()
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().float(), requires_grad=False)
    return dense.train(base.training)
