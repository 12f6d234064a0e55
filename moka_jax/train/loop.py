"""The training loop: steps, evaluations, checkpoints and metrics, resumable at any step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grain
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from moka_core import ConfigError, DataError, MokaError
from moka_jax.linear import MokaParam
from moka_jax.train.checkpoint import CheckpointError, Checkpoints
from moka_jax.train.config import TrainConfig
from moka_jax.train.data import LENGTH_MULTIPLE, Batch, Dataset, eval_batches, load_dataset, train_batches
from moka_jax.train.interrupt import Interrupt
from moka_jax.train.metrics import MetricsLog
from moka_jax.train.report import Report
from moka_jax.train.step import Arrays, Metrics, TrainState, make_eval_step, make_optimiser, make_train_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StepHook = Callable[[int, nnx.State, Mapping[str, jax.Array]], None]


class TrainingError(MokaError):
    """The run cannot go on: its loss or gradient is no longer a number."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Args:
        step: finished steps.
        interrupted: it was stopped before the last step; started again, it goes on from `step`.
        resumed_from: step of the checkpoint that it started from, or None.
        train_loss: loss of the newest training record, or None.
        eval_loss: newest held-out loss, or None without held-out data.
        metrics: the metrics file.
        checkpoints: the folder of the checkpoints.
    """

    step: int
    interrupted: bool
    resumed_from: int | None
    train_loss: float | None
    eval_loss: float | None
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
    """Train the adapter of a model, or go on with the run in `config.output`; the model then holds the adapter.

    Minimises the mean cross-entropy of the learned tokens over the `MokaParam` entries; everything else is frozen.
    The first Ctrl-C ends the run after the step that is under way, with a checkpoint. A run that was stopped and
    started again, however often, ends with the same bits and the same losses as one that never stopped.

    Args:
        model: an NNX model with an adapter attached, that maps tokens (batch, time) int32 to logits
            (batch, time, vocabulary).
        tokenizer: of the base model.
        config: the run. `base`, `quantise`, `dtype` and `adapter` describe the model; they are not applied here,
            but a run is not resumed with others.
        on_step: called after every step with the number of finished steps, the adapter's state, and the metrics as
            arrays. The next step gives the adapter's buffers away: copy what should last.
        console: where progress is shown; the standard output by default.

    Raises:
        ConfigError: the model has no adapter.
        DataError: see `load_dataset`; or a token is beyond the model's vocabulary.
        CheckpointError: `config.output` holds another run, or a damaged checkpoint.
        TrainingError: loss or gradient is not finite; earlier checkpoints stay.
    """
    parts: Any = nnx.split(model, MokaParam, ...)
    graphdef, adapter, frozen = parts
    if not jax.tree.leaves(adapter):
        raise ConfigError("train: this model has no adapter; attach one first")
    learn = _load(config.data.train, tokenizer, config)
    held_out = None if config.data.eval is None else _load(config.data.eval, tokenizer, config)
    _check_vocabulary(model, [learn] if held_out is None else [learn, held_out])

    optimiser = make_optimiser(config.optimiser, steps=config.steps)
    state = optimiser.start(adapter)
    batches = train_batches(learn, batch_size=config.batch_size, accumulate=config.accumulate, seed=config.seed)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    meaning = config.meaning() | {
        "base model": getattr(model, "base_fingerprint", None),
        "training examples": learn.digest,
        "held-out examples": None if held_out is None else held_out.digest,
    }
    with Checkpoints(
        output / "checkpoints", keep=config.keep_checkpoints, meaning=meaning, config=config.to_dict()
    ) as checkpoints:
        resumed_from = checkpoints.latest
        if resumed_from is not None:
            state = checkpoints.restore(state, batches)
            if resumed_from > config.steps:
                raise CheckpointError(
                    f"{checkpoints.folder / str(resumed_from)}: expected a step up to steps: {config.steps}; "
                    "raise steps, or use another output folder"
                )
        log = MetricsLog(output / "metrics.jsonl", resume_from=resumed_from)
        with Report(console or Console(), steps=config.steps, done=int(state.step)) as report:
            run = _Run(
                config=config,
                train_step=make_train_step(graphdef, optimiser, accumulate=config.accumulate, seed=config.seed),
                eval_step=make_eval_step(graphdef),
                frozen=frozen,
                held_out=held_out,
                batches=batches,
                checkpoints=checkpoints,
                log=log,
                report=report,
            )
            run.announce(learn, resumed_from)
            state = run.go(state, on_step)
    nnx.update(model, state.adapter)
    train_record, eval_record = log.last("train"), log.last("eval")
    return TrainResult(
        step=int(state.step),
        interrupted=int(state.step) < config.steps,
        resumed_from=resumed_from,
        train_loss=None if train_record is None else train_record["loss"],
        eval_loss=None if eval_record is None else eval_record["loss"],
        metrics=log.path,
        checkpoints=checkpoints.folder,
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run under way: what its steps, evaluations, checkpoints and records need."""

    config: TrainConfig
    train_step: Callable[[TrainState, nnx.State, Arrays], tuple[TrainState, Metrics]]
    eval_step: Callable[[nnx.State, nnx.State, Arrays], tuple[jax.Array, jax.Array]]
    frozen: nnx.State
    held_out: Dataset | None
    batches: grain.DatasetIterator[Batch]
    checkpoints: Checkpoints
    log: MetricsLog
    report: Report

    def announce(self, learn: Dataset, resumed_from: int | None) -> None:
        """Say what is learned from; record it once."""
        for split, dataset in (("train", learn), ("eval", self.held_out)):
            if dataset is None:
                continue
            counts = dataset.summary()
            self.report.say(
                f"{dataset.path}: {counts['examples']:,} examples, {counts['loss_tokens']:,} of {counts['tokens']:,} "
                f"tokens learned, longest {counts['longest']}, {counts['cut']} cut at "
                f"data.max_length {self.config.data.max_length}"
            )
            if not any(record["kind"] == "data" and record["split"] == split for record in self.log.records):
                self.log.append({"kind": "data", "step": 0, "split": split, **counts})
        if resumed_from is not None:
            self.report.say(f"going on from step {resumed_from} of {self.config.steps}")

    def go(self, state: TrainState, on_step: StepHook | None) -> TrainState:
        """Take the remaining steps, or those until the run is interrupted; what was reached is in a checkpoint."""
        config, step = self.config, int(state.step)
        metrics: Metrics = {}
        clock = _Clock(before=max((record.get("seconds", 0.0) for record in self.log.records), default=0.0))
        hint = "stopping after this step; press Ctrl-C again to stop at once, without a checkpoint"
        with Interrupt(lambda: self.report.say(hint)) as interrupt:
            while True:
                with clock.pause():
                    if self._evaluation_is_due(step):
                        self._evaluate(step, state, clock, interrupt)
                    stop = interrupt.requested
                    if step == config.steps or stop or (step > 0 and step % config.checkpoint_every == 0):
                        _check_finite(step, metrics)
                        self.checkpoints.save(state, self.batches)
                if step == config.steps:
                    break
                if stop:
                    self.report.say(f"interrupted: checkpoint of step {step} saved; start again to go on from there")
                    break
                batch = next(self.batches)
                state, metrics = self.train_step(state, self.frozen, _place(batch))
                step += 1
                clock.count(int(batch["lengths"].sum()))
                if step % config.log_every == 0 or step == config.steps:
                    self._record(step, metrics, clock)
                self.report.advance(step)
                if on_step is not None:
                    try:
                        on_step(step, state.adapter, metrics)
                    except KeyboardInterrupt:
                        interrupt.request()
        return state

    def _evaluation_is_due(self, step: int) -> bool:
        last = self.log.last("eval")
        due = step % self.config.eval_every == 0 or step == self.config.steps
        return self.held_out is not None and due and (last is None or last["step"] != step)

    def _evaluate(self, step: int, state: TrainState, clock: _Clock, interrupt: Interrupt) -> None:
        """Record the held-out loss, Σ losses / Σ learned tokens; nothing if it was interrupted."""
        assert self.held_out is not None
        loss, tokens = 0.0, 0
        for batch in eval_batches(self.held_out, batch_size=self.config.batch_size, limit=self.config.eval_batches):
            if interrupt.requested:
                return
            summed, count = self.eval_step(state.adapter, self.frozen, _place(batch))
            loss, tokens = loss + float(summed), tokens + int(count)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the held-out loss is {loss}; {_WAY_OUT}")
        record = {"kind": "eval", "step": step, "loss": loss / tokens, "tokens": tokens, "seconds": clock.seconds}
        self.log.append(record)
        self.report.eval(record)

    def _record(self, step: int, metrics: Metrics, clock: _Clock) -> None:
        """Record the metrics of a step; waits for it to be finished."""
        _check_finite(step, metrics)
        speed, seconds_a_step = clock.lap()
        record = {
            "kind": "train",
            "step": step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens": int(metrics["tokens"]),
            "tokens_per_second": speed,
            "seconds": clock.seconds,
        }
        self.log.append(record)
        self.report.train(record, seconds_left=seconds_a_step * (self.config.steps - step))


