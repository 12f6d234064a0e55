"""Generation with a key/value cache: one prompt or several at once, token by token."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import ConfigError, DataError, ModelError
from moka_core.paths import json_object
from moka_jax.llama.config import LlamaConfig
from moka_jax.llama.model import KvCache, Llama
from moka_jax.llama.sampling import SEEDS, Sampling, draw, filter_logits

GREEDY = Sampling()
OnToken = Callable[[int, int], None]
_SMALLEST = 16  # tokens: shorter prompts are padded to it


@overload
def generate(
    model: Llama,
    prompts: Sequence[int],
    *,
    max_new_tokens: int | None = ...,
    stop_tokens: Collection[int] = ...,
    sampling: Sampling = ...,
    row_keys: Sequence[int] | None = ...,
    on_token: OnToken | None = ...,
) -> list[int]: ...


@overload
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = ...,
    stop_tokens: Collection[int] = ...,
    sampling: Sampling = ...,
    row_keys: Sequence[int] | None = ...,
    on_token: OnToken | None = ...,
) -> list[list[int]]: ...


def generate(
    model: Llama,
    prompts: Any,
    *,
    max_new_tokens: int | None = 64,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    row_keys: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Any:
    """The continuation of a prompt, or of each of several.

    In a batch every row is what it would be alone: prompts may differ in length, each ends on its own, and with one
    seed and one row key a draw is the same whatever the other rows are.

    Args:
        prompts: token numbers, at least one; or several such prompts.
        max_new_tokens: the most tokens to add to each; None: as many as the model's context has room for.
        stop_tokens: a row ends when one of these came; it is not part of the result.
        sampling: how a token is chosen; the most likely one by default.
        row_keys: one whole number a row, from 0 to 2³² - 1, that its draws depend on beside the seed; 0, 1, … by
            default, so that equal prompts in a batch get different texts.
        on_token: called with (row, token) as soon as a token is there.

    Returns:
        The new tokens; a list of such lists for several prompts.

    Raises:
        DataError: there is no prompt, or one is empty, has numbers that are no tokens of the model, or does not fit its
            context together with the new tokens; all such prompts are listed.
        ConfigError: row_keys do not fit.
        ModelError: the model's logits are not finite.
    """
    rows, single = _as_rows(prompts)
    results: list[list[int]] = [[] for _ in rows]
    steps = _start(
        model, rows, single=single, max_new=max_new_tokens, stop=stop_tokens, sampling=sampling, row_keys=row_keys
    )
    for step in steps:
        for row, token in enumerate(step):
            if token is not None:
                results[row].append(token)
                if on_token is not None:
                    on_token(row, token)
    return results[0] if single else results


@overload
def stream(
    model: Llama,
    prompts: Sequence[int],
    *,
    max_new_tokens: int | None = ...,
    stop_tokens: Collection[int] = ...,
    sampling: Sampling = ...,
    row_keys: Sequence[int] | None = ...,
) -> Iterator[int]: ...


@overload
def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = ...,
    stop_tokens: Collection[int] = ...,
    sampling: Sampling = ...,
    row_keys: Sequence[int] | None = ...,
) -> Iterator[list[int | None]]: ...


def stream(
    model: Llama,
    prompts: Any,
    *,
    max_new_tokens: int | None = 64,
    stop_tokens: Collection[int] = (),
    sampling: Sampling = GREEDY,
    row_keys: Sequence[int] | None = None,
) -> Iterator[Any]:
    """The tokens of `generate`, each as soon as it is there.

    Args:
        model: see `generate`, as for all others.
        prompts: of tokens.
        max_new_tokens: of each prompt.
        stop_tokens: end a row.
        sampling: how a token is chosen.
        row_keys: of the random numbers of each row.

    Returns:
        An iterator over the new tokens of one prompt; over lists of one entry a row for several prompts, None standing
        for a row that has ended. It ends when all rows have.

    Raises:
        ConfigError: see `generate`; what is wrong with the arguments is told at once.
        DataError: likewise.
    """
    rows, single = _as_rows(prompts)
    steps = _start(
        model, rows, single=single, max_new=max_new_tokens, stop=stop_tokens, sampling=sampling, row_keys=row_keys
    )
    return (step[0] for step in steps) if single else steps


def folder_stop_tokens(folder: str | Path) -> list[int]:
    """The tokens that end a text of the model in a folder, as transformers takes them.

    Those of `eos_token_id` in generation_config.json, one number or a list; in config.json if that file is not there.

    Raises:
        ModelError: a file cannot be read, or eos_token_id is not a token or a list of them.
    """
    file = Path(folder) / "generation_config.json"
    if not os.path.isfile(file):
        file = Path(folder) / "config.json"
    found = json_object(file, ModelError, needed="expected a Hugging Face model folder").get("eos_token_id")
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in tokens):
        raise ModelError(f"{file}: eos_token_id: expected a token or a list of tokens; got {found!r}")
    return tokens


def check_prompts(
    config: LlamaConfig,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int | None = 64,
    single: bool = False,
) -> list[int]:
    """The most new tokens that each prompt can get, if all prompts can be continued.

    Args:
        config: of the model; its weights are not needed.
        prompts: the tokens of each, (length,); see `generate`.
        max_new_tokens: see `generate`.
        single: there is one prompt only, which an error need not name.

    Raises:
        DataError: see `generate`.
    """
    if max_new_tokens is not None and max_new_tokens < 0:
        raise DataError(f"generate: expected max_new_tokens of at least 0; got {max_new_tokens}")
    if not len(prompts):
        raise DataError("generate: expected at least one prompt; got none")
    limits, problems = [], []
    for index, prompt in enumerate(prompts):
        limit, problem = _limit(config, prompt, max_new_tokens)
        limits.append(limit)
        if problem:
            problems.append(problem if single else f"prompt {index + 1} of {len(prompts)}: {problem}")
    if problems:
        listed = problems[0] if len(problems) == 1 else "\n  " + "\n  ".join(problems)
        raise DataError(f"generate: {listed}")
    return limits


def _limit(config: LlamaConfig, prompt: Sequence[int] | np.ndarray, most: int | None) -> tuple[int, str | None]:
    """The most new tokens that a prompt can get, and what is wrong with it."""
    if not len(prompt):
        return 0, "expected at least one prompt token; got none"
    vocabulary = config.architecture.vocab_size
    foreign = sorted({int(token) for token in prompt if not 0 <= token < vocabulary})
    if foreign:  # a look-up outside of the table gives NaN in JAX, not an error
        return 0, f"expected tokens from 0 to {vocabulary - 1}; got {', '.join(map(str, foreign[:8]))}"
    length, context, rope = len(prompt), config.max_position_embeddings, config.rope
    what = f"the model's context of {context}"
    if rope.kind == "longrope" and length <= rope.original_max_position < context:
        # beyond it all positions are turned by other angles, those in the cache too
        context = rope.original_max_position
        what = f"{context}, beyond which rope type 'longrope' would have to read the whole text anew"
    room = max(context - length, 0)
    if length > context or (most is not None and most > room):
        return 0, (
            f"{length} prompt tokens and {most or 0} new ones exceed {what}; "
            f"shorten the prompt or ask for at most {room} tokens"
        )
    return room if most is None else most, None


def _as_rows(prompts: Any) -> tuple[list[np.ndarray], bool]:
    """Every prompt as an array, and whether a single one was meant."""
    single = len(prompts) > 0 and np.ndim(prompts[0]) == 0
    rows = [np.asarray(row) for row in ([prompts] if single else prompts)]
    for index, row in enumerate(rows):
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            named = "" if single else f"prompt {index + 1} of {len(rows)}: "
            raise DataError(
                f"generate: {named}expected a list of token numbers; got {prompts[0 if single else index]!r}"
            )
    return rows, single


def _start(
    model: Llama,
    rows: list[np.ndarray],
    *,
    single: bool,
    max_new: int | None,
    stop: Collection[int],
    sampling: Sampling,
    row_keys: Sequence[int] | None,
) -> Iterator[list[int | None]]:
    """The steps of a batch, once its arguments were found to be good."""
    limits = check_prompts(model.config, rows, max_new_tokens=max_new, single=single)
    keys = list(range(len(rows))) if row_keys is None else list(row_keys)
    if len(keys) != len(rows) or any(not 0 <= key < SEEDS for key in keys):
        raise ConfigError(f"row_keys: expected {len(rows)} whole numbers from 0 to {SEEDS - 1}; got {keys}")
    return _steps(model, rows, limits, frozenset(stop), sampling, np.asarray(keys, np.uint32))


def _steps(
    model: Llama, rows: list[np.ndarray], limits: list[int], stop: frozenset[int], sampling: Sampling, keys: np.ndarray
) -> Iterator[list[int | None]]:
    """The tokens of each step, None for rows that have ended."""
    if not any(limits):
        return
    context = model.config.max_position_embeddings
    counts = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), padded_length(int(counts.max()), context)), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    needed = max(len(row) + limit for row, limit in zip(rows, limits, strict=True))
    cache = model.new_cache(len(rows), padded_length(needed, context))
    graphdef, state = nnx.split(model)
    top_k, top_p = sampling.kept(model.architecture.vocab_size)
    choice = (np.float32(sampling.temperature), top_k, top_p, np.uint32(sampling.seed), keys)
    lives = [limit > 0 for limit in limits]
    following: Any = tokens
    for step in range(max(limits)):
        following, finite, cache = _step(
            graphdef, sampling.draws, state, following, counts, cache, choice, np.int32(step)
        )
        found = np.asarray(following)[:, 0].tolist()
        broken = [row for row in np.flatnonzero(~np.asarray(finite)).tolist() if lives[row]]
        if broken:
            raise ModelError(
                f"generate: the model's logits are not finite, after {step} new tokens, for prompt {broken[0] + 1} of "
                f"{len(rows)}; its weights or its adapter may hold NaN or infinite entries, or overflow in "
                f"{jnp.dtype(model.dtype).name}"
            )
        lives = [alive and token not in stop for alive, token in zip(lives, found, strict=True)]
        if any(lives):
            yield [token if alive else None for alive, token in zip(lives, found, strict=True)]
        lives = [alive and step + 1 < limit for alive, limit in zip(lives, limits, strict=True)]
        if not any(lives):
            return
        counts = np.ones_like(counts)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5,))
def _step(
    graphdef: nnx.GraphDef,
    draws: bool,
    state: nnx.State,
    tokens: jax.Array,
    counts: jax.Array,
    cache: KvCache,
    choice: tuple[Any, ...],
    step: jax.Array,
) -> tuple[jax.Array, jax.Array, KvCache]:
    """The next token of every row (batch, 1), whether its logits are finite, and the cache that has read `tokens`."""
    logits, cache = nnx.merge(graphdef, state).decode(tokens, cache, counts)
    if draws:
        temperature, top_k, top_p, seed, row_keys = choice
        found = draw(filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p), seed, row_keys, step)
    else:
        found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return found[:, None], jnp.isfinite(logits).all(axis=-1), cache


def padded_length(length: int, most: int) -> int:
    """A length of at least this many tokens, of which there are four an octave: few shapes, so few compilations.

    >>> [padded_length(length, 8192) for length in (3, 16, 17, 21, 100, 1025, 8000)]
    [16, 16, 20, 24, 112, 1280, 8192]
    """
    if length <= _SMALLEST:
        return min(_SMALLEST, most)
    step = 1 << ((length - 1).bit_length() - 3)
    return min(-(-length // step) * step, most)
