"""What a run takes of a device's memory, before a weight is loaded."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moka_core import ConfigError
from moka_jax.linear import MokaParam
from moka_jax.sharding import Layout
from moka_jax.train.batches import padded_length
from moka_jax.train.config import TrainConfig
from moka_jax.train.optimiser import make_optimiser
from moka_jax.train.step import run_step, start_state

GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each device, by part, and what the device has.

    Args:
        parts: the base's weights, the adapter, the optimiser's state, a batch, and what a step needs for itself: kept
            activations, logits, gradients, gathered and decoded weights.
        capacity: bytes of a device; on a CPU the host's memory, shared by its simulated devices. None if unknown.
        device: its kind.
        devices: how many the run is spread over.
    """

    parts: dict[str, int]
    capacity: int | None
    device: str
    devices: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())

    def check(self) -> None:
        """Raise a ConfigError if it cannot fit."""
        if self.capacity is None or self.total <= self.capacity:
            return
        listed = ", ".join(f"{name} {size / GIGA:.2f} GB" for name, size in self.parts.items())
        raise ConfigError(
            f"this run needs {self.total / GIGA:.2f} GB on each device ({listed}), and a {self.device} has "
            f"{self.capacity / GIGA:.2f} GB; lower batch_size or data.max_length (accumulate makes up for the former), "
            "keep remat: true, take quantise: nf4-double, or split the weights with mesh.fsdp or mesh.tensor"
        )


def plan_weights(model: nnx.Module) -> MemoryPlan:
    """The plan without a step: base weights and adapter only. Costs nothing.

    Args:
        model: adapted; its arrays may be abstract (`moka_jax.llama.abstract_llama`).
    """
    _, adapter, frozen = nnx.split(model, MokaParam, ...)  # type: ignore[misc]
    parts = {"base weights": _bytes(jax.tree.leaves(frozen)), "adapter": _bytes(jax.tree.leaves(adapter))}
    return _plan(parts, getattr(model, "layout", None))


def plan_memory(model: nnx.Module, config: TrainConfig) -> MemoryPlan:
    """The plan of a whole step, which is compiled for that, but not run.

    The batch is the largest that may come: every row as long as data.max_length.

    Args:
        model: adapted; its arrays may be abstract.
        config: the run.
    """
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)  # type: ignore[misc]
    layout: Layout | None = getattr(model, "layout", None)
    optimiser = make_optimiser(config.optimiser, steps=config.steps)
    state = jax.eval_shape(lambda adapter: start_state(optimiser, adapter), adapter)
    if layout is not None:
        state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.trained(a.shape)), state)
    batch = _largest_batch(config, layout)
    step: Any = run_step(graphdef, optimiser, config, layout=layout)
    with contextlib.nullcontext() if layout is None else jax.set_mesh(layout.mesh):
        found: Any = step.lower(state, frozen, batch).compile().memory_analysis()
    parts = {
        "base weights": _bytes(jax.tree.leaves(frozen)),
        "adapter": _bytes(jax.tree.leaves(state.adapter)),
        "optimiser": _bytes(jax.tree.leaves(state.moments)),
        "batch": _bytes(batch.values()),
        "a step": int(found.temp_size_in_bytes),
    }
    return _plan(parts, layout)


def _plan(parts: dict[str, int], layout: Layout | None) -> MemoryPlan:
    devices = 1 if layout is None else layout.mesh.size
    return MemoryPlan(parts=parts, capacity=_capacity(), device=jax.devices()[0].device_kind, devices=devices)


def _largest_batch(config: TrainConfig, layout: Layout | None) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.accumulate, config.batch_size, padded_length(config.data.max_length))
    names = {"tokens": jnp.int32, "targets": jnp.int32, "loss_mask": jnp.bool_}
    if config.data.packing:
        names |= {"positions": jnp.int32, "segments": jnp.int32}
    at = None if layout is None else layout.batch(1)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=at) for name, dtype in names.items()}


def _bytes(leaves: Iterable[Any]) -> int:
    """Of the part of some arrays that one device holds."""
    total = 0
    for leaf in leaves:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
    return total


def _capacity() -> int | None:
    """Bytes of a device."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")
