"""Where two sides of a parity check part first, by how much, and the likely cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from conversion import causes
from conversion.causes import relative
from conversion.oracle_probe import OracleProbe
from moka_core.oracle_llama import attend, project, rms_norm, silu
from moka_core.probe import ATTENTION, LAYER_STEPS, ForwardProbe

# Measured on healthy models: 4.3e-6, the worst of all modules of SmolLM2-135M; see docs/parity.md.
MODULE_BOUND = 2e-5


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The first difference: which module (or stage), its figure and bound, and the likely cause."""

    module: str
    figure: float
    bound: float
    cause: str

    def __str__(self) -> str:
        figure = f"{self.figure:d}" if isinstance(self.figure, int) else f"{self.figure:.1e}"
        return f"first difference: {self.module}, {figure} (bound {self.bound:g}); likely cause: {self.cause}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """The first module whose outputs differ, with what was computed around it on both sides.

    Holds: `around` has, for each side, the outputs of the same layer so far by what they are called inside it, and
    "input", what the layer read.
    """

    module: str
    figure: float
    around: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Traces:
    """Two traces, compared as they came: each module's relative difference, the first that is too large, the logits."""

    figures: tuple[tuple[str, float], ...]
    first: Difference | None
    logits: tuple[np.ndarray, np.ndarray]

    @property
    def worst(self) -> tuple[str, float]:
        """The module that differs most."""
        return max(self.figures, key=lambda entry: entry[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What the comparisons of the stored numbers found, by tensor and by layer.

    Args:
        frozen: tensors of the base that differ: name -> parts, see `causes.frozen_differences`.
        alone: tensors that one side only has.
        totals: how many tensors were compared that are packed ("codes"), and that are not ("dense").
        deltas: side -> path -> relative error of ΔW against the float64 oracle; infinite where there is no adapter.
    """

    frozen: dict[str, dict[str, int]] = field(default_factory=dict)
    alone: tuple[str, ...] = ()
    totals: dict[str, int] = field(default_factory=dict)
    deltas: dict[str, dict[str, float]] = field(default_factory=dict)


def compare_traces(
    ours: ForwardProbe, theirs: ForwardProbe, tokens: np.ndarray, *, bound: float = MODULE_BOUND
) -> Traces:
    """‖y - y'‖ / ‖y'‖ of every module in order of computation, and what stands around the first that exceeds `bound`.

    One layer's outputs are held at a time.
    """
    figures: list[tuple[str, float]] = []
    first: Difference | None = None
    around: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    logits = (np.zeros(0), np.zeros(0))
    for (name, own), (other, reference) in zip(ours.trace(tokens), theirs.trace(tokens), strict=True):
        assert name == other, (name, other)
        figure = relative(own, reference)
        figures.append((name, figure))
        logits = own, reference
        if first is not None:
            continue
        step = _step(name)
        for side, array in zip(around, (own, reference), strict=True):
            if not step:  # a layer's end is the next one's beginning
                side.clear()
            side[step or "input"] = array
        if not figure <= bound:
            first = Difference(module=name, figure=figure, around=around)
    return Traces(figures=tuple(figures), first=first, logits=logits)


def _step(module: str) -> str:
    """What a module is called inside its layer; "" for a layer's output and the embedding's."""
    parts = module.split(".")
    if module == "model.embed_tokens" or (parts[:2] == ["model", "layers"] and len(parts) == 3):
        return ""
    return ".".join(parts[3:]) if parts[:2] == ["model", "layers"] else module


def diagnose(ours: ForwardProbe, theirs: ForwardProbe, truth: OracleProbe, found: Found, traces: Traces) -> Diagnosis:
    """The first difference of two sides, in order of computation, and its likely cause.

    Args:
        theirs: the reference; may be `truth` itself.
        truth: says what each number should be, so that the side that is wrong can be named.
        found: what the stored numbers' comparison found.
        traces: of both sides.
    """
    sides = _Sides(ours, theirs, truth, found)
    first = traces.first
    if first is not None:
        return Diagnosis(module=first.module, figure=first.figure, bound=MODULE_BOUND, cause=_cause_at(first, sides))
    stored = _first_stored(sides)
    if stored is not None:
        return stored
    module, figure = traces.worst
    return Diagnosis(
        module="none",
        figure=figure,
        bound=MODULE_BOUND,
        cause=f"rounding: no module's output differs by more than its bound (worst: {module})",
    )


@dataclass(frozen=True, eq=False)
class _Sides:
    ours: ForwardProbe
    theirs: ForwardProbe
    truth: OracleProbe
    found: Found

    @property
    def backends(self) -> tuple[ForwardProbe, ...]:
        """Those that can be wrong."""
        return (self.ours,) if self.theirs is self.truth else (self.ours, self.theirs)

    def wrong(self, arrays: tuple[np.ndarray, np.ndarray], expected: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(label, output) of the backends whose output is not the expected one."""
        pairs = zip(self.backends, arrays, strict=False)
        return [(side.label, array) for side, array in pairs if not relative(array, expected) <= MODULE_BOUND]


def _cause_at(first: Difference, sides: _Sides) -> str:
    """The likely cause of a module's difference, what it reads being equal."""
    step, (own, other) = _step(first.module), first.around
    outputs = own[step or "input"], other[step or "input"]
    broken = [side.label for side, array in zip(sides.backends, outputs, strict=False) if not np.isfinite(array).all()]
    stored = "; ".join(_stored_causes(first.module, sides))
    if stored:
        return stored
    if broken:
        return f"NaN or infinite entries, in {' and '.join(broken)}"
    if not step:
        if first.module == "model.embed_tokens":
            return "the look-up of tokens, or a factor on the embedding: the table itself is equal"
        return "the residual stream: the layer's parts are equal, their sum is not"
    if step.endswith("norm"):
        return _norm(first.module, step, outputs, other, sides)
    if step == ATTENTION:
        return _attention(outputs, other, sides)
    return _linear(first.module, step, outputs, other, sides)


def _explain(
    outputs: tuple[np.ndarray, np.ndarray], expected: np.ndarray, sides: _Sides, cause: Callable[[np.ndarray], str]
) -> str:
    """The cause for the backends whose output is not the expected one, which are named."""
    wrong = sides.wrong(outputs, expected)
    if not wrong and not relative(*outputs) <= 2 * MODULE_BOUND:  # float64's output is the one that is off
        return "unknown: the backend computes what its numbers say, the float64 LLaMA does not; please report this"
    if not wrong:
        return "rounding: each backend is within the bound of what should come out"
    return "; ".join(f"{cause(array)}, in {label}" for label, array in wrong)


def _norm(
    module: str,
    step: str,
    outputs: tuple[np.ndarray, np.ndarray],
    around: dict[str, np.ndarray],
    sides: _Sides,
) -> str:
    x = around["input"].astype(np.float64)
    if step == "post_attention_layernorm":
        x = x + around["self_attn.o_proj"]
    weight, eps = sides.truth.frozen_tensor(f"{module}.weight").value, sides.truth.config.eps
    expected = rms_norm(x, weight, eps)
    return _explain(outputs, expected, sides, lambda array: causes.norm_cause(array, x, weight, eps))


def _attention(outputs: tuple[np.ndarray, np.ndarray], around: dict[str, np.ndarray], sides: _Sides) -> str:
    config = sides.truth.config
    q, k, v = (around[f"self_attn.{name}_proj"] for name in "qkv")
    sizes, rope = config.architecture, config.rope
    if rope is None:  # no formula of its own: which side is wrong cannot be told
        return causes.attention_position(*outputs)
    expected = attend(q, k, v, sizes=sizes, frequencies=rope.frequencies(sizes.head_dim))
    return _explain(
        outputs, expected, sides, lambda array: causes.attention_cause(array, q, k, v, sizes=sizes, rope=rope)
    )


def _linear(
    module: str,
    step: str,
    outputs: tuple[np.ndarray, np.ndarray],
    around: dict[str, np.ndarray],
    sides: _Sides,
) -> str:
    truth = sides.truth
    names = set(truth.frozen())
    reads = {"self_attn.o_proj": ATTENTION, "lm_head": "model.norm"}
    attends = step.startswith("self_attn.")
    tied = step == "lm_head" and "lm_head.weight" not in names
    weight = truth.frozen_tensor("model.embed_tokens.weight" if tied else f"{module}.weight").value
    bias = truth.frozen_tensor(f"{module}.bias").value.astype(np.float64) if f"{module}.bias" in names else 0.0
    delta = truth.delta(module) if module in truth.adapter.layers else None

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return project(x, weight) + bias, None if delta is None else project(x, delta)

    def whole(x: np.ndarray) -> np.ndarray:
        frozen, change = parts(x)
        return frozen if change is None else frozen + change

    if step == "mlp.down_proj":
        gate, up = (around[f"mlp.{name}_proj"].astype(np.float64) for name in ("gate", "up"))
        x = silu(gate) * up
        others = {name: whole(value * up) for name, value in causes.activations(gate).items()}
    else:
        x = around[reads.get(step, "input_layernorm" if attends else "post_attention_layernorm")].astype(np.float64)
        others = {}
    frozen, change = parts(x)
    expected = frozen if change is None else frozen + change
    return _explain(
        outputs,
        expected,
        sides,
        lambda array: causes.activation_cause(array, others) or causes.linear_cause(array, frozen, change),
    )


def _stored_causes(module: str, sides: _Sides) -> Iterator[str]:
    """The causes that lie in a module's stored numbers: its weight, its bias, its ΔW."""
    found = sides.found
    names = [f"{module}.weight", f"{module}.bias"]
    if module == "lm_head" and "lm_head.weight" not in sides.truth.frozen():
        names.append("model.embed_tokens.weight")
    for name in names:
        if name in found.alone:
            has = [side.label for side in (sides.ours, sides.theirs) if name in side.frozen()]
            yield f"{name} is there in {' and '.join(has)} only"
        elif name in found.frozen:
            yield from _frozen_causes(name, sides)
    path = module
    for side in sides.backends:
        if not found.deltas.get(side.label, {}).get(path, 0.0) <= causes.DELTA_TELL:
            yield f"{_delta_cause(path, side, sides)}, in {side.label}{_delta_extent(side, found)}"


def _frozen_causes(name: str, sides: _Sides) -> Iterator[str]:
    expected = sides.truth.frozen_tensor(name)
    parts = sides.found.frozen[name]
    kind = "dense" if "dense" in parts else next(part for part, count in parts.items() if count)
    total = sides.found.totals["dense" if kind == "dense" else "codes"]
    alike = sum(1 for other in sides.found.frozen.values() if other.get(kind))
    kinds = "dense tensors" if kind == "dense" else "NF4 layers"
    what = "bias: " if name.endswith(".bias") else ""
    for side in sides.backends:
        cause = causes.frozen_cause(side.frozen_tensor(name), expected)
        if cause is not None:
            yield f"{what}{cause}, in {side.label}{_extent(alike, total, kinds)}"


def _delta_cause(path: str, side: ForwardProbe, sides: _Sides) -> str:
    adapter = sides.truth.adapter
    if path not in side.adapted():
        return "ΔW is 0: this layer has no adapter"
    return causes.delta_cause(side.delta(path), adapter.layers[path], adapter.layer_config(path))


def _delta_extent(side: ForwardProbe, found: Found) -> str:
    errors = found.deltas[side.label].values()
    return _extent(sum(1 for error in errors if not error <= causes.DELTA_TELL), len(errors), "adapted layers")


def _extent(count: int, total: int, kinds: str) -> str:
    if count == total > 1:
        return f"; {kinds}: all {total} of them differ"
    return f"; {kinds}: {'this one alone differs' if count == 1 else f'{count} of {total} differ'}"


def _first_stored(sides: _Sides) -> Diagnosis | None:
    """The first tensor or ΔW that differs, where no output shows it."""
    found = sides.found
    wrong = {
        path for errors in found.deltas.values() for path, error in errors.items() if not error <= causes.DELTA_TELL
    }
    tensors = {name.rpartition(".")[0] for name in (*found.frozen, *found.alone)}
    modules = sorted(tensors | wrong, key=_place)
    if not modules:
        return None
    module = modules[0]
    if module in tensors:
        counts = [sum(parts.values()) for name, parts in found.frozen.items() if name.rpartition(".")[0] == module]
        figure, bound = float(sum(counts) + sum(name.rpartition(".")[0] == module for name in found.alone)), 0.0
    else:
        figure = max(errors.get(module, 0.0) for errors in found.deltas.values())
        bound = causes.DELTA_TELL
    cause = "; ".join(_stored_causes(module, sides)) or "one side alone has it"
    return Diagnosis(
        module=module, figure=figure, bound=bound, cause=f"{cause}; its output differs by less than its bound"
    )


def _place(module: str) -> tuple[float, int, str]:
    """Where a module stands in the order of computation."""
    parts, step = module.split("."), _step(module)
    if parts[:2] == ["model", "layers"]:
        return int(parts[2]), LAYER_STEPS.index(step) if step in LAYER_STEPS else len(LAYER_STEPS), module
    return -1 if module == "model.embed_tokens" else float("inf"), module == "lm_head", module
