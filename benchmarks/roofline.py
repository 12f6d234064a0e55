"""What a job needs, and what the hardware attains, measured in the same run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moka_core import Architecture


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations, and bytes that must move between memory and the processor."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Attained per second: operations in one large matrix product, bytes in one large copy (read and written)."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The roofline: the longer of both times."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def share(self, work: Work, seconds: float | None) -> float | None:
        return None if seconds is None else self.seconds(work) / seconds

    def describe(self) -> str:
        product, copy = f"{self.flops / 1e9:.4g} GFLOP/s", f"{self.bytes / 1e9:.3g} GB/s"
        return f"Attained in this run: {product} in a matrix product, {copy} in a copy."


def frozen_layer(out: int, in_: int, tokens: int, itemsize: int) -> Work:
    """Forward and input gradient of x Wᵀ with W in NF4: two products; W, x and dy read, y and dx written."""
    packed = out * in_ * (1 / 2 + 1 / 64)
    return Work(flops=4.0 * tokens * out * in_, bytes=2 * packed + 2 * itemsize * tokens * (in_ + out))


def frozen_step(sizes: Architecture, batch: int, length: int, *, remat: bool, itemsize: int) -> Work:
    """Forward and backward of a frozen NF4 LLaMA, down to the first layer's input; no weight gradient.

    Every linear layer is one product forward and one backward; with `remat` the layers' forward runs twice (the head's
    does not). Causal attention needs half of the full products: 2·batch·heads·length²·head_dim a layer forward, and
    twice that backward. Bytes: the packed weights once a pass, the head forward and backward, each layer's input.
    """
    linear = sizes.linear_layers()
    head = sizes.vocab_size * sizes.hidden_size
    weights = sum(out * in_ for out, in_ in linear.values()) - head
    tokens = batch * length
    forwards = 2 if remat else 1
    attention = 2.0 * batch * sizes.num_attention_heads * length**2 * sizes.head_dim * sizes.num_hidden_layers
    flops = 2.0 * tokens * (weights * (forwards + 1) + 2 * head) + attention * (forwards + 2)
    moved = weights * (1 / 2 + 1 / 64) * (forwards + 1) + 2 * head * itemsize
    return Work(flops=flops, bytes=moved + 4 * itemsize * tokens * sizes.hidden_size * sizes.num_hidden_layers)


def attained(arguments: argparse.Namespace) -> Speed:
    """The best of three large products and copies, in whichever framework of the run is faster."""
    gpu = arguments.device == "gpu"
    size = 512 if arguments.quick else 16384 if gpu else 4096
    entries = 2**20 if arguments.quick else 2**30 if gpu else 2**26
    probes = {"jax": _jax_probes, "torch": _torch_probes}
    flops, moved = [], []
    for framework in arguments.frameworks:
        product, copy, itemsize = probes[framework](arguments, size, entries)
        flops.append(2 * size**3 / _best(product))
        moved.append(2 * entries * itemsize / _best(copy))
    return Speed(flops=max(flops), bytes=max(moved))


def _best(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _jax_probes(
    arguments: argparse.Namespace, size: int, entries: int
) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(arguments.dtype)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    vector = jnp.ones((entries,), dtype)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    return (
        lambda: jax.block_until_ready(multiply(a, b)),
        lambda: jax.block_until_ready(copy(vector)),
        dtype.itemsize,
    )


def _torch_probes(
    arguments: argparse.Namespace, size: int, entries: int
) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    import torch

    dtype = getattr(torch, arguments.dtype)
    device = torch.device("cuda" if arguments.device == "gpu" else "cpu")
    wait = torch.cuda.synchronize if arguments.device == "gpu" else lambda: None
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    source = torch.ones(entries, device=device, dtype=dtype)
    target = torch.empty_like(source)

    def multiply() -> None:
        torch.matmul(a, b)
        wait()

    def copy() -> None:
        target.copy_(source)
        wait()

    return multiply, copy, dtype.itemsize
