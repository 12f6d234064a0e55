"""Compile time of the JAX training step against depth; shapes only, so that no weights are needed.

    python -m benchmarks.compile_time                      # a narrow model
    python -m benchmarks.compile_time --random llama3-8b   # the width of LLaMA3-8B

Every compile is fresh: JAX's caches are cleared before it. Results: results/compile_time_MODEL_DEVICE.*
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import jax_steps
from benchmarks.harness import (
    Timings,
    add_options,
    chosen,
    describe,
    environment,
    file_name,
    note,
    seconds_cell,
    settled,
    table,
    words,
    write_results,
)
from benchmarks.models import TINY, Model, add_model_options

NARROW = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, vocab_size=1024)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written."""
    arguments = _arguments(argv)
    with settled(arguments):
        return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    jax.config.update("jax_enable_compilation_cache", False)
    named = arguments.base or arguments.random
    model = Model.from_options(arguments) if named else Model(name="narrow", sizes=NARROW)
    lowering, compiling = Timings(), Timings()
    cases = [
        (variant, depth) for variant in chosen(jax_steps.VARIANTS, arguments.variants) for depth in arguments.depths
    ]
    steps = {case: _step(arguments, model, *case) for case in cases}
    for turn in range(1 if arguments.quick else 0, arguments.repeats + 1):
        note(f"round {turn} of {arguments.repeats}")
        for variant, depth in cases:
            lowered, compiled = _compile(steps[variant, depth])
            if turn:  # the first round loads libraries, and on a GPU tunes the products
                lowering.seconds.setdefault(_case(variant, depth), []).append(lowered)
                compiling.seconds.setdefault(_case(variant, depth), []).append(compiled)
    result = {
        "environment": environment(arguments),
        "model": model.name,
        "batch": arguments.batch,
        "length": arguments.length,
        "depths": arguments.depths,
        "lowering": lowering.summary(),
        "compiling": compiling.summary(),
        "ratio_to_least_depth": {
            _case(variant, depth): compiling.ratio(_case(variant, depth), _case(variant, arguments.depths[0]))
            for variant, depth in cases
        },
    }
    name = file_name("compile_time", arguments, model.name)
    write_results(arguments.output, name, result, _markdown(result, cases))
    return result


def _case(variant: str, depth: int) -> str:
    return f"{variant}, {depth} layers"


def _step(arguments: argparse.Namespace, model: Model, variant: str, depth: int) -> jax_steps.JaxStep:
    deep = Model(name=model.name, sizes=dataclasses.replace(model.sizes, num_hidden_layers=depth))
    llama = jax_steps.base_llama(deep, dtype=arguments.dtype, abstract=True)
    return jax_steps.JaxStep(llama, deep, variant, batch=arguments.batch, length=arguments.length, remat=True)


def _compile(step: jax_steps.JaxStep) -> tuple[float, float]:
    """Seconds of tracing and lowering, and of compiling."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower()
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def _markdown(result: dict[str, Any], cases: list[tuple[str, int]]) -> str:
    least = result["depths"][0]
    rows = [
        [
            variant,
            depth,
            seconds_cell(result["compiling"][_case(variant, depth)]),
            result["ratio_to_least_depth"][_case(variant, depth)],
            seconds_cell(result["lowering"][_case(variant, depth)]),
        ]
        for variant, depth in cases
    ]
    return "\n".join(
        [
            f"# Compile time of the training step, {result['model']}",
            "",
            describe(result["environment"]),
            "",
            f"{result['batch']} x {result['length']} tokens, with recomputation; median (least–greatest) of fresh "
            "compiles.",
            "",
            table(["variant", "layers", "compiling", f"ratio to {least}", "tracing and lowering"], rows),
            "",
        ]
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--depths", type=lambda text: [int(word) for word in words(text)], default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    add_options(parser, frameworks=False)
    arguments = parser.parse_args(argv)
    arguments.variants = arguments.variants or ["MoKA auto"]
    if arguments.quick:
        arguments.batch, arguments.length, arguments.depths, arguments.repeats = 2, 16, [1, 2], 1
    return arguments


if __name__ == "__main__":
    main()
