"""Checkpoints of a run: adapter, optimiser, data position, counts and config; never the base model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from moka_core import MokaError, base_difference
from moka_jax.sharding import place
from moka_jax.train.config import differing_settings
from moka_jax.train.processes import is_first, wait_for_all, whole
from moka_jax.train.step import TrainState

FORMAT_VERSION = 2

# What Orbax raises for files that are missing, cut off or changed, and for those that it cannot write. (What else it
# may raise, such as a device out of memory, says nothing about the files.)
FILE_ERRORS = (ValueError, OSError, KeyError)


class CheckpointError(MokaError):
    """A checkpoint is damaged, cannot be written, or belongs to another run than the one that would resume it."""


class DamageError(Exception):
    """Why a checkpoint cannot be read; the caller knows whether another one will do."""


class Checkpoints:
    """Writes the checkpoints of one run, each whole or not at all, and deletes old ones.

    Orbax reads the descriptions of all that are there, and fails if one is damaged: `restore` comes first.

    Args:
        folder: where they are; made if it does not exist.
        keep: how many of the newest stay.
        meaning: flat plain values that decide the run's result; see `restore`.
        config: the whole config as plain values, kept for the reader.
    """

    def __init__(self, folder: Path, *, keep: int, meaning: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.folder = folder.resolve()
        self._meaning = json.loads(json.dumps(meaning))
        self._config = json.loads(json.dumps(config))
        self._best = _OneStep()
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), self._best]),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Orbax raises the error of a failed save once more on closing
        with contextlib.nullcontext() if kind is None else contextlib.suppress(*FILE_ERRORS):
            self._orbax.close()

    def save(self, state: TrainState, data: grain.DatasetIterator[Any], *, best: int | None = None) -> None:
        """Save the state and the position in the data, unless that step is saved already.

        Args:
            best: a step whose checkpoint stays, however old it is.

        Raises:
            CheckpointError: it cannot be written; those before it stay as they are.
        """
        step = int(state.step)
        self._best.step = best
        if step in checkpoint_steps(self.folder):
            return
        try:
            self._orbax.save_checkpointables(
                step,
                {"adapter": state.adapter, "moments": state.moments, "data": data},
                force=True,
                custom_metadata={
                    "format_version": FORMAT_VERSION,
                    "meaning": self._meaning,
                    "config": self._config,
                    "skipped": int(state.skipped),
                    "skipped_in_a_row": int(state.skipped_in_a_row),
                    "adapter_digest": digest_of(state.adapter),
                    "digest": _whole_digest(state, data),
                },
            )
        except FILE_ERRORS as error:
            raise CheckpointError(
                f"{self.folder / str(step)}: the checkpoint cannot be written: {first_line(error)}; {self.way_on()}"
            ) from error

    def way_on(self) -> str:
        """What is safe when the run has to end now, and how it goes on."""
        steps = checkpoint_steps(self.folder)
        if not steps:
            return "there is no checkpoint yet: make room on the disk, and start again from the beginning"
        return f"the checkpoint of step {steps[-1]} is safe: make room on the disk, and start again to go on from there"


@dataclass
class _OneStep:
    """An Orbax policy that keeps the checkpoint of one step, whichever it is at the time."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A state from a checkpoint, and what is wrong with those that were set aside, by step."""

    state: TrainState
    damaged: Mapping[int, str]


def restore(
    folder: Path, like: TrainState, data: grain.DatasetIterator[Any], *, meaning: Mapping[str, Any]
) -> Restored | None:
    """The state of the newest checkpoint that is sound, or None if there is no checkpoint at all.

    `data` is moved to its position. Newer checkpoints that are damaged, and older ones whose description is, are
    renamed to STEP.damaged.

    Args:
        folder: of `Checkpoints`.
        like: a state with the structure, shapes, dtypes and devices to restore to.
        data: the run's iterator over training batches.
        meaning: of `Checkpoints`.

    Raises:
        CheckpointError: a checkpoint is of another run (every changed setting is listed) or of another version of
            this program; or all are damaged (each is listed, and left as it is).
    """
    folder = folder.resolve()
    damaged: dict[int, str] = {}
    steps = checkpoint_steps(folder)
    for step in reversed(steps):
        where = folder / str(step)
        try:
            description = describe(where)
            _check_same_run(where, description["meaning"], json.loads(json.dumps(meaning)))
            state = _load(where, description, like, data)
        except DamageError as problem:
            damaged[step] = str(problem)
            continue
        damaged |= {older: why for older in steps if older < step and (why := _unreadable(folder / str(older)))}
        wait_for_all("every process has read the checkpoints")
        for bad in damaged if is_first() else ():
            _set_aside(folder / str(bad))
        wait_for_all("damaged checkpoints are set aside")
        return Restored(state=state, damaged=damaged)
    if damaged:
        listed = "\n  ".join(f"{step}: {why}" for step, why in damaged.items())
        raise CheckpointError(
            f"{folder}: expected a sound checkpoint; all {len(damaged)} are damaged:\n  {listed}\n"
            "nothing was deleted; delete this folder to start again from the beginning, or use another output folder"
        )
    return None


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending, damaged ones included.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: expected a folder that can be read; {error}") from error
    return sorted(int(name) for name in names if name.isdecimal())