class _Clock:
    """Seconds of the whole run, and tokens and steps a second since the last lap, pauses left out."""

    def __init__(self, *, before: float) -> None:
        self._start = time.perf_counter() - before
        self._lap_start = time.perf_counter()
        self._tokens = self._steps = 0

    @property
    def seconds(self) -> float:
        """Since the run began, the time between an interruption and the next start left out."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that counts for no lap."""
        begin = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - begin

    def count(self, tokens: int) -> None:
        """Note a step over this many tokens."""
        self._tokens += tokens
        self._steps += 1

    def lap(self) -> tuple[float, float]:
        """Tokens a second and seconds a step since the last lap."""
        now = time.perf_counter()
        seconds = now - self._lap_start
        rates = self._tokens / seconds, seconds / self._steps
        self._lap_start, self._tokens, self._steps = now, 0, 0
        return rates


_WAY_OUT = "lower optimiser.learning_rate, lengthen optimiser.warmup_steps, or look at the data; checkpoints stay"


def _check_finite(step: int, metrics: Metrics) -> None:
    for name in ("loss", "grad_norm"):
        if name in metrics and not math.isfinite(float(metrics[name])):
            raise TrainingError(f"step {step}: {name} is {float(metrics[name])}; {_WAY_OUT}")


def _place(batch: Batch) -> Arrays:
    """The arrays of a batch on the device; the one place where batches are distributed."""
    return {name: jnp.asarray(array) for name, array in batch.items()}


def _load(path: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Dataset:
    return load_dataset(path, tokenizer, max_length=config.data.max_length, chat_template=config.data.chat_template)


def _check_vocabulary(model: nnx.Module, datasets: Iterable[Dataset]) -> None:
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
