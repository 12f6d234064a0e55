"""Batches of examples: one example a row or several packed into it, in an order that can be resumed at any step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from moka_jax.train.data import Dataset, Example

Batch = dict[str, np.ndarray]

LENGTH_MULTIPLE = 32
_ROWS_OPEN = 64  # rows that are filled at the same time: with 64 about 3 % is padding where one row a step leaves 13 %


def train_batches(
    dataset: Dataset, *, batch_size: int, accumulate: int, seed: int, pack_to: int | None = None
) -> grain.DatasetIterator[Batch]:
    """Endless batches, one for each optimiser step, in an order drawn anew for every pass over the data.

    Batch s is a function of (dataset, batch_size·accumulate, pack_to, seed, s) alone: `get_state` and `set_state`
    resume at any step, and 2 × 4 rows are the same ones as 1 × 8. No example is left out: a batch may span two passes.

    Args:
        pack_to: put as many examples into a row as fit into this many tokens, rounded up to a multiple of 32; at least
            the longest example. None gives each example a row of its own.

    Returns:
        An iterator over batches as of `collate` or, packed, of rows as of `packed_rows`; each array is
        (accumulate, batch_size, …).
    """
    rows = batch_size * accumulate
    order = grain.MapDataset.source(dataset.examples).seed(seed).shuffle().repeat()
    # The examples are in memory: reading threads would only contend for the interpreter.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    longest = dataset.longest

    def stack(examples: Sequence[Example]) -> Batch:
        return split(collate(examples, pad_id=dataset.pad_id, longest=longest))

    def stack_packed(rows: Sequence[Batch]) -> Batch:
        return split({name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def split(flat: Batch) -> Batch:
        return {name: array.reshape(accumulate, batch_size, *array.shape[1:]) for name, array in flat.items()}

    # Endless, so there is no remainder to drop; but without this Grain counts batches of one by a float and overflows.
    if pack_to is None:
        steps: Any = order.batch(rows, drop_remainder=True, batch_fn=stack).to_iter_dataset(reading)
    else:
        assert pack_to >= longest
        packed = packed_rows(
            order.to_iter_dataset(reading), dataset, time=padded_length(pack_to), rows=rows, seed=seed % 2**31
        )
        steps = packed.batch(rows, drop_remainder=True, batch_fn=stack_packed)
    return iter(steps)


def packed_rows(
    examples: grain.IterDataset[Example], dataset: Dataset, *, time: int, rows: int, seed: int
) -> grain.IterDataset[Batch]:
    """Rows of several examples, by first fit into a set of open rows that are given out together, in a drawn order.

    Only tokens that predict another one of their own example stand in a row, so nothing predicts across a border.
    Segments count the examples of a row from 1, and positions restart with each; padding is segment 0.

    Args:
        examples: endless, from `dataset`.
        time: tokens of a row.
        rows: rows of a step; the set is a multiple of it, but not more than one pass over the data fills.

    Returns:
        Rows {"tokens", "targets", "positions", "segments": int32 (time,), "loss_mask": bool (time,), "lengths": int32},
        the last being the row's tokens without padding.
    """
    one_pass = sum(len(example.tokens) for example in dataset.examples) // time
    open_rows = rows * max(1, min(_ROWS_OPEN, one_pass) // rows)

    def shifted(example: Example) -> Batch:
        tokens, mask = example.tokens, example.loss_mask
        return {"tokens": tokens[:-1], "targets": tokens[1:], "loss_mask": mask[1:]}

    def named(row: Batch) -> Batch:
        segments = row["tokens_segment_ids"]
        return {
            **{name: row[name] for name in ("tokens", "targets", "loss_mask")},
            "positions": row["tokens_positions"],
            "segments": segments,
            "lengths": np.array(np.count_nonzero(segments), np.int32),
        }

    packed = FirstFitPackIterDataset(
        examples.map(shifted),
        length_struct={"tokens": time, "targets": time, "loss_mask": time},
        padding_struct={"tokens": dataset.pad_id, "targets": dataset.pad_id, "loss_mask": False},
        meta_features=("targets", "loss_mask"),
        num_packing_bins=open_rows,
        seed=seed,
    )
    return packed.map(named)


def eval_batches(dataset: Dataset, *, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The examples once, in the file's order, one a row; the last batch is filled up with rows that count nothing.

    Args:
        limit: at most this many batches.

    Returns:
        Batches as of `collate`, each with batch_size rows.
    """
    longest = dataset.longest
    starts = range(0, len(dataset.examples), batch_size)
    for start in starts[:limit]:
        yield collate(
            dataset.examples[start : start + batch_size],
            pad_id=dataset.pad_id,
            longest=longest,
            rows=batch_size,
        )


def collate(examples: Sequence[Example], *, pad_id: int, longest: int, rows: int | None = None) -> Batch:
    """Examples side by side, padded on the right: targets[t] = tokens[t+1], loss_mask[t] = it is learned.

    The length is 32, 64, 128, … or that of `longest`, so that few different shapes are ever compiled.

    Args:
        longest: tokens of the longest example there will be.
        rows: rows of the batch; those beyond the examples have no learned token.

    Returns:
        {"tokens", "targets": int32 (rows, time), "loss_mask": bool (rows, time), "lengths": int32 (rows,)}, the last
        being each row's tokens without padding.
    """
    rows = len(examples) if rows is None else rows
    time = LENGTH_MULTIPLE
    while time < max(len(example.tokens) for example in examples):
        time *= 2
    time = min(time, padded_length(longest))
    tokens = np.full((rows, time + 1), pad_id, np.int32)
    mask = np.zeros((rows, time + 1), bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        mask[row, : len(example.loss_mask)] = example.loss_mask
    lengths = [len(example.tokens) for example in examples] + [0] * (rows - len(examples))
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "loss_mask": mask[:, 1:].copy(),
        "lengths": np.array(lengths, np.int32),
    }


def padded_length(length: int) -> int:
    """The length of a row that holds this many tokens: the next multiple of 32."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
