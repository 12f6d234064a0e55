"""One linear layer alone, forward and backward, on an NF4 base: MoKA by each execution, LoRA, and the ways others go.

    python -m benchmarks.layer [--frameworks jax,torch] [--shapes llama2-7b-q,llama3-8b-v] [--tokens 128,512]

The gradient is by the input and by the adapter's parameters; the base is frozen. Results: results/layer_DEVICE.*
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import (
    Timings,
    add_options,
    chosen,
    describe,
    environment,
    file_name,
    interleave,
    known_shapes,
    note,
    numbers,
    seconds_cell,
    settled,
    table,
    words,
    write_results,
)
from benchmarks.roofline import Speed, attained, frozen_layer

SHAPES = {"llama2-7b-q": (4096, 4096), "llama3-8b-v": (1024, 4096)}
QUICK = {"quick": (128, 256)}
TOKENS = (128, 512, 2048, 8192, 16384)
OURS = "MoKA auto"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written."""
    arguments = _arguments(argv)
    with settled(arguments):
        return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    name = file_name("layer", arguments)
    speed = attained(arguments)
    result: dict[str, Any] = {
        "environment": environment(arguments),
        "attained": {"flops_per_second": speed.flops, "bytes_per_second": speed.bytes},
        "cases": [],
    }
    known = QUICK if arguments.quick else SHAPES
    for shape in known_shapes(arguments.shapes, known):
        layers = _layers(arguments, *known[shape])
        for tokens in arguments.tokens:
            result["cases"].append(_case(arguments, layers, shape, known[shape], tokens, speed))
            write_results(arguments.output, name, result, _markdown(result, speed), show=False)
    write_results(arguments.output, name, result, _markdown(result, speed))
    return result


def _layers(arguments: argparse.Namespace, out: int, in_: int) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    if "jax" in arguments.frameworks:
        from benchmarks.layer_jax import JaxLayer

        layers["jax"] = JaxLayer(out, in_, arguments.dtype)
    if "torch" in arguments.frameworks:
        from benchmarks.layer_torch import TorchLayer

        layers["torch"] = TorchLayer(out, in_, arguments.dtype, arguments.device)
    return layers


def _case(
    arguments: argparse.Namespace,
    layers: dict[str, Any],
    shape: str,
    dims: tuple[int, int],
    tokens: int,
    speed: Speed,
) -> dict[str, Any]:
    note(f"{shape}, {tokens} tokens")
    everything = [f"{framework}: {name}" for framework, layer in layers.items() for name in layer.variants]
    wanted = chosen(everything, arguments.variants)
    names = {f: [name.partition(": ")[2] for name in wanted if _framework(name) == f] for f in layers}
    calls = {}
    for framework, layer in layers.items():
        calls |= {f"{framework}: {name}": call for name, call in layer.calls(tokens, names[framework]).items()}
    slow = arguments.device == "cpu" and tokens >= 8192  # then a warm-up costs more than it is worth
    repeats = arguments.repeats or _repeats(arguments, tokens)
    timings = interleave(calls, repeats, warm=not slow, keep_going=arguments.keep_going)
    work = frozen_layer(*dims, tokens, 2 if arguments.dtype == "bfloat16" else 4)
    del calls
    gc.collect()
    return {
        "shape": shape,
        "dims": list(dims),
        "tokens": tokens,
        "variants": timings.summary(),
        "failures": timings.failures,
        "notes": {f"{f}: {n}": why for f, layer in layers.items() for n, why in getattr(layer, "notes", {}).items()},
        "ratio_to_frozen": {name: timings.ratio(name, _framework(name) + ": frozen base") for name in timings.seconds},
        "ratio_to_moka_auto": {name: timings.ratio(name, f"{_framework(name)}: {OURS}") for name in timings.seconds},
        "needed": {"flops": work.flops, "bytes": work.bytes, "seconds": speed.seconds(work)},
        "share_of_roofline": _shares(timings, speed, work),
    }


def _repeats(arguments: argparse.Namespace, tokens: int) -> int:
    if arguments.quick:
        return 2
    if arguments.device == "gpu":
        return 20
    return 15 if tokens <= 128 else 7 if tokens <= 512 else 4 if tokens <= 2048 else 2


def _shares(timings: Timings, speed: Speed, work: Any) -> dict[str, float | None]:
    return {name: speed.share(work, timings.median(name)) for name in timings.seconds}


def _framework(name: str) -> str:
    return name.partition(":")[0]


def _markdown(result: dict[str, Any], speed: Speed) -> str:
    lines = ["# One layer, forward and backward", "", describe(result["environment"]), "", speed.describe(), ""]
    lines += [
        "Ratios are of medians in one run. The roofline is the time of the products, and of the bytes, that the frozen "
        "layer needs, at the attained speeds; a share is that time over the measured one.",
        "",
    ]
    cases = result["cases"]
    for shape in dict.fromkeys(case["shape"] for case in cases):
        own = [case for case in cases if case["shape"] == shape]
        out, in_ = own[0]["dims"]
        for framework in result["environment"]["options"]["frameworks"]:
            lines += [f"## {shape} ({out}x{in_}), {framework}", "", *_tables(own, framework), ""]
    missing = {name: why for case in cases for name, why in (case["notes"] | case["failures"]).items()}
    lines += [f"- {name}: {why}" for name, why in missing.items()]
    return "\n".join(lines)


def _tables(cases: list[dict[str, Any]], framework: str) -> list[str]:
    names = list(dict.fromkeys(name for case in cases for name in case["variants"] if _framework(name) == framework))
    names.sort(key=lambda name: not name.endswith("frozen base"))
    short = [name.partition(": ")[2] for name in names]
    missing = sorted({n.partition(": ")[2] for c in cases for n in c["notes"] if _framework(n) == framework})
    frozen = f"{framework}: frozen base"

    def values(case: dict[str, Any], key: str) -> list[Any]:
        return [case[key].get(name) for name in names] + ["not measured" for _ in missing]

    head = ["tokens", *short, *missing]
    ratio = table(head, [[case["tokens"], *values(case, "ratio_to_frozen")] for case in cases])
    ours = table(head, [[case["tokens"], *values(case, "ratio_to_moka_auto")] for case in cases])
    times = table(
        head,
        [
            [c["tokens"], *(seconds_cell(c["variants"].get(name)) for name in names), *("–" for _ in missing)]
            for c in cases
        ],
    )
    roof = table(
        ["tokens", "GFLOP needed", "MB needed", "roofline ms", "share, frozen", f"share, {OURS}"],
        [
            [
                case["tokens"],
                case["needed"]["flops"] / 1e9,
                case["needed"]["bytes"] / 1e6,
                case["needed"]["seconds"] * 1e3,
                case["share_of_roofline"].get(frozen),
                case["share_of_roofline"].get(f"{framework}: {OURS}"),
            ]
            for case in cases
        ],
    )
    return [
        "Ratio to the frozen base:",
        "",
        ratio,
        "",
        f"Ratio to {OURS} (above 1: slower than it):",
        "",
        ours,
        "",
        "Median (least–greatest):",
        "",
        times,
        "",
        roof,
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=words, help=", ".join(SHAPES))
    parser.add_argument("--tokens", type=numbers)
    parser.add_argument("--repeats", type=int, help="samples of each variant; by default more for small sizes")
    add_options(parser)
    arguments = parser.parse_args(argv)
    arguments.tokens = arguments.tokens or ([16] if arguments.quick else list(TOKENS))
    return arguments


if __name__ == "__main__":
    main()
