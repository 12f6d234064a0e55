"""What our LLaMA needs to know of a Hugging Face `config.json`, and the refusal of what it does not support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moka_core import Architecture, ModelError

Attend = Literal["xla", "cudnn"]

MODEL_TYPES = ("llama", "mistral")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base, and the frequency scaling of LLaMA 3.1 or a linear one.

    Args:
        theta: base of the geometric series of frequencies.
        kind: "default", "linear" or "llama3".
        factor: what positions ("linear") or low frequencies ("llama3") are divided by.
        low_freq_factor, high_freq_factor, original_max_position: the bounds of "llama3".
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> RopeConfig:
        """The rotary settings; transformers 5 writes `rope_parameters`, earlier versions `rope_scaling`.

        Raises:
            ModelError: the type of scaling is not supported, or a value of it is missing.
        """
        nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = nested.get("rope_type") or nested.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise ModelError(f"config.json: rope type {kind!r} is not supported; supported: default, linear, llama3")
        theta = nested.get("rope_theta") or config.get("rope_theta") or 10000.0
        fields: dict[str, Any] = {"theta": float(theta), "kind": kind}
        needed = {
            "default": {},
            "linear": {"factor": "factor"},
            "llama3": {
                "factor": "factor",
                "low_freq_factor": "low_freq_factor",
                "high_freq_factor": "high_freq_factor",
                "original_max_position": "original_max_position_embeddings",
            },
        }[kind]
        missing = [name for name in needed.values() if nested.get(name) is None]
        if missing:
            raise ModelError(f"config.json: rope type {kind!r} needs {', '.join(missing)}")
        fields |= {ours: nested[theirs] for ours, theirs in needed.items()}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The architecture of a LLaMA-family decoder. Hashable, so that it can be static in a compiled function."""

    architecture: Architecture
    rope: RopeConfig
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """The config of a Hugging Face model folder.

        Raises:
            ModelError: the model is no LLaMA-family decoder, or uses what is not supported; all is listed.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ModelError(
                f"config.json: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)} "
                "(LLaMA 1 to 3.2, SmolLM2, TinyLlama, Mistral without sliding window)"
            )
        problems = []
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            problems.append(f"hidden_act: expected silu; got {config['hidden_act']!r}")
        # transformers' default for a Mistral without the key is a window of 4096
        window = config.get("sliding_window", 4096 if kind == "mistral" else None)
        if window:
            problems.append(f"sliding_window: expected none; got {window!r}")
        if problems:
            raise ModelError("config.json: " + "; ".join(problems))
        return cls(
            architecture=Architecture.from_hf_config(config),
            rope=RopeConfig.from_hf_config(config),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
