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
from moka_jax.train import (
    OptimiserConfig,
    load_dataset,
    make_eval_step,
    make_optimiser,
    make_train_step,
    start_state,
)
from moka_jax.train.batches import train_batches
from moka_jax.train.optimiser import Optimiser
from moka_jax.train.step import TrainState, summed_loss
from tests.moka_jax.train_toys import ToyModel, arrays, make_model, make_tokenizer, write_data

STEPS = 6
MAX_SKIPPED = 2


def batch_of(folder: Path, *, batch_size: int, accumulate: int) -> dict[str, np.ndarray]:
    data = load_dataset(write_data(folder)[0], make_tokenizer())
    return next(train_batches(data, batch_size=batch_size, accumulate=accumulate, seed=3))


@functools.cache
def compiled(graphdef: nnx.GraphDef, config: OptimiserConfig, accumulate: int, seed: int) -> tuple[Optimiser, Any]:
    made = make_optimiser(config, steps=STEPS)
    return made, make_train_step(graphdef, made, accumulate=accumulate, seed=seed, max_skipped_steps=MAX_SKIPPED)


def take_step(
    model: ToyModel, batch: dict[str, np.ndarray], *, steps: int = 1, seed: int = 0, **optimiser: Any
) -> tuple[TrainState, list[dict[str, float]]]:
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    config = OptimiserConfig(**{"learning_rate": 0.01, "clip_norm": None} | optimiser)
    made, step = compiled(graphdef, config, len(batch["tokens"]), seed)
    state, seen = start_state(made, adapter), []
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


def descend(name: str, grads: list[np.ndarray], start: np.ndarray, *, rate: float, decay: float) -> np.ndarray:
    """An entry's way over these gradients, in float64, by the formulas of the optimisers' papers."""
    p, first, second = start.astype(np.float64), np.zeros_like(start, np.float64), np.zeros_like(start, np.float64)
    for count, grad in enumerate(grads, start=1):
        if name == "adamw":
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            update = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
        elif name == "lion":
            update = np.sign(0.9 * first + 0.1 * grad)
            first = 0.99 * first + 0.01 * grad
        else:
            kept = 1 - count**-0.8
            second = kept * second + (1 - kept) * (grad**2 + 1e-30)
            update = grad / np.sqrt(second)
            update = update / max(1.0, np.sqrt(np.mean(update**2)))
        p = p - rate * (update + decay * p)
    return p


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_every_optimiser_moves_as_its_paper_says(name: Any) -> None:
    config = OptimiserConfig(
        learning_rate=0.1, name=name, weight_decay=0.2, clip_norm=None, schedule="linear", final_fraction=1.0
    )
    made = make_optimiser(config, steps=9)
    rng = np.random.default_rng(1)
    start = rng.normal(size=(3, 5)).astype(np.float32)
    grads = [rng.normal(size=(3, 5)).astype(np.float32) for _ in range(4)]
    params, moments = {"p": jnp.asarray(start)}, made.transform.init({"p": jnp.asarray(start)})
    for step, grad in enumerate(grads):
        updates, moments = made.transform.update({"p": jnp.asarray(grad)}, moments, params)
        params = {"p": params["p"] + made.schedule(step) * updates["p"]}
    expected = descend(name, grads, start, rate=0.1, decay=0.2)
    # measured: 2.5e-6, AdamW's bias correction 1 - 0.999^t in float32; the others 2e-7
    np.testing.assert_allclose(params["p"], expected, rtol=0, atol=1e-5)
    floats = [leaf for leaf in jax.tree.leaves(moments) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats
    assert all(leaf.dtype == jnp.float32 for leaf in floats)


def test_adafactor_keeps_a_row_and_a_column_of_a_large_factor() -> None:
    made = make_optimiser(OptimiserConfig(learning_rate=0.1, name="adafactor"), steps=9)
    moments = made.transform.init({"small": jnp.ones((2, 64, 64)), "large": jnp.ones((128, 256))})
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(moments) if leaf.size > 1)
    assert sizes == [128, 256, 2 * 64 * 64]


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_the_other_optimisers_learn(tmp_path: Path, name: Any) -> None:
    batch = batch_of(tmp_path, batch_size=3, accumulate=2)
    _, metrics = take_step(make_model(dropout=0.0), batch, steps=4, name=name, learning_rate=0.02)
    assert metrics[3]["loss"] < metrics[0]["loss"] - 0.01


