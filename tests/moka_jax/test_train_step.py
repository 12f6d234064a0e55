"""One step: the loss against NumPy, accumulation, clipping, the schedule, dropout, and what stays frozen."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moka_jax import MokaParam
from moka_jax.train import OptimiserConfig, load_dataset, make_eval_step, make_optimiser, make_train_step
from moka_jax.train.data import train_batches
from moka_jax.train.step import Optimiser, TrainState, summed_loss
from tests.moka_jax.train_toys import ToyModel, arrays, make_model, make_tokenizer, quick_compilation, write_data

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield


def batch_of(folder: Path, *, batch_size: int, accumulate: int) -> dict[str, np.ndarray]:
    data = load_dataset(write_data(folder)[0], make_tokenizer())
    return next(train_batches(data, batch_size=batch_size, accumulate=accumulate, seed=3))


@functools.cache
def compiled(graphdef: nnx.GraphDef, config: OptimiserConfig, accumulate: int, seed: int) -> tuple[Optimiser, Any]:
    made = make_optimiser(config, steps=STEPS)
    return made, make_train_step(graphdef, made, accumulate=accumulate, seed=seed)


def take_step(
    model: ToyModel, batch: dict[str, np.ndarray], *, steps: int = 1, seed: int = 0, **optimiser: Any
) -> tuple[TrainState, list[dict[str, float]]]:
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    config = OptimiserConfig(**{"learning_rate": 0.01, "clip_norm": None} | optimiser)
    made, step = compiled(graphdef, config, len(batch["tokens"]), seed)
    state, seen = made.start(adapter), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        seen.append({name: value.item() for name, value in metrics.items()})
    return state, seen


def reference_loss(model: ToyModel, batch: dict[str, np.ndarray]) -> float:
    """The mean loss of the learned tokens in float64, token by token."""
    total, count = 0.0, 0
    for tokens, targets, masks in zip(batch["tokens"], batch["targets"], batch["loss_mask"], strict=True):
        logits = np.asarray(model(jnp.asarray(tokens)), np.float64)
        for row, time in np.argwhere(masks):
            scores = logits[row, time]
            total += math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[targets[row, time]]
            count += 1
    return total / count


def test_the_loss_is_the_mean_over_the_learned_tokens(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, batch_size=2, accumulate=2)
    model = make_model(dropout=0.0)
    expected = reference_loss(model, batch)
    _, (metrics,) = take_step(model, batch)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["tokens"] == batch["loss_mask"].sum()
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    evaluate = make_eval_step(graphdef)
    sums = [evaluate(adapter, frozen, {name: a[i] for name, a in batch.items()}) for i in range(2)]
    assert sum(float(s) for s, _ in sums) / sum(int(t) for _, t in sums) == pytest.approx(expected, rel=1e-6)


def test_accumulated_micro_batches_are_one_large_batch(tmp_path: Path) -> None:
    parts = batch_of(tmp_path, batch_size=2, accumulate=3)
    whole = batch_of(tmp_path, batch_size=6, accumulate=1)
    counts = parts["loss_mask"].sum(axis=(1, 2))
    assert len(set(counts.tolist())) > 1  # a mean of the micro-batches' means would be another number
    model = make_model(dropout=0.0)
    one, (first,) = take_step(model, parts)
    other, (second,) = take_step(model, whole)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)
    assert first["tokens"] == second["tokens"]
    moments = zip(arrays(one.moments), arrays(other.moments), strict=True)
    assert all(np.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in moments)


def test_padding_and_rows_without_learned_tokens_change_nothing(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, batch_size=2, accumulate=1)
    longer = {
        name: np.pad(array, [(0, 0), (0, 3)] + [(0, 32)] * (array.ndim - 2)) if array.ndim > 1 else array
        for name, array in batch.items()
    }
    model = make_model(dropout=0.0)
    (_, (one,)), (_, (other,)) = take_step(model, batch), take_step(model, longer)
    assert one == pytest.approx(other, rel=1e-5)


def test_the_step_is_that_of_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, batch_size=3, accumulate=1)
    model = make_model(dropout=0.0)
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    count = batch["loss_mask"].sum()

    def loss(adapter: nnx.State) -> jax.Array:
        logits = nnx.merge(graphdef, adapter, frozen)(jnp.asarray(batch["tokens"][0]))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][0][..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch["loss_mask"][0]) / count

    grads = arrays(jax.grad(loss)(adapter))
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads))
    before = arrays(adapter)
    settings = {"learning_rate": 0.03, "clip_norm": norm / 2, "eps": 0.01, "weight_decay": 0.1}
    state, (metrics,) = take_step(model, batch, **settings)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for old, new, grad in zip(before, arrays(state.adapter), grads, strict=True):
        clipped = grad / 2
        step = clipped / (np.abs(clipped) + 0.01) + 0.1 * old
        np.testing.assert_allclose(new, old - 0.03 * step, rtol=1e-4, atol=1e-7)
    assert int(state.step) == 1


def test_only_the_adapter_changes(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, batch_size=3, accumulate=2)
    model = make_model()
    before = arrays(nnx.state(model))
    state, metrics = take_step(model, batch, steps=3)
    for old, new in zip(before, arrays(nnx.state(model)), strict=True):
        assert np.array_equal(old, new)  # the caller's model keeps its own buffers
    started = arrays(nnx.state(model, MokaParam))
    assert all(not np.array_equal(a, b) for a, b in zip(started, arrays(state.adapter), strict=True))
    assert metrics[2]["loss"] < metrics[0]["loss"]


def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, batch_size=3, accumulate=2)

    def losses(seed: int, dropout: float = 0.5) -> list[float]:
        """The losses of steps 0 and 1, both from the same adapter: they differ by dropout alone."""
        graphdef, adapter, frozen = nnx.split(make_model(dropout=dropout), MokaParam, ...)
        made, step = compiled(graphdef, OptimiserConfig(learning_rate=0.01), 2, seed)
        starts = (dataclasses.replace(made.start(adapter), step=jnp.int32(number)) for number in (0, 1))
        return [step(start, frozen, batch)[1]["loss"].item() for start in starts]

    one, again, other = losses(0), losses(0), losses(1)
    assert one == again
    assert len({*one, *other}) == 4
    without = losses(0, dropout=0.0)
    assert without[0] == without[1]


def test_dropout_differs_between_micro_batches(tmp_path: Path) -> None:
    one = batch_of(tmp_path, batch_size=3, accumulate=1)
    twice = {name: np.concatenate([array, array]) for name, array in one.items()}
    losses = [take_step(make_model(dropout=0.5), batch)[1][0]["loss"] for batch in (one, twice)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)  # the same masks twice would give the same mean
    losses = [take_step(make_model(dropout=0.0), batch)[1][0]["loss"] for batch in (one, twice)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_schedule_is_the_documented_formula(warmup: int, kind: Any) -> None:
    config = OptimiserConfig(learning_rate=0.5, warmup_steps=warmup, schedule=kind, final_fraction=0.1)
    schedule = make_optimiser(config, steps=20).schedule
    for step in range(20):
        share = (1 + math.cos(math.pi * (step - warmup) / (20 - warmup))) / 2
        expected = 0.5 * (0.1 + 0.9 * share) if kind == "cosine" else 0.5
        expected = 0.5 * (step + 1) / warmup if step < warmup else expected
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5), step


def test_the_optimiser_uses_the_rate_that_the_metrics_report(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, batch_size=3, accumulate=1)
    model = make_model(dropout=0.0)
    before = arrays(nnx.state(model, MokaParam))
    state, (metrics,) = take_step(model, batch, learning_rate=0.4, warmup_steps=4, eps=1e-30)
    assert metrics["learning_rate"] == pytest.approx(0.1)
    # AdamW's first step is the learning rate in every entry whose gradient is not 0.
    moved = [np.abs(new - old).max() for old, new in zip(before, arrays(state.adapter), strict=True)]
    assert moved == pytest.approx([0.1] * len(moved), rel=1e-3)


def test_losses_of_narrow_logits_are_computed_in_float32() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 50)) * 4, jnp.bfloat16)
    targets = jnp.arange(8).reshape(2, 4)
    wide = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    loss = summed_loss(logits, {"targets": targets, "loss_mask": jnp.ones((2, 4), bool)})
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(wide.sum()), rel=1e-6)
