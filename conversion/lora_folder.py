"""A PEFT LoRA adapter folder as the updates ΔW that it makes, strictly."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from conversion.adapter_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from moka_core import AdapterError
from moka_core.adapter import DTYPE_NAMES, DTYPES, raise_problems
from moka_core.config import SCALE_MAX, check_finite
from moka_core.errors import ConfigError, first_lines
from moka_core.paths import json_object, no_file
from moka_core.plan import ALL_LINEAR, matches, matches_pattern

# Fields with which ΔW is not lora_B · lora_A, or not all that the adapter does: (why, the value that does nothing).
_REFUSED: dict[str, tuple[str, Any]] = {
    "use_dora": ("DoRA also rescales every output of the frozen weight", False),
    "bias": ("it trains biases, which a mixture has not", "none"),
    "lora_bias": ("its lora_B has a bias, which a mixture has not", False),
    "modules_to_save": ("it trains whole modules beside the low-rank updates", None),
    "fan_in_fan_out": ("its layers hold (in, out) weights, which no LLaMA has", False),
    "target_parameters": ("it adapts parameters that are no linear layer's weight, such as experts", None),
    "trainable_token_indices": ("it trains rows of the embedding", None),
    "layer_replication": ("it repeats layers, so that its base is another model", None),
    "alora_invocation_tokens": ("aLoRA acts on some of the tokens only", None),
    "use_qalora": ("QA-LoRA pools the inputs first", False),
    "use_bdlora": ("BD-LoRA holds its factors as blocks", None),
    "arrow_config": ("Arrow chooses among several adapters, token by token", None),
    "monteclora_config": ("MonteCLoRA draws its weights at random", None),
    "kasa_config": ("KaSA changes the base's weights, too", None),
    "velora_config": ("VeLoRA stores tensors of its own", None),
    "megatron_config": ("its layers are Megatron's", None),
}
_INITS = ("gaussian", "eva", "orthogonal", "mica")  # beside True and False: they leave the base's weights alone
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # the first letters of the others
_KNOWN = {
    *_REFUSED,
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # with what is refused and accepted above, these change nothing
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config"),
}
_SHOWN = 5
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
# What PEFT saves as well if target_modules names an embedding or the head, or if the vocabulary was resized.
_EMBEDDING_KEY = re.compile(rf"{re.escape(PREFIX)}(.+\.)?(embed_tokens|lm_head)\.(base_layer\.)?weight")
_TIED_HEAD = (
    "lm_head: the base's head is its embedding (tie_word_embeddings), which no adapter changes, so its LoRA cannot be "
    "imported: train the LoRA without lm_head in target_modules"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraLayer:
    """The update of one layer, ΔW = scale · lora_b · lora_a.

    Args:
        lora_a: (r, in). lora_b: (out, r).
        scale: lora_alpha/r, or lora_alpha/√r for a rank-stabilised LoRA.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """r, the most that the rank of ΔW can be."""
        return len(self.lora_a)

    @property
    def parameters(self) -> int:
        """Number of trained entries, r·(in + out)."""
        return self.lora_a.size + self.lora_b.size

    def delta(self) -> np.ndarray:
        """ΔW (out, in), float64."""
        return self.scale * (self.lora_b.astype(np.float64) @ self.lora_a.astype(np.float64))


