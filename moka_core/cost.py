"""What each execution of the mixture costs, and which one should be faster, from static shapes alone."""

from __future__ import annotations

from typing import Literal

from moka_core.config import MokaConfig
from moka_core.errors import ConfigError
from moka_core.plan import LayerPlan

Execution = Literal["auto", "factored", "merged"]
EXECUTIONS = ("auto", "factored", "merged")

# One entry written to memory and read again is taken to cost as much time as this many multiply-adds of a large matrix
# product. Timed in PyTorch on 2 shared CPU cores (float32, forward and backward; 576², 192x576, 2048², 512x2048 with
# r = 10 and both identities; 1 to 1024 tokens), the choice was the faster one in 31 of 33 cases, and within 1.5x in
# the others.
_ENTRY_COST = 32


def choose_execution(
    plan: LayerPlan, config: MokaConfig, tokens: int, *, own_product: bool = True
) -> Literal["factored", "merged"]:
    """The execution that should take less time for this many tokens.

    Args:
        own_product: whether merged multiplies ΔW with the input; False where ΔW is added to a base weight
            whose product is computed anyway.

    Time is counted as multiply-adds, plus a fixed price for each entry of an intermediate array: the factored
    way multiplies less but writes a_in·copies·b_out entries a token, the merged way writes ΔW once.
    """
    out, in_ = plan.out_features, plan.in_features
    factored = merged = 0
    for group in plan.groups:
        shape, copies = group.shape, group.copies
        if config.identity == "none":
            hidden = copies * shape.a_in * shape.b_out
            factored += tokens * (hidden * (shape.b_in + shape.a_out) + _ENTRY_COST * (hidden + out))
            merged += out * in_ * (copies + _ENTRY_COST)
        else:
            inner = shape.b_in if config.identity == "a" else shape.a_in
            factored += tokens * out * (inner + _ENTRY_COST)
            merged += out * in_ * _ENTRY_COST
    if own_product:
        merged += tokens * out * (in_ + _ENTRY_COST)
    return "factored" if factored <= merged else "merged"


def resolve_execution(
    execution: Execution, plan: LayerPlan, config: MokaConfig, tokens: int, *, own_product: bool = True
) -> Literal["factored", "merged"]:
    """`execution` itself, or for "auto" the choice of `choose_execution`.

    Raises:
        ConfigError: the name is none of auto, factored, merged.
    """
    if execution not in EXECUTIONS:
        raise ConfigError(f"execution: expected one of {', '.join(EXECUTIONS)}; got {execution!r}")
    return choose_execution(plan, config, tokens, own_product=own_product) if execution == "auto" else execution