def describe(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: the `custom_metadata` of `Checkpoints.save`.

    Raises:
        DamageError: it cannot be read.
        CheckpointError: it is of another version of this program.
    """
    try:
        description = ocp.metadata(checkpoint, checkpointable_name="adapter").custom_metadata
    except FILE_ERRORS as error:
        raise DamageError(first_line(error)) from error
    expected = {"format_version", "meaning", "config", "skipped", "skipped_in_a_row", "adapter_digest", "digest"}
    if not isinstance(description, dict) or "format_version" not in description:
        raise DamageError("its description is missing or cut off")
    if description["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of this program, format {FORMAT_VERSION}; "
            f"got format {description['format_version']!r}; use another output folder"
        )
    if set(description) != expected or not isinstance(description["meaning"], dict):
        raise DamageError(f"its description has no {', '.join(sorted(expected - set(description))) or 'settings'}")
    return description


def _unreadable(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's description, if anything is."""
    try:
        describe(checkpoint)
    except DamageError as problem:
        return str(problem)
    except CheckpointError:  # of another version, which is whole
        pass
    return None


def digest_of(tree: Any) -> str:
    """SHA-256 of every array of a tree, with its path, dtype and shape."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = whole(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """An error of Orbax, whose messages go on for pages, in one short line."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    text = text.split("\n")[0].split(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _load(
    where: Path, description: Mapping[str, Any], like: TrainState, data: grain.DatasetIterator[Any]
) -> TrainState:
    wanted = jax.tree.map(_abstract, {"adapter": like.adapter, "moments": like.moments})
    try:
        loaded = ocp.load_checkpointables(where, {**wanted, "data": data})
    except FILE_ERRORS as error:
        raise DamageError(first_line(error)) from error

    def count(value: int, like: jax.Array) -> jax.Array:
        return place(np.asarray(value, np.int32), like.sharding)

    state = replace(
        like,
        adapter=loaded["adapter"],
        moments=loaded["moments"],
        step=count(int(where.name), like.step),
        skipped=count(description["skipped"], like.skipped),
        skipped_in_a_row=count(description["skipped_in_a_row"], like.skipped_in_a_row),
    )
    if _whole_digest(state, data) != description["digest"]:
        raise DamageError("its contents are not those that were saved")
    return state


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _whole_digest(state: TrainState, data: grain.DatasetIterator[Any]) -> str:
    """SHA-256 of every array, the counts and the position in the data."""
    counts = [int(state.step), int(state.skipped), int(state.skipped_in_a_row)]
    position = json.dumps([*counts, data.get_state()], sort_keys=True)
    return hashlib.sha256((position + digest_of((state.adapter, state.moments))).encode()).hexdigest()


def _check_same_run(where: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, base, changes = saved.get("base model"), now.get("base model"), []
    if isinstance(before, str) and isinstance(base, str):  # one model has several fingerprints, by its precision
        now = {**now, "base model": before}
        changes += [f"another base model: {told}" for told in [base_difference(before, base)] if told]
    changes += filter(None, [differing_settings(saved, now, names=("the checkpoint", "this run"))])
    if changes:
        longer = "; to train its adapter for longer, export it and begin a run from it (adapter.start)"
        raise CheckpointError(
            f"{where}: this checkpoint belongs to another run; {'; '.join(changes)}\n"
            "set them back to resume it, or use another output folder"
            + longer
            * (saved.get("steps") != now.get("steps"))
        )


def _set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that the step can be saved anew and somebody can still look at it."""
    names = (f"{checkpoint.name}.damaged{'' if n == 0 else f'-{n}'}" for n in range(1000))
    checkpoint.rename(next(path for name in names if not (path := checkpoint.with_name(name)).exists()))
