"""How far one adapter's logits are from another's, against how far it moves the logits itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moka_core import AdapterError


@dataclass(frozen=True, kw_only=True)
class LogitsGap:
    """Two sets of logits compared: y against a reference.

    Args:
        largest: max |y - reference|, as a share of the reference's range.
        rms: √mean (y - reference)², as a share of that range.
        changed: positions whose most likely next token differs.
    """

    largest: float
    rms: float
    changed: int


@dataclass(frozen=True, kw_only=True)
class LogitsError:
    """What an approximation of an adapter loses in logits.

    Args:
        positions: how many positions were compared.
        error: the approximation against the adapter.
        effect: the base without an adapter, against the adapter: how far the adapter moves the logits.
    """

    positions: int
    error: LogitsGap
    effect: LogitsGap

    @property
    def lost(self) -> float | None:
        """√Σ(approximation - adapter)² / √Σ(base - adapter)²: 0 if all of the adapter's effect is there.

        None if the adapter has no effect, and the approximation has one.
        """
        if self.effect.rms == 0:
            return 0.0 if self.error.rms == 0 else None
        return self.error.rms / self.effect.rms

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {**asdict(self), "lost": self.lost}


def logits_error(base: np.ndarray, adapter: np.ndarray, approximation: np.ndarray) -> LogitsError:
    """What the approximation of an adapter loses, from logits on the same tokens.

    Args:
        base, adapter, approximation: (…, vocab).

    Raises:
        AdapterError: some are not finite, or all of the adapter's are equal.

    >>> base, adapter = np.array([[0.0, 1.0, 0.0]]), np.array([[2.0, 1.0, 0.0]])
    >>> logits_error(base, adapter, np.array([[1.5, 1.0, 0.0]])).lost
    0.25
    """
    for name, logits in (("base", base), ("adapter", adapter), ("approximation", approximation)):
        if not np.isfinite(logits).all():
            raise AdapterError(
                f"the logits of the {name} are not finite, so that there is nothing to compare; is the adapter's "
                "scale, or a factor, too large?"
            )
    if np.ptp(adapter) == 0:
        raise AdapterError("the logits of the adapter are all equal, so that there is no range to compare with")
    return LogitsError(positions=adapter[..., 0].size, error=_gap(approximation, adapter), effect=_gap(base, adapter))


def _gap(logits: np.ndarray, reference: np.ndarray) -> LogitsGap:
    gap = logits.astype(np.float64) - reference
    spread = float(reference.max() - reference.min())
    return LogitsGap(
        largest=float(np.abs(gap).max()) / spread,
        rms=float(np.sqrt(np.mean(gap**2))) / spread,
        changed=int((logits.argmax(-1) != reference.argmax(-1)).sum()),
    )
