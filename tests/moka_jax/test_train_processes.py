"""Two real processes, connected over loopback, two simulated devices each: they train one adapter, killed or not."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import moka_jax.train.processes as processes
from moka_core import ConfigError
from moka_jax.train.checkpoint import describe
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import save_tiny_llama, write_run

ROOT = Path(__file__).parents[2]


def start(config: Path, output: Path, *, count: int = 2, settings: Sequence[list[str]] = ((), ())) -> list:
    """`moka train`, in several processes, or in one, each with settings of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}", "PYTHONPATH": str(ROOT)}
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-c", "from moka_cli.main import main; main()", "train", str(config)]
    return [
        subprocess.Popen(
            [*command, f"output={output}", "mesh={data: 2, fsdp: 2}", *settings[number]],
            env={**os.environ, **devices, **({**together, "JAX_PROCESS_ID": str(number)} if count > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]


def finish(started: list[subprocess.Popen]) -> list[str]:
    texts = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(texts)
    return texts


def records(output: Path) -> list[dict]:
    """Every record without what depends on the clock, or on how often the run was started."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    clocks = ("seconds", "tokens_per_second")
    return [{key: line[key] for key in line if key not in clocks} for line in lines if line["kind"] != "start"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"hidden_size": 256, "vocab_size": 320, "max_position_embeddings": 128}
    save_tiny_llama(folder / "base", **sizes)
    make_tokenizer().save_pretrained(folder / "base")
    steps = {"steps": 20, "batch_size": 8, "accumulate": 2, "eval_every": 10, "checkpoint_every": 10}
    return write_run(folder, folder / "base", train=48, eval=10, **steps)


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_end_as_if_nothing_had_happened(config, tmp_path):
    texts = finish(start(config, tmp_path / "whole"))
    assert "step 20/20" in texts[0]
    assert "step 20/20" not in texts[1], "one of them tells"

    killed = start(config, tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 13' in metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in killed:
        process.kill()
        process.communicate()
    assert "going on from step 10 of 20" in finish(start(config, tmp_path / "killed"))[0]

    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    ends = [describe(tmp_path / name / "checkpoints" / "20")["digest"] for name in ("whole", "killed")]
    assert ends[0] == ends[1]

    finish(start(config, tmp_path / "alone", count=1))  # the same mesh in one process
    losses = [
        [record["loss"] for record in records(tmp_path / name) if record["kind"] == "train"]
        for name in ("whole", "alone")
    ]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # measured: 0


@pytest.mark.slow
def test_two_processes_that_were_told_other_things_do_not_start(config, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [json.dumps({"prompt": f"add {n} {n}", "completion": f"gives {7 * n + 1}"}) for n in range(48)]
    other.write_text("\n".join(rows) + "\n")
    settings = [[], [f"data.train={other}", "optimiser.learning_rate=0.5", "eval_every=7"]]
    started = start(config, tmp_path / "run", settings=settings)
    texts = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [1, 1], texts
    for text in texts:
        assert "expected one config, the same data and the same checkpoints for all; 3 settings differ:" in text
        assert "eval_every: process 0 has 10, process 1 7" in text
        assert "training examples: process 0 has" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_the_processes_were_told_is_compared_name_by_name(monkeypatch):
    values = {"seed": 3, "optimiser.learning_rate": 0.01, "mesh": {"data": 2}, "checkpoints": [4]}
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    told = [values, values, {**values, "seed": 4, "checkpoints": []}]
    monkeypatch.setattr(processes, "_texts_of_all", lambda text: [json.dumps(told[0]), *map(json.dumps, told[1:])])
    message = (
        "2 settings differ:\n  checkpoints: process 0 has [4], process 2 []\n  seed: process 0 has 3, process 2 4\n"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        processes.check_agreement(values)
    del told[2]
    processes.check_agreement(values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set, but JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "expected JAX_PROCESS_ID from 0 to JAX_NUM_PROCESSES - 1; got 2 of 2",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "got 0 of two",
        ),
    ],
)
def test_an_environment_that_cannot_connect_is_refused(given, message, monkeypatch):
    for name in processes._NAMED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(message)):
        processes.start_processes()


def test_a_process_of_its_own_connects_to_nobody(monkeypatch):
    for name in (*processes._NAMED, *processes._SCHEDULERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_: pytest.fail("connected"))
    processes.start_processes()
    assert processes.is_first()
    assert processes.any_process(True)
    assert not processes.any_process(False)
