"""What a merge did to the weights: what it lost, layer by layer, and what it wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MergeError:
    """How far the weight W′ that was written is from W + ΔW, for one layer or the sum over several.

    Args:
        total: ‖W + ΔW‖², squared Frobenius norms here and below; 0 only if the weight is.
        error: ‖W′ − (W + ΔW)‖².
        update: ‖ΔW‖²; 0 without an adapter.
        moved: ⟨W′ − W, ΔW⟩, how far W′ went from W along ΔW.

    >>> one = MergeError(total=100.0, error=1.0, update=4.0, moved=1.0)
    >>> one.relative, one.lost, one.off
    (0.1, 0.75, 0.5)
    """

    total: float = 0.0
    error: float = 0.0
    update: float = 0.0
    moved: float = 0.0

    @classmethod
    def between(cls, base: np.ndarray, delta: np.ndarray | None, merged: np.ndarray) -> MergeError:
        """The error of some rows, from W and W′ in float32 and ΔW in float64 (None: no adapter).

        >>> weight, delta = np.ones((1, 1), np.float32), np.full((1, 1), 2.0**-70)
        >>> MergeError.between(weight, delta, weight).off  # W + ΔW is W in float32 and float64, and yet ΔW is missed
        1.0
        """
        moved = np.subtract(merged, base, dtype=np.float64)
        if delta is None:
            return cls(total=_inner(base, base), error=_inner(moved, moved))
        total, error = base + delta, moved - delta  # not merged − total: a small ΔW is lost in W + ΔW
        return cls(
            total=_inner(total, total),
            error=_inner(error, error),
            update=_inner(delta, delta),
            moved=_inner(moved, delta),
        )

    def __add__(self, other: MergeError) -> MergeError:
        return MergeError(
            total=self.total + other.total,
            error=self.error + other.error,
            update=self.update + other.update,
            moved=self.moved + other.moved,
        )

    @property
    def relative(self) -> float:
        """‖W′ − (W + ΔW)‖ / ‖W + ΔW‖: the error of rounding, or of quantising again."""
        return math.sqrt(self.error / self.total) if self.total else 0.0

    @property
    def size(self) -> float:
        """‖ΔW‖ / ‖W + ΔW‖: how large the update is."""
        return math.sqrt(self.update / self.total) if self.total else 0.0

    @property
    def lost(self) -> float | None:
        """1 − ⟨W′ − W, ΔW⟩ / ‖ΔW‖²: the share of the update that did not arrive; None without an update.

        0: W′ went from W along ΔW as far as W + ΔW did. 1: not at all, as if it had been rounded away. It says nothing
        of the noise across ΔW, which `relative` and `off` hold.
        """
        return 1 - self.moved / self.update if self.update else None

    @property
    def off(self) -> float | None:
        """‖W′ − (W + ΔW)‖ / ‖ΔW‖: the error against the update; W itself, with nothing merged, has 1."""
        return math.sqrt(self.error / self.update) if self.update else None

    def to_dict(self) -> dict[str, float | None]:
        """The ratios as plain JSON values."""
        return {
            "relative_error": self.relative,
            "update": self.size,
            "update_lost": self.lost,
            "error_of_update": self.off,
        }


def _inner(one: np.ndarray, other: np.ndarray) -> float:
    """Σ one·other in float64; not by BLAS, whose threads would get in the way of those that call this."""
    return float(np.einsum("ij,ij->", one, other, dtype=np.float64))


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge_folder` wrote, and what the numbers became.

    Args:
        folder: the merged model folder.
        dtype: of every tensor that is not packed.
        pack: the packing of the linear weights, None for a dense folder.
        base_quantisation: how W was held: "nf4-double", "nf4" or "none".
        layers: the error of every linear layer, by path, in the order in which they were written.
        packed: which of them are written packed.
        bytes: of all tensors.
        files: those with tensors.
        copied: the files taken over from the base's folder as they are.
        left_out: files and tensors of the base that are not in the merged folder.
        notes: what one should know about this merge, a sentence each.
    """

    folder: Path
    dtype: str
    pack: str | None
    base_quantisation: str
    layers: dict[str, MergeError]
    packed: frozenset[str]
    bytes: int
    files: tuple[str, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def adapted(self) -> dict[str, MergeError]:
        """The layers with an adapter."""
        return {path: error for path, error in self.layers.items() if error.update}

    @property
    def total(self) -> MergeError:
        """The sum over the layers with an adapter."""
        return sum(self.adapted.values(), MergeError())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "folder": str(self.folder),
            "dtype": self.dtype,
            "pack": self.pack,
            "base_quantisation": self.base_quantisation,
            "bytes": self.bytes,
            "files": list(self.files),
            "copied": list(self.copied),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "total": self.total.to_dict(),
            "layers": {path: {"packed": path in self.packed, **error.to_dict()} for path, error in self.layers.items()},
        }
