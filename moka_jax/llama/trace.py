"""The outputs of every module of our LLaMA, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moka_core.probe import ATTENTION, LAYER_STEPS
from moka_jax.llama.model import Llama, RmsNorm
from moka_jax.llama.rope import turns
from moka_jax.sites import dotted, linear_sites, replace_module


class _Recorder(nnx.Module):
    """A module that shows what it reads and what comes out."""

    def __init__(self, module: nnx.Module, note: Callable[[jax.Array, jax.Array], None]) -> None:
        self.module = module
        self.note = note

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.module(x)  # type: ignore[operator]
        self.note(x, y)
        return y


class LlamaTrace:
    """(name, output) of every module in the order of `moka_core.probe.ForwardProbe.trace`, when called with tokens.

    The layers of the stack run one by one, by a function that is compiled once; only one layer's outputs are held.

    Args:
        model: its numbers may change between calls, its structure may not.
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        graphdef = nnx.graphdef(model.model.layers.block)

        def run(state: nnx.State, x: jax.Array, around: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            block = nnx.merge(graphdef, state)
            seen: dict[str, jax.Array] = {}
            _record(block, seen)
            y, _ = block(x, None, *around, None, None)
            return y, seen

        self._run = jax.jit(run)

    def __call__(self, tokens: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """The outputs (batch, time, features) for tokens (batch, time), int."""
        model, config = self._model, self._model.config
        positions = jnp.arange(tokens.shape[1])[None]
        around = turns(config.rope, config.architecture.head_dim, positions, jnp.max(positions) + 1, model.dtype)
        stacked = nnx.state(model.model.layers.block)
        x = model.embed(tokens)
        yield "model.embed_tokens", x
        for index in range(config.architecture.num_hidden_layers):
            x, seen = self._run(jax.tree.map(lambda leaf, index=index: leaf[index], stacked), x, around)
            for step in LAYER_STEPS:
                yield f"model.layers.{index}.{step}", seen[step]
            yield f"model.layers.{index}", x
        x = model.model.norm(x)
        yield "model.norm", x
        yield "lm_head", model.head(x)


def _record(block: nnx.Module, seen: dict[str, jax.Array]) -> None:
    """Make the linear layers and norms of a block put their outputs into `seen`, and o_proj its input too."""
    norms: list[Any] = [(path, module) for path, module in nnx.iter_modules(block) if isinstance(module, RmsNorm)]
    for path, module in [*((site.path, site.module) for site in linear_sites(block)), *norms]:
        name = dotted(path)

        def note(x: jax.Array, y: jax.Array, name: str = name) -> None:
            seen[name] = y
            if name == "self_attn.o_proj":
                seen[ATTENTION] = x

        replace_module(block, path, _Recorder(module, note))
