"""Why a number differs from what it should be: hypotheses, each tested by computing what it would give.

Every function takes what was found and what it should have been made of, and returns a sentence's part, or None (or a
sentence that says so) where no hypothesis gives what was found. NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moka_core import LayerFactors, MokaConfig, Nf4Weight, dequantise_nf4
from moka_core.architecture import Architecture
from moka_core.oracle import dense_delta, stable_factor, term_coefficients
from moka_core.oracle_llama import OracleRope, attend, rms_norm, silu
from moka_core.probe import FrozenTensor

# A hypothesis holds for ΔW if what it leaves unexplained is within ΔW's own bound; healthy ones show 1.4e-7.
DELTA_TELL = 1e-6
# ... and for an output if it is within a module's own bound; healthy ones show 4.3e-6.
OUTPUT_TELL = 2e-5
_BASES = (1e4, 1e5, 2.5e5, 5e5, 1e6, 1e7)  # of the rotary embedding, as published models have them


def relative(value: np.ndarray, reference: np.ndarray, *, least: float = 0.0) -> float:
    """‖value - reference‖ / ‖reference‖, in float64; infinite if an entry is not finite or only the reference is 0.

    Args:
        least: the gap is divided by this where ‖reference‖ is smaller.

    >>> relative(np.array([3.0, 5.0]), np.array([3.0, 4.0]))
    0.2
    """
    reference = reference.astype(np.float64)
    if value.shape != reference.shape:
        return float("inf")
    gap = float(np.linalg.norm(value.astype(np.float64) - reference))
    size = max(float(np.linalg.norm(reference)), least)
    if not (np.isfinite(gap) and np.isfinite(size)):
        return float("inf")
    if size == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / size


def differing(found: np.ndarray, expected: np.ndarray) -> int:
    """How many entries differ in their bits; all of them if the shapes or dtypes do."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return max(found.size, expected.size)
    bits = np.dtype(f"u{found.dtype.itemsize}")
    return int((np.atleast_1d(found).view(bits) != np.atleast_1d(expected).view(bits)).sum())


def frozen_differences(found: FrozenTensor, expected: FrozenTensor) -> dict[str, int]:
    """How many entries differ: of "codes", "absmax" (all parts of the scales) and "decoded", or of "dense"."""
    if found.packed is None and expected.packed is None:
        return {"dense": differing(found.value, expected.value)}
    if found.packed is None or expected.packed is None:
        return {"codes": expected.value.size, "absmax": 0, "decoded": differing(found.value, expected.value)}
    own, other = found.packed.parts(), expected.packed.parts()
    scales = [
        differing(own[part], other[part]) if part in own and part in other else 1
        for part in sorted((own.keys() | other.keys()) - {"codes"})
    ]
    return {
        "codes": differing(own["codes"], other["codes"]),
        "absmax": sum(scales),
        "decoded": differing(found.value, expected.value),
    }


def frozen_cause(found: FrozenTensor, expected: FrozenTensor) -> str | None:
    """Why a tensor of the base model is another one; None if it is not."""
    counts = frozen_differences(found, expected)
    if "dense" in counts:
        if not counts["dense"]:
            return None
        if found.value.shape != expected.value.shape:
            return f"the weight has the shape {found.value.shape} in place of {expected.value.shape}"
        figure = relative(found.value, expected.value)
        return f"the weight: {counts['dense']} of {expected.value.size} entries differ (relative {figure:.1e})"
    if found.packed is None or expected.packed is None:
        which = "dense in place of packed" if found.packed is None else "packed in place of dense"
        return f"the weight is {which}"
    if counts["codes"]:
        if np.array_equal(_swapped(found.packed).codes, expected.packed.codes):
            return "nibble order: the NF4 codes are those of the folder with the low half of each byte first"
        return f"the weight: {counts['codes']} of {expected.packed.codes.size} bytes of NF4 codes differ"
    if counts["absmax"]:
        return f"the NF4 scales (absmax): {counts['absmax']} entries differ, the codes are equal"
    return _decoder_cause(found) if counts["decoded"] else None


def _swapped(weight: Nf4Weight) -> Nf4Weight:
    codes = ((weight.codes << 4) | (weight.codes >> 4)).astype(np.uint8)
    return Nf4Weight(shape=weight.shape, codes=codes, scales=weight.scales, dtype=weight.dtype)


def _decoder_cause(found: FrozenTensor) -> str:
    """Why a packed weight that is right comes out of the decoder as another matrix."""
    assert found.packed is not None
    if relative(found.value, dequantise_nf4(_swapped(found.packed))) < OUTPUT_TELL:
        return "nibble order: codes and scales are equal, but the low half of each byte is decoded first"
    figure = relative(found.value, dequantise_nf4(found.packed))
    return f"the NF4 decoder: codes and scales are equal, the decoded weight is not (relative {figure:.1e})"


