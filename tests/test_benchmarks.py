"""Every benchmark runs to its end on tiny sizes, and writes what it measured; nothing here looks at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Call, interleave

ROOT = Path(__file__).parents[1]


def run_quick(script: str, folder: Path, *options: str) -> tuple[dict, str]:
    """The JSON and the Markdown of a `--quick` run in a process of its own: it sets up JAX for itself."""
    command = [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--output", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_the_ways_are_timed_and_compared_with_the_cost_model(tmp_path):
    result, text = run_quick("ways", tmp_path)
    (case,) = result["cases"]
    assert case["seconds"].keys() == {"base", *case["predicted_multiply_adds"]}
    assert all(case["seconds"][name] > 0 for name in ("base", "factored", "gradient_factored", "gradient_merged"))
    assert "The model takes the faster way in" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", ["layer", "train_step", "memory", "compile_time"])
def test_each_benchmark_runs_to_its_end(script, tmp_path):
    result, text = run_quick(script, tmp_path)
    assert result["environment"]["versions"]["jax"]
    assert "MoKA" in text
    assert "|" in text


def test_variants_take_turns_and_one_that_fails_is_left_out_with_its_reason():
    order = []

    def fails() -> None:
        raise MemoryError("too large")

    calls = {name: Call(lambda name=name: order.append(name), lambda _: None) for name in ("a", "b")}
    calls["c"] = Call(fails, lambda _: None)
    timings = interleave(calls, 3, warm=False, keep_going=True)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert timings.failures == {"c": "MemoryError: too large"}
    assert {name: len(times) for name, times in timings.seconds.items()} == {"a": 3, "b": 3}
    with pytest.raises(MemoryError):
        interleave(calls, 1, warm=False)
