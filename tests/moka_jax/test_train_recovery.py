"""What damage, a full disk and signals leave behind, and that the run goes on from there as if nothing had happened."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from flax import nnx

from moka_core import DataError
from moka_jax.train import CheckpointError, read_metrics
from moka_jax.train.checkpoint import checkpoint_steps
from moka_jax.train.metrics import MetricsLog
from tests.moka_jax.train_toys import Ended, arrays, losses, run

# what Orbax leaves behind after reading a damaged checkpoint
pytestmark = pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> None:
    """Orbax shows pages of what went wrong below it."""
    caplog.set_level(logging.CRITICAL + 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run that was never stopped."""
    return run(tmp_path_factory.mktemp("whole"))


def assert_same_bits(one: Ended, other: Ended) -> None:
    """The same records, but for those of a fallback, each step once, and the same adapter."""
    records = [record for record in losses(one[0].metrics) if record[0] != "fallback"]
    assert records == losses(other[0].metrics)
    assert len({record[:2] for record in records if record[0] != "data"}) == len(records) - 2
    for a, b in zip(arrays(nnx.state(one[1])), arrays(nnx.state(other[1])), strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_damaged_checkpoint_is_told_recorded_and_made_up_for(tmp_path: Path, whole: Ended) -> None:
    shutil.copytree(whole[0].metrics.parent, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "7" / "_CHECKPOINT_METADATA").write_text('{"custom')
    resumed = run(tmp_path)
    assert resumed[0].resumed_from == 6
    assert "the checkpoint of step 7 is damaged, and was renamed to 7.damaged: " in resumed[2]
    assert "going on from step 6 of 7" in resumed[2]
    fallbacks = [record for record in read_metrics(resumed[0].metrics) if record["kind"] == "fallback"]
    assert [(record["step"], [d["step"] for d in record["damaged"]]) for record in fallbacks] == [(6, [7])]
    assert fallbacks[0]["damaged"][0]["why"] in resumed[2]
    assert_same_bits(resumed, whole)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["6", "7", "7.damaged"]


def test_if_no_checkpoint_is_sound_the_run_is_refused_and_nothing_changes(tmp_path: Path, whole: Ended) -> None:
    shutil.copytree(whole[0].metrics.parent, tmp_path / "run")
    for step in ("6", "7"):
        (tmp_path / "run" / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text("{}")

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(CheckpointError, match=r"expected a sound checkpoint; all 2 are damaged:\n  7: .*\n  6: "):
        run(tmp_path)
    assert contents() == before


def test_another_run_is_refused_though_its_newest_checkpoint_is_damaged(tmp_path: Path, whole: Ended) -> None:
    shutil.copytree(whole[0].metrics.parent, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"6: this checkpoint belongs to another run; 1 setting differs:"):
        run(tmp_path, seed=5)
    assert checkpoint_steps(checkpoints) == [6, 7]


def test_metrics_that_cannot_be_written_anew_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, resume_from=None).append({"kind": "train", "step": 1})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    message = (
        r"metrics.jsonl: the metrics cannot be written: .* No space left .*; nothing was lost: make room on the disk"
    )
    with pytest.raises(DataError, match=message):
        MetricsLog(path, resume_from=1)
    assert [record["step"] for record in read_metrics(path)] == [1]


Started = Callable[[str, Path], "subprocess.Popen[str]"]


@pytest.fixture
def start(whole: Ended) -> Iterator[Started]:
    """Start a run of `train_toys` in a process of its own; what is left of it is ended with the test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(mode: str, folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.moka_jax.train_toys", str(folder), mode]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(stream: IO[str] | None, line: str) -> None:
    assert stream is not None
    for seen in stream:
        if seen.strip() == line:
            return
    raise AssertionError(f"the process ended before {line!r}")


def test_sigterm_saves_and_stops_and_a_second_signal_stops_at_once(
    tmp_path: Path, whole: Ended, start: Started
) -> None:
    polite, stuck = start("slow", tmp_path / "polite"), start("stuck", tmp_path / "stuck")
    wait_for(polite.stdout, "step 2")
    polite.send_signal(signal.SIGTERM)
    out, error = polite.communicate(timeout=60)
    assert polite.returncode == 0, error
    told = json.loads(out.splitlines()[-1])
    assert told["interrupted"]
    assert 2 <= told["step"] < 7
    assert "stopping after this step; press Ctrl-C again, or repeat the signal, to stop at once" in told["printed"]
    assert checkpoint_steps(tmp_path / "polite" / "run" / "checkpoints")[-1] == told["step"]
    resumed = run(tmp_path / "polite")
    assert resumed[0].resumed_from == told["step"]
    assert_same_bits(resumed, whole)

    wait_for(stuck.stdout, "step 2")
    stuck.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert stuck.poll() is None  # it waits for the step
    begin = time.monotonic()
    stuck.send_signal(signal.SIGTERM)
    _, error = stuck.communicate(timeout=60)
    assert time.monotonic() - begin < 20  # the step would have taken 60
    assert stuck.returncode != 0
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert checkpoint_steps(tmp_path / "stuck" / "run" / "checkpoints") == []
    assert_same_bits(run(tmp_path / "stuck"), whole)


def test_a_full_disk_stops_the_run_and_the_next_start_goes_on(tmp_path: Path, whole: Ended, start: Started) -> None:
    """The system refuses to let a file grow, as a full disk does, in the middle of a line and of a checkpoint."""
    process = start("full", tmp_path)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    metrics, checkpoint = json.loads(out.splitlines()[-1])
    safe = "is safe: make room on the disk, and start again to go on from there"
    assert metrics["type"] == "TrainingError"
    assert metrics["message"].startswith("step 6: the metrics cannot be written: [Errno 27] File too large")
    assert metrics["message"].endswith(f"the checkpoint of step 4 {safe}")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text().endswith("\n")
    resumed = run(tmp_path)
    assert resumed[0].resumed_from == 4
    assert_same_bits(resumed, whole)

    folder = tmp_path / "checkpoint"
    assert checkpoint["type"] == "CheckpointError"
    where = folder.resolve() / "run" / "checkpoints" / "7"
    assert checkpoint["message"].startswith(f"{where}: the checkpoint cannot be written: ")
    assert "File too large" in checkpoint["message"]
    assert checkpoint["message"].endswith(f"the checkpoint of step 4 {safe}")
    resumed = run(folder, data={"eval": None}, log_every=7)
    assert (resumed[0].resumed_from, resumed[0].step) == (4, 7)
    assert checkpoint_steps(resumed[0].checkpoints) == [4, 7]
    for a, b in zip(arrays(nnx.state(resumed[1])), arrays(nnx.state(whole[1])), strict=True):
        assert a.tobytes() == b.tobytes()
