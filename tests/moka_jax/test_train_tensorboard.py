"""TensorBoard's event files and the profiler's traces: what stands in them, also after a run was stopped."""

from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moka_core import ConfigError
from moka_jax.train import TrainingError, read_metrics, train
from moka_jax.train.tensorboard import TensorBoard
from tests.moka_jax.train_toys import make_config, make_model, make_tokenizer, run


def events(folder: Path) -> Iterator[Any]:
    """The events of a folder's files, in the order in which TensorBoard reads them."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event()
            event.ParseFromString(content[12 : 12 + length])
            content = content[16 + length :]
            yield event


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that TensorBoard shows: where a session starts at a step, what was there from it on is dropped."""
    points: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        if event.HasField("session_log"):
            points = {tag: [point for point in old if point[0] < event.step] for tag, old in points.items()}
        for value in event.summary.value:
            points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points


def recorded(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """The same points from the metrics file."""
    names = {"train": ("loss", "learning_rate", "grad_norm", "tokens_per_second", "skipped"), "eval": ("loss",)}
    points: dict[str, list[tuple[int, Any]]] = {}
    for record in read_metrics(path):
        for name in names.get(record["kind"], ()):
            points.setdefault(f"{record['kind']}/{name}", []).append((record["step"], pytest.approx(record[name])))
    return points


def test_tensorboard_shows_the_metrics_once_though_the_run_was_stopped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")

    class PowerCut(Exception):
        pass

    def crash(step: int, *_: Any) -> None:
        if step == 6:
            raise PowerCut

    with pytest.raises(PowerCut):
        run(tmp_path, crash, tensorboard=True)
    folder = tmp_path / "run" / "tensorboard"
    assert [step for step, _ in shown(folder)["train/loss"]] == [1, 2, 3, 4, 5, 6]
    resumed, _, _ = run(tmp_path, tensorboard=True)
    assert resumed.resumed_from == 4
    assert len(list(folder.iterdir())) == 2
    assert shown(folder) == recorded(resumed.metrics)
    assert [step for step, _ in shown(folder)["eval/loss"]] == [0, 3, 6, 7]


def test_the_points_that_are_not_shown_twice_are_there_twice(tmp_path: Path) -> None:
    """The test above would notice points that were given again without a new session."""
    pytest.importorskip("tensorboardX")
    record = {"kind": "train", "step": 3, "loss": 1.0}
    for first_step in (0, 4):
        with TensorBoard(tmp_path, first_step=first_step) as board:
            board.add(record)
    assert shown(tmp_path) == {"train/loss": [(3, 1.0), (3, 1.0)]}


def test_without_the_package_the_run_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboardX" else find(name))
    message = (
        r"tensorboard: expected the package tensorboardX; it is not installed; run: pip install tensorboardX, or set "
        r"tensorboard: false"
    )
    config = make_config(tmp_path, tensorboard=True)
    with pytest.raises(ConfigError, match=message):
        train(make_model(), make_tokenizer(), config, console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


def test_an_event_file_that_cannot_be_written_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    write = TensorBoard.add

    def fail(board: TensorBoard, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise OSError(28, "No space left on device")
        write(board, record)

    monkeypatch.setattr(TensorBoard, "add", fail)
    message = r"step 5: the metrics cannot be written: .* No space left on device; the checkpoint of step 4 is safe"
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, tensorboard=True)


def test_the_named_steps_are_profiled(tmp_path: Path) -> None:
    xplanes = tmp_path / "run" / "profile" / "plugins" / "profile"
    _, _, printed = run(tmp_path, profile={"start": 3, "steps": 2}, data={"eval": None}, steps=5)
    assert f"profile of the steps up to 4: {tmp_path / 'run' / 'profile'}" in printed
    (trace,) = xplanes.glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    names = trace.read_bytes()
    assert b"step_num" in names


def test_a_profile_ends_with_the_run(tmp_path: Path) -> None:
    """The next one can begin: JAX has one profiler for the process."""

    class PowerCut(Exception):
        pass

    def crash(step: int, *_: Any) -> None:
        if step == 2:
            raise PowerCut

    changes: dict[str, Any] = {"profile": {"start": 1, "steps": 5}, "data": {"eval": None}, "steps": 5}
    for _ in range(2):
        with pytest.raises(PowerCut):
            run(tmp_path, crash, **changes)
