"""How a mixture is computed: the executions, what each costs, and which should be faster, from static shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from moka_core.errors import ConfigError

if TYPE_CHECKING:
    from moka_core.config import Factor, Identity, MokaConfig
    from moka_core.plan import KronShape, LayerPlan

Execution = Literal["auto", "factored", "merged"]
Way = Literal["factored", "merged"]
EXECUTIONS: tuple[Execution, ...] = ("auto", "factored", "merged")


class Machine(NamedTuple):
    """Prices of memory traffic in units of one multiply-add of a large matrix product.

    Args:
        stream: one entry of an intermediate array, written by one product and read by the next.
        form: one entry of (out, in) of one group's ΔW, formed and added.
        split: one entry of G = dyᵀ x, (out, in), rearranged for one group and contracted with its factors.
    """

    stream: float
    form: float
    split: float


# The CPU's are fitted in JAX on 2 cores by benchmarks/ways.py, whose result says how often they choose right. The
# accelerator's are predicted, not measured: with 400e12 multiply-adds a second in bfloat16 and 4.8e12 bytes a second,
# an entry of 2 bytes written and read costs as much as 330 multiply-adds; ΔW is formed inside the decoding of the
# weight, at the speed of arithmetic outside the matrix units; a float32 entry read, written and read again costs 1000.
MACHINES: Mapping[str, Machine] = {
    "cpu": Machine(stream=160, form=100, split=200),
    "gpu": Machine(stream=330, form=40, split=1000),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the mixture of one layer is computed for a given number of tokens.

    With H the half product and G = dyᵀ x, (out, in):

    Args:
        forward: "factored" takes two products a shape group, and dx through them; "merged" forms ΔW, and forms it again
            for dx.
        gradient: "factored" has dA and dB from recomputed halves; "merged" from G.
        first: for each group, the factor that meets x first: "b" gives H = X Bᵀ, (a_in, copies, b_out) a token,
            "a" gives H = A X, (a_out, copies, b_in).
    """

    forward: Way
    gradient: Way
    first: tuple[Factor, ...]


class Costs(NamedTuple):
    """Predicted time of each way, in multiply-adds of a large matrix product."""

    factored: float
    merged: float
    gradient_factored: float
    gradient_merged: float


def first_factor(shape: KronShape) -> Factor:
    """The factor to contract with x first: fewer multiply-adds, then the smaller intermediate array.

        B first: in·b_out + a_in·out, and a_in·b_out entries;  A first: in·a_out + out·b_in, and a_out·b_in entries.

    >>> from moka_core import KronShape
    >>> first_factor(KronShape(16, 256, 256, 16)), first_factor(KronShape(256, 16, 16, 256))
    ('a', 'b')
    """
    return "a" if _halves(shape, "a") < _halves(shape, "b") else "b"


def _halves(shape: KronShape, first: Factor) -> tuple[int, int]:
    """(multiply-adds, entries between the two products) a token and copy."""
    if first == "b":
        return shape.in_features * shape.b_out + shape.a_in * shape.out_features, shape.a_in * shape.b_out
    return shape.in_features * shape.a_out + shape.b_in * shape.out_features, shape.a_out * shape.b_in


def costs(plan: LayerPlan, identity: Identity, tokens: int, *, own_product: bool = True, backend: str = "cpu") -> Costs:
    """What each way costs for this many tokens.

    Args:
        own_product: whether merged multiplies ΔW with x itself; False where ΔW is added to a base weight whose
            product is computed anyway.
        backend: "cpu" or "gpu"; any other is priced as "gpu".
    """
    out, in_ = plan.out_features, plan.in_features
    machine = MACHINES.get(backend, MACHINES["gpu"])
    dense = tokens * (out * in_ + machine.stream * out)
    factored, merged = 0.0, float(dense if own_product else 0)
    gradient_factored, gradient_merged = 0.0, float(tokens * out * in_)
    for group in plan.groups:
        shape, copies = group.shape, group.copies
        if identity == "none":
            products, between = _halves(shape, first_factor(shape))
            # besides the half products, x and y (x and dy) are rearranged for each group
            factored += tokens * (copies * products + machine.stream * (copies * between + out + in_))
            gradient_factored += tokens * 2 * (copies * products + machine.stream * (copies * between + out + in_))
            merged += out * in_ * (copies + machine.form)
            gradient_merged += out * in_ * (2 * copies + machine.split)
        else:
            products = out * shape.b_in if identity == "a" else in_ * shape.a_out
            factored += tokens * (products + machine.stream * out)
            gradient_factored += tokens * products
            merged += out * in_ * machine.form
    return Costs(factored, merged, gradient_factored, gradient_merged)


def plan_execution(
    plan: LayerPlan,
    config: MokaConfig,
    tokens: int,
    *,
    execution: Execution | None = None,
    own_product: bool = True,
    backend: str = "cpu",
) -> Schedule:
    """The schedule that serves `execution`, the cheapest one for "auto".

    Args:
        tokens: rows of x.
        execution: "factored" never forms an array of (out, in); "merged" forms ΔW, and has the gradients by
            whichever way is cheaper; "auto" chooses both by cost; None takes `config.execution`.
        own_product, backend: see `costs`.

    Raises:
        ConfigError: the name is none of these.
    """
    execution = check_execution(config.execution if execution is None else execution)
    priced = costs(plan, config.identity, tokens, own_product=own_product, backend=backend)
    forward: Way = "factored" if priced.factored <= priced.merged else "merged"
    gradient: Way = "factored" if priced.gradient_factored <= priced.gradient_merged else "merged"
    if execution != "auto":
        forward = execution
    # a mixture with an identity needs only blocks on a diagonal, which x and dy give more cheaply than G in every case
    if execution == "factored" or config.identity != "none":
        gradient = "factored"
    return Schedule(forward=forward, gradient=gradient, first=tuple(first_factor(group.shape) for group in plan.groups))


def check_execution(execution: str) -> Execution:
    """The name itself.

    Raises:
        ConfigError: it is none of auto, factored, merged.
    """
    if execution == "dense":
        raise ConfigError(
            "execution: 'dense' is numpy.kron in float64, which no layer trains with (moka_core.oracle has it, for "
            f"tests); expected one of {', '.join(EXECUTIONS)}"
        )
    for known in EXECUTIONS:
        if execution == known:
            return known
    raise ConfigError(f"execution: expected one of {', '.join(EXECUTIONS)}; got {execution!r}")
