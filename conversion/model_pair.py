"""A base model and a model fine-tuned from it: what has changed, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from conversion.base_weights import BaseFolder, open_base
from moka_core import Architecture, ModelError, base_fingerprint
from moka_core.fingerprint import MERGED

_PIECE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """Two dense model folders of one architecture.

    Args:
        base: before. tuned: after. Both opened with quantise "none".
    """

    base: BaseFolder
    tuned: BaseFolder

    def delta(self, path: str) -> np.ndarray:
        """ΔW = W' − W (out, in) of a linear layer, float64."""
        name = f"{path}.weight"
        return self.tuned.dense(name).astype(np.float64) - self.base.dense(name).astype(np.float64)

    def others(self, targeted: Collection[str]) -> Iterator[tuple[str, float]]:
        """(name, ‖T' − T‖ / ‖T‖) of every tensor that differs and is not the weight of a targeted layer.

        One tensor of each model is read at a time.
        """
        weights = {f"{path}.weight" for path in targeted}
        for name in sorted(set(self.base.specs()) - weights):
            before, after = (folder.dense(name) for folder in (self.base, self.tuned))
            change = _norm(after, before)
            if change:
                yield name, change / (_norm(before) or change)


def _norm(tensor: np.ndarray, less: np.ndarray | None = None) -> float:
    """‖tensor − less‖ in float64, a piece at a time."""

    def norm(start: int) -> float:
        piece = tensor.reshape(-1)[start : start + _PIECE].astype(np.float64)
        return float(np.linalg.norm(piece if less is None else piece - less.reshape(-1)[start : start + _PIECE]))

    return math.hypot(*map(norm, range(0, tensor.size, _PIECE)))


def open_pair(base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> ModelPair:
    """The pair, checked but not read.

    Raises:
        ModelError: a folder is no model's, or is quantised; or they differ in architecture, or in the names or shapes
            of their tensors (all are listed).
    """
    pair = ModelPair(base=open_base(base, quantise="none"), tuned=open_base(tuned, quantise="none"))
    for folder in (pair.base, pair.tuned):
        if folder.packed:
            raise ModelError(
                f"{folder.folder}: expected dense weights; these are NF4, and what quantisation lost would be most of "
                "the difference; give the folder that it was quantised from"
            )
    one, other = (Architecture.from_hf_config(folder.config) for folder in (pair.base, pair.tuned))
    problems = [
        f"{field.name}: {getattr(one, field.name)!r} became {getattr(other, field.name)!r}"
        for field in dataclasses.fields(Architecture)
        if getattr(one, field.name) != getattr(other, field.name)
    ]
    digests = {base_fingerprint({**folder.config, MERGED: None}, {}) for folder in (pair.base, pair.tuned)}
    if not problems and len(digests) > 1:
        problems = ["the rotary settings or rms_norm_eps differ"]
    if not problems:
        before, after = pair.base.specs(), pair.tuned.specs()
        problems += [f"{name}: only in one of them" for name in sorted(set(before) ^ set(after))]
        problems += [
            f"{name}: {before[name].shape} became {after[name].shape}"
            for name in sorted(set(before) & set(after))
            if before[name].shape != after[name].shape
        ]
    if problems:
        raise ModelError(
            f"{pair.tuned.folder}: expected a model fine-tuned from {pair.base.folder}, of the same architecture:\n  "
            + "\n  ".join(problems)
        )
    return pair
