"""The fingerprint of a PyTorch base model, as that of its folder, in every precision and under NF4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from moka_core import base_fingerprint, check_base
from moka_core.errors import AdapterError
from moka_core.nf4 import BLOCK
from moka_core.sketch import LinearWeight
from moka_torch.base_weight import is_4bit
from moka_torch.exactness import is_repacked
from moka_torch.targets import linear_dims, outer_modules

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def model_fingerprint(model: nn.Module) -> str | None:
    """`moka_core.base_fingerprint` of a model's config and weights, or None if it has no such config.

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
    return base_fingerprint(to_dict(), norm_weights(model), linear_weights(model))


def check_fingerprint(expected: str | None, model: nn.Module, *, allow_other_base: bool = False) -> str | None:
    """The fingerprint that an adapter has on this model; see `moka_core.check_base`.

    Args:
        expected: what the adapter was trained on; None accepts any base.
        allow_other_base: accept another base, too.

    Raises:
        AdapterError: the model is another one, or has no config to tell by.
    """
    return check_base(expected, model_fingerprint(model), allow_other_base=allow_other_base)


def quantisation(model: nn.Module) -> str | None:
    """How a model's linear weights are held: "nf4-double", "nf4", or "none" if all are dense; None in another way."""
    kinds = {_held(module) for module in model.modules()} - {"no weight"}
    packed = kinds - {"none"}
    return "none" if not packed else packed.pop() if len(packed) == 1 else None


def _held(module: nn.Module) -> str | None:
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):  # some hold what they multiply by under another name
        return None if hasattr(module, "in_features") else "no weight"
    if getattr(weight, "quant_type", None) == "nf4":
        return "nf4-double" if getattr(weight, "compress_statistics", False) else "nf4"
    return "none" if weight.dtype in _DTYPES else None


def norm_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Every norm weight of a model as float32, by its name in the model."""
    weights = {}
    for path, module in model.named_modules():
        if _is_trained_copy(path):
            continue
        path = _checkpoint_path(path)
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


def linear_weights(model: nn.Module) -> dict[str, LinearWeight | None]:
    """Every linear weight of a model by its layer's path, to be read block by block.

    None stands for a weight that cannot be looked at: quantised in another way than NF4 in blocks of 64, repacked by
    bitsandbytes, on the meta device (offloaded), sharded, or with an adapter merged into it.
    """
    kwargs = get_quantization_kwargs(model)
    found = {}
    for path, module in outer_modules(model).items():
        dims = None if _is_trained_copy(path) else linear_dims(module, **kwargs)
        if dims is not None:
            found[_checkpoint_path(path)] = _linear_weight(module, dims)
    return found


def _linear_weight(module: nn.Module, dims: tuple[int, int]) -> LinearWeight | None:
    if isinstance(module, BaseTunerLayer):
        if module.merged:
            return None
        module = module.get_base_layer()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    entries = dims[0] * dims[1]
    if is_4bit(module):
        state: Any = getattr(weight, "quant_state", None)
        told = getattr(state, "quant_type", None), getattr(state, "blocksize", None)
        if told != ("nf4", BLOCK) or tuple(state.shape) != dims or is_repacked(module):
            return None
        return LinearWeight(entries=entries, read=_packed_reader(weight))
    turned = isinstance(module, Conv1D)
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype in _DTYPES
    if not plain or tuple(weight.shape) != (dims[::-1] if turned else dims):
        return None
    return LinearWeight(entries=entries, read=_dense_reader(weight.T if turned else weight))


def _dense_reader(weight: Tensor) -> Callable[[Sequence[int]], Sequence[np.ndarray]]:
    """Reads blocks of a matrix (out, in), wherever it is and however it is laid out."""

    def read(numbers: Sequence[int]) -> Sequence[np.ndarray]:
        chosen, ends = _chosen(numbers, BLOCK, weight.numel())
        chosen = chosen.to(weight.device)
        values = weight.detach()[chosen // weight.shape[1], chosen % weight.shape[1]]
        return np.split(values.to("cpu", torch.float32).numpy(), ends)

    return read


def _packed_reader(weight: Tensor) -> Callable[[Sequence[int]], Sequence[np.ndarray]]:
    """Reads blocks of the codes that bitsandbytes packed, whatever dtype it stores them in."""

    def read(numbers: Sequence[int]) -> Sequence[np.ndarray]:
        codes = weight.detach().as_subclass(Tensor).contiguous().view(torch.uint8).reshape(-1)
        chosen, ends = _chosen(numbers, BLOCK // 2, codes.numel())
        return np.split(codes[chosen.to(codes.device)].cpu().numpy(), ends)

    return read


def _chosen(numbers: Sequence[int], size: int, count: int) -> tuple[Tensor, list[int]]:
    """The places of the blocks of these numbers among `count` places, `size` a block, and where each block ends."""
    spans = [range(number * size, min((number + 1) * size, count)) for number in numbers]
    ends = np.cumsum([len(span) for span in spans])[:-1]
    return torch.tensor([place for span in spans for place in span]), ends.tolist()


def _is_trained_copy(path: str) -> bool:
    """Whether a module is what `modules_to_save` trains; the base's own stands beside it."""
    return ".modules_to_save." in f".{path}."


def _checkpoint_path(path: str) -> str:
    """A module's path without what PEFT and torch's wrappers put in."""
    path = path.replace(".original_module", "").replace("_checkpoint_wrapped_module.", "")
    return path.removesuffix("._checkpoint_wrapped_module")
