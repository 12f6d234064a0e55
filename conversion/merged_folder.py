"""A base model and an adapter as one model folder that needs neither: W + ΔW, from files alone, a tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import ml_dtypes
import numpy as np

from conversion.base_weights import BaseFolder, flax_place
from conversion.bitsandbytes_state import to_bitsandbytes
from conversion.merge_report import MergeError, MergeReport
from conversion.new_folder import check_new, new_folder
from conversion.shards import INDEX, ShardWriter
from moka_core import (
    Adapter,
    AdapterError,
    ConfigError,
    ModelError,
    Nf4Weight,
    PathError,
    check_base,
    dequantise_nf4,
    quantise_nf4,
)
from moka_core.adapter import SHOWN, raise_problems
from moka_core.delta import delta_rows
from moka_core.fingerprint import MERGED, merged_adapters
from moka_core.nf4 import BLOCK, NESTED_BLOCK
from moka_core.seal import merge_mark
from moka_core.tensor_spec import Packing, TensorSpec

Dtype = Literal["float32", "bfloat16", "float16"]
OnTensor = Callable[[str, int, int], None]
Rows = Callable[[int, int], np.ndarray]
T = TypeVar("T")

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PACKINGS = ("nf4-double", "nf4")
# Held in memory until it is written. transformers reads a model of many shards like one of few.
SHARD_BYTES = 10**9
CARRIED_OVER = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates",
)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE = 2**19  # entries that are summed and rounded at once, in each of at most eight threads


def merge_folder(
    adapter: Adapter,
    base: BaseFolder,
    out: str | os.PathLike[str],
    *,
    dtype: Dtype = "bfloat16",
    pack: Packing | None = None,
    max_shard_bytes: float = SHARD_BYTES,
    allow_other_base: bool = False,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> MergeReport:
    """What was written and what was lost: a model folder with W + ΔW in place of W, whole or not at all.

    W′ = round(W + ΔW), with W as `base` holds it (decoded from NF4, or dense), ΔW and the sum in float64, rounded to
    float32 and from there to `dtype`. Every other tensor is cast to `dtype`. With `pack`, W′ = Q(W + ΔW) in NF4
    instead, for the linear layers that the base holds packed or, if it holds all of them dense, for those of the
    transformer blocks. Without an adapter and packed the same way, a layer keeps its codes and scales. The new
    config.json names the adapter in `moka_merged`, which makes the model another base than the old one: see
    `base_fingerprint` and `merge_mark`.

    In memory are one shard, one tensor as it is stored, and pieces of half a million entries; for a layer to pack also
    W + ΔW in float32.

    Args:
        adapter: what to merge.
        base: opened with the quantisation under which the adapter is to be applied; see `Adapter.base_quantisation`.
        out: the folder to write; it must not exist, and its parent is made if needed.
        dtype: "float32", "bfloat16" or "float16".
        pack: None for a dense folder (recommended), or "nf4-double" or "nf4" for one that transformers loads with
            bitsandbytes. An update that is small against NF4's gaps is rounded away: see `MergeError.lost`.
        max_shard_bytes: the largest shard, > 0; a larger tensor is a shard of its own.
        allow_other_base: merge into a base with another fingerprint than the adapter's.
        on_tensor: called after each tensor with its name, the bytes done and those in all.

    Raises:
        ConfigError: `dtype`, `pack` or `max_shard_bytes` is none of the above.
        AdapterError: the adapter is not sound, belongs to another base, or has layers that the base has not, or in
            other dimensions; all are listed, and nothing was read or written.
        PathError: the folder exists, does not fit onto the disk or cannot be written.
        ModelError: the base cannot be read, or an entry does not fit into `dtype`. Nothing is left of the folder.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected {', '.join(DTYPES)}; got {dtype!r}")
    if pack is not None and pack not in PACKINGS:
        raise ConfigError(f"pack: expected {', '.join(PACKINGS)} or None; got {pack!r}")
    if not max_shard_bytes > 0:
        raise ConfigError(f"max_shard_bytes: expected more than 0; got {max_shard_bytes!r}")
    target = Path(out)
    check_new(target)
    adapter.validate()
    outputs = _plan(adapter, base, dtype, pack, allow_other_base=allow_other_base)
    carried = [name for name in CARRIED_OVER if os.path.exists(base.folder / name)]
    total = sum(output.nbytes for output in outputs)
    left_out = tuple(_left_out(base, carried, outputs))
    with new_folder(target) as draft:
        _check_room(target, draft, total + sum(map(_size, (base.folder / name for name in carried))))
        writer, layers = ShardWriter(draft, max_shard_bytes), {}
        for output in outputs:
            writer.make_room(output.nbytes)
            error = _write(output, base, writer)
            if output.linear:
                layers[output.path] = error
            on_tensor(output.name, writer.bytes, total)
        files = writer.close()
        (draft / "config.json").write_text(json.dumps(_config(adapter, base, outputs, dtype, pack), indent=2) + "\n")
        for name in carried:
            _copy(base.folder / name, draft / name)
    return MergeReport(
        folder=target,
        dtype=dtype,
        pack=pack,
        base_quantisation=base.quantisation,
        layers=layers,
        packed=frozenset(output.path for output in outputs if output.packing),
        bytes=writer.bytes,
        files=tuple(files),
        copied=tuple(carried),
        left_out=left_out,
        notes=tuple(_notes(adapter, base, outputs)),
    )


