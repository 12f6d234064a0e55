"""How the next token is chosen from logits: the most likely one, or a draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moka_core import ConfigError

COOLEST = 1e-6
SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; above, logits are divided by it before a token is drawn.
        top_k: draw among this many of the most likely tokens (more, where the last ones are equally likely).
        top_p: draw among the fewest tokens whose probabilities, after top_k, sum to this much at least; one always
            remains. Above 0, at most 1.
        seed: of the draws; a whole number from 0 to 2³² - 1.

    Raises:
        ConfigError: a value is out of range, or top_k or top_p is given where nothing is drawn.

    >>> Sampling(temperature=0.8, top_p=0.95).draws
    True
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not _is_number(self.temperature) or not (
            self.temperature == 0 or COOLEST <= self.temperature < float("inf")
        ):
            problems.append(
                f"temperature: expected 0 (the most likely token) or a number from {COOLEST:g} on; "
                f"got {self.temperature!r}"
            )
        elif self.temperature == 0:
            problems += [
                f"{name}: expected none at temperature 0, where nothing is drawn; got {value!r}; set a temperature"
                for name, value in (("top_k", self.top_k), ("top_p", self.top_p))
                if value is not None
            ]
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            problems.append(f"top_k: expected a whole number of at least 1; got {self.top_k!r}")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            problems.append(f"top_p: expected a number above 0 and at most 1; got {self.top_p!r}")
        if not _is_whole(self.seed) or not 0 <= self.seed < SEEDS:
            problems.append(f"seed: expected a whole number from 0 to {SEEDS - 1}; got {self.seed!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, not only the most likely one taken."""
        return self.temperature > 0

    def kept(self, vocabulary: int) -> tuple[int | None, float | None]:
        """top_k and top_p, or None where they keep every token of the vocabulary."""
        top_k = None if self.top_k is None or self.top_k >= vocabulary else self.top_k
        return top_k, None if self.top_p is None or self.top_p == 1 else self.top_p


def filter_logits(
    logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Logits of what a token is drawn from: divided by the temperature, then top_k, then top_p, the others at -∞.

    The order, and what happens to tokens that are equally likely, are those of transformers' logits warpers. The
    largest logit is subtracted first, which changes no probability and lets no temperature overflow.

    Args:
        logits: (…, vocab), float32.
        temperature: see `Sampling`.
        top_k: see `Sampling`.
        top_p: see `Sampling`.

    Returns:
        (…, vocab), float32; the largest is 0.

    >>> import numpy as np
    >>> logits = jnp.log(jnp.array([0.5, 0.125, 0.25, 0.125]))
    >>> np.isfinite(filter_logits(logits, top_p=0.6)).tolist()
    [True, False, True, False]
    """
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if top_k is None and top_p is None:
        return scores
    size = scores.shape[-1]
    order = jnp.argsort(scores, axis=-1)
    ranked = jnp.take_along_axis(scores, order, axis=-1)  # ascending
    if top_k is not None:
        least = jnp.take(ranked, size - jnp.minimum(jnp.asarray(top_k), size), axis=-1)[..., None]
        scores, ranked = (jnp.where(values < least, -jnp.inf, values) for values in (scores, ranked))
    if top_p is not None:
        dropped = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1) <= 1 - top_p
        dropped = dropped.at[..., -1].set(False)
        back = jnp.argsort(order, axis=-1)
        scores = jnp.where(jnp.take_along_axis(dropped, back, axis=-1), -jnp.inf, scores)
    return scores


def draw(logits: jax.Array, seed: jax.Array, row_keys: jax.Array, step: jax.Array) -> jax.Array:
    """One token a row, (batch,), int32: a row's draw depends on the seed, its own key and the step, and no other row.

    Args:
        logits: (batch, vocab), of `filter_logits`.
        seed: (), uint32.
        row_keys: (batch,), uint32.
        step: (), int32: how many tokens were drawn before.
    """

    def one(row: jax.Array, row_key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row_key), step)
        return jax.random.categorical(key, row)

    return jax.vmap(one)(logits, row_keys).astype(jnp.int32)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
