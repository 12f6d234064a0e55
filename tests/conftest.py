"""No test asks the network for anything: what a test needs, it makes."""

import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for the tests that shard
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")


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
