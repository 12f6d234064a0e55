"""A small base with files beside its weights, and adapters on it: what the tests of the merged folder share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from conversion import open_base
from moka_core import Adapter, MokaConfig
from moka_core.seal import merge_mark
from tests.tiny import random_adapter, save_tiny_llama

CONFIG = MokaConfig(r=6, num_shapes=3, scale=0.02, target_modules=("q_proj", "v_proj", "down_proj"))


def make_base(folder: Path, **fields: Any) -> Path:
    """A base with an own head, unless `fields` say so, and files beside its weights."""
    save_tiny_llama(folder, **{"tie_word_embeddings": False, **fields})
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("not for the merged model")
    return folder


def make_tied(folder: Path) -> tuple[Path, Adapter]:
    """A base whose head is the embedding, and an adapter on that head."""
    make_base(folder, tie_word_embeddings=True)
    return folder, random_adapter(open_base(folder), dataclasses.replace(CONFIG, target_modules=("q_proj", "lm_head")))


def mark(adapter: Adapter) -> str:
    """What the config of a merged folder says of an adapter."""
    return merge_mark({path: (adapter.layer_config(path), dict(one.tensors())) for path, one in adapter.layers.items()})
