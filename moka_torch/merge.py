"""The verb `merge`: W + ΔW in place of W, in the base's own format or, better, in a dense copy of it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from moka_core.adapter import raise_problems
from moka_core.errors import AdapterError, ConfigError
from moka_torch.exactness import refuse_repacked
from moka_torch.linear import MokaLinear
from moka_torch.loading import check_peft_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def merge(peft_model: PeftModel, dtype: torch.dtype | None = None) -> nn.Module:
    """The base model with W + ΔW of the active adapters in place of W, and no adapters.

    The sum is taken in float32 at least and rounded once. On a quantised base there are two ways:

    - With a `dtype`, such as torch.bfloat16 (recommended): every quantised layer is decoded, and the model that comes
      back is dense, its parameters in that dtype. The only errors are one rounding of W + ΔW and of each other
      parameter. An adapted output head that was tied to the input's embedding is tied no longer.
    - Without: W + ΔW is quantised again, with a warning. Every entry of a block of NF4 is then off by at most
      0.152·s, half of the widest gap between two levels times the block's new scale s, and by what double
      quantisation changes s. W stands on those levels already: an update that is small against the gaps is rounded
      away, and the merged model is little else than the base. It cannot be taken back.

    Args:
        peft_model: changed in place, and of no use afterwards.
        dtype: of the dense model's parameters; None leaves every layer in the format that it has.

    Raises:
        AdapterError: an adapter, or W + ΔW in the dtype that it is to have, has NaN or infinite entries; no adapter is
            active; or, with a `dtype`, a layer has an adapter of another method. Nothing has been merged.
        ConfigError: `dtype` is none of `DTYPES`.
    """
    check_peft_model(peft_model)
    layers = {path: layer for path, layer in peft_model.named_modules() if isinstance(layer, MokaLinear)}
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype!r}")
    _check(peft_model, layers)
    _check_range(layers, dtype)
    if dtype is None:
        return peft_model.merge_and_unload(safe_merge=True)
    _refuse_others(peft_model)
    for layer in layers.values():
        layer.base_layer = _decoded(layer.get_base_layer(), layer.quantization_backend, dtype)
        layer.quantization_backend = None
        layer.merge()
        layer.base_layer.to(dtype)
    model = peft_model.unload()
    _decode_others(model, dtype)
    for parameter in model.parameters():  # not the buffers, such as the frequencies of rotary embeddings
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _describe(model, dtype)
    return model


def untie(model: nn.Module) -> None:
    """Give every adapted layer whose weight is another module's too, as a tied output head's is, one of its own."""
    layers = [module for module in model.modules() if isinstance(module, MokaLinear)]
    own = {id(layer.get_base_layer()) for layer in layers}
    others = {
        id(parameter)
        for module in model.modules()
        if id(module) not in own
        for parameter in module.parameters(recurse=False)
    }
    for layer in layers:
        base: Any = layer.get_base_layer()
        if id(base.weight) not in others:
            continue
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        config = getattr(model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        warnings.warn(
            "an adapted layer shares its weight with another one, as an output head that is tied to the input's "
            "embedding does; it is given a weight of its own, which merging changes",
            stacklevel=3,
        )


def _check(peft_model: PeftModel, layers: dict[str, MokaLinear]) -> None:
    problems = []
    active = {name for layer in layers.values() for name in layer.active_adapters if name in layer.moka_plan}
    if not active and not any(layer.merged for layer in layers.values()):
        raise AdapterError("merge: no adapter is active, so there is nothing to merge; set_adapter makes one active")
    for module in peft_model.modules():
        refuse_repacked(module)
    for path, layer in layers.items():
        for name in layer.active_adapters:
            if name in layer.moka_plan:
                layer.factors(name)  # refuses shards
                for key, tensor in layer.tensors(name).items():
                    if not torch.isfinite(tensor).all():
                        problems.append(f"{path}: {key} of adapter {name!r} has NaN or infinite entries")
    raise_problems(problems, "nothing was merged")


def _check_range(layers: dict[str, MokaLinear], dtype: torch.dtype | None) -> None:
    """Raise an AdapterError if W + ΔW of a layer does not fit into the dtype that it is to have."""
    problems = []
    for path, layer in layers.items():
        weight = layer.get_base_weight()
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in layer.active_adapters:
            if name in layer.moka_plan and name not in layer.merged_adapters:
                total = total + layer.get_delta_weight(name).to(total.device)
        wanted = dtype or weight.dtype
        if not (largest := float(total.abs().max())) <= torch.finfo(wanted).max:
            problems.append(f"{path}: an entry of W + ΔW is {largest:.3g}, which {wanted} cannot hold")
    raise_problems(problems, "nothing was merged")


def _refuse_others(peft_model: PeftModel) -> None:
    """Raise an AdapterError if another method has adapted a layer: unloading would drop what it adds."""
    problems = [
        f"{path}: has an adapter of another method ({type(module).__name__})"
        for path, module in peft_model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, MokaLinear)
    ]
    raise_problems(problems, "nothing was merged; merge the other method first (PeftModel.merge_and_unload)")


def _decode_others(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a dense layer in place of every quantised linear layer that had no adapter."""
    kwargs = get_quantization_kwargs(model)
    for path, module in list(model.named_modules()):
        backend = None if type(module) is nn.Linear else resolve_quantization_backend(module, **kwargs)
        if backend is not None and backend.layer_type == "linear":
            model.set_submodule(path, _decoded(module, backend, dtype).to(dtype))


def _decoded(base: Any, backend: Any, dtype: torch.dtype) -> nn.Module:
    """A copy of a linear layer with a dense weight of its own, in float32 at least."""
    precise = torch.promote_types(dtype, torch.float32)
    if backend is None:
        return copy.deepcopy(base).to(torch.promote_types(base.weight.dtype, precise))
    weight = backend.get_base_weight(base).to(precise)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().to(precise), requires_grad=False)
    return dense.train(base.training)


def _describe(model: Any, dtype: torch.dtype) -> None:
    """Bring what a transformers model says of itself in line: dense, in `dtype`, its embeddings tied or not."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, name, False):
            setattr(model, name, False)
    config = getattr(model, "config", None)
    if config is None:
        return
    config.dtype = dtype
    layers = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    weights = [layer.weight for layer in layers if layer is not None]
    if getattr(config, "tie_word_embeddings", False) and len(weights) == 2 and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
