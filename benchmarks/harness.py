"""What every benchmark shares: options, interleaved timing, the machine's description and the result files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
FRAMEWORKS = ("jax", "torch")
PACKAGES = (
    *("moka", "numpy", "jax", "jaxlib", "flax", "optax"),
    *("torch", "transformers", "peft", "bitsandbytes", "pyfastkron"),
)
_SAMPLE_SECONDS = 0.01  # a call shorter than this is repeated within one sample
_MOST_CALLS = 50


class Call(NamedTuple):
    """A piece of work: `run` starts it, `wait` returns once what `run` returned is computed."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any]


@dataclass
class Timings:
    """Seconds of every sample by variant, and why a variant has none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        return statistics.median(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, to: str) -> float | None:
        """The median of `name` over that of `to`."""
        own, other = self.median(name), self.median(to)
        return None if own is None or other is None else own / other

    def summary(self) -> dict[str, dict[str, Any]]:
        """Median, least and greatest seconds of every variant, and all samples."""
        return {
            name: {"median": statistics.median(times), "min": min(times), "max": max(times), "samples": times}
            for name, times in self.seconds.items()
            if times
        }


def interleave(
    calls: Mapping[str, Call],
    repeats: int,
    *,
    warm: bool = True,
    keep_going: bool = False,
    each_round: Callable[[Timings], None] = lambda _: None,
) -> Timings:
    """Time every call `repeats` times, round robin; each second round goes backwards.

    Args:
        calls: by variant; each is one sample, or several equal calls if one takes less than 10 ms.
        warm: make one untimed round first, two calls of what takes less than a second. Without it every sample is
            one call.
        keep_going: leave out a variant that raises, and say why, instead of raising.
        each_round: called with what there is after every round, so that a run that is cut short leaves results.
    """
    timings = Timings()
    inner = dict.fromkeys(calls, 1)

    def attempt(name: str, count: int) -> float | None:
        try:
            return _seconds(calls[name], count)
        except Exception as error:  # out of memory has a type of its own in every framework
            if not keep_going:
                raise
            timings.failures[name] = reason(error)
            timings.seconds.pop(name, None)
            return None

    if warm:
        for name in calls:
            first = attempt(name, 1)
            second = attempt(name, 1) if first is not None and first < 1 else first
            if second is not None:
                inner[name] = max(1, min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS / second)))
    for turn in range(repeats):
        for name in calls if turn % 2 == 0 else reversed(list(calls)):
            if name not in timings.failures:
                elapsed = attempt(name, inner[name])
                if elapsed is not None:
                    timings.seconds.setdefault(name, []).append(elapsed)
        each_round(timings)
    return timings


def _seconds(call: Call, count: int) -> float:
    result = None
    start = time.perf_counter()
    for _ in range(count):
        result = call.run()
    call.wait(result)
    return (time.perf_counter() - start) / count


def reason(error: Exception) -> str:
    """One line for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def add_options(parser: argparse.ArgumentParser, *, frameworks: bool = True, variants: bool = True) -> None:
    """The options that all scripts have in common."""
    if frameworks:
        parser.add_argument("--frameworks", type=words, default=list(FRAMEWORKS), help="jax,torch")
    if variants:
        parser.add_argument(
            "--variants", nargs="+", help="names, or parts of names, of the variants to run; all by default"
        )
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--label", default="", help="appended to the names of the result files")
    parser.add_argument("--keep-going", action="store_true", help="a variant that fails is a line in the table")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, measures nothing")


