"""The adapter folder: what `peft.PeftModel.from_pretrained` loads as it is, read and written from NumPy arrays.

The format is specified in FORMAT.md, beside this file.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from conversion.new_folder import check_new, new_folder, set_aside
from moka_core import Adapter, AdapterError, ConfigError, LayerFactors, LayerPlan, MokaConfig, PathError
from moka_core.adapter import (
    DTYPES,
    QUANTISATIONS,
    expected_tensors,
    finite_problems,
    header_problems,
    raise_problems,
)
from moka_core.config import RUNTIME_FIELDS, SPARSE_FIELDS, check_keys
from moka_core.paths import no_file, no_folder
from moka_core.seal import FORMAT_VERSION, STORED_DTYPES, adapter_checksum, check_seal, sealed_text

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# PEFT's own fields, with what we write for them; PEFT fills in the rest when it saves.
PEFT_FIELDS: dict[str, Any] = {
    "peft_type": "MOKA",
    "task_type": None,
    "inference_mode": True,
    "base_model_name_or_path": None,
    "revision": None,
    "auto_mapping": None,
    "peft_version": None,
}
# Written by PEFT where they were given. The first say how `layers` was chosen; the second cannot be read here.
CHOICE_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern")
BEYOND_MIXTURE = ("modules_to_save", "bias")
OWN_FIELDS = ("format_version", "base_fingerprint", "base_quantisation", "layers", "checksum")
LARGEST_CONFIG = 1 << 26  # bytes; some thousand layers need a thousandth of it
_READS = 20  # how often a folder is read that is replaced meanwhile

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.moka_(?P<name>factor_[ab]\.\d+|gate_logits)")


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder that was written: adapter_config.json and adapter_model.safetensors, whole or not at all.

    Args:
        adapter: what to write; it is validated first.
        folder: where; it must not exist unless `overwrite`, and its parent is made if needed.
        overwrite: take the place of an adapter folder, whole: what else stood in it is gone. A process that reads or
            dies meanwhile sees the old folder or the new one; see `conversion.new_folder`.

    Raises:
        AdapterError: the adapter is not sound.
        PathError: the folder exists, or with `overwrite` something that is no adapter folder; or it cannot be written.
    """
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"save_adapter: expected an Adapter, as export_adapter gives, as the first argument; got "
            f"{type(adapter).__name__}"
        )
    adapter.validate()
    target = Path(folder)
    if not overwrite:
        check_new(target)
    elif os.path.exists(target) and no_file(target / CONFIG_FILE) and not _is_empty_folder(target):
        raise PathError(f"{target}: exists and is no adapter folder; it is left as it is, choose another name")
    with new_folder(target, replace=overwrite) as draft:
        (draft / CONFIG_FILE).write_text(json.dumps(folder_config(adapter), indent=2, sort_keys=True) + "\n")
        save_file(folder_tensors(adapter), draft / WEIGHTS_FILE, metadata={"format": "pt"})
        (draft / WEIGHTS_FILE).chmod(0o644)
    return target


def _is_empty_folder(path: Path) -> bool:
    try:
        return not os.listdir(path)
    except OSError:  # a file, or a folder of somebody else
        return False


def load_adapter(folder: str | os.PathLike[str], *, verify: bool = True) -> Adapter:
    """The adapter in a folder, with the factors' bits as they were written, by whichever backend.

    Names, shapes, dtypes and sizes are checked from the files' headers before an array is made.

    Args:
        verify: False takes a folder whose settings or tensors were changed after it was written, if it is valid
            otherwise: for who changed it on purpose, to save it again.

    Raises:
        AdapterError: a file is missing, unreadable or leads out of the folder, the config is not MoKA's or not valid,
            the checksum is another, or tensors are missing, unexpected, mis-shaped, of another dtype or not finite;
            one error lists every problem.
    """
    folder = Path(folder)
    for attempt in range(1, _READS + 1):
        before = _identity(folder)
        try:
            adapter = _load(folder, verify=verify)
        except AdapterError:
            if attempt == _READS or _identity(folder) == before:
                raise
        else:
            if attempt == _READS or _identity(folder) == before:
                return adapter
    raise AssertionError("unreachable")


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from the one that takes its place; an inode alone is given again, to the second next."""
    try:
        found = folder.stat()
    except (OSError, ValueError):  # the latter for a name with a null byte
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _load(folder: Path, *, verify: bool) -> Adapter:
    if why := no_folder(folder):
        hint = "; expected an adapter folder, as moka export, save_adapter or PEFT's save_pretrained writes it"
        if (aside := set_aside(folder)) is not None and not os.path.exists(folder):
            hint = f"; a process died while it replaced the folder, and {aside} is what stood there: rename it"
        raise AdapterError(f"{folder}: {why}{hint}")
    config, fields = _read_config(folder)
    config, plans = _layer_plans(config, fields["layers"], folder / CONFIG_FILE)
    tensors = _read_tensors(folder, config, plans)
    layers = {path: LayerFactors.from_tensors(plan, config, tensors[path]) for path, plan in plans.items()}
    adapter = Adapter(
        config=config,
        layers=layers,
        base_fingerprint=fields["base_fingerprint"],
        base_model=fields["base_model_name_or_path"],
        base_quantisation=fields["base_quantisation"],
    ).validate()
    if verify:
        check_seal(fields["checksum"], fields["sealed"], folder_tensors(adapter), where=str(folder))
    return adapter


def folder_config(adapter: Adapter) -> dict[str, Any]:
    """The contents of adapter_config.json: PEFT's fields, MoKA's, and what ties the two to the tensors."""
    layers = {path: (adapter.layer_config(path), layer.plan) for path, layer in adapter.layers.items()}
    stated = MokaConfig.of_layers(layers, r=adapter.config.r, scale=adapter.config.scale).to_dict()
    config = {
        key: value for key, value in stated.items() if key not in RUNTIME_FIELDS and (value or key not in SPARSE_FIELDS)
    }
    fields = {
        **PEFT_FIELDS,
        **config,
        # without a fingerprint the base is somebody's own model, which need not have what PEFT's class for LLMs needs
        "task_type": "CAUSAL_LM" if adapter.base_fingerprint else None,
        "base_model_name_or_path": adapter.base_model,
        "format_version": FORMAT_VERSION,
        "base_fingerprint": adapter.base_fingerprint,
        "base_quantisation": adapter.base_quantisation,
        "layers": {path: layer.plan.key for path, layer in adapter.layers.items()},
    }
    return {**fields, "checksum": adapter_checksum(sealed_text(fields), folder_tensors(adapter))}


def folder_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The contents of adapter_model.safetensors, by key."""
    return {
        f"{PREFIX}{path}.moka_{name}": np.ascontiguousarray(array)
        for path, layer in adapter.layers.items()
        for name, array in layer.tensors()
    }


