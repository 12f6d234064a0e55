"""The NF4 state as bitsandbytes serialises it in a checkpoint, to ours and back, byte for byte.

For a weight called w a checkpoint has: w (uint8 codes), w.absmax, w.quant_map (16 levels),
w.quant_state.bitsandbytes__nf4 (JSON as bytes), and doubly quantised also w.nested_absmax and
w.nested_quant_map (256 levels); the offset of the scales stands in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from moka_core import ModelError, Nf4Weight
from moka_core.nf4 import BLOCK, DTYPES, NESTED_BLOCK, NF4_LEVELS, NestedScales
from moka_core.tensor_spec import Packing, TensorSpec

STATE_KEY = "quant_state.bitsandbytes__nf4"
_FLOAT32_MAX = float(np.finfo(np.float32).max)
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)


def from_bitsandbytes(name: str, tensors: Mapping[str, np.ndarray]) -> Nf4Weight:
    """The packed weight under `name` in a checkpoint's tensors.

    Args:
        name: the weight's key ("model.layers.0.self_attn.q_proj.weight").
        tensors: at least the weight and the keys that start with its name.

    Raises:
        ModelError: a part is missing or malformed, or the weight is not NF4 in blocks of 64 (256 for scales).
    """
    parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in SUFFIXES if f"{name}.{suffix}" in tensors}
    if STATE_KEY not in parts:
        found = sorted(key for key in tensors if key.startswith(f"{name}."))
        raise ModelError(f"{name}: expected {STATE_KEY} beside it (NF4); found {', '.join(found) or 'nothing'}")
    state, problems = _read_state(name, parts[STATE_KEY], set(parts))
    if name not in tensors:
        problems.append(f"missing {name}")
    if not problems and not np.array_equal(parts["quant_map"].reshape(-1), NF4_LEVELS):
        problems.append("quant_map: expected the 16 levels of NF4, got others")
    if problems:
        raise ModelError(f"{name}: " + "; ".join(problems))
    shape, offset = state["shape"], state.get("nested_offset", 0.0)
    scales: np.ndarray | NestedScales = parts["absmax"].reshape(-1)
    if "nested_absmax" in parts:
        scales = NestedScales(
            codes=parts["absmax"].reshape(-1),
            absmax=parts["nested_absmax"].reshape(-1),
            levels=parts["nested_quant_map"].reshape(-1),
            offset=np.float32(offset),
        )
    try:
        return Nf4Weight(
            shape=(shape[0], shape[1]), codes=tensors[name].reshape(-1), scales=scales, dtype=state["dtype"]
        )
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def spec_from_bitsandbytes(name: str, state: np.ndarray, suffixes: Collection[str]) -> TensorSpec:
    """What `from_bitsandbytes` will give for `name`, from the small state tensor alone.

    Args:
        state: the tensor under `STATE_KEY`.
        suffixes: of the tensors that stand beside the weight.

    Raises:
        ModelError: see `from_bitsandbytes`.
    """
    found, problems = _read_state(name, state, set(suffixes))
    if problems:
        raise ModelError(f"{name}: " + "; ".join(problems))
    packing: Packing = "nf4-double" if "nested_absmax" in suffixes else "nf4"
    return TensorSpec(shape=tuple(found["shape"]), dtype=found["dtype"], packing=packing)


def _read_state(name: str, tensor: np.ndarray, suffixes: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The state that stands as JSON in a tensor, and what is wrong with it or missing beside it."""
    try:
        state: Any = json.loads(tensor.tobytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}.{STATE_KEY}: expected JSON; {error}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{name}.{STATE_KEY}: expected a JSON object; got {state!r}")
    nested = "nested_absmax" in suffixes
    needed = {"absmax", "quant_map"} | ({"nested_quant_map"} if nested else set())
    problems = [f"missing {name}.{suffix}" for suffix in sorted(needed - suffixes)]
    expected = {"quant_type": "nf4", "blocksize": BLOCK, **({"nested_blocksize": NESTED_BLOCK} if nested else {})}
    for key, want in expected.items():
        if state.get(key) != want:
            problems.append(f"{key}: expected {want!r}, got {state.get(key)!r}")
    shape: Any = state.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        problems.append(f"shape: expected [out, in], got {shape!r}")
    offset: Any = state.get("nested_offset")
    if nested and not (type(offset) in (int, float) and abs(offset) <= _FLOAT32_MAX):
        problems.append(f"nested_offset: expected a finite number, got {offset!r}")
    if state.get("dtype") not in DTYPES:
        problems.append(f"dtype: expected {', '.join(DTYPES)}, got {state.get('dtype')!r}")
    return state, problems


def to_bitsandbytes(name: str, weight: Nf4Weight) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes writes for this weight, under the keys that it uses."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
    }
    parts = weight.parts()
    tensors = {
        name: parts["codes"].reshape(-1, 1),
        f"{name}.absmax": parts["absmax"],
        f"{name}.quant_map": NF4_LEVELS.copy(),
    }
    if isinstance(weight.scales, NestedScales):
        offset = float(weight.scales.offset)
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors[f"{name}.nested_absmax"] = weight.scales.absmax
        tensors[f"{name}.nested_quant_map"] = weight.scales.levels.copy()
    tensors[f"{name}.{STATE_KEY}"] = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy()
    return tensors
