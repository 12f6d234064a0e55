"""No test asks the network for anything: what a test needs, it makes."""

import importlib.util
import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for the tests that shard
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory):
    """What XLA has compiled is kept for this session: a program that another test needs too is not compiled again.

    Every jit traces as before, and what is read back is the same machine code.
    """
    if importlib.util.find_spec("jax") is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def smollm(tmp_path_factory):
    """SmolLM2-135M as a model folder (540 MB), from an installed package; skipped without it."""
    pytest.importorskip("gguf")
    from moka_cli.demo_base import gguf_file, prepare_base
    from moka_core import ModelError

    try:
        gguf_file()
    except ModelError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm") / "base"
    prepare_base(folder)
    return folder
