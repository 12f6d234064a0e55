"""A tiny base model with a tokenizer, and data that it can learn in a few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import save_tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # as `python examples/….py` does


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("examples") / "base", vocab_size=320)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    rows = [{"prompt": f"add {n} {n}", "completion": f"gives {2 * n}"} for n in range(40)]
    path = tmp_path_factory.mktemp("examples") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that more threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
