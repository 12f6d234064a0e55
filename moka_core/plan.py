"""Shapes, targets and parameter counts, decided in plain Python before any array exists."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moka_core.errors import ConfigError, TargetError

if TYPE_CHECKING:
    from moka_core.config import Identity, MokaConfig

ALL_LINEAR = "all-linear"
OUTPUT_HEADS = ("lm_head", "embed_out", "output_head")


@dataclass(frozen=True, order=True)
class KronShape:
    """The two factors' shapes of one term: A (a_out, a_in) and B (b_out, b_in), A ⊗ B (out, in).

    >>> KronShape(2, 3, 4, 5).out_features, KronShape(2, 3, 4, 5).in_features
    (8, 15)
    """

    a_out: int
    a_in: int
    b_out: int
    b_in: int

    def __post_init__(self) -> None:
        for name in ("a_out", "a_in", "b_out", "b_in"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"shape {self}: expected {name} to be a whole number >= 1; got {value!r}")

    @property
    def out_features(self) -> int:
        """a_out·b_out, the rows of A ⊗ B."""
        return self.a_out * self.b_out

    @property
    def in_features(self) -> int:
        """a_in·b_in, its columns."""
        return self.a_in * self.b_in

    def parameters(self, identity: Identity = "none") -> int:
        """Number of stored entries: a_out·a_in + b_out·b_in, less the factor that is a fixed identity."""
        a = 0 if identity == "a" else self.a_out * self.a_in
        b = 0 if identity == "b" else self.b_out * self.b_in
        return a + b

    def __str__(self) -> str:
        return f"({self.a_out}x{self.a_in}) ⊗ ({self.b_out}x{self.b_in})"


@dataclass(frozen=True)
class ShapeGroup:
    """The `copies` terms of a layer that share one shape; their factors are stored stacked."""

    shape: KronShape
    copies: int

    def __post_init__(self) -> None:
        if isinstance(self.copies, bool) or not isinstance(self.copies, int) or self.copies < 1:
            raise ConfigError(f"shape {self.shape}: expected copies to be a whole number >= 1; got {self.copies!r}")

    def factor_shape(self, factor: str) -> tuple[int, int, int]:
        """(copies, a_out, a_in) for factor "a", (copies, b_out, b_in) for factor "b"."""
        shape = self.shape
        rows, columns = (shape.a_out, shape.a_in) if factor == "a" else (shape.b_out, shape.b_in)
        return self.copies, rows, columns

    def to_list(self) -> list[int]:
        """[copies, a_out, a_in, b_out, b_in], as it stands in a config."""
        shape = self.shape
        return [self.copies, shape.a_out, shape.a_in, shape.b_out, shape.b_in]

    @classmethod
    def from_list(cls, row: Sequence[int], *, where: str) -> ShapeGroup:
        """The group that `to_list` wrote.

        Args:
            where: what an error names.

        Raises:
            ConfigError: it is no list of five whole numbers of 1 or more.
        """
        if not isinstance(row, (list, tuple)) or len(row) != 5:
            raise ConfigError(f"{where}: expected [copies, a_out, a_in, b_out, b_in]; got {row!r}")
        copies, *dims = row
        return cls(shape=KronShape(*dims), copies=copies)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The shape groups of one linear layer, in the order of their gates.

    Holds for every group: a_out·b_out = out_features and a_in·b_in = in_features. Term number t of the
    layer is copy t - Σ(copies of the groups before) of its group.

    Raises:
        ConfigError: no groups, a repeated shape, or a shape whose product is not (out, in).
    """

    out_features: int
    in_features: int
    groups: tuple[ShapeGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError(f"plan for {self.key}: expected at least one shape; got none")
        for group in self.groups:
            shape = group.shape
            if (shape.out_features, shape.in_features) != (self.out_features, self.in_features):
                raise ConfigError(
                    f"plan for {self.key}: shape {shape} multiplies to {shape.out_features}x{shape.in_features}; "
                    f"a_out and b_out must multiply to {self.out_features} "
                    f"(divisors: {_divisor_list(self.out_features)}), "
                    f"a_in and b_in to {self.in_features} (divisors: {_divisor_list(self.in_features)})"
                )
        shapes = [group.shape for group in self.groups]
        if len(set(shapes)) != len(shapes):
            raise ConfigError(f"plan for {self.key}: a shape stands twice; give it once, with more copies")

    @property
    def key(self) -> str:
        """The layer's dimensions as they stand in a config: "OUTxIN"."""
        return f"{self.out_features}x{self.in_features}"

    @property
    def terms(self) -> int:
        """The number of terms, r."""
        return sum(group.copies for group in self.groups)

    def term_shapes(self) -> list[KronShape]:
        """The shape of every term, in gate order."""
        return [group.shape for group in self.groups for _ in range(group.copies)]

    def trainable(self, config: MokaConfig) -> int:
        """Trainable entries of one layer: Σ copies·(stored factor entries), and one logit a term if gated."""
        factors = sum(group.copies * group.shape.parameters(config.identity) for group in self.groups)
        return factors + (self.terms if config.gate == "softmax" else 0)

    def check_identity(self, identity: Identity) -> None:
        """Raise a ConfigError unless the factor that is a fixed identity is square in every shape."""
        for group in self.groups:
            shape = group.shape
            rows, columns = (shape.a_out, shape.a_in) if identity == "a" else (shape.b_out, shape.b_in)
            if identity != "none" and rows != columns:
                raise ConfigError(
                    f"plan for {self.key}: identity={identity!r} needs a square factor_{identity}; "
                    f"got {rows}x{columns} in {shape}"
                )


def divisors(number: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def balanced_shapes(out_features: int, in_features: int) -> list[KronShape]:
    """Every shape of (out, in), fewest parameters first, ties broken toward square factors.

    Squareness is |log2 a_out/a_in| + |log2 b_out/b_in|; what is still tied comes in the order of
    (a_out, a_in). The two trivial shapes, with one factor as large as the layer, are left out
    unless there is nothing else.

    >>> [str(s) for s in balanced_shapes(4096, 4096)[:3]]
    ['(64x64) ⊗ (64x64)', '(32x128) ⊗ (128x32)', '(128x32) ⊗ (32x128)']
    """
    shapes = [
        KronShape(a_out, a_in, out_features // a_out, in_features // a_in)
        for a_out in divisors(out_features)
        for a_in in divisors(in_features)
    ]
    small = [shape for shape in shapes if shape.parameters() < out_features * in_features] or shapes
    return sorted(small, key=lambda shape: (shape.parameters(), _unsquareness(shape), shape))


def block_shape(out_features: int, in_features: int, *, entries: int, identity: Identity) -> KronShape:
    """The shape whose fixed factor is I_k and whose stored factor is nearest to `entries` entries.

    k runs over the common divisors of out and in; "nearest" is by ratio, the larger k winning a tie.

    >>> str(block_shape(1024, 4096, entries=4096, identity="a"))
    '(32x32) ⊗ (32x128)'
    """

    def distance(k: int) -> tuple[float, int]:
        return abs(math.log(out_features * in_features / (k * k * entries))), -k

    k = min(divisors(math.gcd(out_features, in_features)), key=distance)
    fixed, stored = (k, k), (out_features // k, in_features // k)
    return KronShape(*fixed, *stored) if identity == "a" else KronShape(*stored, *fixed)


def lora_shape(out_features: int, in_features: int) -> KronShape:
    """(1 x in) ⊗ (out x 1): the shape of `lora_terms`, c of which are a LoRA of rank c."""
    return KronShape(1, in_features, out_features, 1)


def plan_layer(config: MokaConfig, out_features: int, in_features: int) -> LayerPlan:
    """The shape groups that `config` gives to a linear layer of shape (out, in).

    An explicit plan in `config.shapes` is taken as it is. Otherwise `lora_terms` of the r terms are
    (1 x in) ⊗ (out x 1), and the others go to the `num_shapes` balanced shapes as evenly as they divide, the first
    shapes taking what is left over; with an identity factor all r terms share one block shape.

    Raises:
        ConfigError: a dimension of the layer is no positive whole number, or r gives some shape more terms than the
            layer has entries: so many products of one shape repeat each other, one being a weighted sum of others. Or
            `lora_terms` are more than r.
    """
    for name, value in (("out_features", out_features), ("in_features", in_features)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"layer {out_features}x{in_features}: expected {name} to be a whole number >= 1")
    for plan in config.shapes:
        if (plan.out_features, plan.in_features) == (out_features, in_features):
            return plan
    if config.identity != "none":
        shape = block_shape(out_features, in_features, entries=config.block_entries, identity=config.identity)
        groups = [ShapeGroup(shape, config.r)]
    else:
        outer, others = lora_shape(out_features, in_features), config.r - config.lora_terms
        if others < 0:
            raise ConfigError(f"lora_terms: expected at most {config.r} of the terms (r); got {config.lora_terms}")
        shapes = balanced_shapes(out_features, in_features)
        if config.lora_terms and shapes != [outer]:
            shapes = [shape for shape in shapes if shape != outer]
        shapes = shapes[: min(config.num_shapes, others)]
        copies = {outer: config.lora_terms} if config.lora_terms else {}
        for position, shape in enumerate(shapes):
            share = others // len(shapes) + (position < others % len(shapes))
            copies[shape] = copies.get(shape, 0) + share
        groups = [ShapeGroup(shape, count) for shape, count in copies.items()]
    _check_terms(config.r, len(groups), out_features, in_features)
    return LayerPlan(out_features=out_features, in_features=in_features, groups=tuple(groups))


def _check_terms(r: int, shapes: int, out_features: int, in_features: int) -> None:
    most = shapes * out_features * in_features
    if r > most:
        raise ConfigError(
            f"r: expected at most {most:,} terms on a layer {out_features}x{in_features}, for each of its shapes "
            f"({shapes}) as many as the layer has entries, beyond which one is a weighted sum of others; got {r:,}; "
            "lower r, or give such layers an r of their own in r_pattern"
        )


def matches(target_modules: Sequence[str] | str, path: str) -> bool:
    """Whether a layer's dotted path is a target.

    A sequence names whole paths or dotted suffixes of them; a string is a regular expression for the
    whole path, or "all-linear" for every layer but an output head. PEFT reads them the same way.

    >>> matches(["q_proj"], "model.layers.0.self_attn.q_proj"), matches(["proj"], "a.q_proj")
    (True, False)
    """
    if target_modules == ALL_LINEAR or list(target_modules) == [ALL_LINEAR]:
        return path.rpartition(".")[2] not in OUTPUT_HEADS
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, path) is not None
        except re.error as error:
            raise ConfigError(f"target_modules: {target_modules!r} is no regular expression: {error}") from error
    return any(path == target or path.endswith("." + target) for target in target_modules)


def plan_model(
    config: MokaConfig, layers: Mapping[str, tuple[int, int]], *, excluded: Collection[str] = ()
) -> dict[str, LayerPlan]:
    """The plan of every targeted layer.

    Args:
        layers: (out_features, in_features) of every linear layer of the model, by dotted path.
        excluded: paths of modules, linear layers or not, that are left out although a target matches them.

    Raises:
        TargetError: a target matched no layer (the message lists near misses), or all that match are excluded.
        ConfigError: `config.shapes` states a plan for dimensions that no targeted layer has, or a pattern matches none.
    """
    targets = config.target_modules
    if list(targets) == [ALL_LINEAR]:
        targets = ALL_LINEAR
    rules: list[Sequence[str] | str] = [targets] if isinstance(targets, str) else [[target] for target in targets]
    for rule in rules:
        if not any(matches(rule, path) for path in (*layers, *excluded)):
            raise TargetError(_no_match(rule, layers))
    targeted = {path: dims for path, dims in layers.items() if matches(targets, path)}
    chosen = {path: dims for path, dims in targeted.items() if path not in excluded}
    if not chosen:
        raise TargetError(f"target_modules: all of the {len(targeted)} layers that match are excluded")
    plans = {path: plan_layer(config.for_layer(path, *dims), *dims) for path, dims in chosen.items()}
    check_patterns(config, plans)
    used = {plan.key for plan in plans.values()}
    unused = [plan.key for plan in config.shapes if plan.key not in used]
    if unused:
        raise ConfigError(
            f"shapes: no targeted layer is {' or '.join(unused)} (out x in); the targeted layers are "
            f"{', '.join(sorted(used))}. Take the plan out, or target such a layer."
        )
    return plans


def matches_pattern(pattern: str, path: str) -> bool:
    """Whether a key of a `…_pattern` field means a layer: its end, from the start or a dot on. PEFT reads them so.

    >>> matches_pattern("q_proj", "layers.0.q_proj"), matches_pattern("proj", "layers.0.q_proj")
    (True, False)
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def check_patterns(config: MokaConfig, paths: Iterable[str]) -> None:
    """Raise a ConfigError if a pattern of the config matches none of the adapted layers, and so would do nothing."""
    paths = list(paths)
    for name, entries in (
        ("r_pattern", config.r_pattern),
        ("shapes_pattern", config.shapes_pattern),
        ("scale_pattern", config.scale_pattern),
    ):
        for pattern, _ in entries:
            if pattern not in paths and not any(matches_pattern(pattern, path) for path in paths):
                raise ConfigError(
                    f"{name}: {pattern!r} matches none of the {len(paths)} adapted layers, such as {paths[0]!r}"
                )


def lora_parameters(layers: Mapping[str, tuple[int, int]], targets: Sequence[str], rank: int) -> int:
    """Trainable parameters of a LoRA of that rank on the same layers, for comparison: Σ rank·(out + in)."""
    return sum(rank * (out + in_) for path, (out, in_) in layers.items() if matches(targets, path))


def _no_match(rule: Sequence[str] | str, layers: Iterable[str]) -> str:
    """Why nothing is a target; `rule` as `matches` takes it, with one name at most."""
    leaves = sorted({path.rpartition(".")[2] for path in layers})
    target = rule if isinstance(rule, str) else rule[0]
    near = difflib.get_close_matches(target.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    start = f"target_modules: {target!r} matches no linear layer of this model"
    end = f"Its linear layers: {', '.join(leaves) if leaves else 'none at all'}"
    if isinstance(rule, str) and rule != ALL_LINEAR:
        named = [leaf for leaf in leaves if leaf in re.findall(r"\w+", rule)] or near
        hint = f", such as [{', '.join(named)}]" if named else ""
        return f"{start}: text is a regular expression for a layer's whole path; give names as a list{hint}. {end}"
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "nothing there has a similar name."
    return f"{start}; {hint} {end}"


def _unsquareness(shape: KronShape) -> float:
    skew = abs(math.log2(shape.a_out / shape.a_in)) + abs(math.log2(shape.b_out / shape.b_in))
    return round(skew, 9)  # equal skews computed from different quotients must tie


def _divisor_list(number: int) -> str:
    found = divisors(number)
    return ", ".join(map(str, found)) if len(found) <= 16 else ", ".join(map(str, found[:15])) + ", …"
