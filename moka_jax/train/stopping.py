"""What the held-out losses of a run say: which evaluation was the best, and whether to go on.

Both are functions of the metrics records alone, so that a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]


def best_evaluation(records: Iterable[Record]) -> Record | None:
    """The first evaluation with the lowest held-out loss after a step was taken, if there is one."""
    evaluations = [record for record in records if record["kind"] == "eval" and record["step"] > 0]
    return min(evaluations, key=lambda record: record["loss"], default=None)


def evaluations_without_gain(records: Iterable[Record], *, min_delta: float) -> int:
    """How many of the last evaluations in a row brought no gain; the one before the first step counts as one.

    A gain is a loss lower than that of the gain before it by more than `min_delta`.

    >>> losses = [3.0, 2.0, 1.9, 2.5]
    >>> records = [{"kind": "eval", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    >>> evaluations_without_gain(records, min_delta=0.0), evaluations_without_gain(records, min_delta=0.5)
    (1, 2)
    """
    lowest, without = math.inf, 0
    for record in records:
        if record["kind"] == "eval":
            gain = record["loss"] < lowest - min_delta
            lowest, without = (record["loss"], 0) if gain else (lowest, without + 1)
    return without
