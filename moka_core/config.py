"""What a mixture of Kronecker adapters is made of: one frozen, validated value."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moka_core.errors import ConfigError
from moka_core.execution import Execution, check_execution
from moka_core.plan import LayerPlan, ShapeGroup

Gate = Literal["softmax", "uniform"]
Scaling = Literal["none", "stable"]
Factor = Literal["a", "b"]
Identity = Literal["none", "a", "b"]

# Fields that say how an adapter is computed, not what it is: a saved adapter does not hold them.
RUNTIME_FIELDS = ("execution",)

_CHOICES: dict[str, tuple[str, ...]] = {
    "gate": ("softmax", "uniform"),
    "scaling": ("none", "stable"),
    "zero_factor": ("a", "b"),
    "identity": ("none", "a", "b"),
}
# "OUTxIN"; nine digits at most, so that a number from a file cannot keep the search for divisors busy
_DIMS = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


@dataclass(frozen=True, kw_only=True)
class MokaConfig:
    """The settings of one adapter: which layers, which shapes, how the terms are weighted.

    For a linear layer with frozen weight W (out, in) the adapter adds

        ΔW = scale · Σ_i  α_i · c_i · (A_i ⊗ B_i)

    with α = softmax(gate_logits) or α_i = 1/r, and c_i = 1 or √r / √(columns of the zero factor).

    Args:
        r: number of terms of each layer, at least 1.
        num_shapes: how many different shapes the `balanced` rule spreads the terms over.
        block_entries: number of entries of the stored factor that an `identity` mixture aims at.
        shapes: explicit plans; a layer whose (out, in) stands here takes that plan and not the rule's.
        gate: "softmax" (one learned logit a term) or "uniform" (the ungated ablation).
        scaling: "none" (the paper) or "stable" (terms of different shapes move equally far a step).
        scale: multiplies every term; finite, not zero.
        identity: "a" or "b" makes that factor a fixed identity that is not stored (MoKA_s).
        zero_factor: the factor that starts at zero, so that ΔW = 0 at the start.
        dropout: probability that an input of ΔW is dropped in training, 0 <= dropout < 1.
        target_modules: names or dotted suffixes of linear layers, or one regular expression
            for the whole path, or "all-linear" (every linear layer but the output head).
        execution: how it is computed, not what: "auto", "factored" or "merged" (`moka_core.execution`). It is
            no part of the adapter: a saved adapter does not hold it.

    Raises:
        ConfigError: a field is outside its range, or two fields contradict each other.

    Ref: arXiv 2508.03527 (the mixture), arXiv 2602.01267 (the scale that "stable" generalises).

    >>> MokaConfig(r=4, num_shapes=2, target_modules=("q_proj",)).gate
    'softmax'
    """

    r: int = 10
    num_shapes: int = 5
    block_entries: int = 4096
    shapes: tuple[LayerPlan, ...] = ()
    gate: Gate = "softmax"
    scaling: Scaling = "none"
    scale: float = 1.0
    identity: Identity = "none"
    zero_factor: Factor = "b"
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    execution: Execution = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
        check_execution(self.execution)
        for name in ("r", "num_shapes", "block_entries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: expected a whole number >= 1; got {value!r}")
        for name in ("scale", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
                raise ConfigError(f"{name}: expected a finite number; got {value!r}")
        if self.scale == 0:
            raise ConfigError("scale: expected a number other than 0; 0 would switch the adapter off for good")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1; got {self.dropout!r}")
        if self.identity == self.zero_factor:
            raise ConfigError(
                f"zero_factor: factor {self.zero_factor!r} is the fixed identity, so it cannot start at zero; "
                f"set zero_factor={'b' if self.identity == 'a' else 'a'!r}"
            )
        targets = self.target_modules
        if not isinstance(targets, str):
            if not isinstance(targets, Iterable) or isinstance(targets, Mapping):
                raise ConfigError(f"target_modules: expected names or one regular expression; got {targets!r}")
            targets = tuple(sorted(targets, key=str) if isinstance(targets, (set, frozenset)) else targets)
            if any(not isinstance(target, str) for target in targets):
                raise ConfigError(f"target_modules: expected strings; got {targets!r}")
            object.__setattr__(self, "target_modules", targets)
        if not targets or (not isinstance(targets, str) and any(not target for target in targets)):
            raise ConfigError(
                f"target_modules: expected at least one name, none of them empty; got {self.target_modules!r}"
            )
        if not isinstance(self.shapes, (list, tuple)) or any(not isinstance(plan, LayerPlan) for plan in self.shapes):
            raise ConfigError(f"shapes: expected LayerPlans; got {self.shapes!r}")
        object.__setattr__(self, "shapes", tuple(self.shapes))
        dims = [plan.key for plan in self.shapes]
        for plan in self.shapes:
            plan.check_identity(self.identity)
            if plan.terms != self.r:
                raise ConfigError(f"shapes[{plan.key}]: expected {self.r} terms in all (r); got {plan.terms}")
        if len(set(dims)) != len(dims):
            raise ConfigError(f"shapes: one plan for each (out, in); got {', '.join(dims)}")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` gives back an equal config."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["shapes"] = {plan.key: [group.to_list() for group in plan.groups] for plan in self.shapes}
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MokaConfig:
        """The config that `to_dict` wrote, or that a user typed.

        Args:
            values: field names and their values; a field left out takes its default.

        Raises:
            ConfigError: a key is unknown (the nearest name is given), or a value is invalid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys(values, known, where="MokaConfig")
        arguments = dict(values)
        if "shapes" in arguments:
            arguments["shapes"] = plans_from_dict({} if arguments["shapes"] is None else arguments["shapes"])
        return cls(**arguments)


def plans_from_dict(shapes: Mapping[str, Any]) -> tuple[LayerPlan, ...]:
    """The plans written as {"OUTxIN": [[copies, a_out, a_in, b_out, b_in], ...]}.

    Raises:
        ConfigError: a key is not "OUTxIN", or an entry is not five whole numbers.
    """
    if not isinstance(shapes, Mapping):
        raise ConfigError(f'shapes: expected {{"OUTxIN": [[copies, a_out, a_in, b_out, b_in], ...]}}; got {shapes!r}')
    plans = []
    for key, rows in shapes.items():
        found = _DIMS.fullmatch(str(key))
        if found is None:
            raise ConfigError(f'shapes: expected a key such as "4096x1024" (out x in); got {key!r}')
        if not isinstance(rows, (list, tuple)):
            raise ConfigError(f"shapes[{key}]: expected a list of [copies, a_out, a_in, b_out, b_in]; got {rows!r}")
        groups = tuple(ShapeGroup.from_list(row, where=f"shapes[{key}]") for row in rows)
        plans.append(LayerPlan(out_features=int(found[1]), in_features=int(found[2]), groups=groups))
    return tuple(plans)


def check_keys(values: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    """Raise a ConfigError that names every unknown key with the nearest known one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected names and their values; got {values!r}")
    known = list(known)
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        hints = []
        for key in unknown:
            near = difflib.get_close_matches(str(key), known, n=1)
            hints.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise ConfigError(f"{where}: unknown {', '.join(hints)}; known: {', '.join(known)}")