@dataclass(frozen=True)
class _Term:
    """A term of ΔW: its factors in float64, and the names and rows under which they are stored, "" if they are not."""

    a: np.ndarray
    b: np.ndarray
    name_a: str
    name_b: str

    def blocks(self) -> np.ndarray:
        """A ⊗ B as (a_out, b_out, a_in, b_in)."""
        return np.einsum("pq,ij->piqj", self.a, self.b)


def _terms(layer: LayerFactors, config: MokaConfig) -> Iterator[_Term]:
    for index, group in enumerate(layer.plan.groups):
        for copy in range(group.copies):
            fixed_a, fixed_b = config.identity == "a", config.identity == "b"
            yield _Term(
                np.eye(group.shape.a_out) if fixed_a else layer.factor_a[index][copy].astype(np.float64),
                np.eye(group.shape.b_out) if fixed_b else layer.factor_b[index][copy].astype(np.float64),
                "" if fixed_a else f"factor_a.{index}[{copy}]",
                "" if fixed_b else f"factor_b.{index}[{copy}]",
            )


def delta_cause(found: np.ndarray, layer: LayerFactors, config: MokaConfig) -> str:
    """Why ΔW (out, in) is another than Σ_i scale·α_i·c_i·(A_i ⊗ B_i).

    >>> from moka_core import KronShape, LayerPlan, ShapeGroup
    >>> plan = LayerPlan(out_features=2, in_features=2, groups=(ShapeGroup(KronShape(1, 2, 2, 1), 1),))
    >>> config = MokaConfig(r=1, num_shapes=1, shapes=(plan,))
    >>> layer = LayerFactors(plan=plan, factor_a=(np.array([[[1.0, 10.0]]]),),
    ...                      factor_b=(np.array([[[3.0], [4.0]]]),), gate_logits=np.zeros(1))
    >>> delta_cause(np.array([[6.0, 60.0], [8.0, 80.0]]), layer, config)
    'the scale: ΔW is 2 times what it should be'
    """
    found, expected = found.astype(np.float64), dense_delta(layer, config)
    if found.shape != expected.shape:
        return f"ΔW has the shape {found.shape} in place of {expected.shape}"
    if not np.isfinite(found).all():
        return "ΔW has NaN or infinite entries"
    if not found.any():
        return "ΔW is 0: no adapter is there"
    terms, right = list(_terms(layer, config)), term_coefficients(layer, config)
    tell = DELTA_TELL * float(max(np.linalg.norm(expected), np.linalg.norm(found)))
    return (
        _multiple(found, expected, tell)
        or _arrangement(found, terms, right, tell)
        or _coefficients(found, layer, config, terms, right, tell)
        or _factor(found - expected, terms, right, tell)
        or "ΔW is made of other factors: more than one of them differs"
    )


def _multiple(found: np.ndarray, expected: np.ndarray, tell: float) -> str | None:
    times = float((found * expected).sum() / (expected * expected).sum())
    if np.linalg.norm(found - times * expected) > tell:
        return None
    return f"the scale: ΔW is {times:.6g} times what it should be"


_ORDERS = {
    (1, 0, 3, 2): "the order of the Kronecker product: B ⊗ A in place of A ⊗ B",
    (0, 1, 3, 2): "the order of the input: x is read column by column in place of row by row",
    (1, 0, 2, 3): "the order of the output: y is written column by column in place of row by row",
    (2, 3, 0, 1): "a transpose: ΔWᵀ in place of ΔW",
}


def _arrangement(found: np.ndarray, terms: list[_Term], right: np.ndarray, tell: float) -> str | None:
    for order, cause in _ORDERS.items():
        if order == (2, 3, 0, 1) and found.shape[0] != found.shape[1]:
            continue
        left = found.copy()
        for weight, term in zip(right, terms, strict=True):
            left -= weight * term.blocks().transpose(order).reshape(found.shape)
        if np.linalg.norm(left) <= tell:
            return cause
    return None


