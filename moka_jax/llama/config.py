"""What our LLaMA needs to know of a Hugging Face `config.json`, and the refusal of what it does not support."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moka_core import Architecture, ModelError
from moka_core.architecture import ModelFields, is_positive

Attend = Literal["xla", "cudnn"]

MODEL_TYPES = ("llama", "mistral")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

# what transformers takes where config.json is silent
_CONTEXT = {"llama": 2048, "mistral": 131072}
_WINDOW = {"llama": None, "mistral": 4096}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: its base, and how its frequencies are scaled.

    Args:
        theta: base of the geometric series of frequencies.
        kind: one of `ROPE_KINDS`.
        factor: what positions ("linear", "proportional") or low frequencies ("llama3", "yarn") are divided by, and how
            far "dynamic" stretches the base.
        original_max_position: the context of the first training, from where on "dynamic" and "longrope" depend on the
            length of a text, and by which "llama3" and "yarn" tell low frequencies from high ones.
        attention_factor: multiplies cosines and sines ("yarn", "longrope").
        low_freq_factor: the lower bound of "llama3".
        high_freq_factor: the upper one.
        beta_fast: the bound of "yarn" for fast turns.
        beta_slow: that for slow ones.
        truncate: whether both are rounded outward.
        short_factor: what "longrope" divides each frequency by, in texts up to original_max_position.
        long_factor: the same in longer ones.
        partial: the part of each head that "proportional" turns.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial: float = 1.0

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> RopeConfig:
        """The rotary settings; transformers 5 writes `rope_parameters`, earlier versions `rope_scaling`.

        Raises:
            ModelError: the type of scaling is not supported, or values of it are missing or unusable; all are listed.
        """
        fields = ModelFields(config)
        result = cls.from_fields(fields)
        fields.check()
        return result

    @classmethod
    def from_fields(cls, fields: ModelFields) -> RopeConfig:
        """The rotary settings, what is wrong with them being added to `fields.problems`."""
        place = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"  # in transformers' order
        nested = fields.get(place, {})
        if not isinstance(nested, Mapping) or any(isinstance(value, Mapping) for value in nested.values()):
            fields.refuse(place, "one set of values for all layers", nested)
            return cls()
        rope = ModelFields(nested, problems=fields.problems, inside=place)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ROPE_KINDS:
            fields.problems.append(f"{place}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
            return cls()
        partial = rope if rope.get("partial_rotary_factor") is not None else fields
        values: dict[str, Any] = {
            "kind": kind,
            "theta": (rope if rope.get("rope_theta") is not None else fields).number("rope_theta", cls.theta),
            "partial": partial.number("partial_rotary_factor", 1.0),
        }
        if values["partial"] > 1 or (kind != "proportional" and values["partial"] != 1):
            expected = (
                "at most 1" if kind == "proportional" else f"1, as a LLaMA's rope type {kind!r} turns whole heads"
            )
            partial.refuse("partial_rotary_factor", expected, values["partial"])
        before = len(fields.problems)
        values |= _scaling(kind, rope, fields, values["theta"])
        return cls(**values) if len(fields.problems) == before else cls()


def _scaling(kind: str, rope: ModelFields, fields: ModelFields, theta: float) -> dict[str, Any]:
    """The fields of a RopeConfig that one kind of scaling has."""
    if kind == "default":
        return {}
    if kind == "proportional":
        return {"factor": rope.number("factor", 1.0)}
    if kind == "linear":
        return {"factor": rope.number("factor")}
    context = fields.whole("max_position_embeddings", _CONTEXT.get(str(fields.get("model_type")), _CONTEXT["llama"]))
    if kind == "dynamic":
        return {"factor": rope.number("factor"), "original_max_position": context}
    outside = fields.get("original_max_position_embeddings") is not None  # goes before the nested one in transformers
    original = (fields if outside else rope).whole("original_max_position_embeddings", context)
    values: dict[str, Any] = {"original_max_position": original}
    if kind == "llama3":
        values |= {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        if rope.problems == [] and values["high_freq_factor"] <= values["low_freq_factor"]:
            rope.refuse(
                "high_freq_factor",
                f"more than low_freq_factor ({values['low_freq_factor']})",
                values["high_freq_factor"],
            )
        return values
    values["factor"] = rope.number("factor", context / original)
    values["attention_factor"] = rope.number(
        "attention_factor", _attention_factor(kind, rope, values["factor"], original)
    )
    if kind == "yarn":
        if theta <= 1:
            rope.refuse("rope_theta", "a number above 1 for rope type 'yarn'", theta)
        values |= {"beta_fast": rope.number("beta_fast", 32.0), "beta_slow": rope.number("beta_slow", 1.0)}
        return {**values, "truncate": rope.flag("truncate", True)}
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if isinstance(factors, list) and all(is_positive(factor) for factor in factors):
            values[name] = tuple(map(float, factors))
        else:
            rope.refuse(name, "a list of positive numbers", factors)
    return values


def _attention_factor(kind: str, rope: ModelFields, factor: float, original: int) -> float:
    """What cosines and sines are multiplied by where the config leaves it open."""
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


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

        `pretraining_tp` is not read: transformers 5 does not either, and earlier versions only split the same sums.

        Raises:
            ModelError: the model is no LLaMA-family decoder, or uses what is not supported; all is listed.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ModelError(
                f"config.json: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)} "
                "(LLaMA 1 to 3.2, SmolLM2, TinyLlama, Mistral without sliding window)"
            )
        fields = ModelFields(config)
        result = cls(
            architecture=Architecture.from_fields(fields),
            rope=RopeConfig.from_fields(fields),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.whole("max_position_embeddings", _CONTEXT[kind]),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
        )
        if not fields.problems:
            _check_rope_fits(result, fields)
        _check_switches(fields, kind)
        _check_quantisation(fields)
        fields.problems[:] = dict.fromkeys(fields.problems)  # a field that two readers want is named once
        fields.check()
        return result


def _check_rope_fits(config: LlamaConfig, fields: ModelFields) -> None:
    """The rotary settings against the size of the heads."""
    head_dim, rope = config.architecture.head_dim, config.rope
    if head_dim % 2 or (rope.kind == "dynamic" and head_dim == 2):
        fields.refuse("head_dim", f"an even number{' above 2' * (rope.kind == 'dynamic')}", head_dim)
    elif rope.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(getattr(rope, name)) != head_dim // 2:
                expected = f"one number for each of the {head_dim // 2} pairs of a head"
                fields.refuse(name, expected, len(getattr(rope, name)))


def _check_switches(fields: ModelFields, kind: str) -> None:
    """What changes the numbers of a LLaMA and is not computed here."""
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        fields.refuse("hidden_act", "silu", activation)
    window = fields.values.get("sliding_window", _WINDOW[kind])
    if window:
        fields.refuse("sliding_window", "none", window)
    layers = fields.get("layer_types", [])
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        fields.refuse("layer_types", "full_attention in every layer", layers)
    dropout = fields.get("attention_dropout", 0)
    if dropout:
        # transformers drops entries of the softmax when training; without it a run would not be what the config says
        fields.refuse("attention_dropout", "0, as none is computed here (set it to 0 to go without)", dropout)
    if kind == "mistral":  # transformers does not read them there
        for name in ("attention_bias", "mlp_bias"):
            if fields.get(name):
                fields.refuse(name, "false for a Mistral", fields.get(name))


def _check_quantisation(fields: ModelFields) -> None:
    """Weights are dense, or packed by bitsandbytes as NF4 in bytes."""
    packed = next((name for name in ("quantization_config", "compression_config") if fields.get(name)), None)
    if packed is None:
        return
    expected = "none, or bitsandbytes' 4-bit NF4"
    found = fields.get(packed)
    if not isinstance(found, Mapping):
        fields.refuse(packed, expected, found)
        return
    inside = ModelFields(found, problems=fields.problems, inside=packed)
    four, eight = (found.get(f"load_in_{bits}bit") or found.get(f"_load_in_{bits}bit") for bits in (4, 8))
    method = "bitsandbytes" if four or eight else inside.get("quant_method")
    if method != "bitsandbytes" or packed != "quantization_config":
        inside.refuse("quant_method", expected, method)
    elif not four:
        inside.refuse("load_in_4bit", "true, as of bitsandbytes only 4-bit NF4 is supported", bool(four))
    else:
        kind = inside.get("bnb_4bit_quant_type", "fp4")  # transformers' default
        if kind != "nf4":
            inside.refuse("bnb_4bit_quant_type", "nf4", kind)
        storage = inside.get("bnb_4bit_quant_storage", "uint8")
        if storage != "uint8":
            inside.refuse("bnb_4bit_quant_storage", "uint8", storage)
