"""A digest of a base model that is the same before and after quantisation."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from moka_core.errors import ModelError

_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)


def base_fingerprint(hf_config: Mapping[str, Any], norms: Mapping[str, np.ndarray]) -> str:
    """A hexadecimal SHA-256 of what 4-bit quantisation leaves alone: architecture numbers and norm weights.

    Norm weights are rounded to bfloat16 first (to nearest, ties to even), so one checkpoint gives one digest
    whether it is held in float32, bfloat16 or under NF4.

    Args:
        hf_config: the fields of the model's `config.json`.
        norms: every norm weight, float32, by its name in a Hugging Face checkpoint.

    Raises:
        ModelError: the rotary settings are no mapping, or their rope_theta is no positive number.
    """
    digest = hashlib.sha256()
    numbers: dict[str, Any] = {name: hf_config.get(name) for name in _NUMBERS}
    heads = numbers["num_attention_heads"]
    if numbers["head_dim"] is None and isinstance(numbers["hidden_size"], int) and isinstance(heads, int) and heads:
        numbers["head_dim"] = numbers["hidden_size"] // heads
    if numbers["num_key_value_heads"] is None:
        mistral = hf_config.get("model_type") == "mistral"  # where config.json is silent, transformers takes these
        numbers["num_key_value_heads"] = 8 if mistral else heads
    if numbers["rms_norm_eps"] is None:
        numbers["rms_norm_eps"] = 1e-6  # what transformers takes where config.json is silent
    numbers["rope"] = _rope(hf_config)
    digest.update(json.dumps(numbers, sort_keys=True).encode())
    for name in sorted(norms):
        weight = np.ascontiguousarray(norms[name], dtype=np.float32)
        digest.update(f"{name}{weight.shape}".encode())
        digest.update(_bfloat16_bits(weight).tobytes())
    return digest.hexdigest()


def _rope(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings under one spelling: transformers 5 nests them all and fills some in."""
    nested = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}  # in transformers' order
    if not isinstance(nested, Mapping):
        raise ModelError(f"config.json: expected the rotary settings to be a JSON object; got {nested!r}")
    rope = {key: value for key, value in nested.items() if key not in ("type", "rope_type") and value is not None}
    rope.setdefault("rope_theta", hf_config.get("rope_theta") or 10000.0)
    theta = rope["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta <= sys.float_info.max:
        raise ModelError(f"config.json: rope_theta: expected a positive number; got {theta!r}")
    rope["rope_theta"] = float(theta)
    rope["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    if rope["rope_type"] in ("yarn", "longrope", "llama3"):
        name = "original_max_position_embeddings"  # outside, it stays there beside what transformers fills in
        rope[name] = hf_config.get(name) or rope.get(name) or hf_config.get("max_position_embeddings")
    partial = rope.pop("partial_rotary_factor", None) or hf_config.get("partial_rotary_factor")
    if partial not in (None, 1):
        rope["partial_rotary_factor"] = partial
    return rope


def _bfloat16_bits(weight: np.ndarray) -> np.ndarray:
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
