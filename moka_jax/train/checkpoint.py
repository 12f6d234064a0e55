"""Checkpoints of a run: adapter, optimiser, data position, step and config; never the base model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from moka_core import MokaError
from moka_jax.train.step import TrainState

FORMAT_VERSION = 1


class CheckpointError(MokaError):
    """A checkpoint is damaged, or belongs to another run than the one that would resume it."""


class Checkpoints:
    """The newest checkpoints of one run, written whole or not at all.

    Args:
        folder: where they are; made if it does not exist.
        keep: how many of the newest stay.
        meaning: flat plain values that decide the run's result; a checkpoint with others is refused.
        config: the whole config as plain values, kept for the reader.

    Raises:
        CheckpointError: the description of a checkpoint cannot be read.
    """

    def __init__(self, folder: Path, *, keep: int, meaning: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.folder = folder.resolve()
        self._meaning = json.loads(json.dumps(meaning))
        self._config = json.loads(json.dumps(config))
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )
        except ValueError as error:  # Orbax reads every description at once, and does not say whose is damaged
            raise CheckpointError(
                f"{self.folder}: damaged checkpoint; delete the one whose _CHECKPOINT_METADATA cannot be read: {error}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, state: TrainState, data: grain.DatasetIterator[Any]) -> int:
        """Save the state and the position in the data, unless that step is saved already; returns the step."""
        step = int(state.step)
        if step not in {checkpoint.step for checkpoint in self._orbax.checkpoints}:
            self._orbax.save_checkpointables(
                step,
                {"adapter": state.adapter, "moments": state.moments, "data": data},
                force=True,
                custom_metadata={
                    "format_version": FORMAT_VERSION,
                    "meaning": self._meaning,
                    "config": self._config,
                    "digest": _digest(state, data),
                },
            )
        return step

    def restore(self, like: TrainState, data: grain.DatasetIterator[Any]) -> TrainState:
        """The state of the newest checkpoint; `data` is moved to its position.

        Args:
            like: a state with the structure, shapes, dtypes and devices to restore to.
            data: the run's iterator over training batches.

        Raises:
            CheckpointError: what decides the result has changed (every change is listed), or the checkpoint is
                damaged.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"{self.folder}: expected a checkpoint; there is none")
        where = self.folder / str(step)
        try:
            saved = ocp.metadata(where, checkpointable_name="adapter").custom_metadata or {}
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged(step, error) from error
        if saved.get("format_version") != FORMAT_VERSION or not isinstance(saved.get("meaning"), dict):
            raise CheckpointError(
                f"{where}: expected a checkpoint of this program, format {FORMAT_VERSION}; "
                f"got format {saved.get('format_version')!r}; use another output folder"
            )
        changes = _changes(saved["meaning"], self._meaning)
        if changes:
            raise CheckpointError(
                f"{where}: this checkpoint belongs to another run; {len(changes)} setting{'s' * (len(changes) > 1)} "
                "differ:\n  " + "\n  ".join(changes) + "\nset them back to resume it, or use another output folder"
            )
        abstract = jax.tree.map(_abstract, {"adapter": like.adapter, "moments": like.moments})
        try:
            loaded = self._orbax.load_checkpointables(step, {**abstract, "data": data})
        except (ValueError, OSError, KeyError) as error:
            raise self._damaged(step, error) from error
        state = TrainState(
            adapter=loaded["adapter"],
            moments=loaded["moments"],
            step=jax.device_put(np.int32(step), like.step.sharding),
        )
        if _digest(state, data) != saved.get("digest"):
            raise self._damaged(step, "its contents are not those that were saved")
        return state

    def _damaged(self, step: int, why: object) -> CheckpointError:
        others = sorted(checkpoint.step for checkpoint in self._orbax.checkpoints if checkpoint.step != step)
        way_out = f"resume from step {others[-1]}" if others else "start again"
        return CheckpointError(
            f"{self.folder / str(step)}: damaged checkpoint; delete this folder to {way_out}: {str(why)[:300]}"
        )


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digest(state: TrainState, data: grain.DatasetIterator[Any]) -> str:
    """SHA-256 of every array, the step and the position in the data."""
    digest = hashlib.sha256(json.dumps([int(state.step), data.get_state()], sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.adapter, state.moments)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs."""
    absent = object()

    def show(value: Any) -> str:
        return "nothing" if value is absent else json.dumps(value)

    pairs = {name: (saved.get(name, absent), now.get(name, absent)) for name in sorted({*saved, *now})}
    return [
        f"{name}: the checkpoint has {show(old)}, this run {show(new)}"
        for name, (old, new) in pairs.items()
        if old != new
    ]
