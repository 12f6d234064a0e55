"""The adapter folder: what `peft.PeftModel.from_pretrained` loads as it is, read and written from NumPy arrays.

The format is specified in FORMAT.md, beside this file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moka_core import Adapter, AdapterError, ConfigError, LayerFactors, LayerPlan, MokaConfig
from moka_core.adapter import raise_problems, tensor_problems
from moka_core.config import PATTERN_FIELDS, RUNTIME_FIELDS, check_keys

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
PREFIX = "base_model.model."

# PEFT's own fields, with what we write for them; PEFT fills in the rest when it saves.
PEFT_FIELDS: dict[str, Any] = {
    "peft_type": "MOKA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "base_model_name_or_path": None,
    "revision": None,
    "auto_mapping": None,
    "peft_version": None,
}
# Written by PEFT where they were given. The first say how `layers` was chosen; the second cannot be read here.
CHOICE_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")
BEYOND_MIXTURE = ("modules_to_save", "bias")
OWN_FIELDS = ("format_version", "base_fingerprint", "layers")

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.moka_(?P<name>factor_[ab]\.\d+|gate_logits)")


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder that was written: adapter_config.json and adapter_model.safetensors, whole or not at all.

    Args:
        adapter: what to write; it is validated first.
        folder: where; it must not exist unless `overwrite`, and its parent is made if needed.

    Raises:
        AdapterError: the adapter is not sound, or the folder exists.
    """
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"save_adapter: expected an Adapter, as export_adapter gives, as the first argument; got "
            f"{type(adapter).__name__}"
        )
    adapter.validate()
    target = Path(folder)
    if target.exists() and not overwrite:
        raise AdapterError(f"{target}: expected a folder that does not exist yet; choose another name or remove it")
    if target.exists() and not (target / CONFIG_FILE).is_file() and (target.is_file() or any(target.iterdir())):
        raise AdapterError(f"{target}: exists and is no adapter folder; it is left as it is, choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = draft.with_name(draft.name + ".old")
    try:
        draft.chmod(0o755)
        (draft / CONFIG_FILE).write_text(json.dumps(folder_config(adapter), indent=2, sort_keys=True) + "\n")
        save_file(folder_tensors(adapter), draft / WEIGHTS_FILE, metadata={"format": "pt"})
        (draft / WEIGHTS_FILE).chmod(0o644)
        if target.exists():  # set aside, and gone only once the new one stands
            target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """The adapter in a folder, with the factors' bits as they were written, by whichever backend.

    Raises:
        AdapterError: a file is missing or unreadable, the config is not MoKA's or not valid, or tensors are
            missing, unexpected, mis-shaped, of another dtype or not finite; one error lists every problem.
    """
    folder = Path(folder)
    config, fields = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    config, plans = _layer_plans(config, fields["layers"], folder / CONFIG_FILE)

    by_layer: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    problems = []
    for key in sorted(tensors):
        found = _KEY.fullmatch(key)
        if found is None:
            problems.append(f"unexpected tensor {key}")
        else:
            by_layer[found["path"]][found["name"]] = tensors[key]
    problems += [f"unexpected layer {path}" for path in sorted(set(by_layer) - set(plans))]
    for path, plan in plans.items():
        problems += tensor_problems(plan, config, by_layer.get(path, {}), where=path)
    raise_problems(problems, f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says")
    layers = {path: LayerFactors.from_tensors(plan, config, by_layer[path]) for path, plan in plans.items()}
    return Adapter(
        config=config,
        layers=layers,
        base_fingerprint=fields["base_fingerprint"],
        base_model=fields["base_model_name_or_path"],
    ).validate()


def folder_config(adapter: Adapter) -> dict[str, Any]:
    """The contents of adapter_config.json: PEFT's fields, MoKA's, and what ties the two to the tensors."""
    layers = {path: (adapter.layer_config(path), layer.plan) for path, layer in adapter.layers.items()}
    stated = MokaConfig.of_layers(layers, r=adapter.config.r, scale=adapter.config.scale).to_dict()
    config = {
        key: value
        for key, value in stated.items()
        if key not in RUNTIME_FIELDS and (value or key not in PATTERN_FIELDS)
    }
    return {
        **PEFT_FIELDS,
        **config,
        "base_model_name_or_path": adapter.base_model,
        "format_version": FORMAT_VERSION,
        "base_fingerprint": adapter.base_fingerprint,
        "layers": {path: layer.plan.key for path, layer in adapter.layers.items()},
    }


def folder_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The contents of adapter_model.safetensors, by key."""
    return {
        f"{PREFIX}{path}.moka_{name}": np.ascontiguousarray(array)
        for path, layer in adapter.layers.items()
        for name, array in layer.tensors()
    }


def _read_config(path: Path) -> tuple[MokaConfig, dict[str, Any]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError:
        run = (path.parent / "checkpoints").is_dir()
        hint = f"; {path.parent} is a training run: moka export writes its adapter" if run else ""
        raise AdapterError(
            f"{path}: no such file; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: expected JSON; {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object; got {type(values).__name__}")
    if values.get("peft_type") != "MOKA":
        raise AdapterError(f"{path}: expected peft_type 'MOKA'; got {values.get('peft_type')!r}")
    if type(values.get("format_version")) is not int or values["format_version"] != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: expected format_version {FORMAT_VERSION}; got {values.get('format_version')!r}; "
            "a higher one needs a newer version of this package"
        )
    own = {key: values.get(key) for key in (*PEFT_FIELDS, *OWN_FIELDS, *CHOICE_FIELDS, *BEYOND_MIXTURE)}
    beyond = [key for key in BEYOND_MIXTURE if own[key] not in (None, [], "none")]
    if beyond:
        raise AdapterError(
            f"{path}: {' and '.join(beyond)} make this adapter train more than mixtures; only PEFT can load it whole"
        )
    mixture = {key: value for key, value in values.items() if key not in own}
    try:
        stored = set(MokaConfig().to_dict()) - set(RUNTIME_FIELDS)
        missing = sorted(stored - set(PATTERN_FIELDS) - set(mixture))
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")
        check_keys(mixture, sorted(stored), where="fields")
        config = MokaConfig.from_dict(mixture)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from error
    if not isinstance(own["layers"], dict) or not own["layers"]:
        raise AdapterError(f'{path}: expected layers {{"path": "OUTxIN", ...}}, at least one; got {own["layers"]!r}')
    for key in ("base_fingerprint", "base_model_name_or_path"):
        if own[key] is not None and not isinstance(own[key], str):
            raise AdapterError(f"{path}: expected {key} to be a string or null; got {own[key]!r}")
    return config, own


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    if twice:
        raise ValueError(f"stands twice: {', '.join(twice)}")
    return dict(pairs)


def _layer_plans(config: MokaConfig, layers: Mapping[str, Any], path: Path) -> tuple[MokaConfig, dict[str, LayerPlan]]:
    """The config with its patterns as whole paths, and the plan of every layer."""
    plans = {plan.key: plan for plan in config.shapes}
    own = dict(config.shapes_pattern)
    chosen = {name: own.get(name, plans.get(str(key))) for name, key in layers.items()}
    problems = [
        f"{name}: {layers[name]!r} does not stand in shapes"
        for name, plan in chosen.items()
        if plan is None or plan.key != layers[name]
    ]
    raise_problems(problems, f"{path}: layers")
    stated = {name: plan for name, plan in chosen.items() if plan is not None}
    try:
        exact = config.exact({name: (plan.out_features, plan.in_features) for name, plan in stated.items()})
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from error
    return exact, stated


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: expected a safetensors file; {error}") from error
