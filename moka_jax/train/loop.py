"""The training loop: steps, evaluations, checkpoints and metrics, resumable at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from moka_core import ConfigError, DataError, MokaError
from moka_jax.linear import MokaParam
from moka_jax.sharding import Layout, place
from moka_jax.train.batches import Batch, eval_batches, train_batches
from moka_jax.train.checkpoint import CheckpointError, Checkpoints, checkpoint_steps, restore
from moka_jax.train.clock import Clock
from moka_jax.train.config import TrainConfig
from moka_jax.train.data import Dataset, load_dataset
from moka_jax.train.gates import gate_values
from moka_jax.train.interrupt import Interrupt
from moka_jax.train.metrics import MetricsLog
from moka_jax.train.optimiser import make_optimiser
from moka_jax.train.preflight import check_packing, check_run, check_vocabulary
from moka_jax.train.processes import any_process, check_agreement, is_first, only_run_in
from moka_jax.train.profiler import Profiler
from moka_jax.train.report import Report
from moka_jax.train.step import Arrays, Metrics, TrainState, make_eval_step, run_step, start_state
from moka_jax.train.stopping import best_evaluation, evaluations_without_gain
from moka_jax.train.tensorboard import TensorBoard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StepHook = Callable[[int, nnx.State, Mapping[str, jax.Array]], None]


class TrainingError(MokaError):
    """The run cannot go on: its loss or gradient is no longer a number, or its metrics cannot be written."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Args:
        step: finished steps.
        interrupted: it was stopped before the last step and its evaluation; started again, it goes on from `step`.
        stopped_early: it ended before the last step, since the held-out loss no longer fell; see `EarlyStopping`.
        resumed_from: step of the checkpoint that it started from, or None.
        train_loss: loss of the newest training record, or None.
        eval_loss: newest held-out loss, or None without held-out data.
        best_step: step with the lowest held-out loss, whose checkpoint is kept, or None without held-out data.
        skipped: steps that changed nothing, since their loss or gradient was not finite.
        metrics: the metrics file.
        checkpoints: the folder of the checkpoints.
    """

    step: int
    interrupted: bool
    stopped_early: bool
    resumed_from: int | None
    train_loss: float | None
    eval_loss: float | None
    best_step: int | None
    skipped: int
    metrics: Path
    checkpoints: Path


def train(
    model: nnx.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    *,
    on_step: StepHook | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the adapter of a model, or go on with the run in `config.output`; the model then holds the newest adapter.

    Minimises the mean cross-entropy of the learned tokens over the `MokaParam` entries; everything else is frozen.
    The first Ctrl-C or SIGTERM ends the run after the step that is under way, with a checkpoint. A run that was stopped
    and started again, however often, ends with the same bits and the same losses as one that never stopped.

    Args:
        model: an NNX model with an adapter attached, that maps tokens (batch, time) int32 to logits
            (batch, time, vocabulary); for packing also with `positions` and `segments`, as `Llama` takes them.
        tokenizer: of the base model.
        config: the run. `base`, `quantise`, `dtype` and `adapter` describe the model; they are not applied here,
            but a run is not resumed with others.
        on_step: called after every step with the number of finished steps, the adapter's state, and the metrics as
            arrays. The next step gives the adapter's buffers away: copy what should last.
        console: where progress is shown; the standard output by default.

    Raises:
        ConfigError: the model has no adapter, or cannot keep packed examples apart; the batch does not fit its mesh;
            `config.output` cannot be written, or another run writes into it; a package is missing; several processes
            were not told the same.
        DataError: see `load_dataset`; a token is beyond the model's vocabulary; the metrics cannot be read.
        CheckpointError: `config.output` holds another run, or no checkpoint that is sound; one cannot be written.
        TrainingError: too many steps in a row were skipped, the held-out loss is not finite, or the metrics cannot be
            written; earlier checkpoints stay.
    """
    parts: Any = nnx.split(model, MokaParam, ...)
    graphdef, adapter, frozen = parts
    if not jax.tree.leaves(adapter):
        raise ConfigError("train: this model has no adapter; attach one first")
    if config.data.packing:
        check_packing(model)
    layout: Layout | None = getattr(model, "layout", None)
    check_run(config, layout)
    config = dataclasses.replace(config, adapter=config.adapter.resolved(getattr(model, "architecture", None)))
    learn = _load(config.data.train, tokenizer, config)
    held_out = None if config.data.eval is None else _load(config.data.eval, tokenizer, config)
    check_vocabulary(model, [learn] if held_out is None else [learn, held_out])

    optimiser = make_optimiser(config.optimiser, steps=config.steps)
    state = start_state(optimiser, adapter)
    if layout is not None:
        state = jax.tree.map(lambda leaf: place(np.asarray(leaf), layout.trained(leaf.shape)), state)
    else:
        state = _beside(frozen, state)
    batches = train_batches(
        learn,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        pack_to=config.data.max_length if config.data.packing else None,
    )
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    meaning = config.meaning() | {
        "base model": getattr(model, "base_fingerprint", None),
        "training examples": learn.digest,
        "held-out examples": None if held_out is None else held_out.digest,
    }
    check_agreement(config.shared() | meaning | {"checkpoints": checkpoint_steps(output / "checkpoints")})
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run_in(output))
        restored = restore(output / "checkpoints", state, batches, meaning=meaning)
        resumed_from = None
        if restored is not None:
            state = restored.state
            resumed_from = int(state.step)
            if resumed_from > config.steps:
                raise CheckpointError(
                    f"{output / 'checkpoints' / str(resumed_from)}: expected a step up to steps: {config.steps}; "
                    "raise steps, or use another output folder"
                )
        log = MetricsLog(output / "metrics.jsonl", resume_from=resumed_from, write=is_first())
        if held_out is not None and resumed_from and log.last("eval") is None:
            raise DataError(
                f"{log.path}: expected the held-out losses up to step {resumed_from}, which say what the best "
                "checkpoint is; there are none; put the file back, or use another output folder"
            )
        if layout is not None:
            stack.enter_context(jax.set_mesh(layout.mesh))
        board = None
        if config.tensorboard and is_first():
            first_step = 0 if resumed_from is None else resumed_from + 1
            board = stack.enter_context(TensorBoard(output / "tensorboard", first_step=first_step))
        run = _Run(
            config=config,
            train_step=run_step(graphdef, optimiser, config, layout=layout),
            eval_step=make_eval_step(graphdef),
            graphdef=graphdef,
            frozen=frozen,
            layout=layout,
            held_out=held_out,
            batches=batches,
            checkpoints=stack.enter_context(
                Checkpoints(
                    output / "checkpoints", keep=config.keep_checkpoints, meaning=meaning, config=config.to_dict()
                )
            ),
            log=log,
            board=board,
            report=stack.enter_context(
                Report(console or Console(quiet=not is_first()), steps=config.steps, done=int(state.step))
            ),
            profiler=stack.enter_context(Profiler(config.profile, output / "profile")),
        )
        run.announce(learn, resumed_from, {} if restored is None else restored.damaged)
        state = run.go(state, on_step)
    nnx.update(model, state.adapter)
    step, train_record, eval_record = int(state.step), log.last("train"), log.last("eval")
    best_step, gains_nothing = run.standing()
    stopped_early = step < config.steps and gains_nothing
    return TrainResult(
        step=step,
        interrupted=not run.has_ended(step, gains_nothing),
        stopped_early=stopped_early,
        resumed_from=resumed_from,
        train_loss=None if train_record is None else train_record["loss"],
        eval_loss=None if eval_record is None else eval_record["loss"],
        best_step=best_step,
        skipped=int(state.skipped),
        metrics=log.path,
        checkpoints=run.checkpoints.folder,
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run under way: what its steps, evaluations, checkpoints and records need."""

    config: TrainConfig
    train_step: Callable[[TrainState, nnx.State, Arrays], tuple[TrainState, Metrics]]
    eval_step: Callable[[nnx.State, nnx.State, Arrays], tuple[jax.Array, jax.Array]]
    graphdef: nnx.GraphDef
    frozen: nnx.State
    layout: Layout | None
    held_out: Dataset | None
    batches: grain.DatasetIterator[Batch]
    checkpoints: Checkpoints
    log: MetricsLog
    board: TensorBoard | None
    report: Report
    profiler: Profiler

    def announce(self, learn: Dataset, resumed_from: int | None, damaged: Mapping[int, str]) -> None:
        """Say what is learned from, and where the run goes on, and record it."""
        if not self.has_ended(resumed_from or 0, self.standing()[1]):
            self._write({"kind": "start", "step": resumed_from or 0, **_surroundings()})
        packed = f"; packed into rows of {self.config.data.max_length}" if self.config.data.packing else ""
        for split, dataset in (("train", learn), ("eval", self.held_out)):
            if dataset is None:
                continue
            counts = dataset.summary()
            self.report.say(
                f"{dataset.path}: {counts['examples']:,} examples, {counts['loss_tokens']:,} of {counts['tokens']:,} "
                f"tokens learned, longest {counts['longest']}, {counts['cut']} cut at "
                f"data.max_length {self.config.data.max_length}" + (packed if split == "train" else "")
            )
            if not any(record["kind"] == "data" and record["split"] == split for record in self.log.records):
                self._write({"kind": "data", "step": 0, "split": split, **counts})
        used = 1 if self.layout is None else self.layout.mesh.size
        if used < jax.device_count():
            self.report.say(f"this run uses {used} of {jax.device_count()} devices; mesh spreads it over more")
        if resumed_from is None:
            return
        for step, why in damaged.items():
            self.report.say(f"the checkpoint of step {step} is damaged, and was renamed to {step}.damaged: {why}")
        if damaged:
            listed = [{"step": step, "why": why} for step, why in damaged.items()]
            self._write({"kind": "fallback", "step": resumed_from, "damaged": listed})
        if self.has_ended(resumed_from, self.standing()[1]):
            self.report.say(f"this run ended at step {resumed_from} of {self.config.steps}; nothing is left to do")
        else:
            self.report.say(f"going on from step {resumed_from} of {self.config.steps}")

    def standing(self) -> tuple[int | None, bool]:
        """The step with the lowest held-out loss, if there is one, and whether early stopping ends the run here."""
        best, rule = best_evaluation(self.log.records), self.config.early_stopping
        without = 0 if rule is None else evaluations_without_gain(self.log.records, min_delta=rule.min_delta)
        return None if best is None else best["step"], rule is not None and without >= rule.patience

    def has_ended(self, step: int, gains_nothing: bool) -> bool:
        """Whether nothing is left to do: all steps are taken and evaluated, or more of them would be in vain."""
        return gains_nothing or (step == self.config.steps and not self._evaluation_is_due(step))

    def go(self, state: TrainState, on_step: StepHook | None) -> TrainState:
        """Take the remaining steps, or those until the run is stopped; what was reached is in a checkpoint."""
        config, step = self.config, int(state.step)
        metrics: Metrics = {}
        best, gains_nothing = self.standing()
        clock = Clock(before=max((record.get("seconds", 0.0) for record in self.log.records), default=0.0))
        with Interrupt(lambda: self.report.say(_STOPPING)) as interrupt:
            while True:
                with clock.pause():
                    if self._evaluation_is_due(step):
                        self._check_skipped(step, metrics)
                        self._evaluate(step, state, clock, interrupt)
                        best, gains_nothing = self.standing()
                    ended = self.has_ended(step, gains_nothing)
                    # not if the evaluation was interrupted, and will be made up for
                    if step % config.checkpoint_every == 0 and not self._evaluation_is_due(step):
                        self._record_gates(step, state)
                    stop = any_process(interrupt.requested)
                    if ended or stop or step == best or (step > 0 and step % config.checkpoint_every == 0):
                        self._check_skipped(step, metrics)
                        self.checkpoints.save(state, self.batches, best=best)
                if ended:
                    if step < config.steps:
                        self._tell_early_stop(step)
                    break
                if stop:
                    self.report.say(f"interrupted: checkpoint of step {step} saved; start again to go on from there")
                    break
                batch = next(self.batches)
                step += 1
                with self.profiler.step(step):
                    state, metrics = self.train_step(state, self.frozen, self._place(batch, axis=1))
                clock.count(int(batch["lengths"].sum()))
                if step % config.log_every == 0 or step == config.steps:
                    self._record(step, metrics, clock)
                if self.profiler.finish(step, metrics["loss"]):
                    self.report.say(f"profile of the steps up to {step}: {Path(config.output) / 'profile'}")
                self.report.advance(step)
                if on_step is not None:
                    try:
                        on_step(step, state.adapter, metrics)
                    except KeyboardInterrupt:
                        if interrupt.requested:
                            raise
                        interrupt.request()
        return state

    def _evaluation_is_due(self, step: int) -> bool:
        if self.held_out is None or (step % self.config.eval_every != 0 and step != self.config.steps):
            return False
        last = self.log.last("eval")
        return last is None or last["step"] != step

    def _evaluate(self, step: int, state: TrainState, clock: Clock, interrupt: Interrupt) -> None:
        """Record the held-out loss, Σ losses / Σ learned tokens; nothing if it was interrupted."""
        assert self.held_out is not None
        loss, tokens = 0.0, 0
        for batch in eval_batches(self.held_out, batch_size=self.config.batch_size, limit=self.config.eval_batches):
            if any_process(interrupt.requested):
                return
            summed, count = self.eval_step(state.adapter, self.frozen, self._place(batch, axis=0))
            loss, tokens = loss + float(summed), tokens + int(count)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the held-out loss is {loss}; {_WAY_OUT}; checkpoints stay")
        record = {"kind": "eval", "step": step, "loss": loss / tokens, "tokens": tokens, "seconds": clock.seconds}
        self._write(record)
        self.report.eval(record)

    def _record(self, step: int, metrics: Metrics, clock: Clock) -> None:
        """Record the metrics of a step; waits for it to be finished."""
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        counts = {name: int(metrics[name]) for name in ("skipped", "skipped_in_a_row")}
        speed, seconds_a_step = clock.lap()
        if counts["skipped_in_a_row"]:
            record = {"kind": "skip", "step": step, "reason": _reason(loss, norm), **counts, "seconds": clock.seconds}
            self._write(record)
            self.report.skip(record)
            self._check_skipped(step, metrics)
            return
        record = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": norm,
            "tokens": int(metrics["tokens"]),
            "skipped": counts["skipped"],
            "tokens_per_second": speed,
            "seconds": clock.seconds,
        }
        self._write(record)
        left = None if seconds_a_step is None else seconds_a_step * (self.config.steps - step)
        self.report.train(record, seconds_left=left)

    def _record_gates(self, step: int, state: TrainState) -> None:
        """Record the gates, if the adapter has any; once for each step."""
        last = self.log.last("gates")
        if last is None or last["step"] != step:
            gates = gate_values(self.graphdef, state.adapter, self.frozen)
            if gates:
                self._write({"kind": "gates", "step": step, "gates": gates})

    def _check_skipped(self, step: int, metrics: Metrics) -> None:
        """End the run if too many steps up to this one were skipped; waits for the step to be finished."""
        in_a_row = int(metrics.get("skipped_in_a_row", 0))
        allowed = self.config.max_skipped_steps
        if in_a_row <= allowed:
            return
        saved = checkpoint_steps(self.checkpoints.folder)
        raise TrainingError(
            f"step {step - in_a_row + 1 + allowed}: {_reason(float(metrics['loss']), float(metrics['grad_norm']))}; "
            f"{allowed + 1} step{'s' * (allowed > 0)} in a row changed nothing (max_skipped_steps: {allowed}); "
            f"{_WAY_OUT}; "
            + (f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet")
        )

    def _place(self, batch: Batch, *, axis: int) -> Arrays:
        """The arrays of a batch on the devices, the examples along `axis`; the one place where batches are spread."""
        if self.layout is None:
            return {name: jnp.asarray(array) for name, array in batch.items()}
        return {name: place(array, self.layout.batch(axis)) for name, array in batch.items()}

    def _write(self, record: Mapping[str, Any]) -> None:
        """Write a record to all files of metrics."""
        try:
            self.log.append(record)
            if self.board is not None:
                self.board.add(record)
        except OSError as error:
            raise TrainingError(
                f"step {record['step']}: the metrics cannot be written: {error}; {self.checkpoints.way_on()}"
            ) from error

    def _tell_early_stop(self, step: int) -> None:
        rule, best = self.config.early_stopping, best_evaluation(self.log.records)
        assert rule is not None
        assert best is not None
        self.report.say(
            f"stopped early after step {step}: no gain{f' of more than {rule.min_delta}' if rule.min_delta else ''} in "
            f"{rule.patience} evaluation{'s' * (rule.patience > 1)}; "
            f"the lowest held-out loss, {best['loss']:.4f}, is that of step {best['step']}"
        )


_STOPPING = "stopping after this step; press Ctrl-C again, or repeat the signal, to stop at once, without a checkpoint"
_WAY_OUT = "lower optimiser.learning_rate, lengthen optimiser.warmup_steps, or look at the data"


def _surroundings() -> dict[str, Any]:
    """What a start record tells of the machine and the packages."""
    packages = ("moka", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # of a source tree that was never installed
            versions[name] = "unknown"
    return {
        "versions": versions,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _beside(frozen: nnx.State, state: TrainState) -> TrainState:
    """The state, put on the base's device by name, as every step returns it.

    A loaded base is there by name and a new adapter by default only: the second step would be compiled anew.
    """
    where = {leaf.sharding for leaf in jax.tree.leaves(frozen)}
    if len(where) == 1 and isinstance(at := where.pop(), jax.sharding.SingleDeviceSharding):
        return jax.device_put(state, at)
    return state


def _reason(loss: float, norm: float) -> str:
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return f"gradient norm is {norm}" if not math.isfinite(norm) else "too many steps before it were skipped"


def _load(path: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Dataset:
    return load_dataset(path, tokenizer, max_length=config.data.max_length, chat_template=config.data.chat_template)
