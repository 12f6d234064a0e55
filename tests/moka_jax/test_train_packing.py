"""Packing: what stands in a row, that no example sees another, and that any position can be resumed."""

from __future__ import annotations

import collections
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from moka_core import ConfigError, MokaConfig
from moka_jax import MokaParam, attach
from moka_jax.llama import Llama, LlamaConfig
from moka_jax.train import Dataset, Example, OptimiserConfig, make_optimiser, make_train_step, start_state, train
from moka_jax.train.batches import Batch, collate, train_batches
from tests.moka_jax.train_toys import arrays, make_config, make_model, make_tokenizer

VOCABULARY, TIME = 97, 64


@pytest.fixture(scope="module")
def data() -> Dataset:
    """40 examples of 4 to 60 tokens, each beginning with its number, so that a row tells which ones it holds."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(40):
        length = int(rng.integers(4, 61)) if number else 60
        tokens = np.append(number, rng.integers(40, VOCABULARY, length - 1)).astype(np.int32)
        examples.append(Example(tokens=tokens, loss_mask=(np.arange(length) >= rng.integers(1, length))))
    return Dataset(path="toy", examples=tuple(examples), pad_id=0, cut=0, digest="")


def packed(data: Dataset, *, batch_size: int = 3, accumulate: int = 2, seed: int = 0) -> Any:
    return train_batches(data, batch_size=batch_size, accumulate=accumulate, seed=seed, pack_to=TIME)


def rows_of(batch: Batch) -> list[Batch]:
    """The rows of a batch one by one."""
    flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
    return [{name: array[row] for name, array in flat.items()} for row in range(len(flat["tokens"]))]


def examples_in(row: Batch, data: Dataset) -> list[Example]:
    """The examples of a row, after a check that each stands there whole and alone."""
    segments, found = row["segments"], []
    assert np.array_equal(segments[: row["lengths"]], np.sort(segments[: row["lengths"]]))
    for segment in range(1, segments.max() + 1):
        (at,) = np.nonzero(segments == segment)
        assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
        example = data.examples[int(row["tokens"][at[0]])]
        assert np.array_equal(row["tokens"][at], example.tokens[:-1])
        assert np.array_equal(row["targets"][at], example.tokens[1:])  # its own tokens, up to its last
        assert np.array_equal(row["loss_mask"][at], example.loss_mask[1:])
        assert np.array_equal(row["positions"][at], np.arange(len(at)))
        found.append(example)
    return found


def test_a_row_holds_whole_examples_and_padding_of_its_own(data: Dataset) -> None:
    batches = packed(data)
    seen: collections.Counter[int] = collections.Counter()
    filled = 0
    for _ in range(40):
        batch = next(batches)
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segments"), ((2, 3, TIME), np.int32)),
            "loss_mask": ((2, 3, TIME), bool),
            "lengths": ((2, 3), np.int32),
        }
        for row in rows_of(batch):
            examples = examples_in(row, data)
            seen.update(int(example.tokens[0]) for example in examples)
            padding = row["segments"] == 0
            assert (padding == (np.arange(TIME) >= row["lengths"])).all()
            assert not row["loss_mask"][padding].any()
            assert (row["tokens"][padding] == data.pad_id).all()
            filled += int(row["lengths"])
    assert len(seen) == 40
    assert max(seen.values()) - min(seen.values()) <= 2  # as often as each other, but for the passes under way
    alone = np.mean([len(example.tokens) - 1 for example in data.examples]) / TIME
    assert filled / (40 * 6 * TIME) > 0.8 > 1.5 * alone  # 0.85; one example a row fills 0.52


def test_two_by_three_rows_are_those_of_one_by_six(data: Dataset) -> None:
    two, one = packed(data), packed(data, batch_size=6, accumulate=1)
    for _ in range(15):
        first, second = next(two), next(one)
        for name, array in first.items():
            assert np.array_equal(array.reshape(second[name].shape), second[name])
    other = next(packed(data, seed=1))
    assert not np.array_equal(other["tokens"], next(packed(data))["tokens"])


def test_every_position_can_be_resumed_bit_for_bit(data: Dataset) -> None:
    """Groups of rows are packed together: positions in the middle of a group, and between two, are among these."""
    batches = packed(data, batch_size=2, accumulate=1)
    states, seen = [], []
    for _ in range(25):
        states.append(json.dumps(batches.get_state()))
        seen.append(next(batches))
    assert len({json.loads(state)["next_row"] for state in states}) > 3
    for at in range(0, 25, 3):
        resumed = packed(data, batch_size=2, accumulate=1)
        resumed.set_state(json.loads(states[at]))
        for expected in seen[at : at + 3]:
            got = next(resumed)
            assert all(np.array_equal(got[name], array) for name, array in expected.items())


def llama() -> Llama:
    """A random model of two layers with a random adapter, whose logits are far from uniform."""
    values = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    model = Llama(LlamaConfig.from_hf_config(values), rngs=nnx.Rngs(0))
    attach(model, MokaConfig(r=2, num_shapes=2, dropout=0.0, target_modules=("q_proj", "v_proj")), seed=0)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), nnx.state(model, MokaParam)
    )
    nnx.update(model, noisy)
    return model


def token_losses(logits: jax.Array, targets: np.ndarray) -> np.ndarray:
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets)))


def test_every_token_has_the_loss_that_it_has_alone(data: Dataset) -> None:
    """Measured in float32 on a CPU: no loss (up to 8.7) differs by a bit; 1e-5, a few roundings, is allowed.

    An example that saw its neighbours would differ by 1.2 and more.
    """
    graphdef, state = nnx.split(llama())
    logits = jax.jit(lambda tokens, **places: nnx.merge(graphdef, state)(tokens, **places))
    batch = {name: array[0] for name, array in next(packed(data, batch_size=8, accumulate=1)).items()}
    contents = [examples_in(row, data) for row in rows_of({name: array[None] for name, array in batch.items()})]
    unpacked = collate([example for row in contents for example in row], pad_id=0, longest=60)
    places = {name: batch[name] for name in ("positions", "segments")}
    losses = token_losses(logits(batch["tokens"], **places), batch["targets"])
    leaking = token_losses(logits(batch["tokens"], positions=batch["positions"]), batch["targets"])
    alone = iter(token_losses(logits(unpacked["tokens"]), unpacked["targets"]))
    assert np.isfinite(losses).all()  # padding included: it sees itself
    worst, leaked = 0.0, []
    for row, examples in enumerate(contents):
        for number in range(len(examples)):
            at = np.flatnonzero(batch["segments"][row] == number + 1)
            expected = next(alone)[: len(at)]
            worst = max(worst, float(np.abs(losses[row, at] - expected).max()))
            if number:
                leaked.append(float(np.abs(leaking[row, at] - expected).max()))
    assert worst < 1e-5
    assert len(leaked) > 3
    assert min(leaked) > 1e-1


def test_a_packed_step_is_the_step_on_the_same_examples_unpacked(data: Dataset) -> None:
    """Measured in float32: losses differ by 1e-7 of themselves, moments by 1.3e-6 of their largest entry."""
    batch = next(packed(data, batch_size=2, accumulate=2))
    examples = [example for row in rows_of(batch) for example in examples_in(row, data)]
    unpacked = {name: array[None] for name, array in collate(examples, pad_id=0, longest=60).items()}
    graphdef, adapter, frozen = nnx.split(llama(), MokaParam, ...)
    results = []
    for one in (batch, unpacked):
        optimiser = make_optimiser(OptimiserConfig(learning_rate=0.01, clip_norm=None), steps=9)
        step = make_train_step(graphdef, optimiser, accumulate=len(one["tokens"]), seed=0, max_skipped_steps=0)
        state, metrics = step(start_state(optimiser, adapter), frozen, one)
        results.append((arrays(state.moments), {name: value.item() for name, value in metrics.items()}))
    (packed_moments, packed_metrics), (moments, metrics) = results
    print(
        "MEASURED",
        packed_metrics,
        metrics,
        [np.abs(one - other).max() / np.abs(other).max() for one, other in zip(packed_moments, moments, strict=True)],
    )
    assert packed_metrics["tokens"] == metrics["tokens"] == sum(int(e.loss_mask.sum()) for e in examples)
    assert packed_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert packed_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
    for one, other in zip(packed_moments, moments, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_a_model_that_cannot_keep_examples_apart_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, data={"packing": True})
    message = (
        r"data.packing: expected a model that takes positions and segments, as moka_jax.llama.Llama does; "
        r"ToyModel takes no positions and no segments; set data.packing: false"
    )
    with pytest.raises(ConfigError, match=message):
        train(make_model(), make_tokenizer(), config, console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
