"""A LLaMA by its definition, in NumPy and float64, a layer at a time: what one backend alone is held to.

Written from the definitions, not from either backend: RMSNorm (arXiv 1910.07467), rotary embedding (arXiv 2104.09864),
grouped queries (arXiv 2305.13245), SwiGLU (arXiv 2002.05202), and the scaling of frequencies of LLaMA 3.1's own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moka_core.architecture import Architecture
from moka_core.errors import ModelError
from moka_core.probe import ATTENTION

ROPE_KINDS = ("default", "linear", "llama3")
_PIECE = 1 << 24  # entries of a weight that are held in float64 at once


@dataclass(frozen=True, kw_only=True)
class OracleRope:
    """Rotary settings; `kind` is one of `ROPE_KINDS`, the others count for the kinds that have them."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: float = 8192

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> OracleRope:
        """The settings of a `config.json`.

        Raises:
            ModelError: the frequencies are scaled in another way.
        """
        nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = nested.get("rope_type") or nested.get("type") or "default"
        part = nested.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if kind not in ROPE_KINDS or part not in (None, 1, 1.0):
            raise ModelError(
                f"config.json: the float64 oracle knows the rope types {', '.join(ROPE_KINDS)}, of whole heads; got "
                f"{kind!r}; compare both backends with each other instead (--backend both)"
            )
        theta = nested.get("rope_theta") or config.get("rope_theta") or cls.theta
        original = config.get("original_max_position_embeddings") or nested.get("original_max_position_embeddings")
        scaling = {name: nested[name] for name in ("factor", "low_freq_factor", "high_freq_factor") if name in nested}
        context = original or config.get("max_position_embeddings", 2048)
        return cls(theta=float(theta), kind=kind, original_context=context, **scaling)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """θ_k = theta^(-2k / head_dim), scaled; the angle per position of every pair, (head_dim / 2,), float64.

        linear: θ_k / factor. llama3, with the wavelength λ = 2π/θ_k: θ_k if λ < original/high, θ_k / factor if
        λ > original/low, else (1 - s) θ_k / factor + s θ_k with s = (original/λ - low) / (high - low).

        >>> OracleRope(theta=100.0).frequencies(4).tolist()
        [1.0, 0.1]
        """
        plain = [self.theta ** (-2 * k / head_dim) for k in range(head_dim // 2)]
        if self.kind == "linear":
            return np.array(plain) / self.factor
        if self.kind == "default":
            return np.array(plain)
        scaled = []
        for frequency in plain:
            wavelength = 2 * math.pi / frequency
            if wavelength < self.original_context / self.high_freq_factor:
                scaled.append(frequency)
            elif wavelength > self.original_context / self.low_freq_factor:
                scaled.append(frequency / self.factor)
            else:
                turns = self.original_context / wavelength
                s = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
                scaled.append((1 - s) * frequency / self.factor + s * frequency)
        return np.array(scaled)


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What the float64 LLaMA needs to know; `rope` is None where it has no formula of its own for it."""

    architecture: Architecture
    eps: float
    rope: OracleRope | None

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> OracleConfig:
        """The numbers of a Hugging Face `config.json`.

        Raises:
            ModelError: a number is missing, or the model is another than a LLaMA.
        """
        unlike = {
            "model_type": config.get("model_type") not in ("llama", "mistral"),
            "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
            "sliding_window": bool(config.get("sliding_window", config.get("model_type") == "mistral")),
        }
        found = [f"{name} {config.get(name)!r}" for name, differs in unlike.items() if differs]
        if found:
            raise ModelError(f"config.json: the float64 oracle is a LLaMA (silu, no sliding window); got {found[0]}")
        try:
            rope = OracleRope.from_hf_config(config)
        except ModelError:
            rope = None
        eps = config.get("rms_norm_eps")
        architecture = Architecture.from_hf_config(config)
        return cls(architecture=architecture, eps=1e-6 if eps is None else float(eps), rope=rope)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """weight · x / √(mean(x²) + eps), over the last axis, float64.

    >>> rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.0).round(4).tolist()
    [0.8485, 2.2627]
    """
    return weight.astype(np.float64) * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + e^(-x)), float64.

    >>> silu(np.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.7311]
    """
    return x * np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


def rotate(x: np.ndarray, frequencies: np.ndarray, *, neighbours: bool = False) -> np.ndarray:
    """x (time, channels) with the pair (x_k, x_k+d/2) at position t turned by the angle t·frequencies[k].

    Args:
        neighbours: turn the pairs (x_2k, x_2k+1) instead, as other checkpoints' layouts want.
    """
    # both the frequencies and the angles of transformers are float32 numbers: part of the definition, not rounding
    positions = np.arange(len(x), dtype=np.float32)
    angles = (positions[:, None] * frequencies.astype(np.float32)).astype(np.float64)
    half = x.shape[1] // 2
    first, second = (x[:, 0::2], x[:, 1::2]) if neighbours else (x[:, :half], x[:, half:])
    turned = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
    return np.stack(turned, axis=-1).reshape(x.shape) if neighbours else np.concatenate(turned, axis=-1)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sizes: Architecture,
    frequencies: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    tiled: bool = False,
    neighbours: bool = False,
) -> np.ndarray:
    """softmax(scale · rotate(q) rotate(k)ᵀ) v of every head, float64, one head at a time.

    Args:
        q: (batch, time, heads·head_dim). k, v: (batch, time, kv heads·head_dim).
        frequencies: of the rotary embedding, (head_dim / 2,).
        causal: position t sees 0..t only.
        scale: 1 / √head_dim if None.
        tiled: query head h reads the keys of head h mod (kv heads) instead of h div (heads / kv heads).
        neighbours: see `rotate`.

    Returns:
        (batch, time, heads·head_dim).
    """
    heads, groups, width = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scale = width**-0.5 if scale is None else scale
    hidden = np.triu(np.ones((q.shape[1], q.shape[1]), bool), 1)
    result = np.empty(q.shape)
    for row in range(len(q)):
        for head in range(heads):
            group = head % groups if tiled else head // (heads // groups)
            own, shared = (slice(index * width, (index + 1) * width) for index in (head, group))
            left, right = (
                rotate(part, frequencies, neighbours=neighbours) for part in (q[row, :, own], k[row, :, shared])
            )
            scores = scale * left @ right.T
            if causal:
                scores[hidden] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            result[row, :, own] = weights / weights.sum(axis=-1, keepdims=True) @ v[row, :, shared]
    return result


