"""Adapt a model that MoKA does not know, in Flax with optax: here a small GPT of Flax's own layers.

    python examples/flax_own_model.py --output run

The GPT learns bytes of English from Python's help topics, with all of its weights; these are then frozen, and a MoKA
adapter learns Python's own source code. The script tells the loss on held-out code before and after, writes the
adapter's folder, puts the adapter onto a second copy of the base, and merges it there into plain layers. To adapt a
model of your own, put it in the place of `Gpt`, and name its layers in TARGETS. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import logging
import subprocess
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx

from conversion import load_adapter, save_adapter
from moka_core import preset
from moka_jax import MokaParam, attach, export_adapter, import_adapter, merge

# The ends of the paths of the layers that are adapted; moka_jax.sites.linear_sites(model) lists all that there are.
TARGETS = ("query", "key", "value", "up", "down")
# Of Python's own, whose source is learned.
MODULES = (argparse, inspect, logging, subprocess, textwrap, typing)
BYTES = 256
BATCH = 16
HELD_OUT = 0.1  # of the code, at its end


class Losses(NamedTuple):
    """Losses on held-out code, nats a byte: of the frozen base, with the adapter, and with it merged into a copy."""

    before: float
    after: float
    merged: float


class Block(nnx.Module):
    """x + attention, x + MLP."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Gpt(nnx.Module):
    """Logits (batch, time, 256) of the next byte from bytes (batch, time)."""

    base_fingerprint: str  # set once the weights are what an adapter will stand on

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4, length: int = 128, *, rngs: nnx.Rngs) -> None:
        self.length = length
        self.embed = nnx.Embed(BYTES, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, BYTES, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.places(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def main(
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    base_steps: Annotated[int, typer.Option(help="Steps of all weights on English.", min=1)] = 400,
    steps: Annotated[int, typer.Option(help="Steps of the adapter on code.", min=1)] = 300,
    width: Annotated[int, typer.Option(help="Width of the GPT.", min=4)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of the adapter.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights, adapter and batches.")] = 0,
) -> Losses:
    """Train a small GPT on English, freeze it, and adapt it to Python's source code."""
    english = as_bytes("\n\n".join(topics.topics[name] for name in sorted(topics.topics)))
    code = as_bytes("".join(map(inspect.getsource, MODULES)))
    print(f"{len(english):,} bytes of English, {len(code):,} of code from {len(MODULES)} modules")
    edge = int(len(code) * (1 - HELD_OUT))

    model = Gpt(width=width, rngs=nnx.Rngs(seed))
    fit("base", model, nnx.Param, draws(english, model.length, base_steps, seed), optax.adamw(1e-3))
    model.base_fingerprint = fingerprint(model)  # the adapter remembers it, and refuses another base
    copy = nnx.clone(model)
    held_out = list(draws(code[edge:], model.length, 8, seed))
    before = mean_loss(model, held_out)

    attach(model, preset("recommended", target_modules=TARGETS, dropout=0.0), seed=seed)
    trained, total = (sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind))) for kind in (MokaParam, ...))
    print(f"{trained:,} of {total:,} parameters are trained")
    fit("adapter", model, MokaParam, draws(code[:edge], model.length, steps, seed), optax.adamw(learning_rate))
    after = mean_loss(model, held_out)

    folder = output / "adapter"
    save_adapter(export_adapter(model), folder)
    import_adapter(copy, load_adapter(folder))
    merged = mean_loss(merge(copy), held_out)
    print(f"loss on held-out code: {before:.4f} before, {after:.4f} after, {merged:.4f} merged into a copy of the base")
    print(f"adapter: {folder}")
    return Losses(before, after, merged)


def fit(
    what: str, model: nnx.Module, kind: type, batches: Iterator[np.ndarray], rule: optax.GradientTransformation
) -> None:
    """Train the variables of one kind; all others stay as they are. `what` says in the lines of progress which."""
    optimiser = nnx.Optimizer(model, rule, wrt=kind)

    @nnx.jit
    def step(model: nnx.Module, optimiser: nnx.Optimizer[nnx.Module], batch: jax.Array) -> jax.Array:
        loss, gradient = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, kind))(model, batch)
        optimiser.update(model, gradient)
        return loss

    for number, batch in enumerate(batches, 1):
        loss = step(model, optimiser, jnp.asarray(batch))
        if number % 50 == 0:
            print(f"{what}, step {number}: loss {loss:.4f}")


def loss_of(model: Callable[[jax.Array], jax.Array], batch: jax.Array) -> jax.Array:
    """Mean cross-entropy of every byte after the first, in nats."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def mean_loss(model: nnx.Module, batches: list[np.ndarray]) -> float:
    """The loss over several batches."""
    compiled = nnx.jit(loss_of)
    return float(np.mean([compiled(model, jnp.asarray(batch)) for batch in batches]))


def as_bytes(text: str) -> np.ndarray:
    """The text's UTF-8 bytes, (bytes,) int32."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def draws(text: np.ndarray, length: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of pieces at random places, (16, length + 1)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(text) - length, BATCH)
        yield np.stack([text[start : start + length + 1] for start in starts])


def fingerprint(model: nnx.Module) -> str:
    """A text that is another for other weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    typer.run(main)
