"""What is refused before a run begins."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from moka_core import ConfigError, DataError
from moka_jax.sharding import Layout
from moka_jax.train.batches import LENGTH_MULTIPLE
from moka_jax.train.config import TrainConfig
from moka_jax.train.data import Dataset, check_readable
from moka_jax.train.processes import is_first
from moka_jax.train.tensorboard import check_tensorboard


def check_run(config: TrainConfig, layout: Layout | None) -> None:
    """What needs neither the model nor the tokens: the batch, the data files, the output folder, packages.

    Args:
        layout: of the model, or of `config.mesh`, on which it will be.

    Raises:
        ConfigError: the batch cannot be split over the mesh, the output folder cannot be written, or tensorboardX is
            missing.
        DataError: a file of examples cannot be read, or has no line.
    """
    if layout is not None:
        check_batch(config.batch_size, layout)
    for path in filter(None, (config.data.train, config.data.eval)):
        check_readable(path)
    check_output(config)
    if config.tensorboard:
        check_tensorboard()


def check_output(config: TrainConfig) -> None:
    """Raise a ConfigError unless a run can write into its output folder, which need not exist; nothing is left there.

    What the run will write may be there of an earlier one, but no file in the place of a folder, no model, no adapter.
    """
    folder = Path(config.output)
    for file, what in {"config.json": "a model", "adapter_config.json": "an adapter"}.items():
        if os.path.exists(folder / file):
            raise ConfigError(
                f"output: expected a folder for this run alone; {folder} holds {what}; use another folder"
            )
    is_folder_of = {"metrics.jsonl": False, "checkpoints": True}
    is_folder_of |= {"tensorboard": True} if config.tensorboard else {}
    is_folder_of |= {"profile": True} if config.profile is not None else {}
    for name, is_folder in is_folder_of.items():
        path = folder / name
        if os.path.exists(path) and os.path.isdir(path) != is_folder:
            expected, got = ("folder", "file") if is_folder else ("file", "folder")
            raise ConfigError(
                f"output: expected {path} to be a {expected}, as a run writes it, or not to be there; it is a {got}; "
                "move it away, or use another output folder"
            )
    if not is_first():
        return  # this process writes nothing
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.stat()
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(nearest))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"output: expected a folder that can be made and written into, {folder}; {error}; use another one"
        ) from error


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
