"""What a finished or stopped run left: its config and its newest adapter, without the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx

from moka_jax.linear import MokaParam
from moka_jax.train.checkpoint import FORMAT_VERSION, CheckpointError


def saved_run(run: str | Path) -> tuple[dict[str, Any], str | None]:
    """The settings of the run in an output folder, for `TrainConfig.from_dict`, and its base model's fingerprint.

    Raises:
        CheckpointError: the folder has no checkpoint, or the newest one cannot be read.
    """
    newest = _newest(run)
    try:
        saved = ocp.metadata(newest, checkpointable_name="adapter").custom_metadata or {}
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{newest}: damaged checkpoint: {error}") from error
    if saved.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{newest}: expected a checkpoint of this program, format {FORMAT_VERSION}; "
            f"got format {saved.get('format_version')!r}"
        )
    return saved["config"], saved["meaning"]["base model"]


def restore_adapter(run: str | Path, model: nnx.Module) -> int:
    """Put a run's newest adapter into a model that has one attached; returns the step that it is from.

    Args:
        model: adapted as the run's was; its arrays may be abstract (`nnx.eval_shape`).

    Raises:
        CheckpointError: the folder has no checkpoint, or the newest one does not fit or cannot be read.
    """
    newest = _newest(run)
    _, adapter, _ = nnx.split(model, MokaParam, ...)  # type: ignore[misc]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), adapter)
    try:
        loaded = ocp.load_checkpointables(newest, {"adapter": wanted})
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{newest}: its adapter cannot be restored: {error}") from error
    nnx.update(model, loaded["adapter"])
    return int(newest.name)


def _newest(run: str | Path) -> Path:
    folder = (Path(run) / "checkpoints").resolve()
    steps = [entry for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    if not steps:
        raise CheckpointError(
            f"{run}: expected the output folder of a training run; it has no checkpoints/STEP (see moka train)"
        )
    return max(steps, key=lambda entry: int(entry.name))
