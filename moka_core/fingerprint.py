"""A digest of a base model that is the same before and after quantisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

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
    """
    digest = hashlib.sha256()
    numbers: dict[str, Any] = {name: hf_config.get(name) for name in _NUMBERS}
    heads = numbers["num_attention_heads"]
    if numbers["head_dim"] is None and numbers["hidden_size"] and heads:
        numbers["head_dim"] = numbers["hidden_size"] // heads
    if numbers["num_key_value_heads"] is None:
        numbers["num_key_value_heads"] = heads
    numbers["rope"] = _rope(hf_config)
    digest.update(json.dumps(numbers, sort_keys=True).encode())
    for name in sorted(norms):
        weight = np.ascontiguousarray(norms[name], dtype=np.float32)
        digest.update(f"{name}{weight.shape}".encode())
        digest.update(_bfloat16_bits(weight).tobytes())
    return digest.hexdigest()


def _rope(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings under one spelling: transformers 5 nests them, earlier versions do not."""
    nested = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope = {key: value for key, value in nested.items() if key not in ("type", "rope_type") and value is not None}
    rope.setdefault("rope_theta", hf_config.get("rope_theta") or 10000.0)
    rope["rope_theta"] = float(rope["rope_theta"])
    rope["rope_type"] = nested.get("rope_type") or nested.get("type") or "default"
    return rope


def _bfloat16_bits(weight: np.ndarray) -> np.ndarray:
    bits = weight.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