def _coefficients(
    found: np.ndarray, layer: LayerFactors, config: MokaConfig, terms: list[_Term], right: np.ndarray, tell: float
) -> str | None:
    """The right terms, differently weighted: the coefficients that fit best, if they leave nothing over."""
    count = len(terms)
    gram, seen = np.empty((count, count)), np.empty(count)
    for i, term in enumerate(terms):
        dense = term.blocks().reshape(found.shape)
        seen[i] = (dense * found).sum()
        for j, other in enumerate(terms[: i + 1]):
            shape = (other.a.shape[0], other.b.shape[0], other.a.shape[1], other.b.shape[1])
            gram[i, j] = gram[j, i] = np.einsum("piqj,pq,ij->", dense.reshape(shape), other.a, other.b, optimize=True)
    fitted = np.linalg.lstsq(gram, seen, rcond=None)[0]
    left = found - sum(
        (weight * term.blocks().reshape(found.shape) for weight, term in zip(fitted, terms, strict=True)),
        np.zeros(found.shape),
    )
    if np.linalg.norm(left) > tell:
        return None
    if np.linalg.matrix_rank(gram) < count:
        return (
            "the gates, the scale or factors: the same terms count differently (they depend on each other, so that "
            "which cannot be told)"
        )
    constants = np.array([config.scale * stable_factor(config, shape) for shape in layer.plan.term_shapes()])
    shares, due = fitted / constants, right / constants
    blur = 3 * tell / np.sqrt(np.diag(gram))  # of each coefficient
    slack = blur / np.abs(constants)
    if (shares < -slack).any() or abs(shares.sum() - 1) > max(slack.sum(), 1e-5):
        return _no_gates(fitted, right, config, layer, blur)
    if (np.abs(fitted - constants / count) <= blur).all():
        return f"the gates: every term counts 1/{count} = {1 / count:.4g}, as without a gate"
    common = float(np.median(fitted / right))
    odd = np.flatnonzero(np.abs(fitted - common * right) > blur)
    if len(odd) == 1 and count > 2:
        number = int(odd[0])
        others = "" if abs(common - 1) < 1e-4 else f", and every other one {common:.4g} times its share"
        return f"the gate of term {number}: it counts {shares[number]:.4g} in place of {due[number]:.4g}{others}"
    return f"the gates: the terms count {_list(shares)} in place of {_list(due)}"


def _no_gates(fitted: np.ndarray, right: np.ndarray, config: MokaConfig, layer: LayerFactors, blur: np.ndarray) -> str:
    """What coefficients are that no gate gives, as gates are positive and sum to 1."""
    stable = np.array([stable_factor(config, shape) for shape in layer.plan.term_shapes()])
    if config.scaling != "none" and (np.abs(fitted - right / stable) <= blur).all():
        return f"the scale: scaling={config.scaling!r} is left out"
    if layer.gate_logits is not None:
        logits, constants = layer.gate_logits.astype(np.float64), config.scale * stable
        for named, shares in (
            ("are all 1", np.ones(len(logits))),
            ("are the logits themselves, without a softmax", logits),
            ("are the logistic function of each logit, in place of their softmax", 1 / (1 + np.exp(-logits))),
        ):
            if (np.abs(fitted - shares * constants) <= blur).all():
                return f"the gates: they {named}"
    times = fitted / right
    odd = np.flatnonzero(np.abs(fitted - right) > blur)
    if len(odd) < len(right) and np.ptp(times[odd]) <= 2 * (blur / np.abs(right))[odd].max():
        which = f"term{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}"
        if (np.abs(fitted[odd]) <= blur[odd]).all():
            return f"{which}: left out; every other term is right"
        which += f": {times[odd[0]]:.4g}"
        return f"a factor, or the scale, of {which} times what it should be; every other term is right"
    return (
        f"the scale, factors, or gates that are no softmax: the terms count {_list(times)} times what they should, "
        "which no softmax gives, as its shares are positive and sum to 1"
    )


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:8]) + " …" * (len(values) > 8)


def _factor(gap: np.ndarray, terms: list[_Term], right: np.ndarray, tell: float) -> str | None:
    """One factor of one term is another one: the change of it that fits best, if it leaves nothing over."""
    if np.linalg.norm(gap) <= 3 * tell:
        return "ΔW, by so little that its cause cannot be told"
    best: tuple[float, str, np.ndarray, np.ndarray] | None = None
    for number, (weight, term) in enumerate(zip(right, terms, strict=True)):
        blocks = gap.reshape(len(term.a), len(term.b), term.a.shape[1], term.b.shape[1])
        for name, own, fixed, equation, product in (
            (term.name_a, term.a, term.b, "piqj,ij->pq", "pq,ij->piqj"),
            (term.name_b, term.b, term.a, "piqj,pq->ij", "ij,pq->piqj"),
        ):
            size = float((fixed * fixed).sum())
            if not name or not weight or not size:
                continue
            change = np.einsum(equation, blocks, fixed) / (weight * size)
            rest = float(np.linalg.norm(blocks - weight * np.einsum(product, change, fixed)))
            if best is None or rest < best[0]:
                best = rest, f"{name} (term {number})", change, own
    if best is None or best[0] > tell:
        return None
    _, name, change, own = best
    moved = np.argwhere(np.abs(change) > 1e-3 * np.abs(change).max())
    if len(moved) > 1:
        return f"a factor: {len(moved)} of {change.size} entries of {name} differ"
    at = tuple(int(index) for index in moved[0])
    return f"a factor: entry {at} of {name} is {own[at] + change[at]:.6g} in place of {own[at]:.6g}"


