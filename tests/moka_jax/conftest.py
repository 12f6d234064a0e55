"""The real model, made once a session."""

from __future__ import annotations

import pytest


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
