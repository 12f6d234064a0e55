"""Every way to compute a mixture alone, against the cost model's prediction: what its constants are fitted to.

python -m benchmarks.ways [--shapes 576x576,4096x4096] [--tokens 128,2048]

Times four pieces in JAX: the product with ΔW, factored or merged (ΔW formed and added to a weight, whose own product
is taken off), and the factors' gradient, from halves or from G = dyᵀ x.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import (
    Call,
    add_options,
    describe,
    environment,
    file_name,
    interleave,
    note,
    numbers,
    settled,
    table,
    words,
    write_results,
)
from moka_core import LayerPlan, MokaConfig, plan_layer
from moka_core.execution import Costs, Schedule, Way, costs, first_factor
from moka_jax.product import Mixture, Statics, mixture_product

SHAPES = ("192x576", "576x576", "2048x2048", "1024x4096", "4096x4096")
TOKENS = (128, 512, 2048, 8192)
CONFIG = MokaConfig()
PIECES = Costs._fields


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    with settled(arguments):
        cases = []
        for shape in arguments.shapes:
            out, in_ = map(int, shape.split("x"))
            for tokens in arguments.tokens:
                note(f"{shape}, {tokens} tokens")
                cases.append(_case(plan_layer(CONFIG, out, in_), tokens, arguments))
        result = {"environment": environment(arguments), "cases": cases}
        write_results(arguments.output, file_name("ways", arguments), result, _markdown(result))


def _case(plan: LayerPlan, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    out, in_ = plan.out_features, plan.in_features
    source = np.random.default_rng(0)
    dtype = jnp.dtype(arguments.dtype)

    def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(source.standard_normal(shape), dtype)

    x, dy = draw(tokens, in_, dtype=dtype), draw(tokens, out, dtype=dtype)
    base = {"kernel": draw(in_, out)}
    mixture = Mixture(
        [draw(group.copies) for group in plan.groups],
        [draw(*group.factor_shape("a")) for group in plan.groups],
        [draw(*group.factor_shape("b")) for group in plan.groups],
    )
    first = tuple(first_factor(group.shape) for group in plan.groups)

    def product(way: Way, own: Any) -> Any:
        statics = Statics(plan=plan, identity="none", schedule=Schedule(forward=way, gradient=way, first=first))
        return jax.jit(lambda x, base, mixture: mixture_product(statics, x, None, base if own else None, mixture))

    def gradient(way: Way) -> Any:
        statics = Statics(plan=plan, identity="none", schedule=Schedule(forward="merged", gradient=way, first=first))

        def pull(x: jax.Array, dy: jax.Array, mixture: Mixture) -> Any:
            return jax.vjp(lambda mixture: mixture_product(statics, x, None, None, mixture), mixture)[1](dy)

        return jax.jit(pull)

    alone = jax.jit(lambda x, base: x @ base["kernel"])
    factored, merged = product("factored", False), product("merged", True)
    halves, full = gradient("factored"), gradient("merged")
    wait = jax.block_until_ready
    calls = {
        "base": Call(lambda: alone(x, base), wait),
        "factored": Call(lambda: factored(x, base, mixture), wait),
        "merged": Call(lambda: merged(x, base, mixture), wait),
        "gradient_factored": Call(lambda: halves(x, dy, mixture), wait),
        "gradient_merged": Call(lambda: full(x, dy, mixture), wait),
    }
    timings = interleave(calls, arguments.repeats)
    seconds = {name: timings.median(name) or 0.0 for name in calls}
    seconds["merged"] -= seconds["base"]
    backend = "cpu" if arguments.device == "cpu" else "gpu"
    predicted = costs(plan, "none", tokens, own_product=False, backend=backend)._asdict()
    return {"shape": plan.key, "tokens": tokens, "seconds": seconds, "predicted_multiply_adds": predicted}


def _markdown(result: dict[str, Any]) -> str:
    lost, rows = [], []
    for case in result["cases"]:
        out, in_ = map(int, case["shape"].split("x"))
        seconds, predicted = case["seconds"], case["predicted_multiply_adds"]
        unit, product = seconds["base"], case["tokens"] * out * in_
        for pair in (PIECES[:2], PIECES[2:]):
            taken = min(pair, key=lambda name: predicted[name])
            lost.append((seconds[taken] - min(seconds[name] for name in pair)) / unit)
        cells = [f"{seconds[name] / unit:.2f} ({predicted[name] / product:.2f})" for name in PIECES]
        rows.append([case["shape"], case["tokens"], 1e3 * unit, *cells])
    head = ["out x in", "tokens", "base product, ms", *(name.replace("_", " ") for name in PIECES)]
    return "\n".join(
        [
            "# Every way alone",
            "",
            describe(result["environment"]),
            "",
            "Measured time over that of the base layer's product x Wᵀ, and in brackets the model's prediction of it.",
            "",
            table(head, rows),
            "",
            f"The model takes the faster way in {sum(time <= 0 for time in lost)} of {len(lost)} choices, and loses "
            f"{max(lost):.2f} of a base product where it is most wrong.",
        ]
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=words)
    parser.add_argument("--tokens", type=numbers)
    parser.add_argument("--repeats", type=int, default=5)
    add_options(parser, frameworks=False, variants=False)
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or (["12x24"] if arguments.quick else list(SHAPES))
    wrong = [shape for shape in arguments.shapes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)]
    if wrong:
        parser.error(f"--shapes: expected OUTxIN such as 576x576; got {', '.join(wrong)}")
    arguments.tokens = arguments.tokens or ([16] if arguments.quick else list(TOKENS))
    return arguments


if __name__ == "__main__":
    main()
