"""What a base model's tensor is, known before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Packing = Literal["nf4", "nf4-double"]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Shape, dtype and packing of one tensor of a model, as it will come.

    Args:
        shape: (out, in) if packed; otherwise as the array will be.
        dtype: NumPy's name; of a packed weight, what it was before.
        packing: NF4 with or without double quantisation, or None for a dense array.
    """

    shape: tuple[int, ...]
    dtype: str
    packing: Packing | None = None
