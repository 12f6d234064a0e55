"""The digest of a PyTorch base model, the same in float32, in bfloat16 and under 4-bit quantisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from moka_core import base_fingerprint
from moka_core.errors import AdapterError


def model_fingerprint(model: nn.Module) -> str | None:
    """`moka_core.base_fingerprint` of a model's config and norm weights, or None if it has no such config.

    Norm weights are the one-dimensional `weight`s of modules whose class is called …Norm or …norm, under their
    names in a Hugging Face checkpoint ("model.layers.0.input_layernorm.weight").

    Args:
        model: a transformers model, or a PeftModel on one.

    Raises:
        AdapterError: norm weights have no values yet (they are on the meta device).
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return None
    return base_fingerprint(to_dict(), norm_weights(model))


def check_fingerprint(expected: str | None, model: nn.Module) -> str | None:
    """The model's fingerprint, if an adapter that expects `expected` may go on it.

    Args:
        expected: what the adapter was trained on; None accepts any base.

    Raises:
        AdapterError: the model is another one, or has no config to tell by.
    """
    found = model_fingerprint(model)
    if expected is not None and found != expected:
        got = "this model has no config to take a fingerprint of" if found is None else f"this model is {found[:16]}…"
        raise AdapterError(
            f"base_fingerprint: the adapter was trained on another base model: expected {expected[:16]}…; {got}. "
            "Load the adapter's own base (base_model_name_or_path in its adapter_config.json)."
        )
    return found


def quantisation(model: nn.Module) -> str | None:
    """How a model's linear weights are held: "nf4-double", "nf4", or "none" if all are dense; None in another way."""
    kinds = {_held(module) for module in model.modules()} - {"no weight"}
    packed = kinds - {"none"}
    return "none" if not packed else packed.pop() if len(packed) == 1 else None


def _held(module: nn.Module) -> str | None:
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return "no weight"
    if getattr(weight, "quant_type", None) == "nf4":
        return "nf4-double" if getattr(weight, "compress_statistics", False) else "nf4"
    return "none" if weight.is_floating_point() else None


def norm_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Every norm weight of a model as float32, by its name in the model."""
    weights = {}
    for path, module in model.named_modules():
        if ".modules_to_save." in f".{path}.":  # a trained copy; the base's own stands beside it
            continue
        path = path.replace(".original_module", "").replace("_checkpoint_wrapped_module.", "")
        path = path.removesuffix("._checkpoint_wrapped_module")
        weight = getattr(module, "weight", None)
        if type(module).__name__.lower().endswith("norm") and isinstance(weight, torch.Tensor) and weight.ndim == 1:
            name = f"{path}.weight" if path else "weight"
            if weight.device.type == "meta":
                raise AdapterError(
                    f"{name}: expected values to tell the base model by; got a meta tensor. Load the base's weights "
                    "before attaching an adapter."
                )
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            weights[name] = weight.detach().to("cpu", torch.float32).clone().numpy()
    return weights
