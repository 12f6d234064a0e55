"""The checksum of a saved adapter: over everything that decides what it computes, whoever writes the file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from moka_core.config import PATTERN_FIELDS, MokaConfig
from moka_core.errors import AdapterError

FORMAT_VERSION = 2
# NumPy's names of the dtypes that an adapter may have, and those of the safetensors format.
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# The fields of adapter_config.json that the checksum covers: those that decide what an adapter computes, and on what.
# The others are PEFT's own, or say how the layers and shapes were chosen, which `layers` and `shapes` state.
SEALED_FIELDS = (
    "format_version",
    "layers",
    "r",
    "shapes",
    "shapes_pattern",
    "gate",
    "scaling",
    "scale",
    "scale_pattern",
    "identity",
    "zero_factor",
    "dropout",
    "base_fingerprint",
    "base_quantisation",
)
_NUMBERS = ("scale", "dropout", "scale_pattern")


def sealed_text(values: Mapping[str, Any]) -> str:
    """The sealed fields of a config as one line, the same in every language and for every way to write the file.

    JSON with sorted keys, without white space, in ASCII. A field that is left out is null, a pattern field {}; a
    number that may have a fraction is a string, as C's "%.17g" writes it.

    Args:
        values: the fields of an adapter_config.json, valid ones.

    >>> '"scale":"0.10000000000000001"' in sealed_text({"scale": 0.1})
    True
    """
    sealed: dict[str, Any] = {}
    for name in SEALED_FIELDS:
        value = values.get(name, {} if name in PATTERN_FIELDS else None)
        if name in _NUMBERS and value is not None:
            value = {key: _digits(entry) for key, entry in value.items()} if name in PATTERN_FIELDS else _digits(value)
        sealed[name] = value
    return json.dumps(sealed, sort_keys=True, separators=(",", ":"))


def adapter_checksum(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of a config's sealed text and an adapter's tensors.

    What is hashed, one after the other: the text and a newline; then for every tensor in the order of the keys' code
    points its key, dtype and shape as "<key> F32 2x3x4" and a newline, and its entries, row-major, little-endian.

    Args:
        text: see `sealed_text`.
        tensors: by their keys in the file; float32, bfloat16 or float16.
    """
    digest = hashlib.sha256(f"{text}\n".encode())
    for key in sorted(tensors):
        array = np.ascontiguousarray(tensors[key])
        shape = "x".join(map(str, array.shape))
        digest.update(f"{key} {STORED_DTYPES[str(array.dtype)]} {shape}\n".encode())
        if sys.byteorder == "big":
            array = array.view(f"u{array.itemsize}").byteswap()
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def merge_mark(layers: Mapping[str, tuple[MokaConfig, Mapping[str, np.ndarray]]]) -> str:
    """What is noted of an adapter that was merged into a model: the same for it in every precision and either backend.

    The SHA-256 of `adapter_checksum`, of the tensors in bfloat16 (to nearest, ties to even) by "<path>.<name>", and of
    the text {"<path>": [gate, identity, scaling, scale], …}, JSON as that of `sealed_text`, with the scale that the
    layer was merged with as C's "%.6g" writes it.

    Args:
        layers: for each layer by its path, its settings and its tensors by the names of `LayerFactors.tensors`.
    """
    settings = {
        path: [config.gate, config.identity, config.scaling, format(config.scale, ".6g")]
        for path, (config, _) in layers.items()
    }
    tensors = {
        f"{path}.{name}": array.astype(np.float32).astype(ml_dtypes.bfloat16)
        for path, (_, named) in layers.items()
        for name, array in named.items()
    }
    return adapter_checksum(json.dumps(settings, sort_keys=True, separators=(",", ":")), tensors)


def check_seal(expected: Any, text: str, tensors: Mapping[str, np.ndarray], *, where: str) -> None:
    """Return if a checksum is the one of these fields and tensors.

    Args:
        expected: what adapter_config.json says.
        where: the folder, for the message.

    Raises:
        AdapterError: it is another one, or none.
    """
    found = adapter_checksum(text, tensors)
    if expected == found:
        return
    got = f"{expected[:16]}…" if isinstance(expected, str) and expected else repr(expected)
    raise AdapterError(
        f"{where}: the checksum in adapter_config.json is {got}, that of the adapter {found[:16]}…: its settings or "
        "its tensors are not the ones that were written. Copy the folder again from where it came from, both files "
        "together. For what was changed on purpose there is no command: in Python "
        "save_adapter(load_adapter(folder, verify=False), new_folder) writes it with its own checksum"
    )


def _digits(number: Any) -> str:
    return format(float(number), ".17g")
