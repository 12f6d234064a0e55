"""Ways to spoil an adapter folder, each drawn from a random generator: what readers are held to."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Mutation = Callable[[Path, np.random.Generator], None]

# Values of every kind of JSON, that stand in for a field's own.
_VALUES = (
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    1.0,
    0.5,
    1e308,
    10**30,
    "",
    "a",
    "b",
    "none",
    "nf4",
    "softmax",
    "uniform",
    [],
    {},
)


def _config(change: Callable[[dict[str, Any], np.random.Generator], None]) -> Mutation:
    def mutate(folder: Path, rng: np.random.Generator) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values, rng)
        (folder / CONFIG).write_text(json.dumps(values, indent=2))

    return mutate


def _tensors(change: Callable[[dict[str, np.ndarray], np.random.Generator], None]) -> Mutation:
    def mutate(folder: Path, rng: np.random.Generator) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, rng)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / WEIGHTS)

    return mutate


def _header(change: Callable[[dict[str, Any], np.random.Generator], bytes | None]) -> Mutation:
    """Change the header's JSON, or give its new bytes; the data stay as they are."""

    def mutate(folder: Path, rng: np.random.Generator) -> None:
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        values = json.loads(data[8:end])
        header = change(values, rng) or json.dumps(values).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data[end:])

    return mutate


def _pick(values: Any, rng: np.random.Generator) -> Any:
    options = sorted(values)
    return options[rng.integers(len(options))]


def _flip(where: str) -> Mutation:
    def mutate(folder: Path, rng: np.random.Generator) -> None:
        path = folder / (CONFIG if where == "config" else WEIGHTS)
        data = bytearray(path.read_bytes())
        end = len(data) if where == "config" else 8 + struct.unpack("<Q", data[:8])[0]
        first, last = (end, len(data)) if where == "data" else (0, end)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(first, last)] ^= 1 << rng.integers(8)
        path.write_bytes(data)

    return mutate


def _truncate(folder: Path, rng: np.random.Generator) -> None:
    path = folder / _pick((CONFIG, WEIGHTS), rng)
    os.truncate(path, rng.integers(path.stat().st_size))


def _append(folder: Path, rng: np.random.Generator) -> None:
    with open(folder / _pick((CONFIG, WEIGHTS), rng), "ab") as file:
        file.write(rng.bytes(rng.integers(1, 64)))


