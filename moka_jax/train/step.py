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
from moka_jax.train.config import OptimiserConfig

Arrays = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes: the adapter, the optimiser's moments, and the number of finished steps (int32)."""

    adapter: nnx.State
    moments: optax.OptState
    step: jax.Array


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """A gradient transformation, clipping included, and the learning rate that it uses at each step."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule

    def start(self, adapter: nnx.State) -> TrainState:
        """The state before the first step; holds copies, so that a step may give away its buffers."""
        adapter = jax.tree.map(jnp.copy, adapter)
        return TrainState(adapter=adapter, moments=self.transform.init(adapter), step=jnp.zeros((), jnp.int32))


def make_optimiser(config: OptimiserConfig, *, steps: int) -> Optimiser:
    """The optimiser of a run of `steps` steps; see `OptimiserConfig` for the learning rate."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, decay_steps=steps - warmup, alpha=config.final_fraction)
    else:
        schedule = optax.constant_schedule(peak)
    if warmup:
        # The first step already moves: a warm-up from 0 would waste it.
        rise = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
        schedule = optax.join_schedules([rise, schedule], boundaries=[warmup])
    adamw = optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return Optimiser(transform=optax.chain(clip, adamw), schedule=schedule)


def summed_loss(logits: jax.Array, batch: Arrays) -> jax.Array:
    """Σ over learned tokens of -log softmax(logits)[target], in float32.

    Args:
        logits: (batch, time, vocabulary).
        batch: "targets" and "loss_mask", (batch, time).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["targets"])
    return jnp.sum(jnp.where(batch["loss_mask"], losses, 0.0))


def make_train_step(
    graphdef: nnx.GraphDef, optimiser: Optimiser, *, accumulate: int, seed: int
) -> Callable[[TrainState, nnx.State, Arrays], tuple[TrainState, Metrics]]:
    """The compiled function (state, frozen, batch) -> (state, metrics) of one optimiser step.

        loss = Σ_micro Σ_learned tokens cross-entropy / number of learned tokens in all micro-batches

    so that k micro-batches of b examples give what one of k·b gives. Dropout is a function of seed, step and
    micro-batch alone.

    Args:
        graphdef: of `nnx.split(model, MokaParam, ...)`; the model maps tokens (batch, time) to logits.
        optimiser: of `make_optimiser`.
        accumulate: micro-batches of a step, the leading axis of the batch.
        seed: of dropout.

    Returns:
        A function that gives away the buffers of its first argument. Metrics are scalars: loss, grad_norm (before
        clipping) and learning_rate in float32, tokens (learned ones) in int32.
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
                return summed_loss(model(micro["tokens"]), micro) * weight

            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_of)(state.adapter)), None

        nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.adapter))
        (loss, grads), _ = jax.lax.scan(micro_step, nothing, (jnp.arange(accumulate), batch))
        updates, moments = optimiser.transform.update(grads, state.moments, state.adapter)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(optimiser.schedule(state.step), jnp.float32),
            "tokens": tokens,
        }
        adapter = optax.apply_updates(state.adapter, updates)
        return TrainState(adapter=adapter, moments=moments, step=state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[nnx.State, nnx.State, Arrays], tuple[jax.Array, jax.Array]]:
    """The compiled function (adapter, frozen, batch) -> (summed loss, learned tokens), without dropout."""

    @jax.jit
    def eval_step(adapter: nnx.State, frozen: nnx.State, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, adapter, frozen)(batch["tokens"])
        return summed_loss(logits, batch), jnp.sum(batch["loss_mask"], dtype=jnp.int32)

    return eval_step