def load_lora(
    folder: str | os.PathLike[str], linear_layers: Mapping[str, tuple[int, int]], *, base: str = "the base"
) -> dict[str, LoraLayer]:
    """The update of every layer that a PEFT LoRA adapter adapts, by the layer's path in a Hugging Face checkpoint.

    Ranks and alphas are those that PEFT gives a layer: of the `rank_pattern` (`alpha_pattern`) that matches its path,
    or else r (lora_alpha). Which layers there must be follows from target_modules, exclude_modules, layers_to_transform
    and layers_pattern, as in PEFT.

    Args:
        folder: has adapter_config.json and adapter_model.safetensors.
        linear_layers: (out_features, in_features) of every linear layer of the base, by path.
        base: what an error calls the base.

    Raises:
        AdapterError: a file is missing or unreadable; the config is no LoRA's, or sets what is more than such a ΔW
            (every such field is named, with the reason); the LoRA is sound, but for layers that the base has not; or
            tensors are missing, unexpected, mis-shaped, of another dtype or not finite (all are listed).
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder)
    where = f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says"
    problems, targeted = [], _targeted(config, linear_layers, folder / CONFIG_FILE)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"unexpected tensor {key}{_meaning(key)}")
        else:
            found.setdefault(match["path"], {})[match["factor"]] = tensors[key]
    if "lm_head" in found and "lm_head" not in linear_layers:
        problems.append(_TIED_HEAD)
        del found["lm_head"]
    unfit = _unfit(found, targeted, linear_layers)
    if unfit and not problems:
        raise AdapterError(_unfit_message(folder, base, config.get("base_model_name_or_path"), unfit))
    for path in found:
        if path not in linear_layers:
            problems.append(unfit[path])
        elif path not in targeted:
            problems.append(f"{path}: {CONFIG_FILE} does not target it")
    layers = {}
    for path in targeted:
        ranks, alphas = _own(config, "rank_pattern", "r", path), _own(config, "alpha_pattern", "lora_alpha", path)
        before = len(problems)
        scale = alphas[0] / (math.sqrt(ranks[0]) if config.get("use_rslora") else ranks[0])
        if abs(scale) > SCALE_MAX:
            problems.append(f"{path}: expected lora_alpha / r to be a number that float32 holds; got {scale:.6g}")
        for name, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if len(values) > 1:
                problems.append(
                    f"{path}: {name}: expected one value for it; got {' and '.join(map(str, values))}, and which of "
                    "the patterns came first is lost, since PEFT sorts them"
                )
        rank, (out, in_) = ranks[0], linear_layers[path]
        for factor, shape in (("A", (rank, in_)), ("B", (out, rank))):
            problems += _problems(found.get(path, {}).get(factor), shape, where=f"{path}: lora_{factor}")
        if len(problems) == before:
            layers[path] = LoraLayer(lora_a=found[path]["A"], lora_b=found[path]["B"], scale=scale)
    raise_problems(problems, where)
    return layers


def stated_base(folder: str | os.PathLike[str]) -> str | None:
    """The name or folder of the base that a LoRA was trained on, as its adapter_config.json has it; None if it has not.

    Raises:
        AdapterError: the config cannot be read, or is no LoRA's.
    """
    name = _read_config(Path(folder) / CONFIG_FILE).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _unfit(
    found: Mapping[str, Mapping[str, np.ndarray]], targeted: list[str], layers: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """What tells that the LoRA was trained on a base of other layers, by path."""
    unfit = {}
    for path, factors in found.items():
        dims = _dims(factors)
        if path not in layers:
            unfit[path] = f"{path}: the base has no such linear layer"
        elif dims not in (None, layers[path]):
            unfit[path] = f"{path}: the LoRA is for {_by(dims)}, the base's layer is {_by(layers[path])}"
    blocks = {_index(path, []) for path in found}
    for path in targeted:
        if _index(path, []) not in blocks:
            unfit[path] = f"{path}: the LoRA has no layers of this number"
    return unfit


def _dims(factors: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """(out, in) of the layer that a pair of factors is for; None if they are no pair."""
    a, b = factors.get("A"), factors.get("B")
    whole = a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1]
    return (len(b), a.shape[1]) if whole else None  # type: ignore[arg-type,union-attr]


def _by(dims: tuple[int, int] | None) -> str:
    return "x".join(map(str, dims or ()))


def _unfit_message(folder: Path, base: str, stated: Any, unfit: Mapping[str, str]) -> str:
    listed = first_lines(list(unfit.values()), _SHOWN)
    own = f"{stated!r}, says its {CONFIG_FILE}" if stated else f"its {CONFIG_FILE} does not name it"
    return (
        f"{folder}: this LoRA does not fit the base given, {base}; give the one that it was trained on ({own}). "
        f"{len(unfit)} layer{'s' * (len(unfit) > 1)} differ{'s' * (len(unfit) == 1)}:\n  " + "\n  ".join(listed)
    )


def _read_config(path: Path) -> dict[str, Any]:
    values = json_object(path, AdapterError, needed=f"a PEFT adapter has {CONFIG_FILE} and {WEIGHTS_FILE}")
    if values.get("peft_type") != "LORA":
        hint = "; this is a MoKA adapter already" if values.get("peft_type") == "MOKA" else ""
        raise AdapterError(f"{path}: expected peft_type 'LORA'; got {values.get('peft_type')!r}{hint}")
    problems = [
        f"{name}: expected {nothing!r}, as {why}; got {values[name]!r}"
        for name, (why, nothing) in _REFUSED.items()
        if not _is_empty(values.get(name)) and values[name] != nothing
    ]
    problems += [
        f"{name}: unknown here, so what it changes is, too; got {values[name]!r}"
        for name in sorted(set(values) - _KNOWN)
        if not _is_empty(values[name])
    ]
    problems += _init_problems(values.get("init_lora_weights", True))
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        problems += _pattern_problems(name, values.get(name) or {}, kind)
    problems += _number_problems("r", values.get("r"), int) + _number_problems("lora_alpha", values.get("lora_alpha"))
    if not isinstance(values.get("use_rslora", False), bool):
        problems.append(f"use_rslora: expected true or false; got {values['use_rslora']!r}")
    raise_problems(problems, f"{path}: cannot be read as ΔW = scale · lora_B · lora_A")
    return values


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _init_problems(init: Any) -> list[str]:
    name = str(init).lower()
    if isinstance(init, bool) or name in _INITS:
        return []
    if name.startswith(_CHANGED_BASE):
        way = "quantised to fit it" if name == "loftq" else "less what its start took out of it"
        hint = "" if name == "loftq" else "; save it with path_initial_model_for_weight_conversion, as a plain LoRA"
        return [f"init_lora_weights: {init!r} trains on a base of its own, {way}{hint}"]
    return [f"init_lora_weights: expected true, false, {', '.join(_INITS)}; got {init!r}"]


def _number_problems(name: str, value: Any, kind: type = float) -> list[str]:
    if kind is int:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        return [] if whole else [f"{name}: expected a whole number >= 1; got {value!r}"]
    try:
        check_finite(name, value)
    except ConfigError as error:
        return [str(error)]
    return []


def _pattern_problems(name: str, patterns: Any, kind: type) -> list[str]:
    if not isinstance(patterns, dict):
        return [f"{name}: expected {{pattern: number}}; got {patterns!r}"]
    problems = []
    for pattern, value in patterns.items():
        problems += _number_problems(f"{name}[{pattern}]", value, kind)
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{name}: {pattern!r} is no regular expression: {error}")
    return problems


def _own(config: Mapping[str, Any], patterns: str, default: str, path: str) -> list[Any]:
    """What a layer's rank or alpha may be: PEFT took the first pattern that matches, but it writes them sorted."""
    found = [value for key, value in (config.get(patterns) or {}).items() if matches_pattern(key, path)]
    return sorted(set(found)) or [config[default]]


