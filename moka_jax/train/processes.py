"""Several processes that train together, as `jax.distributed` connects them: what each of them has to know."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from moka_core import ConfigError
from moka_jax.train.config import differing_settings

_NAMED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# more than one of these, and a scheduler that JAX knows has started this process
_SCHEDULERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def start_processes() -> None:
    """Connect the processes of a run, if the environment says that there are several; call it before anything else.

    Either JAX_COORDINATOR_ADDRESS (host:port of the first one), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or Slurm
    or Open MPI has started more than one task.

    Raises:
        ConfigError: some of the three are missing, or are no numbers.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in _NAMED if os.environ.get(name)}
    if given:
        missing = [name for name in _NAMED if name not in given]
        if missing:
            raise ConfigError(f"several processes: {', '.join(given)} is set, but {', '.join(missing)} is not")
        count, number = given[_NAMED[1]], given[_NAMED[2]]
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise ConfigError(
                f"several processes: expected JAX_PROCESS_ID from 0 to JAX_NUM_PROCESSES - 1; got {number} of {count}"
            )
        jax.distributed.initialize(given[_NAMED[0]], int(count), int(number))
    elif any(os.environ.get(name, "1").isdecimal() and int(os.environ.get(name, "1")) > 1 for name in _SCHEDULERS):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    """Whether it is so in any of the processes, all of which ask at the same time."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_agreement(values: Mapping[str, Any]) -> None:
    """Refuse to go on if the processes were not told the same; all of them come here at the same time.

    Args:
        values: what has to be the same everywhere, in JSON's types.

    Raises:
        ConfigError: some process has other values than the first; all that differ are listed.
    """
    if jax.process_count() == 1:
        return
    first, *others = [json.loads(text) for text in _texts_of_all(json.dumps(values))]
    for number, other in enumerate(others, start=1):
        changes = differing_settings(first, other, names=("process 0", f"process {number}"))
        if changes:
            raise ConfigError(
                f"several processes: expected one config, the same data and the same checkpoints for all; {changes}\n"
                "start every process with the same settings and the same files"
            )


def _texts_of_all(text: str) -> list[str]:
    """The text of every process, in their order."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """While entered, no other run can write into the folder; the lock ends with the process, however that ends.

    Raises:
        ConfigError: another run holds it.
    """
    lock = FileLock(output / ".lock", blocking=False)
    taken = False
    if is_first():
        try:
            lock.acquire()
        except Timeout:
            taken = True
    try:
        if any_process(taken):
            raise ConfigError(f"output: another run writes into {output}; wait for its end, or use another folder")
        yield
    finally:
        lock.release()


def whole(array: jax.Array) -> np.ndarray:
    """An array on this host, whichever devices it is split over."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