def _rename(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    key = _pick(tensors, rng)
    ways = (
        lambda k: k.removeprefix("base_model.model."),
        lambda k: f"base_model.model.{k}",
        lambda k: k.replace("layers.0", "layers.7"),
        lambda k: k.replace("factor_a", "factor_c").replace("gate_logits", "gate"),
        lambda k: f"{k}0",
        lambda k: f"../{k}",
        lambda k: k.replace("model.layers", "model/../layers"),
        lambda k: k.swapcase(),
    )
    tensors[ways[rng.integers(len(ways))](key)] = tensors.pop(key)


def _add(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    key = _pick(tensors, rng)
    name = _pick((f"{key}.1", "lm_head.weight", f"{key} ", "base_model.model.x.moka_gate_logits", "../../x"), rng)
    tensors[name] = tensors[key].copy()


def _swap(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Exchange two different tensors of one shape, or two copies inside of one tensor."""
    key = _pick(tensors, rng)
    alike = [k for k in tensors if k != key and tensors[k].shape == tensors[key].shape]
    if alike:
        other = _pick(alike, rng)
        tensors[key], tensors[other] = tensors[other], tensors[key]
    else:
        tensors[key] = tensors[key][::-1]


def _transpose(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    key = _pick([key for key in tensors if tensors[key].ndim == 3], rng)
    turned = tensors[key].swapaxes(1, 2)
    tensors[key] = turned if rng.integers(2) else turned.reshape(tensors[key].shape)


def _poison(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    key = _pick(tensors, rng)
    tensors[key] = tensors[key].copy()
    tensors[key].reshape(-1)[rng.integers(tensors[key].size)] = (
        _pick((np.inf, -np.inf, 0.0), rng) * np.nan if (rng.integers(2)) else np.inf
    )


def _dtype(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    key = _pick(tensors, rng)
    names = [name for name in ("float64", "int32", "float16", "bfloat16", "uint8") if name != str(tensors[key].dtype)]
    tensors[key] = tensors[key].astype(names[rng.integers(len(names))])


def _drop(values: dict[str, Any], rng: np.random.Generator) -> None:
    del values[_pick(values, rng)]


def _reset(values: dict[str, Any], rng: np.random.Generator) -> None:
    values[_pick(values, rng)] = _VALUES[rng.integers(len(_VALUES))]


def _unknown(values: dict[str, Any], rng: np.random.Generator) -> None:
    values[_pick(("r_pattern", "lora_alpha", "gatee", "../x", "use_dora", "bias", "modules_to_save"), rng)] = _pick(
        ("all", "x"), rng
    )


def _nested(values: dict[str, Any], rng: np.random.Generator) -> None:
    """Change one number or name inside of shapes, layers or a pattern field."""
    field = _pick([name for name, value in values.items() if isinstance(value, dict) and value], rng)
    inner, key = values[field], _pick(values[field], rng)
    kind = rng.integers(3)
    if kind == 0 and isinstance(inner[key], list):
        row = inner[key][rng.integers(len(inner[key]))]
        row[rng.integers(len(row))] = int(_pick((0, -1, 1, 2, 3, 4, 8, 10**9, 10**18), rng))
    elif kind == 1:
        inner[f"{key}{_pick(('', '0', '.x', '/../x'), rng)}" + "1"] = inner.pop(key)
    else:
        inner[key] = _VALUES[rng.integers(len(_VALUES))]


def _huge_header(folder: Path, rng: np.random.Generator) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[:8] = struct.pack("<Q", int(_pick((2**20, 2**31, 2**40, 2**63 + 5, 2**64 - 1), rng)))
    (folder / WEIGHTS).write_bytes(data)


def _huge_tensor(header: dict[str, Any], rng: np.random.Generator) -> None:
    key = _pick([key for key in header if key != "__metadata__"], rng)
    size = int(_pick((2**31, 2**40, 2**62), rng))
    if rng.integers(2):
        header[key]["shape"] = [size, size]
    else:
        header[key]["shape"], header[key]["data_offsets"] = [size], [0, 4 * size]


def _huge_numbers(values: dict[str, Any], rng: np.random.Generator) -> None:
    size = int(_pick((10**9, 10**12, 10**18), rng))
    values["r"] = size
    for rows in values["shapes"].values():
        rows[0][0] = size - sum(row[0] for row in rows[1:])


def _shape(header: dict[str, Any], rng: np.random.Generator) -> None:
    key = _pick([key for key in header if key != "__metadata__"], rng)
    shape = header[key]["shape"]
    header[key]["shape"] = shape[::-1] if rng.integers(2) else [1, *shape]


def _offsets(header: dict[str, Any], rng: np.random.Generator) -> None:
    one, other = (_pick([key for key in header if key != "__metadata__"], rng) for _ in range(2))
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )


def _twice(header: dict[str, Any], rng: np.random.Generator) -> bytes:
    """A key that stands twice in the header, with the same place or with another tensor's."""
    key, other = (_pick([key for key in header if key != "__metadata__"], rng) for _ in range(2))
    entry = json.dumps({**header[key], "data_offsets": header[other]["data_offsets"]})
    return f"{json.dumps(header)[:-1]}, {json.dumps(key)}: {entry}}}".encode()


def _config_twice(folder: Path, rng: np.random.Generator) -> None:
    text = (folder / CONFIG).read_text().rstrip().removesuffix("}")
    field = _pick(json.loads((folder / CONFIG).read_text()), rng)
    value = json.dumps(_VALUES[rng.integers(len(_VALUES))])
    (folder / CONFIG).write_text(f'{text}, "{field}": {value}}}')


def _link(folder: Path, rng: np.random.Generator) -> None:
    """A file that is a link: out of the folder, to nowhere, to itself, or to a copy inside of it."""
    name = _pick((CONFIG, WEIGHTS), rng)
    aside = folder.with_name(f"{folder.name}-aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    kind = rng.integers(4)
    target = [aside / name, aside / "nothing", folder / name, folder / f"copy-{name}"][kind]
    if kind in (0, 3):
        shutil.copy(folder / name, target)
    (folder / name).unlink()
    (folder / name).symlink_to(os.path.relpath(target, folder) if rng.integers(2) else target)


def _gone(folder: Path, rng: np.random.Generator) -> None:
    path = folder / _pick((CONFIG, WEIGHTS), rng)
    path.unlink()
    if rng.integers(2):
        path.mkdir()


def _pickle(folder: Path, rng: np.random.Generator) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04\x95" + rng.bytes(40))


def _other_base(values: dict[str, Any], rng: np.random.Generator) -> None:
    values["base_fingerprint"] = _pick(("0" * 64, "", "ff"), rng) or None


MUTATIONS: dict[str, Mutation] = {
    "a header's byte": _flip("header"),
    "a data byte": _flip("data"),
    "a config's byte": _flip("config"),
    "cut off": _truncate,
    "bytes added": _append,
    "a tensor renamed": _tensors(_rename),
    "a tensor added": _tensors(_add),
    "a tensor missing": _tensors(_drop),
    "tensors swapped": _tensors(_swap),
    "a factor transposed": _tensors(_transpose),
    "NaN or infinity": _tensors(_poison),
    "another dtype": _tensors(_dtype),
    "a field missing": _config(_drop),
    "a field changed": _config(_reset),
    "an unknown field": _config(_unknown),
    "inside a field": _config(_nested),
    "another base": _config(_other_base),
    "a field twice": _config_twice,
    "a huge header": _huge_header,
    "a huge tensor": _header(_huge_tensor),
    "huge numbers": _config(_huge_numbers),
    "a header's shape": _header(_shape),
    "places swapped": _header(_offsets),
    "a key twice": _header(_twice),
    "a link": _link,
    "a file gone": _gone,
    "a pickle": _pickle,
}
