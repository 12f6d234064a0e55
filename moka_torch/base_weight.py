"""The frozen weight under an adapter: whether a product with W + ΔW can stand in for the layer's own, and what W is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moka_core.errors import ConfigError
from moka_torch.exactness import is_repacked
from moka_torch.product import compute_dtype

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BaseWeight(NamedTuple):
    """A base layer as y = x Wᵀ + bias, for one input.

    Args:
        held: the tensor that W is stored in.
        decode: gives W (out, in) of that tensor, in the dtype that it is asked for, as a new one each time.
        bias: (out,), or None.
        compute: the dtype that the layer multiplies in.
        returns: the dtype that it returns.
    """

    held: Tensor
    decode: Callable[[Tensor, torch.dtype], Tensor]
    bias: Tensor | None
    compute: torch.dtype
    returns: torch.dtype


def special(base: nn.Module) -> str | None:
    """Why W + ΔW can never stand in for this layer's own weight; None if it can.

    It can for exactly `nn.Linear` with a plain parameter (or a plain tensor in its place, as under
    `torch.func.functional_call`) and bitsandbytes' 4-bit layers, as long as `forward` is the class's own.
    """
    if "forward" in vars(base):
        return "its forward was replaced on this instance (accelerate does so to move weights between devices)"
    if type(base) is nn.Linear:
        if type(base.weight) in (nn.Parameter, Tensor):
            return None
        return f"its weight is a {type(base.weight).__name__}, not a plain parameter"
    if is_4bit(base):
        return None
    return f"it is a {type(base).__name__}, which multiplies in a way of its own"


def refuse_special(execution: str, bases: dict[str, nn.Module]) -> None:
    """Raise a ConfigError if "merged" is asked for on layers that cannot take W + ΔW; `bases` by their names."""
    if execution != "merged":
        return
    reasons = {name: special(base) for name, base in bases.items()}
    problems = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if problems:
        raise ConfigError(
            "execution: 'merged' puts W + ΔW in place of the frozen weight, which these layers do not allow; "
            "use 'factored' or 'auto'\n  " + "\n  ".join(problems)
        )


def base_weight(base: nn.Module, x: Tensor) -> BaseWeight | None:
    """The layer's weight and how it would multiply x; None if it has to be called itself, now or always.

    That is so if it is `special`, has hooks, has no values yet, or has been repacked by bitsandbytes.
    """
    if special(base) is not None or any(getattr(base, hooks, None) for hooks in _HOOKS):
        return None
    weight: Any = base.weight
    if weight.device.type == "meta":
        return None
    bias: Any = base.bias
    if type(base) is nn.Linear:
        compute = compute_dtype(x, weight.dtype)
        if x.dtype not in (weight.dtype, compute):
            return None  # the layer itself says that the dtypes differ
        return BaseWeight(weight, _cast, bias, compute, compute)

    layer: Any = base
    state = getattr(weight, "quant_state", None)
    if state is None or is_repacked(base) or tuple(state.shape) != (base.out_features, base.in_features):
        return None
    if not layer.compute_type_is_set:  # as in Linear4bit.forward
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    compute = x.dtype if layer.compute_dtype is None else layer.compute_dtype
    return BaseWeight(weight, functools.partial(_decode, state), bias, compute, x.dtype)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype, copy=True)


def _decode(state: Any, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight in `dtype`, or rounded from float32 to float64.

    Not through PEFT, which decodes to the dtype that the weight was quantised from: the layer itself decodes to the
    dtype that it multiplies in.
    """
    import bitsandbytes as bnb

    single = torch.float32 if dtype == torch.float64 else dtype
    wanted = bnb.functional.QuantState(
        absmax=state.absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=single,
        offset=state.offset,
        state2=state.state2,
    )
    return bnb.functional.dequantize_4bit(codes, wanted).to(dtype)


def is_4bit(base: nn.Module) -> bool:
    if type(base).__module__.partition(".")[0] != "bitsandbytes":
        return False
    import bitsandbytes as bnb

    return type(base) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)
