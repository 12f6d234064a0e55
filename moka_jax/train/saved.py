"""What a finished or stopped run left: its config and an adapter, without the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx

from moka_core.paths import no_file, no_folder
from moka_jax.linear import MokaParam
from moka_jax.train.checkpoint import (
    FILE_ERRORS,
    CheckpointError,
    DamageError,
    checkpoint_steps,
    describe,
    digest_of,
    first_line,
)
from moka_jax.train.metrics import read_metrics
from moka_jax.train.stopping import best_evaluation

Which = Literal["last", "best"]


def saved_run(run: str | Path, *, which: Which = "last") -> tuple[dict[str, Any], str | None]:
    """The settings of the run in an output folder, for `TrainConfig.from_dict`, and its base model's fingerprint.

    Args:
        which: "last" for the newest checkpoint, "best" for the one with the lowest held-out loss.

    Raises:
        CheckpointError: the folder has no such checkpoint, or it cannot be read.
    """
    checkpoint = _checkpoint(run, which)
    try:
        saved = describe(checkpoint)
    except DamageError as problem:
        raise _damaged(checkpoint, problem) from problem
    return saved["config"], saved["meaning"]["base model"]


def readable_settings(run: str | Path) -> dict[str, Any] | None:
    """The settings that the newest checkpoint notes whose description can be read; None if a run has no checkpoint.

    Raises:
        CheckpointError: no checkpoint's description can be read (each is listed), or it is of another version.
    """
    folder = (Path(run) / "checkpoints").resolve()
    damaged = []
    for step in reversed(checkpoint_steps(folder)):
        try:
            return describe(folder / str(step))["config"]
        except DamageError as problem:
            damaged.append(f"{step}: {problem}")
    if not damaged:
        return None
    raise CheckpointError(f"{folder}: all {len(damaged)} checkpoints are damaged:\n  " + "\n  ".join(damaged))


def restore_adapter(run: str | Path, model: nnx.Module, *, which: Which = "last") -> int:
    """Put an adapter of a run into a model that has one attached; returns the step that it is from.

    Args:
        model: adapted as the run's was; its arrays may be abstract (`nnx.eval_shape`).
        which: "last" for the newest checkpoint, "best" for the one with the lowest held-out loss.

    Raises:
        CheckpointError: the folder has no such checkpoint, or it does not fit or cannot be read.
    """
    checkpoint = _checkpoint(run, which)
    _, adapter, _ = nnx.split(model, MokaParam, ...)  # type: ignore[misc]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), adapter)
    try:
        digest = describe(checkpoint)["adapter_digest"]
        loaded = ocp.load_checkpointables(checkpoint, {"adapter": wanted})
    except DamageError as problem:
        raise _damaged(checkpoint, problem) from problem
    except FILE_ERRORS as error:
        raise _damaged(checkpoint, first_line(error)) from error
    if digest_of(loaded["adapter"]) != digest:
        raise _damaged(checkpoint, "the adapter is not the one that was saved")
    nnx.update(model, loaded["adapter"])
    return int(checkpoint.name)


def _checkpoint(run: str | Path, which: Which) -> Path:
    folder = (Path(run) / "checkpoints").resolve()
    steps = checkpoint_steps(folder)
    if not steps:
        found = no_folder(run) or "it has no checkpoints/STEP (see moka train)"
        if no_file(Path(run) / "adapter_config.json") is None:
            found = "it is an adapter folder already, as moka export writes it"
        raise CheckpointError(f"{run}: expected the output folder of a training run; {found}")
    if which == "last":
        return folder / str(steps[-1])
    if which != "best":
        raise CheckpointError(f"which: expected last or best; got {which!r}")
    metrics = Path(run) / "metrics.jsonl"
    records = read_metrics(metrics, allow_cut_end=True) if metrics.is_file() else []
    # what a crash left beyond the newest checkpoint is taken back when the run goes on
    best = best_evaluation(record for record in records if record["step"] <= steps[-1])
    if best is None:
        raise CheckpointError(
            f"{metrics}: expected a held-out loss after at least one step, to choose the best checkpoint by; there is "
            "none (has the run data.eval?); take the last one"
        )
    if best["step"] not in steps:
        raise CheckpointError(
            f"{folder}: expected the checkpoint of step {best['step']}, whose held-out loss is the lowest "
            f"({best['loss']:.4f}); there are {', '.join(map(str, steps))}; take the last one"
        )
    return folder / str(best["step"])


def _damaged(checkpoint: Path, why: object) -> CheckpointError:
    others = [step for step in checkpoint_steps(checkpoint.parent) if str(step) != checkpoint.name]
    told = f"the run has checkpoints of step {', '.join(map(str, others))}, too" if others else "the run has no other"
    return CheckpointError(
        f"{checkpoint}: damaged checkpoint: {why}; {told}; started again, the run goes on from the newest sound one"
    )
