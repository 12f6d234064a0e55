"""Greedy generation with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import DataError
from moka_jax.llama.model import KvCache, Llama


@partial(jax.jit, static_argnums=(0,), donate_argnums=(3,))
def _step(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array, cache: KvCache) -> tuple[jax.Array, KvCache]:
    logits, cache = nnx.merge(graphdef, state).decode(tokens, cache)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


def generate(
    model: Llama, prompt: Sequence[int], *, max_new_tokens: int = 64, stop_tokens: Collection[int] = ()
) -> list[int]:
    """The most likely continuation of a prompt, one token at a time.

    Args:
        prompt: token numbers, at least one.
        max_new_tokens: the most tokens to add.
        stop_tokens: ends when one of these came; it is not part of the result.

    Returns:
        The new tokens.

    Raises:
        DataError: the prompt is empty, or has numbers that are no tokens of the model, or prompt and new tokens
            do not fit its context.
    """
    context = model.config.max_position_embeddings
    if not len(prompt):
        raise DataError("generate: expected at least one prompt token; got none")
    vocabulary = model.architecture.vocab_size
    foreign = sorted({int(token) for token in prompt if not 0 <= token < vocabulary})
    if foreign:  # a look-up outside of the table gives NaN in JAX, not an error
        raise DataError(f"generate: expected tokens from 0 to {vocabulary - 1}; got {', '.join(map(str, foreign[:8]))}")
    if max_new_tokens < 0:
        raise DataError(f"generate: expected max_new_tokens of at least 0; got {max_new_tokens}")
    if len(prompt) + max_new_tokens > context:
        raise DataError(
            f"generate: {len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{context}; shorten the prompt or ask for at most {max(context - len(prompt), 0)} tokens"
        )
    graphdef, state = nnx.split(model)
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    tokens = jnp.asarray(np.asarray(prompt, np.int32))[None]
    result: list[int] = []
    for _ in range(max_new_tokens):
        following, cache = _step(graphdef, state, tokens, cache)
        token = int(following[0])
        if token in stop_tokens:
            break
        result.append(token)
        tokens = following[:, None]
    return result
