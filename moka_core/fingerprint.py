"""What a base model is told by: the same before and after rounding and quantisation, another after training."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from moka_core.errors import AdapterError, ModelError
from moka_core.sketch import UNKNOWN, LinearWeight, sketch_weights

_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)
MERGED = "moka_merged"  # the field of a merged model's config.json: the marks of what was merged, in order
# Of a kind's digits that both fingerprints know, the share that may differ. Measured in docs/fingerprint.md.
MOST_DIFFERENT = 0.4
FEWEST_KNOWN = 48  # a kind of fewer digits known to both says nothing
_PARTS = re.compile(r"([0-9a-f]{64})\.([A-Za-z0-9_]+:[0-9a-f.]+(?:/[A-Za-z0-9_]+:[0-9a-f.]+)*)")


def base_fingerprint(
    hf_config: Mapping[str, Any],
    norms: Mapping[str, np.ndarray],
    layers: Mapping[str, LinearWeight | None] | None = None,
) -> str:
    """A digest of a base model's architecture and norm weights, then "." and a sketch of its linear weights.

    The digest is the hexadecimal SHA-256 of what 4-bit quantisation leaves alone: architecture numbers and norm
    weights. The latter are rounded to bfloat16 first (to nearest, ties to even), so one checkpoint gives one digest
    whether it is held in float32, bfloat16 or under NF4. A model into which an adapter was merged says so in its
    `config.json` (`moka_merged`), and that counts, too: it is another base, however small the update was and in
    whatever way the weights are packed. The sketch is `sketch_weights`: some of its digits are others
    after rounding, most are after training. `base_difference` compares two.

    Args:
        hf_config: the fields of the model's `config.json`.
        norms: every norm weight, float32, by its name in a Hugging Face checkpoint.
        layers: see `sketch_weights`; without any, the fingerprint is the digest alone.

    Raises:
        ModelError: the rotary settings are no mapping, their rope_theta is no positive number, or `moka_merged` is no
            list of strings.
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
    if merged := merged_adapters(hf_config):
        numbers["merged"] = merged
    digest.update(json.dumps(numbers, sort_keys=True).encode())
    for name in sorted(norms):
        weight = np.ascontiguousarray(norms[name], dtype=np.float32)
        digest.update(f"{name}{weight.shape}".encode())
        digest.update(_bfloat16_bits(weight).tobytes())
    sketch = sketch_weights(layers or {})
    return f"{digest.hexdigest()}.{sketch}" if sketch else digest.hexdigest()


def merged_adapters(hf_config: Mapping[str, Any]) -> list[str]:
    """The marks (`merge_mark`) of the adapters that were merged into a model, by what its config.json says.

    Raises:
        ModelError: it says something else than a list of strings.
    """
    merged = hf_config.get(MERGED) or []
    if not isinstance(merged, (list, tuple)) or not all(isinstance(entry, str) for entry in merged):
        raise ModelError(f"config.json: {MERGED}: expected a list of marks, which are texts; got {merged!r}")
    return list(merged)


def base_difference(expected: str, found: str) -> str | None:
    """What tells two base models apart by their fingerprints, in words; None if they count as one.

    They do if their digests are equal, and, of each kind of linear layer that both know, at most 40 % of the digits
    that both know differ. A kind of fewer than 48 such digits is not compared, and nothing but the digest is if a
    fingerprint is a digest alone. A text that is no such fingerprint counts as a digest.

    >>> base_difference("0" * 64, "0" * 64 + ".q_proj:0123456789abcdef") is None
    True
    """
    one, other = _parts(expected), _parts(found)
    if one[0] != other[0]:
        told_by = "other architecture numbers, norm weights or merged adapters"
        return f"expected {_short(expected)}, got {_short(found)}: {told_by}"
    kinds = []
    for kind in sorted(set(one[1]) & set(other[1])):
        digits = one[1][kind], other[1][kind]
        if len(digits[0]) != len(digits[1]):
            kinds.append(f"{kind} {len(digits[1])} samples in place of {len(digits[0])}")
            continue
        known = [pair for pair in zip(*digits, strict=True) if UNKNOWN not in pair]
        differing = sum(a != b for a, b in known)
        if len(known) >= FEWEST_KNOWN and differing > MOST_DIFFERENT * len(known):
            kinds.append(f"{kind} in {differing} of {len(known)} samples")
    if not kinds:
        return None
    return f"the architecture and the norm weights of {_short(expected)}, but other linear weights: {', '.join(kinds)}"


def check_base(expected: str | None, found: str | None, *, allow_other_base: bool = False) -> str | None:
    """The fingerprint that an adapter has on this base: what it expects if that is this base, else the base's own.

    Args:
        expected: the base that the adapter was trained on; None goes on any.
        found: the base that it is to go on; None if it has no fingerprint.
        allow_other_base: let it go on another base, or on one that cannot be told.

    Raises:
        AdapterError: it is another base, or has no fingerprint to tell by.
    """
    if expected is None:
        return found
    if found is None:
        difference: str | None = f"expected {_short(expected)}, and this model has no fingerprint to tell it by"
    else:
        difference = base_difference(expected, found)
    if difference is not None and not allow_other_base:
        raise AdapterError(
            f"base_fingerprint: the adapter was trained on another base model: {difference}. Load the adapter's own "
            "base (base_model_name_or_path in its adapter_config.json), or allow another base explicitly "
            "(allow_other_base=True, --allow-other-base)"
        )
    return expected if difference is None and has_sketch(expected) else found


def has_sketch(fingerprint: str) -> bool:
    """Whether a fingerprint says something of the linear weights, or is a digest alone.

    >>> has_sketch("0" * 64), has_sketch("0" * 64 + ".q_proj:0123456789abcdef")
    (False, True)
    """
    return bool(_parts(fingerprint)[1])


def _parts(fingerprint: str) -> tuple[str, dict[str, str]]:
    """The digest, and the digits of every kind."""
    found = _PARTS.fullmatch(fingerprint)
    if found is None:
        return fingerprint, {}
    return found[1], dict(entry.split(":") for entry in found[2].split("/"))


def _short(fingerprint: str) -> str:
    return fingerprint if len(fingerprint) <= 16 else f"{fingerprint[:16]}…"


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
