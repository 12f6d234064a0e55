"""What a backend must be able to show for its numbers to be compared with another's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moka_core.nf4 import Nf4Weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Tokens (batch, time), int32, and which of them are learned, (batch, time), bool."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimiser of a parity run: AdamW with bias correction, decoupled decay, and a constant rate."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


class Probe(Protocol):
    """A base model with a trained adapter on it, in one backend, without dropout.

    The loss is the mean cross-entropy of the learned tokens, each predicted from those before it.
    """

    def packed(self) -> Iterator[tuple[str, Nf4Weight, np.ndarray]]:
        """(layer's path, packed weight, the float32 weight that the backend decodes) of every NF4 layer."""

    def deltas(self) -> Iterator[tuple[str, np.ndarray]]:
        """(layer's path, ΔW (out, in) float32) of every adapted layer."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(batch, time, vocab), float32."""

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and its gradient by every trained array: "<path>.factor_a.0", …, "<path>.gate_logits"."""

    def train(self, batches: Sequence[Batch], optimiser: AdamW) -> list[float]:
        """The loss before each of the optimiser's steps, one a batch; the adapter is changed."""
