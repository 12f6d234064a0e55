"""No test asks the network for anything: what a test needs, it makes."""

import functools
import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are small: more threads get in each other's way


def pytest_configure(config: pytest.Config) -> None:
    """Set XLA up before it is imported, for the processes that tests start too.

    The default tests compile thousands of programs that run once. There XLA's older loops, without LLVM's
    optimisations, are made in an eighth of the time (measured: 0.10 s against 0.79 s for a layer with its gradients);
    the programs that it is given are the same. Any other selection, `make test-all` among them, compiles as users do.
    """
    flags = ["--xla_force_host_platform_device_count=8"]  # for the tests that shard
    if "not slow" in config.option.markexpr:
        flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))


def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session that all of its workers have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory):
    """What XLA has compiled is kept for this session: a program that another test needs too is not compiled again.

    Every jit traces as before, and what is read back is the same machine code. The processes that tests start and the
    other workers share it: a cache of a limited size is one that JAX locks.
    """
    settings = {
        "jax_compilation_cache_dir": str(_shared_folder(tmp_path_factory) / "compiled"),
        "jax_compilation_cache_max_size": 2**32,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    if "jax" in sys.modules:
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, value)


@pytest.fixture(scope="module")
def optimised():
    """LLVM's optimisations, for the rest of a file: where much is computed by one program, or bits are the point."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """SmolLM2-135M as a model folder (540 MB), from an installed package; skipped without it."""
    gguf = pytest.importorskip("gguf")
    from filelock import FileLock

    from moka_cli.demo_base import gguf_file, prepare_base
    from moka_core import ModelError

    try:
        gguf_file()
    except ModelError as error:
        pytest.skip(str(error))
    folder = _shared_folder(tmp_path_factory) / "smollm"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        # transformers reads the file's header, most of the time that this takes, three times: it need not
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        prepare_base(folder)  # unless another worker has
    return folder