def skipping(
    values: list[float], *, accumulate: int = 1
) -> Iterator[tuple[TrainState, list[np.ndarray], dict[str, jax.Array]]]:
    """After each step the state, the bits of adapter and moments, and the metrics; a value scales that step's model."""
    model = make_model(dropout=0.0)
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    made, step = compiled(graphdef, OptimiserConfig(learning_rate=0.01), accumulate, 0)
    state = start_state(made, adapter)
    rng = np.random.default_rng(0)
    for value in values:
        tokens = rng.integers(5, 200, (accumulate, 3, 33)).astype(np.int32)
        batch = {
            "tokens": tokens[..., :-1],
            "targets": tokens[..., 1:],
            "loss_mask": np.ones((accumulate, 3, 32), bool),
        }
        scaled = jax.tree.map(lambda leaf, value=value: leaf * value, frozen)
        state, metrics = step(state, scaled, batch)
        yield state, arrays((state.adapter, state.moments)), metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_bit_and_is_counted(bad: float) -> None:
    seen, bits, metrics = zip(*skipping([1.0, bad, bad, 1.0]), strict=True)
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 2, 2]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2, 0]
    assert [bool(np.isfinite(m["loss"])) for m in metrics] == [True, False, False, True]
    for later in (1, 2):
        assert all(np.array_equal(a, b) for a, b in zip(bits[0], bits[later], strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(bits[0], bits[3], strict=True))
    last = seen[3]
    assert (int(last.step), int(last.skipped), int(last.skipped_in_a_row)) == (4, 2, 0)
    assert all(np.isfinite(array).all() for array in bits[3])
    # the schedule goes on with the steps, skipped or not
    config = OptimiserConfig(learning_rate=0.01)
    rates = [float(make_optimiser(config, steps=STEPS).schedule(step)) for step in range(4)]
    assert [float(m["learning_rate"]) for m in metrics] == pytest.approx(rates)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is() -> None:
    """The derivative of √x at 0 is infinite: the loss says nothing of it."""

    class Rooted(ToyModel):
        def __call__(self, tokens: jax.Array) -> jax.Array:
            moved = jnp.sum(self.q_proj.factor_a[0][...])
            return super().__call__(tokens) + jnp.sqrt(moved - jax.lax.stop_gradient(moved))

    model = make_model(dropout=0.0, kind=Rooted)
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    made, step = compiled(graphdef, OptimiserConfig(learning_rate=0.01), 1, 0)
    start = start_state(made, adapter)
    before = arrays((start.adapter, start.moments))
    tokens = np.arange(5, 38, dtype=np.int32)[None, None]
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "loss_mask": np.ones((1, 1, 32), bool)}
    state, metrics = step(start, frozen, batch)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped"]) == 1
    after = arrays((state.adapter, state.moments))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_after_too_many_skipped_steps_nothing_moves_any_more() -> None:
    """The loop may look at the count late: what comes after the limit is not applied (optax.apply_if_finite would)."""
    _, bits, metrics = zip(*skipping([1.0, *[math.nan] * (MAX_SKIPPED + 1), 1.0, 1.0]), strict=True)
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2, 3, 4, 5]
    assert np.isfinite(metrics[-1]["loss"])
    for later in bits[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(bits[0], later, strict=True))


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
        starts = (dataclasses.replace(start_state(made, adapter), step=jnp.int32(number)) for number in (0, 1))
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
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_schedule_is_the_documented_formula(warmup: int, kind: Any) -> None:
    final = None if kind == "constant" else 0.1
    config = OptimiserConfig(learning_rate=0.5, warmup_steps=warmup, schedule=kind, final_fraction=final)
    schedule = make_optimiser(config, steps=20).schedule
    for step in range(20):
        done = (step - warmup) / (20 - warmup)
        share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}.get(kind)
        expected = 0.5 if share is None else 0.5 * (0.1 + 0.9 * share)
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
