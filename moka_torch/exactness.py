"""Keeping bitsandbytes' 4-bit layers exact on a CPU."""

from __future__ import annotations

from typing import Any

from peft.import_utils import is_bnb_4bit_available
from torch import nn

from moka_core.errors import ModelError
from moka_core.nf4 import BLOCK


def exact_on_cpu(model: nn.Module) -> int:
    """Make every 4-bit layer of a model compute W x with its own weight, in its own dtype, on a CPU too.

    Two things in bitsandbytes (0.50) stand against that, neither of which it reports:

    - On a CPU with AVX512-BF16, `Linear4bit.forward` in eval mode, with an input that needs no gradient,
      repacks the weight in place for a bfloat16 kernel: outputs are bfloat16 whatever compute_dtype says, the
      block scales are rounded to bfloat16 for good, and decoding the weight (as merging does) gives another
      matrix. Switched off here by `support_avx512bf16_for_cpu = False`, before the first forward.
    - With AVX512 its decoder takes the block scales row by row, so a layer whose in_features is no multiple of
      the block (64) decodes to wrong numbers.

    Returns:
        The number of 4-bit layers.

    Raises:
        ModelError: a layer has been repacked already, or its in_features is no multiple of 64; all are listed.
    """
    layers = _layers_4bit(model)
    problems = []
    for path, layer in layers.items():
        if is_repacked(layer):
            problems.append(f"{path}: its weight has been repacked for bfloat16 already; {_REPACKED}")
        if layer.in_features % BLOCK:
            problems.append(
                f"{path}: expected in_features to be a multiple of {BLOCK}; got {layer.in_features}, which "
                "bitsandbytes decodes wrongly on this kind of CPU; leave the layer out of the quantisation "
                "(llm_int8_skip_modules), or work on a GPU"
            )
    if problems:
        raise ModelError("not exact on a CPU:\n  " + "\n  ".join(problems))
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def is_repacked(layer: nn.Module) -> bool:
    """Whether bitsandbytes has brought a 4-bit layer's weight into its layout for bfloat16 on a CPU."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def refuse_repacked(layer: nn.Module) -> None:
    """Raise a ModelError if a 4-bit layer's weight cannot be decoded any more."""
    if is_repacked(layer):
        raise ModelError(f"a 4-bit layer's weight has been repacked by bitsandbytes for bfloat16; {_REPACKED}")


_REPACKED = "load the model again and call moka_torch.exact_on_cpu(model) before its first forward"


def _layers_4bit(model: nn.Module) -> dict[str, Any]:
    if not is_bnb_4bit_available():
        return {}
    import bitsandbytes as bnb

    return {path: module for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
