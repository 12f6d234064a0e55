"""The gates of an adapter while it is trained."""

from __future__ import annotations

import numpy as np
from flax import nnx

from moka_jax.linear import MokaLinear
from moka_jax.sites import linear_sites
from moka_jax.train.processes import whole

_DIGITS = 6  # of a number between 0 and 1 that is looked at, not computed with


def gate_values(graphdef: nnx.GraphDef, *states: nnx.State) -> dict[str, list[float]]:
    """softmax(gate_logits) of every layer that has a gate: the weights of its terms, which sum to 1, by layer.

    In several processes all of them call this.

    Args:
        graphdef, states: the parts of the model, as `nnx.split` gives them.
    """
    found: dict[str, list[float]] = {}
    for site in linear_sites(nnx.merge(graphdef, *states)):
        if not isinstance(site.module, MokaLinear) or site.module.gate_logits is None:
            continue
        logits = whole(site.module.gate_logits[...]).astype(np.float64)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        rows = weights[None] if site.layers is None else weights
        found |= {name: [round(float(w), _DIGITS) for w in row] for name, row in zip(site.names, rows, strict=True)}
    return found
