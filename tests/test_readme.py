"""The README's examples run as they stand, and its yaml is a config that the loader takes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from conversion import load_adapter
from tests.tiny import save_tiny_llama

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the examples take for granted: a small model called base."""
    folder = tmp_path_factory.mktemp("readme")
    save_tiny_llama(folder / "report" / "base")
    return folder


def test_both_examples_run_one_after_the_other_and_hand_the_adapter_on(folder, monkeypatch):
    monkeypatch.chdir(folder)
    in_jax, in_torch = blocks("python")
    assert len([line for line in in_jax.splitlines() if line.strip()]) <= 15
    assert len([line for line in in_torch.splitlines() if line.strip()]) <= 10

    names: dict = {}
    exec(in_jax, names)
    assert np.isfinite(names["value"])
    trained = load_adapter("adapter")
    moved = [name for layer in trained.layers.values() for name, array in layer.tensors() if (array != 0).all()]
    assert any(name.startswith("factor_b") for name in moved), "the step must move the factors that start at zero"

    names = {}
    exec(in_torch, names)
    back = load_adapter("from-torch")
    assert back.layers.keys() == trained.layers.keys()
    for path, layer in trained.layers.items():
        for (name, before), (_, after) in zip(layer.tensors(), back.layers[path].tensors(), strict=True):
            np.testing.assert_array_equal(before, after, err_msg=f"{path}.{name}")


def test_the_config_in_the_readme_is_taken():
    from moka_jax.train import TrainConfig

    config = TrainConfig.from_dict(yaml.safe_load(blocks("yaml")[0]))
    assert config.adapter.moka_config().dropout == 0.05


def test_the_commands_in_the_readme_exist():
    from typer.main import get_command

    from moka_cli.main import app

    named = set(re.findall(r"^\| `moka ([a-z]+)", README, flags=re.MULTILINE))
    assert named == set(get_command(app).commands)


def test_the_files_that_the_readme_points_to_exist():
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
