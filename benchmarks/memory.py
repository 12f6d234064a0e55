"""Memory of a training step, by variant, with and without recomputation of the layers.

    python -m benchmarks.memory --base report/base
    python -m benchmarks.memory --random llama3-8b --length 2048 --remats on

JAX: temporary memory of the compiled step by XLA's own analysis; nothing is run, no weights are needed. PyTorch: what
one step adds to its process at the peak (resident memory on a CPU, allocated memory on a GPU), each variant in a
process of its own, after a first step. On a GPU also the peak of the whole process, weights included, in both
frameworks. Results: results/memory_MODEL_DEVICE.*
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    add_options,
    chosen,
    describe,
    environment,
    file_name,
    note,
    reason,
    settled,
    table,
    words,
    write_results,
)
from benchmarks.models import Model, add_model_options, check_model_options

MEGA = 1e6


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written. A child process prints its own figures instead."""
    arguments = _arguments(argv)
    with settled(arguments):
        if arguments.child:
            result = _child(arguments, Model.from_options(arguments))
            print(json.dumps(result))
            return result
        return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = Model.from_options(arguments)
    names = []
    if "jax" in arguments.frameworks:
        from benchmarks import jax_steps

        names += [f"jax: {name}" for name in jax_steps.VARIANTS]
    if "torch" in arguments.frameworks:
        from benchmarks import torch_steps

        names += [f"torch: {name}" for name in torch_steps.VARIANTS]
    names = chosen(names, arguments.variants)
    result: dict[str, Any] = {
        "environment": environment(arguments),
        "model": model.name,
        "batch": arguments.batch,
        "length": arguments.length,
        "variants": {name: {} for name in names},
        "failures": {},
    }
    file = file_name("memory", arguments, model.name)
    for name in names:
        note(name)
        figures = result["variants"][name]
        try:
            if name.startswith("jax: "):
                figures |= _analysed(arguments, model, name)
            if name.startswith("torch: ") or arguments.device == "gpu":
                _merge(figures, _in_child(arguments, name))
        except Exception as error:  # out of memory has a type of its own in every framework
            if not arguments.keep_going:
                raise
            result["failures"][name] = reason(error)
        write_results(arguments.output, file, result, _markdown(arguments, result), show=False)
    write_results(arguments.output, file, result, _markdown(arguments, result))
    return result


def _analysed(arguments: argparse.Namespace, model: Model, name: str) -> dict[str, Any]:
    """XLA's own analysis of the compiled step, in bytes, by "on" and "off"."""
    from benchmarks import jax_steps

    llama = jax_steps.base_llama(model, dtype=arguments.dtype, abstract=True)
    result = {}
    for remat in arguments.remats:
        step = jax_steps.JaxStep(
            llama,
            model,
            name.partition(": ")[2],
            batch=arguments.batch,
            length=arguments.length,
            remat=remat == "on",
        )
        analysis = step.lower().compile().memory_analysis()
        fields = [field for field in dir(analysis) if field.endswith("_in_bytes")]
        figures = {field.removesuffix("_in_bytes").removesuffix("_size"): getattr(analysis, field) for field in fields}
        result[remat] = {"step": figures["temp"], "analysis": figures}
    return result