def _targeted(config: Mapping[str, Any], layers: Mapping[str, tuple[int, int]], where: Path) -> list[str]:
    """The layers that PEFT adapts with this config."""
    targets: Any = config.get("target_modules")
    excluded = config.get("exclude_modules")
    for name, value in (("target_modules", targets), ("exclude_modules", excluded or [])):
        names = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if not names and not isinstance(value, str):
            raise AdapterError(f"{where}: {name}: expected a list of names or a regular expression; got {value!r}")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    try:
        found = [path for path in layers if matches(targets, path) and not (excluded and matches(excluded, path))]
    except ConfigError as error:
        raise AdapterError(f"{where}: {error}") from error
    indexes, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if isinstance(targets, str) or indexes in (None, []):
        chosen = found
    else:
        wanted = indexes if isinstance(indexes, list) else [indexes]
        chosen = [
            path for path in found if _index(path, [patterns] if isinstance(patterns, str) else patterns) in wanted
        ]
    if not chosen:
        raise AdapterError(f"{where}: target_modules: {targets!r} matches no linear layer of the base")
    return chosen


def _index(path: str, patterns: list[str]) -> int | None:
    """The number of a layer, as PEFT reads it from a path."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next(filter(None, (re.match(expression, path) for expression in expressions)), None)
    return None if found is None else int(found["idx"])


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS_FILE
    if why := no_file(path):
        pickle = folder / "adapter_model.bin"
        hint = f"; {pickle} is a pickle, which can run code: save it again with safe_serialization=True"
        raise AdapterError(f"{path}: {why}{'' if no_file(pickle) else hint}")
    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: expected a safetensors file; {error}") from error


def _meaning(key: str) -> str:
    """What an unexpected tensor is, and what to do about it."""
    if "lora_embedding_" in key:
        return (
            " (LoRA of an embedding, which is no linear layer and cannot be imported: train the LoRA without it in "
            "target_modules)"
        )
    if _EMBEDDING_KEY.fullmatch(key):
        return (
            " (an embedding or head of the base, saved beside the LoRA: if it was neither resized nor trained, save "
            "the LoRA again with save_pretrained(FOLDER, save_embedding_layers=False); else it cannot be imported)"
        )
    return " (DoRA's)" if "lora_magnitude_vector" in key else ""


def _problems(array: np.ndarray | None, shape: tuple[int, int], *, where: str) -> list[str]:
    if array is None:
        return [f"{where}: missing, expected {shape}"]
    if array.shape != shape:
        return [f"{where}: expected shape {shape}, got {array.shape}"]
    if str(array.dtype) not in DTYPES:
        return [f"{where}: expected dtype {DTYPE_NAMES}, got {array.dtype}"]
    return [] if np.isfinite(array.astype(np.float32)).all() else [f"{where}: has NaN or infinite entries"]