def norm_cause(found: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float) -> str:
    """Why a norm's output is another than weight · x / √(mean(x²) + eps), its weight being right.

    With another eps the whole of each token's output is off by one factor √((m + eps) / (m + eps')), m = mean(x²).
    """
    x, found = x.astype(np.float64), found.astype(np.float64)
    expected = rms_norm(x, weight, eps)
    mean = np.mean(x * x, axis=-1)
    ratio = (found * expected).sum(-1) / (expected * expected).sum(-1)
    if np.isfinite(ratio).all() and (ratio > 0).all() and relative(found, ratio[..., None] * expected) < OUTPUT_TELL:
        each = (mean + eps) / ratio**2 - mean
        other = max(float(np.median(each)), 0.0)
        if relative(found, rms_norm(x, weight, other)) < OUTPUT_TELL:
            return f"rms_norm_eps: it is as if it were {other:.3g} in place of {eps:.3g}"
        return "the norm: each token is off by a factor of its own, and no rms_norm_eps explains it"
    return "the norm: its weight is right, but it computes something else"


def attention_cause(
    found: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sizes: Architecture,
    rope: OracleRope,
) -> str:
    """Why softmax(q kᵀ) v, (batch, time, heads·head_dim), is another one than these q, k, v give."""
    width = sizes.head_dim
    right = rope.frequencies(width)
    hypotheses: list[tuple[str, dict[str, Any]]] = [
        ("no rotary embedding: queries and keys are not turned", {"frequencies": np.zeros(width // 2)}),
        ("rotary embedding: neighbouring channels are the pairs in place of the two halves", {"neighbours": True}),
        ("the mask: later tokens are seen too", {"causal": False}),
        ("the scale of the softmax: 1 in place of 1/√head_dim", {"scale": 1.0}),
        ("grouped queries: heads are matched h mod kv_heads in place of h div group", {"tiled": True}),
    ]
    if rope.kind != "default":
        plain = OracleRope(theta=rope.theta).frequencies(width)
        hypotheses.append((f"rope scaling: {rope.kind!r} is left out", {"frequencies": plain}))
    for theta in _BASES:
        if theta != rope.theta:
            other = OracleRope(
                theta=theta,
                kind=rope.kind,
                factor=rope.factor,
                low_freq_factor=rope.low_freq_factor,
                high_freq_factor=rope.high_freq_factor,
                original_context=rope.original_context,
            )
            cause = f"rotary settings: rope_theta is {theta:g} in place of {rope.theta:g}"
            hypotheses.append((cause, {"frequencies": other.frequencies(width)}))
    for cause, change in hypotheses:
        settings = {"frequencies": right, **change}
        if relative(found, attend(q, k, v, sizes=sizes, **settings)) < OUTPUT_TELL:
            return cause
    return attention_position(found, attend(q, k, v, sizes=sizes, frequencies=right))


def attention_position(found: np.ndarray, expected: np.ndarray) -> str:
    """What the first position tells: it sees itself alone, whatever rotary settings and the softmax's scale are."""
    if found.shape[1] > 1 and relative(found[:, :1], expected[:, :1]) < OUTPUT_TELL:
        return (
            "rotary settings (rope_theta, rope_scaling) or the softmax's scale: position 0 is equal, what comes after "
            "it is not"
        )
    return "the heads or the mask: position 0, which sees itself alone, differs already"


def linear_cause(found: np.ndarray, frozen: np.ndarray, change: np.ndarray | None) -> str:
    """Why a linear layer's output is another than `frozen` + `change`, x Wᵀ + b and x ΔWᵀ, W and ΔW being right."""
    found = found.astype(np.float64)
    if change is not None and change.any():
        left = found - frozen
        times = float((left * change).sum() / (change * change).sum())
        if np.isfinite(times) and relative(found, frozen + times * change) < OUTPUT_TELL:
            if abs(times) < 1e-3:
                return "the adapter is not applied, though it is there"
            return f"the adapter is applied {times:.4g} times, though ΔW is right"
    return "the layer computes something else with the right weights"


def activation_cause(found: np.ndarray, results: dict[str, np.ndarray]) -> str | None:
    """Which activation between gate_proj and up_proj gives what down_proj has, of `results` by their names."""
    for name, result in results.items():
        if relative(found, result) < OUTPUT_TELL:
            return f"the activation: {name} in place of silu"
    return None


def activations(x: np.ndarray) -> dict[str, np.ndarray]:
    """What LLaMA-like models have had in the place of silu."""
    cubic = x + 0.044715 * x**3
    return {
        "gelu (tanh)": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * cubic)),
        "gelu (sigmoid)": silu(1.702 * x) / 1.702,
        "relu": np.maximum(x, 0),
        "no activation": x,
    }