def _in_child(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """What `_child` measures, in a new process."""
    options = ["--batch", arguments.batch, "--length", arguments.length, "--device", arguments.device]
    options += ["--dtype", arguments.dtype, "--remats", ",".join(arguments.remats), "--child", name]
    options += ["--frameworks", name.partition(":")[0]]
    options += ["--quick"] if arguments.quick else []
    options += ["--base", str(Path(arguments.base).resolve())] if arguments.base else []
    options += ["--random", arguments.random] if arguments.random else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *map(str, options)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(done.stderr.split()[-40:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _child(arguments: argparse.Namespace, model: Model) -> dict[str, Any]:
    """{"on" or "off": {"step": bytes that a step adds at its peak, "peak": of the whole process on a GPU}}."""
    framework, _, variant = arguments.child.partition(": ")
    options = {"batch": arguments.batch, "length": arguments.length}
    result = {}
    if framework == "jax":
        import jax

        from benchmarks import jax_steps

        llama = jax_steps.base_llama(model, dtype=arguments.dtype)
        for remat in arguments.remats:
            call = jax_steps.JaxStep(llama, model, variant, remat=remat == "on", **options).call()
            call.wait(call.run())
            result[remat] = {"peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]}
            del call
            gc.collect()
        return result
    from benchmarks import torch_steps

    bases = torch_steps.Bases(model, dtype=arguments.dtype, device=arguments.device)
    for remat in arguments.remats:
        step = torch_steps.TorchStep(bases, variant, remat=remat == "on", **options)
        step.wait(step.run())  # the optimiser's moments, and what libraries keep
        result[remat] = _gpu_peak(step) if arguments.device == "gpu" else _resident_peak(step)
        del step
        gc.collect()
    return result


def _gpu_peak(step: Any) -> dict[str, int]:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.wait(step.run())
    peak = torch.cuda.max_memory_allocated()
    return {"step": peak - before, "peak": peak}


def _resident_peak(step: Any) -> dict[str, int]:
    """Growth of the resident memory, from Linux's own high-water mark, after free memory was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident
    before = _status("VmRSS")
    step.run()
    return {"step": _status("VmHWM") - before}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _merge(into: dict[str, Any], measured: dict[str, Any]) -> None:
    for remat, figures in measured.items():
        into[remat] = {**into.get(remat, {}), **figures}


def _markdown(arguments: argparse.Namespace, result: dict[str, Any]) -> str:
    lines = [
        f"# Memory of a training step of {result['model']}",
        "",
        describe(result["environment"]),
        "",
        f"{result['batch']} x {result['length']} tokens, base in NF4. What a step adds at its peak: in JAX XLA's own "
        "analysis of temporary memory, in PyTorch measured in a process for each variant. Ratios are within a "
        "framework.",
        "",
    ]
    gpu = arguments.device == "gpu"
    headers = ["variant", "MB", "to LoRA q,v", "to LoRA q,k,v,up,down", *(["peak of the process, MB"] if gpu else [])]
    for remat in arguments.remats:
        title = "With" if remat == "on" else "Without"
        rows = []
        for name, figures in result["variants"].items():
            own = figures.get(remat, {})
            row = [name, _mega(own.get("step"))]
            row += [_ratio(result["variants"], name, remat, targets) for targets in ("q,v", "q,k,v,up,down")]
            rows.append(row + ([_mega(own.get("peak"))] if gpu else []))
        lines += [f"{title} recomputation:", "", table(headers, rows), ""]
    lines += [f"- {name}: {text}" for name, text in result["failures"].items()]
    return "\n".join(lines)


def _mega(count: int | None) -> str | None:
    return None if count is None else f"{count / MEGA:.0f}" if count >= 100 * MEGA else f"{count / MEGA:.3g}"


def _ratio(variants: dict[str, Any], name: str, remat: str, targets: str) -> float | None:
    framework = name.partition(":")[0]
    other = f"{framework}: {'LoRA' if framework == 'jax' else 'QLoRA'} r=32 {targets}"
    own = variants[name].get(remat, {}).get("step")
    to = variants.get(other, {}).get(remat, {}).get("step")
    return own / to if own and to else None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--remats", type=words, default=["on", "off"], help="recomputation: on,off")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args(argv)
    check_model_options(arguments, parser)
    if not set(arguments.remats) <= {"on", "off"}:
        parser.error(f"--remats: expected on, off or both; got {','.join(arguments.remats)!r}")
    if arguments.quick and not arguments.variants:
        arguments.variants = ["LoRA r=32 q,v", "QLoRA r=32 q,v", "jax: MoKA auto"]
    return arguments


if __name__ == "__main__":
    main()
