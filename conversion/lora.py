"""An adapter as a plain PEFT LoRA folder, for servers that take nothing else: each layer's best rank-k approximation.

ΔW ≈ B A with B = U √S (out, k) and A = √S Vᵀ (k, in), from the k largest singular triplets of ΔW; see `low_rank`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from safetensors.numpy import save_file

from conversion.adapter_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from conversion.low_rank import FactoredDelta, TruncatedSvd, Way, rank_for, truncated_svd
from conversion.new_folder import check_new, new_folder
from moka_core import Adapter, AdapterError, ConfigError
from moka_core.adapter import DTYPE_NAMES, DTYPES

REPEATED = (
    "MoKA_s (identity={identity!r}): every singular value of I ⊗ S stands there as often as the identity is large, so "
    "that no small rank comes near it and a LoRA leaves out whole directions at random; the errors say how much"
)
_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """What one layer's LoRA holds of its ΔW.

    Args:
        relative: ‖ΔW - B A‖ / ‖ΔW‖ (Frobenius), of the factors as they are written, their rounding included.
        best: the same before rounding: the least error that a matrix of rank k can have.
        spectral: σ_{k+1} / σ₁, the error of the best rank k in the spectral norm; 0 if nothing is left.
        norm: ‖ΔW‖.
        padded: how many of the k ranks are zeros, since the layer has no more than min(out, in).
        way: how it was computed.
    """

    path: str
    out_features: int
    in_features: int
    relative: float
    best: float
    spectral: float
    norm: float
    padded: int
    way: Way


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """A LoRA folder that was written: its rank, and the error of each layer.

    Holds: total = √Σ‖ΔW - B A‖² / √Σ‖ΔW‖² over all layers.
    """

    rank: int
    dtype: str
    parameters: int
    moka_parameters: int
    total: float
    layers: tuple[LoraLayer, ...]
    notes: tuple[str, ...]

    @property
    def worst(self) -> LoraLayer:
        """The layer with the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "worst": asdict(self.worst)}


Made = tuple[LoraLayer, dict[str, np.ndarray]]


def export_lora(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    max_error: float | None = None,
    max_rank: int | None = None,
    dtype: str = "float32",
    linear_layers: Collection[str] | None = None,
    on_layer: Callable[[str], None] = lambda path: None,
    on_written: Callable[[Path, LoraReport], None] = lambda draft, report: None,
) -> LoraReport:
    """The errors of the LoRA folder that was written: adapter_config.json and adapter_model.safetensors, or nothing.

    One rank for all layers, lora_alpha = rank, so that PEFT's factor lora_alpha / r is 1 and ΔW ≈ B A.

    Args:
        adapter: what to approximate; it is validated first.
        folder: where; it must not exist, and its parent is made if needed.
        rank: k, at least 1. A layer with fewer is filled up with zeros.
        max_error: in place of `rank`: the smallest k at which no layer's relative error is above this; between 0 and 1.
        max_rank: with `max_error`: the largest k to write.
        dtype: of the written factors: "float32", "bfloat16" or "float16".
        linear_layers: the paths of all linear layers of the base, if they are known: where the last names of the
            adapted layers match no other layer, `target_modules` then holds these names and not whole paths.
        on_layer: called with a layer's path as its work begins.
        on_written: called with the folder where the files stand before it takes its place, and what will be returned;
            if it raises, nothing is left.

    Raises:
        ConfigError: not exactly one of `rank` and `max_error`, or a number or the dtype is out of range.
        ConfigError: a rank above what any layer has.
        AdapterError: the adapter is not sound.
        PathError: the folder exists, or cannot be written.
        AdapterError: `max_error` needs more than `max_rank`, or is below what `dtype` keeps; every such layer is named.
        AdapterError: a factor does not fit into float16.
    """
    _check_request(rank, max_error, max_rank, dtype)
    adapter.validate()
    target = Path(folder)
    check_new(target)
    deltas = {path: FactoredDelta.of(layer, adapter.layer_config(path)) for path, layer in adapter.layers.items()}
    if rank is not None:
        _check_rank(rank, deltas)
        made = {path: _layer(path, delta, rank, dtype, on_layer) for path, delta in deltas.items()}
    else:
        assert max_error is not None
        rank, made = _within(deltas, max_error, max_rank, dtype, on_layer)
    report = _report(adapter, rank, dtype, [layer for layer, _ in made.values()])
    config = lora_config(adapter, rank, linear_layers=linear_layers)
    with new_folder(target) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {key: array for _, arrays in made.values() for key, array in arrays.items()}
        save_file(tensors, draft / WEIGHTS_FILE, metadata={"format": "pt"})
        (draft / WEIGHTS_FILE).chmod(0o644)
        on_written(draft, report)
    return report


