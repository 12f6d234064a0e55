"""Memory and time of merging an adapter into a checkpoint.

    python -m benchmarks.merging --folder /path/with/28GB --arch llama2-7b

Writes a checkpoint of that architecture with random fp16 weights, in shards, if the folder has none, and merges a
random adapter of the preset `paper` into it, in a process of its own, into a folder beside it that is removed
afterwards. Reported: the peak of resident memory (mapped pages of the files included), the peak of its anonymous part
(sampled), the time, and the sizes. Results: results/merging_ARCH_DEVICE.*
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import describe, environment, table, write_results
from benchmarks.loading import GIGA, add_checkpoint_options, have_checkpoint
from moka_core import Adapter, Architecture, LayerFactors, plan_model, preset
from moka_core.adapter import expected_tensors

_SAMPLE_SECONDS = 0.02


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; the result that is written. A child process prints its own figures instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--pack", choices=["nf4-double", "nf4"])
    parser.add_argument("--label", default="", help="appended to the names of the result files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.frameworks, arguments.device = [], "cpu"
    if arguments.child:
        result = _merge(arguments)
        print(json.dumps(result))
        return result
    have_checkpoint(arguments)
    options = sys.argv[1:] if argv is None else list(argv)
    with tempfile.TemporaryDirectory() as adapter:
        _save_random_adapter(Path(adapter) / "adapter", arguments.folder)
        command = [sys.executable, "-m", "benchmarks.merging", *options, "--child", str(Path(adapter) / "adapter")]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    result = {
        "script": "merging",
        **{name: getattr(arguments, name) for name in ("arch", "quantise", "dtype", "pack")},
        **found,
        "environment": environment(arguments),
    }
    total = found["total"]
    rows = [
        ["the base, float16", f"{found['base_bytes'] / GIGA:.2f} GB"],
        ["the merged folder", f"{found['bytes'] / GIGA:.2f} GB in {found['files']} files"],
        ["peak of resident memory, mapped files included", f"{found['peak_bytes'] / GIGA:.2f} GB"],
        ["peak of its anonymous part", f"{found['anonymous_peak_bytes'] / GIGA:.2f} GB"],
        ["before the first tensor", f"{found['start_bytes'] / GIGA:.2f} GB"],
        ["time", f"{found['seconds']:.0f} s"],
        ["layers with an adapter", str(found["adapted"])],
        ["‖ΔW‖ / ‖W+ΔW‖", f"{total['update']:.2e}"],
        ["‖W′−(W+ΔW)‖ / ‖W+ΔW‖", f"{total['relative_error']:.2e}"],
        ["share of ΔW that was lost", f"{round(total['update_lost'], 4) + 0.0:.2%}"],
    ]
    made = f"packed as {arguments.pack}" if arguments.pack else arguments.dtype
    title = f"# Merging {arguments.arch}, held as {arguments.quantise}, into {made}"
    name = "_".join(filter(None, ["merging", arguments.arch, "cpu", arguments.label]))
    write_results(
        arguments.output, name, result, f"{title}\n\n{describe(result['environment'])}\n\n" + table(["", ""], rows)
    )
    return result


def _save_random_adapter(folder: Path, base: Path, *, seed: int = 0) -> None:
    """An adapter of the preset `paper` on every layer that it targets, its factors N(0, 0.02²)."""
    from conversion import open_base, save_adapter

    opened, config, rng = open_base(base), preset("paper"), np.random.default_rng(seed)
    layers = {}
    for path, plan in plan_model(config, Architecture.from_hf_config(opened.config).linear_layers()).items():
        shapes = expected_tensors(plan, config)
        tensors = {name: (0.02 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
        layers[path] = LayerFactors.from_tensors(plan, config, tensors)
    save_adapter(Adapter(config=config, layers=layers, base_fingerprint=opened.fingerprint), folder)


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    from conversion import load_adapter, merge_folder, open_base

    out = arguments.folder.with_name(arguments.folder.name + "-merged")
    base, adapter = open_base(arguments.folder, quantise=arguments.quantise), load_adapter(arguments.child)
    start_bytes = _status("VmHWM")
    with _AnonymousPeak() as anonymous:
        begin = time.perf_counter()
        report = merge_folder(adapter, base, out, dtype=arguments.dtype, pack=arguments.pack)
        seconds, peak = time.perf_counter() - begin, _status("VmHWM")
    shutil.rmtree(out)
    return {
        "base_bytes": sum(path.stat().st_size for path in set(base.files.values())),
        "bytes": report.bytes,
        "files": len(report.files),
        "adapted": len(report.adapted),
        "total": report.total.to_dict(),
        "start_bytes": start_bytes,
        "peak_bytes": peak,
        "anonymous_peak_bytes": anonymous.peak,
        "seconds": seconds,
    }


class _AnonymousPeak:
    """The most anonymous memory while it is entered, sampled: unlike of the whole, the kernel keeps no peak of it."""

    def __enter__(self) -> _AnonymousPeak:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _status("RssAnon"))


def _status(field: str) -> int:
    """Bytes, from the kernel. (Not `ru_maxrss`, which a process takes over from the one that started it.)"""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