def project(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (..., in) weightᵀ (in, out) in float64, a few rows of the weight at a time.

    >>> project(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]], np.float32)).tolist()
    [[11.0, 17.0]]
    """
    rows = max(_PIECE // weight.shape[1], 1)
    x = x.astype(np.float64)
    parts = [x @ weight[start : start + rows].astype(np.float64).T for start in range(0, len(weight), rows)]
    return np.concatenate(parts, axis=-1)


def trace_oracle(
    config: OracleConfig,
    tokens: np.ndarray,
    *,
    tensor: Callable[[str], np.ndarray | None],
    delta: Callable[[str], np.ndarray | None],
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, output) of every module in the order of `moka_core.probe.ForwardProbe.trace`, float64.

    A linear layer is y = x Wᵀ + b + x ΔWᵀ. Weights are asked for when they are needed, and not kept.

    Args:
        tokens: (batch, time), int.
        tensor: the base model's tensor of that name, matrices (out, in), or None if it has none.
        delta: ΔW (out, in) of the layer at that path, or None if it is not adapted.

    Raises:
        ModelError: the rotary embedding is of another kind than `ROPE_KINDS`; or a weight is missing.
    """
    sizes, rope = config.architecture, config.rope
    if rope is None:
        raise ModelError(
            f"config.json: the float64 oracle knows the rope types {', '.join(ROPE_KINDS)} only; compare both backends "
            "with each other instead (--backend both)"
        )

    def needed(name: str) -> np.ndarray:
        found = tensor(name)
        if found is None:
            raise ModelError(f"the base has no tensor {name!r}")
        return found

    def linear(path: str, x: np.ndarray, held: str = "") -> np.ndarray:
        y = project(x, needed(f"{held or path}.weight"))
        bias, change = tensor(f"{path}.bias"), delta(path)
        y = y if bias is None else y + bias.astype(np.float64)
        return y if change is None else y + project(x, change)

    frequencies = rope.frequencies(sizes.head_dim)
    x = needed("model.embed_tokens.weight")[tokens].astype(np.float64)
    yield "model.embed_tokens", x
    for index in range(sizes.num_hidden_layers):
        layer = f"model.layers.{index}"
        inner = rms_norm(x, needed(f"{layer}.input_layernorm.weight"), config.eps)
        yield f"{layer}.input_layernorm", inner
        heads = []
        for name in ("q_proj", "k_proj", "v_proj"):
            heads.append(linear(f"{layer}.self_attn.{name}", inner))
            yield f"{layer}.self_attn.{name}", heads[-1]
        attended = attend(*heads, sizes=sizes, frequencies=frequencies)
        yield f"{layer}.{ATTENTION}", attended
        out = linear(f"{layer}.self_attn.o_proj", attended)
        yield f"{layer}.self_attn.o_proj", out
        x = x + out
        inner = rms_norm(x, needed(f"{layer}.post_attention_layernorm.weight"), config.eps)
        yield f"{layer}.post_attention_layernorm", inner
        gate = linear(f"{layer}.mlp.gate_proj", inner)
        yield f"{layer}.mlp.gate_proj", gate
        up = linear(f"{layer}.mlp.up_proj", inner)
        yield f"{layer}.mlp.up_proj", up
        down = linear(f"{layer}.mlp.down_proj", silu(gate) * up)
        yield f"{layer}.mlp.down_proj", down
        x = x + down
        yield layer, x
    x = rms_norm(x, needed("model.norm.weight"), config.eps)
    yield "model.norm", x
    yield "lm_head", linear("lm_head", x, held="model.embed_tokens" if sizes.tie_word_embeddings else "lm_head")