def lora_config(adapter: Adapter, rank: int, *, linear_layers: Collection[str] | None = None) -> dict[str, Any]:
    """The contents of adapter_config.json: long-standing fields of PEFT's `LoraConfig`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.base_fingerprint else None,  # as in our own folders
        "base_model_name_or_path": adapter.base_model,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(adapter.layers, linear_layers),
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def target_modules(adapted: Collection[str], linear_layers: Collection[str] | None = None) -> list[str]:
    """What PEFT has to be told to adapt these layers: their last names if that catches no other, or their paths.

    PEFT also adapts a layer whose path ends in "." and a listed one; no LLaMA has such a layer.

    Args:
        linear_layers: the paths of all linear layers of the base; if None, names cannot be known to suffice.

    >>> target_modules(["layers.0.q", "layers.1.q"], ["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k"])
    ['q']
    >>> target_modules(["layers.0.q"], ["layers.0.q", "layers.1.q"])
    ['layers.0.q']
    """
    names = {path.rpartition(".")[2] for path in adapted}
    meant = {path for path in linear_layers or () if path.rpartition(".")[2] in names}
    return sorted(names) if meant == set(adapted) else sorted(adapted)


def _check_request(rank: int | None, max_error: float | None, max_rank: int | None, dtype: str) -> None:
    if (rank is None) == (max_error is None):
        raise ConfigError(
            f"expected either a rank or a largest error; got {'neither' if rank is None else 'both'}: "
            "--rank K or --max-error E"
        )
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}: expected a whole number >= 1; got {value!r}")
    if max_error is not None and not 0 < max_error < 1:
        raise ConfigError(f"max_error: expected 0 < max_error < 1, a share of ‖ΔW‖; got {max_error!r}")
    if max_rank is not None and max_error is None:
        raise ConfigError(f"max_rank: expected together with max_error only; got max_rank {max_rank} and rank {rank}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected {DTYPE_NAMES}; got {dtype!r}")


def _check_rank(rank: int, deltas: Mapping[str, FactoredDelta]) -> None:
    most = max(min(delta.shape) for delta in deltas.values())
    if rank > most:
        raise ConfigError(
            f"rank: expected at most {most}, at which every layer is exact (the largest min(out, in)); got {rank}"
        )


def _layer(path: str, delta: FactoredDelta, rank: int, dtype: str, on_layer: Callable[[str], None]) -> Made:
    """The rank-`rank` approximation of one layer as it is written, and its errors."""
    on_layer(path)
    found = truncated_svd(delta, rank)
    b, a = _written(found, dtype, path)
    own = len(found.values)
    layer = LoraLayer(
        path=path,
        out_features=delta.shape[0],
        in_features=delta.shape[1],
        relative=delta.distance(b, a) / delta.norm if delta.norm else 0.0,
        best=delta.distance(*found.balanced()) / delta.norm if delta.norm else 0.0,
        spectral=found.next_value / float(found.values[0]) if delta.norm else 0.0,
        norm=delta.norm,
        padded=max(0, rank - min(delta.shape)),
        way=found.way,
    )
    tensors = {
        f"{PREFIX}{path}.lora_A.weight": np.pad(a, ((0, rank - own), (0, 0))),
        f"{PREFIX}{path}.lora_B.weight": np.pad(b, ((0, 0), (0, rank - own))),
    }
    return layer, {key: np.ascontiguousarray(array) for key, array in tensors.items()}


def _written(found: TruncatedSvd, dtype: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):  # checked in the next line
        b, a = (factor.astype(dtype) for factor in found.balanced())
    if not all(np.isfinite(factor.astype(np.float32)).all() for factor in (b, a)):
        way = "its ΔW is too large for a LoRA" if dtype == "float32" else "write them in float32"
        raise AdapterError(f"{path}: its LoRA factors do not fit into {dtype}; {way}")
    return b, a


def _within(
    deltas: Mapping[str, FactoredDelta],
    max_error: float,
    max_rank: int | None,
    dtype: str,
    on_layer: Callable[[str], None],
) -> tuple[int, dict[str, Made]]:
    """The smallest rank at which every layer is within `max_error` as it is written, and the layers at that rank."""
    needed = {}
    for path, delta in deltas.items():
        on_layer(path)
        needed[path] = max(1, rank_for(delta, max_error))
    rank = 0
    while True:
        _refuse_above(needed, max_error, max_rank)
        rank = max(rank + 1, *needed.values())
        made = {path: _layer(path, delta, rank, dtype, on_layer) for path, delta in deltas.items()}
        above = [layer for layer, _ in made.values() if layer.relative > max_error]
        if not above:
            return rank, made
        # Only rounding can do that: what it adds at this rank is left for it at a higher one.
        for layer in above:
            left = max_error**2 - (layer.relative**2 - layer.best**2)
            if left <= 0 or rank >= min(deltas[layer.path].shape):
                raise AdapterError(
                    f"max_error: expected more than {dtype} takes away from {layer.path}, {layer.relative:.2g} at rank "
                    f"{rank} where the best of that rank is off by {layer.best:.2g}; got {max_error:g}"
                    + ("" if dtype == "float32" else "; write float32")
                )
            needed[layer.path] = max(rank + 1, rank_for(deltas[layer.path], math.sqrt(left)))


def _refuse_above(needed: Mapping[str, int], max_error: float, max_rank: int | None) -> None:
    above = sorted(
        (path for path in needed if max_rank is not None and needed[path] > max_rank), key=needed.__getitem__
    )
    if above:
        names = [f"{path} needs {needed[path]}" for path in reversed(above)]
        more = f"\n  and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise AdapterError(
            f"max_error {max_error:g}: expected layers that come that near at rank {max_rank} or less (max_rank); got "
            f"{len(above)} of {len(needed)} that do not:\n  " + "\n  ".join(names[:_NAMED]) + more
        )


def _report(adapter: Adapter, rank: int, dtype: str, layers: list[LoraLayer]) -> LoraReport:
    whole = math.hypot(*(layer.norm for layer in layers))
    notes = []
    if adapter.config.identity != "none":
        notes.append(REPEATED.format(identity=adapter.config.identity))
    padded = [layer for layer in layers if layer.padded]
    if padded:
        notes.append(
            f"{len(padded)} of {len(layers)} layers have fewer than {rank} singular values; the rest of their rank is "
            "zeros"
        )
    failed = [layer.path for layer in layers if "failed" in layer.way]
    if failed:
        notes.append(f"Lanczos did not converge for {', '.join(failed)}; LAPACK computed them, which took longer")
    return LoraReport(
        rank=rank,
        dtype=dtype,
        parameters=sum(rank * (layer.out_features + layer.in_features) for layer in layers),
        moka_parameters=adapter.trainable,
        total=math.hypot(*(layer.relative * layer.norm for layer in layers)) / whole if whole else 0.0,
        layers=tuple(layers),
        notes=tuple(notes),
    )
