"""A whole training step, forward, backward and AdamW, in JAX and in PyTorch with PEFT, in one process.

    python -m benchmarks.train_step --base report/base            # SmolLM2-135M of `moka demo`
    python -m benchmarks.train_step --random llama3-8b --length 2048

Results: results/train_step_MODEL_DEVICE.*
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import (
    Call,
    Timings,
    add_options,
    chosen,
    describe,
    environment,
    file_name,
    interleave,
    note,
    reason,
    seconds_cell,
    settled,
    table,
    write_results,
)
from benchmarks.models import Model, add_model_options, check_model_options
from benchmarks.roofline import Speed, Work, attained, frozen_step

QUICK = ("frozen base", "LoRA r=32 q,v", "QLoRA r=32 q,v", "DoRA r=32 q,v", "LoKr q,v (dense base)", "MoKA auto")
QLORA = "torch: QLoRA r=32 q,v"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written."""
    arguments = _arguments(argv)
    with settled(arguments):
        return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = Model.from_options(arguments)
    speed = attained(arguments)
    calls, failures, notes = _calls(arguments, model)
    itemsize = 2 if arguments.dtype == "bfloat16" else 4
    work = frozen_step(model.sizes, arguments.batch, arguments.length, remat=arguments.remat, itemsize=itemsize)
    about = {
        "environment": environment(arguments),
        "model": model.name,
        "batch": arguments.batch,
        "length": arguments.length,
        "remat": arguments.remat,
        "attained": {"flops_per_second": speed.flops, "bytes_per_second": speed.bytes},
        "needed": {"flops": work.flops, "bytes": work.bytes, "seconds": speed.seconds(work)},
        "notes": notes,
    }
    parts = [model.name] if arguments.remat else [model.name, "no-remat"]
    name = file_name("train_step", arguments, *parts)

    def write(timings: Timings, *, show: bool = False) -> dict[str, Any]:
        result = {
            **about,
            "variants": timings.summary(),
            "failures": failures | timings.failures,
            "columns": {name: _columns(timings, name, arguments, speed, work) for name in timings.seconds},
        }
        write_results(arguments.output, name, result, _markdown(result, speed), show=show)
        return result

    note(f"{arguments.repeats} rounds of {len(calls)} variants")
    timings = interleave(calls, arguments.repeats, keep_going=arguments.keep_going, each_round=write)
    return write(timings, show=True)


def _calls(arguments: argparse.Namespace, model: Model) -> tuple[dict[str, Call], dict[str, str], dict[str, str]]:
    """Every variant's call, why some have none, and what there is to say of others."""
    options = {"batch": arguments.batch, "length": arguments.length, "remat": arguments.remat}
    makers: dict[str, Any] = {}
    notes: dict[str, str] = {}
    if "jax" in arguments.frameworks:
        from benchmarks import jax_steps

        llama = jax_steps.base_llama(model, dtype=arguments.dtype)
        makers |= {
            f"jax: {name}": lambda name=name: jax_steps.JaxStep(llama, model, name, **options).call()
            for name in jax_steps.VARIANTS
        }
    if "torch" in arguments.frameworks:
        from benchmarks import torch_steps

        bases = torch_steps.Bases(model, dtype=arguments.dtype, device=arguments.device)
        makers |= {
            f"torch: {name}": lambda name=name: torch_steps.TorchStep(bases, name, **options).call()
            for name in torch_steps.VARIANTS
        }
        notes = {f"torch: {name}": text for name, text in torch_steps.NOTES.items()}
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}
    for name in chosen(makers, arguments.variants):
        note(f"making {name}")
        try:
            calls[name] = makers[name]()
        except Exception as error:  # out of memory has a type of its own in every framework
            if not arguments.keep_going:
                raise
            failures[name] = reason(error)
    return calls, failures, {name: text for name, text in notes.items() if name in calls}


def _columns(
    timings: Timings, name: str, arguments: argparse.Namespace, speed: Speed, work: Work
) -> dict[str, float | None]:
    framework = name.partition(":")[0]
    median = timings.median(name)
    lora = "LoRA r=32 q,v" if framework == "jax" else "QLoRA r=32 q,v"
    return {
        "ratio_to_frozen": timings.ratio(name, f"{framework}: frozen base"),
        "ratio_to_lora_qv": timings.ratio(name, f"{framework}: {lora}"),
        "ratio_to_peft_qlora_qv": timings.ratio(name, QLORA),
        "tokens_per_second": None if median is None else arguments.batch * arguments.length / median,
        "share_of_roofline": speed.share(work, median),
    }


def _markdown(result: dict[str, Any], speed: Speed) -> str:
    needed = result["needed"]
    remat = "with" if result["remat"] else "without"
    rows = [
        [
            name,
            columns["ratio_to_frozen"],
            columns["ratio_to_lora_qv"],
            columns["ratio_to_peft_qlora_qv"],
            seconds_cell(result["variants"].get(name)),
            len(result["variants"].get(name, {}).get("samples", [])),
            f"{columns['tokens_per_second']:.0f}",
            columns["share_of_roofline"],
        ]
        for name, columns in result["columns"].items()
    ]
    headers = ["variant", "to frozen base", "to LoRA q,v", "to PEFT QLoRA q,v"]
    headers += ["median (least–greatest)", "rounds", "tokens/s", "share of roofline"]
    lines = [
        f"# A training step of {result['model']}",
        "",
        describe(result["environment"]),
        "",
        f"{result['batch']} x {result['length']} tokens, base in NF4 (doubly quantised), {remat} recomputation of the "
        "layers in the backward. The first two ratios are within a framework; the third is to PEFT's step of the run.",
        "",
        table(headers, rows),
        "",
        f"{speed.describe()} The frozen base's step needs {needed['flops'] / 1e9:.4g} GFLOP and "
        f"{needed['bytes'] / 1e9:.3g} GB (recomputation counted), {needed['seconds']:.3g} s at these speeds; the share "
        "is that time over the measured one.",
        "",
        *(f"- {name}: {text}" for name, text in (result["notes"] | result["failures"]).items()),
    ]
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True, help="in both frameworks")
    add_options(parser)
    arguments = parser.parse_args(argv)
    check_model_options(arguments, parser)
    if arguments.quick:
        arguments.repeats = 1
        arguments.variants = arguments.variants or list(QUICK)
    return arguments


if __name__ == "__main__":
    main()
