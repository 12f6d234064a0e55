"""A Hugging Face model folder as the tensors of our Flax LLaMA."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # it also registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from conversion.bitsandbytes_state import STATE_KEY, SUFFIXES, from_bitsandbytes, spec_from_bitsandbytes
from moka_core import ModelError, Nf4Weight, base_fingerprint, dequantise_nf4, quantise_nf4
from moka_core.nf4 import BLOCK
from moka_core.paths import json_object, no_file, no_folder
from moka_core.sketch import LinearWeight
from moka_core.tensor_spec import TensorSpec

Quantise = Literal["nf4-double", "nf4", "none"]
FlaxPath = tuple[str, ...]

_BLOCK = r"model\.layers\.(?P<layer>\d+)\."
# checkpoint name -> (path in moka_jax.llama, whether the matrix is transposed, whether it may be packed)
_TABLE: tuple[tuple[str, FlaxPath, bool, bool], ...] = (
    (r"model\.embed_tokens\.weight", ("model", "embed_tokens", "embedding"), False, False),
    (r"model\.norm\.weight", ("model", "norm", "weight"), False, False),
    (r"lm_head\.weight", ("lm_head", "kernel"), True, False),
    *(
        (rf"{_BLOCK}{name}\.weight", ("model", "layers", "block", name, "weight"), False, False)
        for name in ("input_layernorm", "post_attention_layernorm")
    ),
    *(
        entry
        for parent, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in names
        for entry in (
            (
                rf"{_BLOCK}{parent}\.{name}_proj\.weight",
                ("model", "layers", "block", parent, f"{name}_proj", "kernel"),
                True,
                True,
            ),
            (
                rf"{_BLOCK}{parent}\.{name}_proj\.bias",
                ("model", "layers", "block", parent, f"{name}_proj", "bias"),
                False,
                False,
            ),
        )
    ),
)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PIECE = 1 << 24
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor stands in our LLaMA."""

    path: FlaxPath
    layer: int | None
    transposed: bool
    packable: bool


def flax_place(name: str) -> Place | None:
    """The place of a checkpoint's tensor, or None if our LLaMA has none for that name.

    >>> flax_place("model.layers.3.mlp.up_proj.weight").layer
    3
    """
    for pattern, path, transposed, packable in _TABLE:
        found = re.fullmatch(pattern, name)
        if found:
            layer = found.groupdict().get("layer")
            return Place(path, None if layer is None else int(layer), transposed, packable)
    return None


def _place(name: str) -> Place:
    place = flax_place(name)
    assert place is not None, name
    return place