def words(text: str) -> list[str]:
    """The entries of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """The same of whole numbers."""
    return [int(word) for word in words(text)]


@contextlib.contextmanager
def settled(arguments: argparse.Namespace) -> Iterator[None]:
    """Resolve `device` and `dtype`, and set up the frameworks for them; enter it before any array exists.

    With --quick PyTorch has one thread meanwhile: two threads on a busy machine wait for each other at every step.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one GPU
    frameworks = getattr(arguments, "frameworks", ["jax"])
    unknown = sorted(set(frameworks) - set(FRAMEWORKS))
    if unknown or not frameworks:
        raise SystemExit(f"--frameworks: expected jax, torch or both; got {','.join(frameworks)!r}")
    if arguments.device == "auto":
        arguments.device = "gpu" if _has_gpu(frameworks) else "cpu"
    if "jax" in frameworks:
        import jax

        if arguments.device == "cpu":
            jax.config.update("jax_platforms", "cpu")
        elif jax.default_backend() != "gpu":
            raise SystemExit(
                "--device gpu: JAX finds no GPU; install jax[cuda12] or jax[cuda13], or --frameworks torch"
            )
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if arguments.device == "gpu" else "float32"
    if not arguments.quick or "torch" not in frameworks:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def known_shapes(wanted: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """The names of the shapes to measure, all by default; the program ends at the first that is unknown."""
    for shape in wanted or known:
        if shape not in known:
            raise SystemExit(f"--shapes: expected some of {', '.join(known)}; got {shape!r}")
    return list(wanted or known)


def chosen(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """The names that a wanted word is (with or without its framework) or, if it is none, is part of; all by default."""
    names = list(names)
    hits: set[str] = set() if wanted else set(names)
    for word in wanted or []:
        whole = {name for name in names if word.lower() in (name.lower(), name.partition(": ")[2].lower())}
        hits |= whole or {name for name in names if word.lower() in name.lower()}
    found = [name for name in names if name in hits]
    if not found:
        raise SystemExit(f"--variants: nothing matches {wanted}; there are: {'; '.join(names)}")
    return found


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """The hardware and the versions of a run."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None or name == "moka":
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "gpu": _gpu_name() if arguments.device == "gpu" else None,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "versions": versions,
        "options": {
            key: value
            for key, value in vars(arguments).items()
            if key not in ("base", "folder", "output", "child") and value is not None
        },
    }


def describe(environment: Mapping[str, Any]) -> str:
    """The environment in one Markdown paragraph."""
    hardware = f"{environment['cpu']}, {environment['cores']} cores"
    if environment["gpu"]:
        hardware = f"{environment['gpu']} ({hardware})"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = f" Commit {environment['commit']}." if environment["commit"] else ""
    return f"{hardware}; {environment['dtype']}. {versions}.{commit}"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is a dash, a float has three digits."""
    lines = [headers, ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def seconds_cell(summary: Mapping[str, Any] | None) -> str | None:
    """Median, least and greatest of one variant, in milliseconds or seconds."""
    if summary is None:
        return None
    unit, factor = ("s", 1) if summary["median"] >= 1 else ("ms", 1000)
    median, low, high = (_digits(summary[key] * factor) for key in ("median", "min", "max"))
    return f"{median} {unit} ({low}–{high})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def file_name(script: str, arguments: argparse.Namespace, *parts: str) -> str:
    """The name of a result file: script, what was measured, hardware, and what is not the default."""
    usual = "bfloat16" if arguments.device == "gpu" else "float32"
    extra = [arguments.dtype] if arguments.dtype != usual else []
    frameworks = getattr(arguments, "frameworks", None)
    if frameworks is not None and len(frameworks) == 1:
        extra += frameworks
    extra += [arguments.label] if arguments.label else []
    extra += ["quick"] if arguments.quick else []
    return "_".join([script, *filter(None, parts), arguments.device, *extra])


def write_results(folder: Path, name: str, result: Mapping[str, Any], markdown: str, *, show: bool = True) -> None:
    """Write NAME.json and NAME.md, and print the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    if show:
        print(markdown)


def note(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def _commit() -> str | None:
    """The commit that was measured, with "-dirty" if files were changed since; None outside of a clone."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    import jax

    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def _has_gpu(frameworks: Sequence[str]) -> bool:
    if "torch" in frameworks:
        import torch

        return torch.cuda.is_available()
    import jax

    return jax.default_backend() == "gpu"
