"""One optimiser step, and one evaluation step, as compiled functions of plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moka_jax.linear import with_dropout_key
from moka_jax.sharding import Layout
from moka_jax.train.config import TrainConfig
from moka_jax.train.optimiser import Optimiser

Arrays = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes: the adapter, the optimiser's moments, and three counts (int32).

    Args:
        step: finished steps, the skipped ones included.
        skipped: how many of them changed nothing, because loss or gradient was not finite.
        skipped_in_a_row: how many of the last ones were skipped.
    """

    adapter: nnx.State
    moments: optax.OptState
    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def start_state(optimiser: Optimiser, adapter: nnx.State) -> TrainState:
    """The state before the first step; holds copies, so that a step may give away its buffers."""
    adapter = jax.tree.map(jnp.copy, adapter)
    # three arrays, not one thrice: a step donates each
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(
        adapter=adapter,
        moments=optimiser.transform.init(adapter),
        step=step,
        skipped=skipped,
        skipped_in_a_row=in_a_row,
    )


def summed_loss(logits: jax.Array, batch: Arrays) -> jax.Array:
    """Σ over learned tokens of -log softmax(logits)[target], in float32.

    Args:
        logits: (batch, time, vocabulary).
        batch: "targets" and "loss_mask", (batch, time).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["targets"])
    return jnp.sum(jnp.where(batch["loss_mask"], losses, 0.0))


def run_step(
    graphdef: nnx.GraphDef, optimiser: Optimiser, config: TrainConfig, *, layout: Layout | None
) -> Callable[[TrainState, nnx.State, Arrays], tuple[TrainState, Metrics]]:
    """`make_train_step` as the config of a run says: for the run, and for the plan of its memory."""
    return make_train_step(
        graphdef,
        optimiser,
        accumulate=config.accumulate,
        seed=config.seed,
        max_skipped_steps=config.max_skipped_steps,
        layout=layout,
    )


def make_train_step(
    graphdef: nnx.GraphDef,
    optimiser: Optimiser,
    *,
    accumulate: int,
    seed: int,
    max_skipped_steps: int,
    layout: Layout | None = None,
) -> Callable[[TrainState, nnx.State, Arrays], tuple[TrainState, Metrics]]:
    """The compiled function (state, frozen, batch) -> (state, metrics) of one optimiser step.

        loss = Σ_micro Σ_learned tokens cross-entropy / number of learned tokens in all micro-batches

    so that k micro-batches of b examples give what one of k·b gives. Dropout is a function of seed, step and
    micro-batch alone.

    A step whose loss or gradient norm is not finite is skipped: adapter and moments keep their bits. After more than
    `max_skipped_steps` of them in a row every further step is skipped, whatever its loss, so that the caller may look
    at the count late.

    Args:
        graphdef: of `nnx.split(model, MokaParam, ...)`; the model maps tokens (batch, time) to logits, and takes
            `positions` and `segments` (batch, time) if the batches have them.
        optimiser: of `make_optimiser`.
        accumulate: micro-batches of a step, the leading axis of the batch.
        seed: of dropout.
        layout: of the mesh that the arrays are spread over, if they are.

    Returns:
        A function that gives away the buffers of its first argument. Metrics are scalars: loss, grad_norm (before
        clipping) and learning_rate in float32, tokens (learned ones) and the state's skipped and skipped_in_a_row
        in int32.
    """

    def train_step(state: TrainState, frozen: nnx.State, batch: Arrays) -> tuple[TrainState, Metrics]:
        tokens = jnp.sum(batch["loss_mask"], dtype=jnp.int32)
        weight = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def micro_step(total: tuple[jax.Array, nnx.State], inputs: tuple[jax.Array, Arrays]) -> tuple[Any, None]:
            index, micro = inputs

            def loss_of(adapter: nnx.State) -> jax.Array:
                model = nnx.merge(graphdef, adapter, frozen)
                with_dropout_key(model, jax.random.fold_in(step_key, index))
                return summed_loss(_logits(model, micro), micro) * weight

            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(state.adapter)), None

        nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.adapter))
        (loss, grads), _ = jax.lax.scan(micro_step, nothing, (jnp.arange(accumulate), batch))
        norm = optax.tree.norm(grads)
        rate = jnp.asarray(optimiser.schedule(state.step), jnp.float32)
        updates, moments = optimiser.transform.update(grads, state.moments, state.adapter)
        adapter = optax.apply_updates(state.adapter, jax.tree.map(lambda update: rate * update, updates))

        taken = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.skipped_in_a_row <= max_skipped_steps)
        adapter, moments = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), (adapter, moments), (state.adapter, state.moments)
        )
        skipped = state.skipped + jnp.where(taken, 0, 1)
        in_a_row = jnp.where(taken, 0, state.skipped_in_a_row + 1)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
        }
        state = TrainState(
            adapter=adapter, moments=moments, step=state.step + 1, skipped=skipped, skipped_in_a_row=in_a_row
        )
        if layout is not None:  # a compiler would be free to leave the new state elsewhere than the old one
            state = jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, layout.trained(a.shape)), state)
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Arrays], tuple[jax.Array, jax.Array]]:
    """The compiled function (adapter, frozen, batch) -> (summed loss, learned tokens), without dropout."""

    @jax.jit
    def eval_step(adapter: nnx.State, frozen: nnx.State, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits = _logits(nnx.merge(graphdef, adapter, frozen), batch)
        return summed_loss(logits, batch), jnp.sum(batch["loss_mask"], dtype=jnp.int32)

    return eval_step


def _logits(model: Any, batch: Arrays) -> jax.Array:
    """The model's logits; packed batches tell it which tokens belong together."""
    return model(batch["tokens"], **{name: batch[name] for name in ("positions", "segments") if name in batch})