@dataclass(frozen=True, kw_only=True)
class BaseFolder:
    """A Hugging Face model folder, opened: its config, and its tensors on demand.

    Args:
        folder: has config.json and model.safetensors, or the shards and their index.
        quantise: what becomes of the dense linear weights: NF4 with or without double quantisation, or nothing.
            A folder that bitsandbytes packed is taken as it is: what it left dense (llm_int8_skip_modules) stays dense.
    """

    folder: Path
    quantise: Quantise
    config: dict[str, Any]
    files: dict[str, Path]

    @property
    def name(self) -> str:
        """The folder, as an adapter trained on it will name its base."""
        return str(self.folder)

    @cached_property
    def packed(self) -> bool:
        """Whether the folder holds bitsandbytes' NF4 weights."""
        return any(name.endswith(STATE_KEY) for name in self.files)

    @cached_property
    def quantisation(self) -> Quantise:
        """How the linear weights come: what was asked for, or how bitsandbytes packed them."""
        if not self.packed:
            return self.quantise
        return "nf4-double" if any(name.endswith(".nested_absmax") for name in self.files) else "nf4"

    def tensor(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor in the shape and dtype of the file, or some of its rows; of the file no more is held than that.

        Raises:
            ModelError: there is none of that name, or its file cannot be read.
        """
        if name not in self.files:
            raise ModelError(f"{self.folder}: has no tensor {name!r}")
        try:
            with safe_open(self.files[name], framework="np") as file:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise ModelError(f"{self.files[name]}: expected a safetensors file with {name}; {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """`moka_core.base_fingerprint`: one base for `base_difference`, in every precision of one model.

        Of the linear weights, only the blocks that the sketch looks at are read.
        """
        norms = {
            name: self.tensor(name).astype(np.float32)
            for name in self.files
            if name.endswith("norm.weight") and not _IGNORED.fullmatch(name)
        }
        places = {name: flax_place(name) for name in self.files}
        linear = [name for name, place in places.items() if place is not None and place.packable]
        layers = {name.removesuffix(".weight"): self._blocks(name) for name in linear}
        return base_fingerprint(self.config, norms, layers)

    def _blocks(self, name: str) -> LinearWeight | None:
        """A linear weight whose blocks can be read; None if it is no dense matrix, and not NF4."""
        shape, dtype = self._headers[name]
        packed = f"{name}.{STATE_KEY}" in self.files
        if packed:
            try:
                entries = math.prod(self._spec(name, shape, dtype).shape)
            except ModelError:  # `specs` tells; there is nothing to compare
                return None
            if dtype != "U8" or shape != (-(-entries // 2), 1):
                return None
        elif dtype not in _DTYPES or len(shape) != 2:
            return None
        else:
            entries = math.prod(shape)

        def read(numbers: Sequence[int]) -> list[np.ndarray]:
            size, end = (BLOCK // 2, shape[0]) if packed else (BLOCK, entries)
            spans = [(number * size, min((number + 1) * size, end)) for number in numbers]
            try:
                with safe_open(self.files[name], framework="np") as file:
                    part = file.get_slice(name)
                    return [_entries(part, start, stop, shape[1]) for start, stop in spans]
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self.files[name]}: expected a safetensors file with {name}; {error}") from error

        return LinearWeight(entries=entries, read=read)

    def weights(self) -> Iterator[tuple[str, np.ndarray | Nf4Weight]]:
        """(checkpoint name, value) of every tensor that our LLaMA has a place for; packed ones as one value.

        One tensor is read at a time, file by file.

        Raises:
            ModelError: see `specs`; or a weight that cannot be packed.
        """
        for name in self.specs():
            yield name, self.weight(name)

    def specs(self) -> dict[str, TensorSpec]:
        """What `weights` will give, in its order, from the files' headers alone.

        Raises:
            ModelError: names that our LLaMA has no place for, a weight that is packed but not as NF4, or is of a
                dtype that is none of a model's; all are listed.
        """
        return dict(self._specs)

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        names = sorted(self._names(), key=lambda name: (str(self.files[name]), name))
        headers, found, problems = self._headers, {}, []
        for name in names:
            try:
                found[name] = self._spec(name, *headers[name])
            except ModelError as error:
                problems.append(str(error))
        if problems:
            raise ModelError(f"{self.folder}: " + "\n  ".join(problems))
        return found

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype as safetensors writes it) of every tensor, from the headers of the files."""
        by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            by_file.setdefault(path, []).append(name)
        headers = {}
        for path, names in by_file.items():
            try:
                with safe_open(path, framework="np") as file:
                    present = set(file.keys())
                    missing = sorted(set(names) - present)
                    if missing:
                        raise ModelError(
                            f"{path}: the index names tensors that are not in it: {', '.join(missing[:8])}"
                        )
                    twice = sorted(name for name in present - set(names) if name in self.files)
                    if twice:
                        raise ModelError(
                            f"{path}: holds {', '.join(twice[:8])}, which the index takes from another shard; expected "
                            "each tensor in one shard"
                        )
                    for name in names:
                        part = file.get_slice(name)
                        headers[name] = tuple(part.get_shape()), part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: expected a safetensors file; {error}") from error
        return headers

    def _spec(self, name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
        if f"{name}.{STATE_KEY}" in self.files:
            suffixes = [suffix for suffix in SUFFIXES if f"{name}.{suffix}" in self.files]
            return spec_from_bitsandbytes(name, self.tensor(f"{name}.{STATE_KEY}"), suffixes)
        if dtype == "U8":
            raise ModelError(f"{name} is packed, but not as NF4; only NF4 is supported")
        if dtype not in _DTYPES:
            raise ModelError(f"{name}: expected dtype {', '.join(_DTYPES)}; got {dtype}")
        return TensorSpec(shape=shape, dtype=_DTYPES[dtype], packing=self.quantise if self._packs(name) else None)  # type: ignore[arg-type]

    def _packs(self, name: str) -> bool:
        """Whether a dense weight is to be packed."""
        return self.quantise != "none" and not self.packed and _place(name).packable

    def _names(self) -> list[str]:
        """The tensors that our LLaMA has a place for; the parts of a packed weight count as the weight."""
        names = [name for name in sorted(self.files) if not _is_part(name, self.files) and not _IGNORED.fullmatch(name)]
        if self.config.get("tie_word_embeddings") and "lm_head.weight" in names and self._head_is_tied:
            names.remove("lm_head.weight")
        unknown = [name for name in names if flax_place(name) is None]
        if unknown:
            raise ModelError(
                f"{self.folder}: no LLaMA tensor is called {', '.join(unknown[:8])}{' …' * (len(unknown) > 8)}"
            )
        return names

    @cached_property
    def _head_is_tied(self) -> bool:
        """True: config.json ties an output head that is stored all the same, and that is the embedding.

        Raises:
            ModelError: the stored head is another matrix, which transformers would use.
        """
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if embedding in self.files and not np.array_equal(self.tensor(head), self.tensor(embedding)):
            raise ModelError(
                f"{self.folder}: config.json says tie_word_embeddings: true, but {head} is not {embedding}; set "
                "tie_word_embeddings to false to use the stored head, or remove it to use the embedding"
            )
        return True

    def weight(self, name: str) -> np.ndarray | Nf4Weight:
        """One tensor of `specs`, in its shape: as it stands if packed, packed if it is to be, dense otherwise.

        Raises:
            ModelError: there is none of that name, it cannot be read or packed, or has NaN or infinite entries.
        """
        if name not in self._specs:
            raise ModelError(f"{self.folder}: has no tensor {name!r}")
        if f"{name}.{STATE_KEY}" in self.files:
            parts = [name, *(f"{name}.{suffix}" for suffix in SUFFIXES)]
            state = {part: self.tensor(part) for part in parts if part in self.files}
            try:
                return from_bitsandbytes(name, state)
            except ModelError as error:
                raise ModelError(f"{self.folder}: {error}") from error
        value = self.tensor(name)
        if not self._packs(name):
            if not _is_finite(value):
                raise ModelError(f"{self.folder}: {name}: expected finite numbers; it has NaN or infinity")
            return value
        try:
            return quantise_nf4(value, double=self.quantise == "nf4-double")
        except ModelError as error:
            raise ModelError(f"{self.folder}: {name}: {error}") from error

    def flax_tensors(self) -> Iterator[tuple[FlaxPath, int | None, np.ndarray | Nf4Weight]]:
        """(path in our LLaMA, layer or None, value): linear weights (in, out) if dense, (out, in) if packed."""
        for name, value in self.weights():
            place = _place(name)
            turned = place.transposed and isinstance(value, np.ndarray)
            yield place.path, place.layer, value.T if turned else value  # type: ignore[union-attr]

    def flax_specs(self) -> Iterator[tuple[FlaxPath, int | None, TensorSpec]]:
        """What `flax_tensors` will give, in its order, from the files' headers alone."""
        for name, spec in self.specs().items():
            place = _place(name)
            turned = place.transposed and spec.packing is None
            shape = spec.shape[::-1] if turned else spec.shape
            yield place.path, place.layer, dataclasses.replace(spec, shape=shape)

    def dense(self, name: str) -> np.ndarray:
        """One linear weight (out, in) as the model computes with it: decoded if packed (or to be packed)."""
        value = self.weight(name)
        return dequantise_nf4(value) if isinstance(value, Nf4Weight) else value


def open_base(folder: str | os.PathLike[str], *, quantise: Quantise = "nf4-double") -> BaseFolder:
    """The model folder, checked but not read: tensors are read one at a time when they are needed.

    Args:
        folder: a Hugging Face model folder with safetensors.
        quantise: "nf4-double" (what QLoRA uses), "nf4", or "none".

    Raises:
        ModelError: the folder is missing something, or does not hold what it says.
    """
    root = Path(folder)
    if quantise not in ("nf4-double", "nf4", "none"):
        raise ModelError(f"quantise: expected nf4-double, nf4 or none; got {quantise!r}")
    if why := no_folder(root):
        raise ModelError(
            f"{root}: {why}; expected a Hugging Face model folder (config.json, safetensors); a model of the hub is "
            "fetched first: hf download NAME --local-dir FOLDER"
        )
    config = _read_json(root / "config.json")
    files = _tensor_files(root)
    return BaseFolder(folder=root, quantise=quantise, config=config, files=files)


def _tensor_files(root: Path) -> dict[str, Path]:
    """The file of every tensor; as in transformers a single file goes before an index, which may be a stale one."""
    index = root / "model.safetensors.index.json"
    single = root / "model.safetensors"
    if no_file(single) is None:
        try:
            with safe_open(single, framework="np") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{single}: expected a safetensors file; {error}") from error
    if no_file(index):
        others = sorted(path.name for path in root.iterdir() if path.suffix in (".bin", ".gguf", ".pth"))
        hint = f"; it has {', '.join(others)}, which must be converted to safetensors first" if others else ""
        raise ModelError(f"{root}: expected model.safetensors or model.safetensors.index.json; found neither{hint}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_shard, weight_map.values())):
        raise ModelError(f'{index}: expected weight_map {{"tensor": "file beside this one", ...}}, at least one')
    shards = {name: root / shard for name, shard in weight_map.items()}
    missing = sorted({str(path) for path in shards.values() if no_file(path)})
    if missing:
        raise ModelError(f"{index} names shards that are not there: {', '.join(missing)}")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    return json_object(path, ModelError, needed="expected a Hugging Face model folder")


def _is_finite(value: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite, a piece at a time."""
    flat = value.reshape(-1)
    pieces = (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))
    if value.dtype == ml_dtypes.bfloat16:  # ml_dtypes is slow at it: the exponent's bits tell
        return all(((piece.view(np.uint16) & 0x7F80) != 0x7F80).all() for piece in pieces)
    return all(np.isfinite(piece).all() for piece in pieces)


def _entries(part: Any, start: int, stop: int, columns: int) -> np.ndarray:
    """The entries start..stop-1 of a matrix in a file, row by row, of which nothing else is read."""
    first, last = start // columns, (stop - 1) // columns
    if first == last:
        return part[first : first + 1, start - first * columns : stop - first * columns].reshape(-1)
    return part[first : last + 1].reshape(-1)[start - first * columns : stop - first * columns]


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and name != ".." and name == Path(name).name


def _is_part(name: str, names: Mapping[str, Any]) -> bool:
    """Whether a tensor is a part of a packed weight and not a weight of its own."""
    return any(name.endswith(f".{suffix}") and name.removesuffix(f".{suffix}") in names for suffix in SUFFIXES)
