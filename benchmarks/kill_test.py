"""Kills a run with SIGKILL at random moments, starts it again each time, and compares its end with a run left alone.

    python -m benchmarks.kill_test --kills 20 --seed 0

A small random model, many steps, frequent evaluations and checkpoints, packed rows, dropout. The moments are aimed at
steps, at saving and at evaluation in turn. Equal bit for bit must be: the adapter and the optimiser's state (their
digests), every line of the metrics but for clocks, and each step stands there once. The exit status says whether they
are.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import note

STEPS = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test; 0 if the ends are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = _prepare(root)
        begin = time.monotonic()
        _finish(_start(config, root / "whole"))
        seconds = time.monotonic() - begin
        note(f"left alone: {seconds:.0f} s")
        moments = random.Random(arguments.seed)
        phases: Counter[str] = Counter()
        for number in range(arguments.kills):
            aim = ("steps", "saving", "evaluation")[number % 3]
            output = root / "killed"
            process, first = _start(config, output), _records_count(output)
            deadline = time.monotonic() + 3 * seconds
            while process.poll() is None and _records_count(output) in (0, first) and time.monotonic() < deadline:
                time.sleep(0.002)  # it starts
            while process.poll() is None and aim != "steps" and _phase(output) != aim and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 1.5 if aim == "steps" else 0.02))
            if process.poll() is not None:
                note(f"the run ended before kill {number + 1}")
                break
            process.kill()
            process.communicate()
            phases[_phase(root / "killed")] += 1
        killed = sum(phases.values())
        _finish(_start(config, root / "killed"))
        problems = _differences(root / "whole", root / "killed")
    found = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    print(f"{killed} kills ({found}); " + ("; ".join(problems) or "the ends are equal, bit for bit"))
    return 1 if problems else 0


def _prepare(root: Path) -> Path:
    from tests.moka_jax.train_toys import make_tokenizer
    from tests.tiny import save_tiny_llama, write_run

    save_tiny_llama(root / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(root / "base")
    steps = {"steps": STEPS, "batch_size": 4, "eval_every": 5, "checkpoint_every": 3}
    data, adapter = {"packing": True}, {"dropout": 0.1}
    return write_run(root, root / "base", train=96, eval=24, data=data, adapter=adapter, **steps)


def _start(config: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from moka_cli.main import main; main()", "train", str(config), f"output={output}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    text = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"the run failed:\n{text}")


def _records_count(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def _phase(output: Path) -> str:
    """What the run was about when it was killed, as far as its files tell."""
    checkpoints = output / "checkpoints"
    if checkpoints.is_dir() and any("tmp" in path.name for path in checkpoints.iterdir()):
        return "saving"
    metrics = output / "metrics.jsonl"
    lines = [line for line in (metrics.read_text() if metrics.exists() else "").split("\n") if line]
    last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {"kind": "none", "step": 0}
    return "evaluation" if last["kind"] == "train" and last["step"] % 5 == 0 else "steps"


def _differences(one: Path, other: Path) -> list[str]:
    from moka_jax.train.checkpoint import describe

    problems = []
    digests = [describe(run / "checkpoints" / str(STEPS))["digest"] for run in (one, other)]
    if digests[0] != digests[1]:
        problems.append("adapter or optimiser differ")
    records = [_records(run) for run in (one, other)]
    if records[0] != records[1]:
        problems.append("metrics differ")
    for run, lines in zip((one, other), records, strict=True):
        steps = [record["step"] for record in lines if record["kind"] == "train"]
        if steps != list(range(1, STEPS + 1)):
            problems.append(f"{run.name}: steps are missing or stand twice")
    return problems


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main())