def _read_config(folder: Path) -> tuple[MokaConfig, dict[str, Any]]:
    """The config, and the fields of `OWN_FIELDS` and PEFT; "sealed" is what the checksum covers."""
    path = _file_of(folder, CONFIG_FILE)
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise AdapterError(f"{path}: expected at most {LARGEST_CONFIG:,} bytes; got {path.stat().st_size:,}")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: expected JSON; {error}{_again(error)}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object; got {type(values).__name__}")
    if values.get("peft_type") != "MOKA":
        raise AdapterError(f"{path}: expected peft_type 'MOKA'; got {values.get('peft_type')!r}")
    if type(values.get("format_version")) is not int or values["format_version"] != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: expected format_version {FORMAT_VERSION}; got {values.get('format_version')!r}; "
            "a higher one needs a newer version of this package, a lower one is from before its first release"
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
        missing = sorted(stored - set(SPARSE_FIELDS) - set(mixture))
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
    if own["base_quantisation"] not in (None, *QUANTISATIONS):
        raise AdapterError(
            f"{path}: expected base_quantisation to be {', '.join(QUANTISATIONS)} or null; got "
            f"{own['base_quantisation']!r}"
        )
    return config, {**own, "sealed": sealed_text(values)}


def _again(error: Exception) -> str:
    """What to do about a file that can be read, but not understood."""
    return "" if isinstance(error, OSError) else "; copy the folder again from where it came from"


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


def _file_of(folder: Path, name: str) -> Path:
    """A regular file of an adapter folder; a link is followed if it stays in the folder.

    The Hub's cache is let pass: there a folder snapshots/<revision> has links to the files in blobs beside it.
    """
    path = folder / name
    if why := no_file(path):
        run = os.path.isdir(folder / "checkpoints")
        hint = f"; {folder} is a training run: moka export writes its adapter" if run else ""
        raise AdapterError(f"{path}: {why}; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}{hint}")
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(cache):
        raise AdapterError(f"{path}: is a link that leads out of the folder, to {real}; expected the file itself")
    return path


def _read_tensors(folder: Path, config: MokaConfig, plans: Mapping[str, LayerPlan]) -> dict[str, dict[str, np.ndarray]]:
    """Every tensor by layer and name; no array is made of one whose header is not what the config says."""
    path = _file_of(folder, WEIGHTS_FILE)
    headers: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {layer: {} for layer in plans}
    arrays: dict[str, dict[str, np.ndarray]] = {layer: {} for layer in plans}
    names = {stored: dtype for dtype, stored in STORED_DTYPES.items()}
    unknown, problems = [], []
    try:
        with safe_open(path, framework="np") as file:
            for key in sorted(file.keys()):
                found = _KEY.fullmatch(key)
                if found is None:
                    unknown.append(f"unexpected tensor {key}")
                elif found["path"] not in plans:
                    unknown.append(f"unexpected layer {found['path']}")
                else:
                    part = file.get_slice(key)
                    dtype = str(part.get_dtype())
                    headers[found["path"]][found["name"]] = tuple(part.get_shape()), names.get(dtype, dtype)
            for layer, plan in plans.items():
                problems += header_problems(plan, config, headers[layer], where=layer)
                expected = expected_tensors(plan, config)
                for name, (shape, dtype) in headers[layer].items():
                    if expected.get(name) == shape and dtype in DTYPES:
                        array = arrays[layer][name] = file.get_tensor(f"{PREFIX}{layer}.moka_{name}")
                        problems += finite_problems(array, f"{layer}: {name}")
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: expected a safetensors file; {error}{_again(error)}") from error
    raise_problems([*dict.fromkeys(unknown), *problems], f"{path} does not hold what {CONFIG_FILE} says")
    return arrays