@dataclass(frozen=True, kw_only=True)
class _Output:
    """One weight to write: its name, the base's tensor that it is made of, how it is written, and rows of its ΔW."""

    name: str
    source: str
    held: TensorSpec
    dtype: str
    packing: Packing | None
    linear: bool
    delta: Rows | None

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        """The bytes that it takes, up to some dozens."""
        entries = math.prod(self.held.shape)
        if self.packing is None:
            return entries * np.dtype(DTYPES[self.dtype]).itemsize
        blocks = -(-entries // BLOCK)
        scales = 4 * blocks if self.packing == "nf4" else blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256
        return -(-entries // 2) + scales + 400


def _plan(
    adapter: Adapter, base: BaseFolder, dtype: str, pack: Packing | None, *, allow_other_base: bool
) -> list[_Output]:
    """Every weight to write, in the order in which the base is read.

    Raises:
        AdapterError: the adapter does not fit the base: another base is told first, then the first layers.
    """
    problems = []
    try:
        check_base(adapter.base_fingerprint, base.fingerprint, allow_other_base=allow_other_base)
    except AdapterError as error:
        problems.append(str(error))
    specs = {name: (name, spec) for name, spec in base.specs().items()}
    if "lm_head" in adapter.layers and _HEAD not in specs and _EMBEDDING in specs and _ties(base):
        specs[_HEAD] = specs[_EMBEDDING]  # adapted, it is the embedding no longer
    for path, layer in adapter.layers.items():
        found = specs.get(f"{path}.weight")
        if found is None or not _is_linear(f"{path}.weight"):
            problems.append(f"{path}: the base has no linear layer of that name")
        elif found[1].shape != (layer.plan.out_features, layer.plan.in_features):
            dims = "x".join(map(str, found[1].shape))
            problems.append(f"{path}: the adapter is for a layer of {layer.plan.key}, the base has {dims} (out x in)")
    raise_problems(problems, f"this adapter does not fit {base.folder}; nothing was merged", shown=SHOWN)
    deltas: dict[str, Rows] = {
        f"{path}.weight": partial(delta_rows, layer, adapter.layer_config(path))
        for path, layer in adapter.layers.items()
    }
    return [
        _Output(
            name=name,
            source=source,
            held=spec,
            dtype=dtype,
            packing=pack if _packs(name, spec, base) else None,
            linear=_is_linear(name),
            delta=deltas.get(name),
        )
        for name, (source, spec) in specs.items()
    ]


def _ties(base: BaseFolder) -> bool:
    return bool(base.config.get("tie_word_embeddings"))


def _is_linear(name: str) -> bool:
    place = flax_place(name)
    return place is not None and place.transposed


def _packs(name: str, spec: TensorSpec, base: BaseFolder) -> bool:
    """Whether a weight belongs to those that are packed: as the base has it, if it packs any."""
    place = flax_place(name)
    return spec.packing is not None if base.quantisation != "none" else place is not None and place.packable


def _check_room(target: Path, draft: Path, size: int) -> None:
    disk = shutil.disk_usage(draft)
    if disk.total and size > disk.free:  # some file systems do not say how large they are
        raise PathError(
            f"{target}: expected {size / 1e9:.3g} GB of free disk space; there are {disk.free / 1e9:.3g} GB; make "
            "room, or choose another disk"
        )


def _write(output: _Output, base: BaseFolder, writer: ShardWriter) -> MergeError:
    """Hand one weight, merged, to the writer, which alone holds it from then on; its error."""
    held = base.weight(output.source) if output.held.packing else None
    if isinstance(held, Nf4Weight):
        read: Rows = partial(dequantise_nf4, held)
    else:
        read = partial(_dense_rows, base, output.source)
    if output.packing is None:
        merged, error = _rounded(output, read)
        writer.add({output.name: merged})
        return error
    if isinstance(held, Nf4Weight) and output.delta is None and output.held.packing == output.packing:
        packed = held
    else:
        total = _summed(output, read)
        try:
            packed = quantise_nf4(total, double=output.packing == "nf4-double")
        except ModelError as error:
            raise ModelError(
                f"{output.name}: cannot be packed as {output.packing}; {error}; merge it unpacked"
            ) from error
    packed = dataclasses.replace(packed, dtype=output.dtype)  # what bitsandbytes decodes it to

    def error_of(start: int, stop: int) -> MergeError:
        delta = output.delta(start, stop) if output.delta else None
        return MergeError.between(read(start, stop), delta, dequantise_nf4(packed, start, stop))

    writer.add(to_bitsandbytes(output.name, packed))
    return sum(_by_pieces(error_of, output.held.shape), MergeError())


def _dense_rows(base: BaseFolder, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of a dense tensor, float32; of the file no more than these is mapped at a time."""
    return base.tensor(name, slice(start, stop)).astype(np.float32)


def _rounded(output: _Output, read: Rows) -> tuple[np.ndarray, MergeError]:
    """W + ΔW in the dtype to write."""
    merged = np.empty(output.held.shape, DTYPES[output.dtype])

    def fill(start: int, stop: int) -> tuple[float, MergeError]:
        rows, delta = read(start, stop), output.delta(start, stop) if output.delta else None
        total = rows if delta is None else rows + delta
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            merged[start:stop] = total.astype(np.float32, copy=False)
            error = MergeError.between(rows, delta, merged[start:stop].astype(np.float32)) if output.linear else None
        return _largest(total), error or MergeError()

    found = _by_pieces(fill, output.held.shape)
    _check_range(output, [largest for largest, _ in found])
    return merged, sum((error for _, error in found), MergeError())


def _summed(output: _Output, read: Rows) -> np.ndarray:
    """W + ΔW in float32."""
    total = np.empty(output.held.shape, np.float32)

    def fill(start: int, stop: int) -> float:
        found = read(start, stop) + output.delta(start, stop) if output.delta else read(start, stop)
        with np.errstate(over="ignore"):  # checked below
            total[start:stop] = found
        return _largest(found)

    _check_range(output, _by_pieces(fill, output.held.shape))
    return total


def _largest(array: np.ndarray) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(np.maximum(array.max(), -array.min()))


def _check_range(output: _Output, found: list[float]) -> None:
    largest, limit = float(np.max(found)), float(ml_dtypes.finfo(DTYPES[output.dtype]).max)
    if math.isnan(largest):
        raise ModelError(f"{output.name}: expected finite numbers; it has NaN")
    if largest > limit:
        wide = [name for name in reversed(DTYPES) if largest <= float(ml_dtypes.finfo(DTYPES[name]).max)]
        unusable = "the update" if output.delta and math.isfinite(largest) else "the base"
        raise ModelError(
            f"{output.name}: its largest entry is {largest:.6g}, and {output.dtype} holds numbers up to {limit:.6g}; "
            + (f"choose {' or '.join(wide)}" if wide else f"{unusable} is not usable")
        )


def _by_pieces(function: Callable[[int, int], T], shape: tuple[int, ...]) -> list[T]:
    """function(start, stop) for rows of at most `_PIECE` entries together, in threads: NumPy lets go of the lock."""
    rows = max(1, _PIECE // max(1, math.prod(shape[1:])))
    starts = range(0, shape[0], rows)
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as threads:
        return list(threads.map(function, starts, (min(start + rows, shape[0]) for start in starts)))


def _config(
    adapter: Adapter, base: BaseFolder, outputs: list[_Output], dtype: str, pack: Packing | None
) -> dict[str, Any]:
    """The base's config.json with what is different now."""
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # every version reads it
    config |= dict.fromkeys(named, dtype)
    if any(output.name == _HEAD and output.source != _HEAD for output in outputs):
        config["tie_word_embeddings"] = False
    if pack is not None:
        config["quantization_config"] = _quantization_config(outputs, dtype, pack)
    layers = {path: (adapter.layer_config(path), dict(layer.tensors())) for path, layer in adapter.layers.items()}
    config[MERGED] = [*merged_adapters(base.config), merge_mark(layers)]
    return config


def _quantization_config(outputs: list[_Output], dtype: str, pack: Packing) -> dict[str, Any]:
    """What transformers writes for such a folder."""
    packed = {output.path for output in outputs if output.packing}
    dense = [output.path for output in outputs if output.linear and not output.packing]
    skipped = dense if "lm_head" in {*packed, *dense} else [*dense, "lm_head"]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": pack == "nf4-double",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skipped == ["lm_head"] else sorted(skipped),  # None leaves out the head
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _left_out(base: BaseFolder, carried: list[str], outputs: list[_Output]) -> Iterator[str]:
    """The base's files that were not taken over, and its tensors that were not."""
    known = {"config.json", INDEX, *carried, *(path.name for path in base.files.values())}
    yield from sorted(path.name for path in base.folder.iterdir() if path.name not in known)
    used = {name for output in outputs for name in (output.name, output.source)}
    parts = {f"{name}." for name in used}
    for name in sorted(base.files):
        if name not in used and not any(name.startswith(part) for part in parts):
            yield f"tensor {name}"


def _notes(adapter: Adapter, base: BaseFolder, outputs: list[_Output]) -> Iterator[str]:
    if adapter.base_quantisation not in (None, base.quantisation):
        yield (
            f"the adapter was trained on a base held as {adapter.base_quantisation}; it was merged into one held as "
            f"{base.quantisation}, on which it computes something else"
        )
    if any(output.name == _HEAD and output.source != _HEAD for output in outputs):
        yield (
            "the adapted output head was tied to the embedding; it is a tensor of its own now, and config.json says "
            "tie_word_embeddings: false"
        )


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(_size(inner) for inner in path.iterdir())
    return path.stat().st_size


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
