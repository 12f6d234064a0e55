"""Forward and backward of a whole model in JAX: the frozen base, and MoKA by each execution.

    python benchmarks/train_step.py --base report/base [--batch 4 --length 128 --repeats 7]

The frozen base is differentiated by a zero added to its first norms, so that the backward runs through every layer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from conversion import open_base
from moka_core import preset
from moka_jax import MokaParam, attach, with_dropout_key
from moka_jax.llama import Llama, load_llama

VARIANTS = {
    "frozen base": {},
    "MoKA auto": {"execution": "auto"},
    "MoKA factored": {"execution": "factored"},
    "MoKA merged": {"execution": "merged"},
    "MoKA auto, dropout": {"execution": "auto", "dropout": True},
}


def main() -> None:
    arguments = _arguments()
    base = open_base(arguments.base)
    tokens = jnp.asarray(
        np.random.default_rng(0).integers(0, base.config["vocab_size"], (arguments.batch, arguments.length + 1))
    )
    steps = {name: _step(load_llama(base), tokens, **options) for name, options in VARIANTS.items()}
    for step in steps.values():
        step()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    _report(arguments, seconds)


def _step(model: Llama, tokens: jax.Array, *, execution: Any = None, dropout: bool = False) -> Callable[[], None]:
    """A call of this makes one forward and backward, and waits for it."""
    if execution is None:
        graphdef, state = nnx.split(model)
        parameters: Any = jnp.zeros_like(model.model.layers.block.input_layernorm.weight[...])

        def build(parameters: Any, state: Any) -> Llama:
            built = nnx.merge(graphdef, state)
            norm = built.model.layers.block.input_layernorm
            norm.weight = nnx.Param(norm.weight[...] + parameters)
            return built

    else:
        attach(model, preset("paper"), execution=execution)
        adapted, parameters, state = nnx.split(model, MokaParam, ...)  # type: ignore[misc]

        def build(parameters: Any, state: Any) -> Llama:
            built = nnx.merge(adapted, parameters, state)
            return with_dropout_key(built, jax.random.key(0)) if dropout else built  # type: ignore[return-value]

    @jax.jit
    def gradient(parameters: Any, state: Any, tokens: jax.Array) -> Any:
        def loss(parameters: Any) -> jax.Array:
            logits = build(parameters, state)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return jax.value_and_grad(loss)(parameters)

    return lambda: jax.block_until_ready(gradient(parameters, state, tokens))


def _report(arguments: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    frozen = medians["frozen base"]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "moka")}
    result = {
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "versions": versions,
        "tokens": [arguments.batch, arguments.length],
        "seconds": seconds,
        "ratio_to_frozen": {name: median / frozen for name, median in medians.items()},
    }
    file = Path(__file__).parent / "results" / "train_step.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{result['hardware']}; {versions}; {arguments.batch} x {arguments.length} tokens; "
        f"{arguments.repeats} repeats\n"
    )
    print("| variant | ratio to frozen base | median s | fastest, slowest s |\n|---|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {medians[name] / frozen:.2f} | {medians[name]:.3g} | {min(times):.3g}, {max(times):.3g} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a Hugging Face model folder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
