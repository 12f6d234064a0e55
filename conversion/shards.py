"""Tensors of a model folder written as they come: safetensors shards and their index, as transformers names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Holds tensors until a shard is full, and writes it: no more than one shard is in memory.

    Args:
        folder: an existing one, of this writer alone.
        max_bytes: of a shard's tensors, > 0; one that is larger by itself is a shard of its own.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._held: dict[str, np.ndarray] = {}
        self._written: list[list[str]] = []
        self.bytes = 0

    def make_room(self, size: int) -> None:
        """Write the shard that is begun, if so many more bytes would be too many for it."""
        if self._held and sum(array.nbytes for array in self._held.values()) + size > self._max_bytes:
            self._write()

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take tensors that belong into one shard; they must not be changed afterwards."""
        self.make_room(sum(array.nbytes for array in tensors.values()))
        self._held.update(tensors)
        self.bytes += sum(array.nbytes for array in tensors.values())

    def close(self) -> list[str]:
        """The names of the files with tensors, all of them written; with more than one, there is an index, too."""
        if self._held:
            self._write()
        count = len(self._written)
        if count == 1:
            self._draft(0).rename(self._folder / "model.safetensors")
            return ["model.safetensors"]
        files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(zip(files, self._written, strict=True)):
            self._draft(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return files

    def _write(self) -> None:
        path = self._draft(len(self._written))
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._written.append(list(self._held))
        self._held = {}

    def _draft(self, number: int) -> Path:
        return self._folder / f"shard-{number + 1}"  # how many there will be shows at the end
