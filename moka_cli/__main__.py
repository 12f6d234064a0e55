"""The command `moka`, also as `python -m moka_cli`, as a process of its own."""

from __future__ import annotations

import os
import sys

from moka_cli.main import main

INTERRUPTED = 130  # the status of a command that was stopped by Ctrl-C


def console() -> None:
    """Run the command; one that was interrupted ends without the interpreter's own end.

    That end crashes (SIGSEGV, with jax 0.10.2) where the interruption came while XLA compiled. All files are closed by
    then. One process of several has to tell the others, which jax does at that end.
    """
    try:
        main()
    except SystemExit as stop:
        if stop.code == INTERRUPTED and not _one_of_several():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and bool(jax.distributed.is_initialized())


if __name__ == "__main__":
    console()
