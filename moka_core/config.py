"""What a mixture of Kronecker adapters is made of: one frozen, validated value."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moka_core.errors import ConfigError
from moka_core.execution import Execution, check_execution
from moka_core.plan import ALL_LINEAR, LayerPlan, ShapeGroup, matches_pattern, plan_layer

Gate = Literal["softmax", "uniform"]
Scaling = Literal["none", "stable"]
Factor = Literal["a", "b"]
Identity = Literal["none", "a", "b"]

# float32's normal numbers: with a `scale` beyond them a backend, which computes in float32, has zeros or infinities.
SCALE_MIN, SCALE_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
# Fields that say how an adapter is computed, not what it is: a saved adapter does not hold them.
RUNTIME_FIELDS = ("execution",)
# Fields that a saved adapter holds only where they say something.
PATTERN_FIELDS = ("r_pattern", "shapes_pattern", "scale_pattern")
SPARSE_FIELDS = (*PATTERN_FIELDS, "lora_terms")

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
        lora_terms: how many of the r terms are (1 x in) ⊗ (out x 1), together a LoRA of that rank; the `balanced` rule
            has the others.
        block_entries: number of entries of the stored factor that an `identity` mixture aims at.
        shapes: explicit plans; a layer whose (out, in) stands here takes that plan and not the rule's.
        gate: "softmax" (one learned logit a term) or "uniform" (the ungated ablation).
        scaling: "none" (the paper) or "stable" (terms of different shapes move equally far a step).
        scale: multiplies every term; not zero, its magnitude one of float32's normal numbers.
        identity: "a" or "b" makes that factor a fixed identity that is not stored (MoKA_s).
        zero_factor: the factor that starts at zero, so that ΔW = 0 at the start.
        dropout: probability that an input of ΔW is dropped in training, 0 <= dropout < 1.
        target_modules: names or dotted suffixes of linear layers, or one regular expression
            for the whole path, or "all-linear" (every linear layer but the output head).
        r_pattern: other numbers of terms for some layers, {pattern: r}; their shapes follow the `balanced` rule.
        shapes_pattern: explicit shapes for some layers, {pattern: [[copies, a_out, a_in, b_out, b_in], ...]}.
        scale_pattern: other scales for some layers, {pattern: scale}. A pattern is a layer's whole path, or a regular
            expression for the end of one, from a dot on ("q_proj", "[01].self_attn.*"); of each field, at most one
            may match a layer.
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
    lora_terms: int = 0
    block_entries: int = 4096
    shapes: tuple[LayerPlan, ...] = ()
    gate: Gate = "softmax"
    scaling: Scaling = "none"
    scale: float = 1.0
    identity: Identity = "none"
    zero_factor: Factor = "b"
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    r_pattern: tuple[tuple[str, int], ...] = ()
    shapes_pattern: tuple[tuple[str, LayerPlan], ...] = ()
    scale_pattern: tuple[tuple[str, float], ...] = ()
    execution: Execution = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
        check_execution(self.execution)
        for name in ("r", "num_shapes", "block_entries"):
            _check_count(name, getattr(self, name))
        _check_count("lora_terms", self.lora_terms, least=0)
        _check_scale("scale", self.scale)
        check_finite("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected 0 <= dropout < 1; got {self.dropout!r}")
        if self.identity == self.zero_factor:
            raise ConfigError(
                f"zero_factor: factor {self.zero_factor!r} is the fixed identity, so it cannot start at zero; "
                f"set zero_factor={'b' if self.identity == 'a' else 'a'!r}"
            )
        if self.lora_terms and self.identity != "none":
            raise ConfigError(f"lora_terms: expected 0 with identity={self.identity!r}; got {self.lora_terms}")
        if self.lora_terms > self.r and not (self.shapes or self.r_pattern or self.shapes_pattern):
            raise ConfigError(f"lora_terms: expected at most {self.r} of the terms (r); got {self.lora_terms}")
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
        if not isinstance(targets, str) and ALL_LINEAR in targets and len(targets) > 1:
            raise ConfigError(
                f"target_modules: {ALL_LINEAR!r} stands for every linear layer; give it alone, got {targets!r}"
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
        self._check_patterns()

    def _check_patterns(self) -> None:
        for name in PATTERN_FIELDS:
            entries = getattr(self, name)
            entries = tuple(entries.items() if isinstance(entries, Mapping) else entries)
            object.__setattr__(self, name, entries)
            for pattern, value in entries:
                if not isinstance(pattern, str) or not pattern:
                    raise ConfigError(f"{name}: expected a layer's path, or a regular expression; got {pattern!r}")
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{name}: {pattern!r} is no regular expression: {error}") from error
                where = f"{name}[{pattern}]"
                if name == "r_pattern":
                    _check_count(where, value)
                elif name == "scale_pattern":
                    _check_scale(where, value)
                elif not isinstance(value, LayerPlan):
                    raise ConfigError(f"{where}: expected a LayerPlan; got {value!r}")
                else:
                    value.check_identity(self.identity)

    def for_layer(self, path: str, out_features: int, in_features: int) -> MokaConfig:
        """The settings of one layer: this config, with what its patterns say of that layer in place of the patterns.

        Raises:
            ConfigError: two patterns of one field match, the pattern's shapes are for a layer of other dimensions, or
                shapes and r of different patterns disagree.

        >>> MokaConfig(r_pattern={"q_proj": 4}).for_layer("layers.0.q_proj", 8, 8).r
        4
        """
        if not (self.r_pattern or self.shapes_pattern or self.scale_pattern):
            return self
        r, plan = self._of("r_pattern", path), self._of("shapes_pattern", path)
        scale = self._of("scale_pattern", path)
        changes: dict[str, Any] = dict.fromkeys(PATTERN_FIELDS, ())
        if scale is not None:
            changes["scale"] = scale
        if plan is not None:
            if (plan.out_features, plan.in_features) != (out_features, in_features):
                raise ConfigError(
                    f"shapes_pattern: the shapes for {path} multiply to {plan.key}; the layer is "
                    f"{out_features}x{in_features}"
                )
            if r not in (None, plan.terms):
                raise ConfigError(f"{path}: r_pattern gives it {r} terms, shapes_pattern {plan.terms}")
            changes |= {"r": plan.terms, "shapes": (plan,)}
        elif r is not None:
            changes |= {"r": r, "shapes": ()}
        return dataclasses.replace(self, **changes)

    def _of(self, name: str, path: str) -> Any:
        """The entry of a pattern field that a layer's path matches, or None."""
        entries = dict(getattr(self, name))
        found = [path] if path in entries else [pattern for pattern in entries if matches_pattern(pattern, path)]
        if len(found) > 1:
            raise ConfigError(f"{name}: expected one pattern for a layer; {' and '.join(found)} match {path}")
        return entries[found[0]] if found else None

    @classmethod
    def of_layers(
        cls, layers: Mapping[str, tuple[MokaConfig, LayerPlan]], *, r: int | None = None, scale: float | None = None
    ) -> MokaConfig:
        """The config of an adapter whose layers have these settings and plans, every plan written out in it.

        What most layers have stands in `shapes`; what others have, in `shapes_pattern` and `scale_pattern` under
        their paths.

        Args:
            layers: by path, the layer's own config (as from `for_layer`) and its plan. At least one.
            r: what the config says in `r`; if None, what most layers have.
            scale: likewise.

        Raises:
            ConfigError: two layers differ in more than r, shapes and scale.
        """
        if r is None:
            r = Counter(own.r for own, _ in layers.values()).most_common(1)[0][0]
        if scale is None:
            scale = Counter(own.scale for own, _ in layers.values()).most_common(1)[0][0]
        by_key: dict[str, Counter[LayerPlan]] = defaultdict(Counter)
        for own, plan in layers.values():
            if own.r == r:
                by_key[plan.key][plan] += 1
        shapes = {key: plans.most_common(1)[0][0] for key, plans in sorted(by_key.items())}
        configs = {
            dataclasses.replace(own, r=r, scale=scale, shapes=(), shapes_pattern=(), scale_pattern=())
            for own, _ in layers.values()
        }
        if len(configs) > 1:
            raise ConfigError("expected layers that differ in r, shapes and scale only; they differ in other settings")
        plans = {path: plan for path, (_, plan) in layers.items()}
        scales = {path: own.scale for path, (own, _) in layers.items()}
        return dataclasses.replace(
            configs.pop(),
            shapes=tuple(shapes.values()),
            shapes_pattern=_entries(plans, {path for path, plan in plans.items() if plan != shapes.get(plan.key)}),
            scale_pattern=_entries(scales, {path for path in scales if scales[path] != scale}),
        )

    def exact(self, layers: Mapping[str, tuple[int, int]]) -> MokaConfig:
        """The same config, its patterns read as the whole paths that they are in a saved adapter.

        Args:
            layers: (out_features, in_features) of every adapted layer, by path.

        Raises:
            ConfigError: a pattern is the path of no layer; or see `for_layer`.
        """
        for name in PATTERN_FIELDS:
            for pattern, _ in getattr(self, name):
                if pattern not in layers or name == "r_pattern":
                    raise ConfigError(
                        f"{name}: {pattern!r} is the path of no layer; in a saved adapter, what some layers have of "
                        "their own is stated layer by layer"
                    )
        own = {}
        for path, dims in layers.items():
            mine = dataclasses.replace(
                self,
                shapes_pattern=tuple(entry for entry in self.shapes_pattern if entry[0] == path),
                scale_pattern=tuple(entry for entry in self.scale_pattern if entry[0] == path),
            ).for_layer(path, *dims)
            own[path] = (mine, plan_layer(mine, *dims))
        return MokaConfig.of_layers(own, r=self.r, scale=self.scale)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values; `from_dict` gives back an equal config."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["shapes"] = {plan.key: [group.to_list() for group in plan.groups] for plan in self.shapes}
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        for name in PATTERN_FIELDS:
            values[name] = dict(values[name])
        values["shapes_pattern"] = {
            pattern: [group.to_list() for group in plan.groups] for pattern, plan in self.shapes_pattern
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MokaConfig:
        """The config that `to_dict` wrote, or that a user typed.

        Args:
            values: field names and their values; a field left out takes its default.

        Raises:
            ConfigError: a key is unknown (the nearest name is given), or a value is invalid.
        """
        return cls(**field_values(values, where="MokaConfig"))


def _entries(values: Mapping[str, Any], deviating: set[str]) -> tuple[tuple[str, Any], ...]:
    """A pattern field: the deviating layers by path, and every layer that such a path would match too as a pattern."""
    caught = {path for path in values for other in deviating if path != other and matches_pattern(other, path)}
    return tuple((path, values[path]) for path in values if path in deviating | caught)


def field_values(values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Fields of `MokaConfig` as plain JSON values, turned into what its constructor takes.

    Raises:
        ConfigError: a key is unknown (the nearest name is given), or shapes are not written as in a config.
    """
    check_keys(values, [field.name for field in dataclasses.fields(MokaConfig)], where=where)
    arguments = dict(values)
    if "shapes" in arguments:
        arguments["shapes"] = plans_from_dict({} if arguments["shapes"] is None else arguments["shapes"])
    for name in PATTERN_FIELDS:
        if name not in arguments:
            continue
        entries = {} if arguments[name] is None else arguments[name]
        if not isinstance(entries, Mapping):
            raise ConfigError(f"{name}: expected {{pattern: value, ...}}; got {entries!r}")
        if name == "shapes_pattern":
            entries = {key: _plan_from_rows(rows, where=f"{name}[{key}]") for key, rows in entries.items()}
        arguments[name] = entries
    return arguments


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
        groups = _groups(rows, where=f"shapes[{key}]")
        plans.append(LayerPlan(out_features=int(found[1]), in_features=int(found[2]), groups=groups))
    return tuple(plans)


def _plan_from_rows(rows: Any, *, where: str) -> LayerPlan:
    groups = _groups(rows, where=where)
    if not groups:
        raise ConfigError(f"{where}: expected at least one [copies, a_out, a_in, b_out, b_in]; got none")
    shape = groups[0].shape
    return LayerPlan(out_features=shape.out_features, in_features=shape.in_features, groups=groups)


def _groups(rows: Any, *, where: str) -> tuple[ShapeGroup, ...]:
    if not isinstance(rows, (list, tuple)):
        raise ConfigError(f"{where}: expected a list of [copies, a_out, a_in, b_out, b_in]; got {rows!r}")
    return tuple(ShapeGroup.from_list(row, where=where) for row in rows)


def _check_count(name: str, value: Any, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number >= {least}; got {value!r}")


def check_finite(name: str, value: Any) -> float:
    """`value`, if it is a finite number; a ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{name}: expected a finite number; got {value!r}")
    return float(value)


def _check_scale(name: str, value: Any) -> None:
    check_finite(name, value)
    if value == 0:
        raise ConfigError(f"{name}: expected a number other than 0; 0 would switch the adapter off for good")
    if not SCALE_MIN <= abs(value) <= SCALE_MAX:
        raise ConfigError(
            f"{name}: expected a magnitude that float32 holds, {SCALE_MIN:.3g} to {SCALE_MAX:.3g}; got {value!r}"
        )


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
