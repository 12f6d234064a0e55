"""Run as a script: kill a process that writes an adapter folder at random moments, and read what it left.

Without JAX or PyTorch, so that it can fork. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from conversion import load_adapter, save_adapter
from moka_core import Adapter, MokaConfig, plan_layer
from tests.cases import random_factors


def adapter(seed: int) -> Adapter:
    config = MokaConfig(r=6, num_shapes=3, target_modules=("q_proj",))
    rng = np.random.default_rng(seed)
    plan = plan_layer(config, 256, 256)
    return Adapter(config=config, layers={f"layers.{n}.q_proj": random_factors(plan, config, rng) for n in range(8)})


def content(one: Adapter) -> dict[str, bytes]:
    return {f"{path}.{name}": array.tobytes() for path, layer in one.layers.items() for name, array in layer.tensors()}


def which(folder: Path, known: dict[str, Adapter]) -> str:
    """The name of the adapter that stands in a folder, bit for bit."""
    found = content(load_adapter(folder))
    return next((name for name, one in known.items() if content(one) == found), "neither")


def write_for_ever(target: Path, known: dict[str, Adapter], done: int) -> None:
    """Write one after the other, and a byte into a pipe after each."""
    while True:
        for one in known.values():
            save_adapter(one, target, overwrite=True)
            os.write(done, b".")


def main(folder: Path, kills: int) -> None:
    rng = random.Random(0)
    known = {"old": adapter(1), "new": adapter(2)}
    target = folder / "adapter"
    save_adapter(known["old"], target)
    start = time.monotonic()
    for one in known.values():
        save_adapter(one, target, overwrite=True)
    once = (time.monotonic() - start) / 2
    after: dict[str, int] = {}
    reads = drafts = 0
    for kill in range(kills):
        told, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            write_for_ever(target, known, done)
        os.close(done)
        try:
            for _ in range(kill % 3):  # so that either may stand there, however slow the machine is
                os.read(told, 1)
            end = time.monotonic() + rng.uniform(0, 2 * once)
            while time.monotonic() < end:
                assert which(target, known) != "neither"
                reads += 1
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(told)
        name = which(target, known)
        after[name] = after.get(name, 0) + 1
        for left in folder.glob(".adapter.*"):
            drafts += 1
            shutil.rmtree(left)
    print(json.dumps({"kills": kills, "after": after, "reads": reads, "drafts left": drafts, "once": once}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
