"""Prints the norm of each ΔW in a MoKA adapter folder, or one ΔW, from FORMAT.md alone; the checksum is verified."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import deserialize

SEALED = "layers r shapes gate scaling scale identity zero_factor dropout base_fingerprint base_quantisation"


def checksum(config, tensors):
    """Section 1.4: SHA-256 of the sealed fields and of every tensor."""
    sealed = {name: config.get(name) for name in ("format_version", *SEALED.split())}
    sealed |= {name: f"{config[name]:.17g}" for name in ("scale", "dropout")}
    sealed["shapes_pattern"] = config.get("shapes_pattern", {})
    sealed["scale_pattern"] = {path: f"{scale:.17g}" for path, scale in config.get("scale_pattern", {}).items()}
    digest = hashlib.sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    for key, entry in sorted(tensors.items()):
        digest.update(f"{key} {entry['dtype']} {'x'.join(map(str, entry['shape']))}\n".encode() + entry["data"])
    return digest.hexdigest()


def numbers(entry):
    """A tensor's entries as float64; a bfloat16 is the upper half of a float32."""
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
    array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return ((array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array).astype(np.float64)


def deltas(folder, layer=None):
    """Section 1.1: (path, ΔW) of every layer or of one, with ΔW = scale · Σ_t α_t · c_t · (A_t ⊗ B_t) in float64."""
    config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("format_version") != 2:
        raise ValueError(f"{folder}: expected a MoKA adapter of format version 2; got {config.get('format_version')}")
    tensors = dict(deserialize(Path(folder, "adapter_model.safetensors").read_bytes()))
    if config["checksum"] != checksum(config, tensors):
        raise ValueError(f"{folder}: not as it was written, its checksum is another; copy the folder again")
    layers = sorted(config["layers"], key=lambda path: [part.zfill(9) for part in path.split(".")])  # 2 before 10
    if layer not in (None, *layers):
        raise ValueError(f"{folder}: no layer {layer!r}; expected one of its {len(layers)}, such as {layers[0]}")
    for path in [layer] if layer else layers:
        name, delta = f"base_model.model.{path}.moka_", 0.0
        groups = config.get("shapes_pattern", {}).get(path) or config["shapes"][config["layers"][path]]
        r = sum(copies for copies, *_ in groups)
        logits = numbers(tensors[name + "gate_logits"]) if config["gate"] == "softmax" else np.zeros(r)
        alpha = iter(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
        for g, (copies, a_out, a_in, b_out, b_in) in enumerate(groups):
            c = np.sqrt(r / (b_in if config["zero_factor"] == "b" else a_in)) if config["scaling"] == "stable" else 1
            a = [np.eye(a_out)] * copies if config["identity"] == "a" else numbers(tensors[f"{name}factor_a.{g}"])
            b = [np.eye(b_out)] * copies if config["identity"] == "b" else numbers(tensors[f"{name}factor_b.{g}"])
            delta += sum(next(alpha) * c * np.kron(a[copy], b[copy]) for copy in range(copies))
        yield path, config.get("scale_pattern", {}).get(path, config["scale"]) * delta


if __name__ == "__main__":
    for path, delta in deltas(*(sys.argv[1:3] or sys.exit("usage: python read_adapter.py FOLDER [LAYER]"))):
        print(path, delta if sys.argv[2:] else f"{delta.shape} {np.linalg.norm(delta):.6g}")
