"""What is refused before a run begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from moka_core import ConfigError, DataError
from moka_jax.sharding import Layout
from moka_jax.train.batches import LENGTH_MULTIPLE
from moka_jax.train.data import Dataset


def check_batch(batch_size: int, layout: Layout) -> None:
    """Every device has to have as many examples as the others."""
    if batch_size % layout.batch_shards:
        raise ConfigError(
            f"batch_size: expected a multiple of mesh.data · mesh.fsdp, {layout.batch_shards}; got {batch_size}"
        )


def check_packing(model: nnx.Module) -> None:
    """Packed examples would see each other in a model that is not told which tokens belong together."""
    taken = inspect.signature(model.__call__).parameters  # type: ignore[operator]
    missing = [name for name in ("positions", "segments") if name not in taken]
    if missing:
        raise ConfigError(
            f"data.packing: expected a model that takes positions and segments, as moka_jax.llama.Llama does; "
            f"{type(model).__name__} takes no {' and no '.join(missing)}; set data.packing: false"
        )


def check_vocabulary(model: nnx.Module, datasets: Iterable[Dataset]) -> None:
    """JAX clamps an index beyond an array: without this, tokens beyond the vocabulary would train nonsense."""
    graphdef, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, LENGTH_MULTIPLE), jnp.int32)
    logits = jax.eval_shape(lambda state, tokens: nnx.merge(graphdef, state)(tokens), state, tokens)
    for dataset in datasets:
        if dataset.largest_token >= logits.shape[-1]:
            raise DataError(
                f"{dataset.path}: token {dataset.largest_token} is beyond the model's vocabulary of "
                f"{logits.shape[-1]}; use the tokenizer of this base model"
            )
