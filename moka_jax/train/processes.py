"""Several processes that train together, as `jax.distributed` connects them: what each of them has to know."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from moka_core import ConfigError

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


def whole(array: jax.Array) -> np.ndarray:
    """An array on this host, whichever devices it is split over."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
