"""What a run is said to take of a device's memory: what it then takes, and a refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
import re

import jax
import pytest
from flax import nnx

from conversion import open_base
from moka_core import ConfigError
from moka_jax import MokaParam, attach
from moka_jax.llama import load_llama
from moka_jax.llama.load import abstract_llama
from moka_jax.train import AdapterSettings, DataConfig, MeshConfig, OptimiserConfig, TrainConfig
from moka_jax.train.memory import plan_memory, plan_weights
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=512, num_attention_heads=8)
    return TrainConfig(
        base=str(folder),
        output="nowhere",
        data=DataConfig(train="train.jsonl", max_length=60),
        optimiser=OptimiserConfig(learning_rate=0.01),
        steps=5,
        batch_size=4,
        accumulate=2,
        dtype="float32",
        adapter=AdapterSettings(overrides={"r": 2, "num_shapes": 1, "dropout": 0.0}),  # less to compile
    )


def abstract(config: TrainConfig) -> nnx.Module:
    layout = None if config.mesh is None else config.mesh.layout()
    model = abstract_llama(open_base(config.base, quantise=config.quantise), layout=layout)
    return attach(model, config.adapter.moka_config(model.architecture))


def test_a_plan_is_what_the_arrays_then_take(config):
    plan = plan_memory(abstract(config), config)
    model = attach(load_llama(open_base(config.base, quantise=config.quantise)), config.adapter.moka_config())
    _, adapter, frozen = nnx.split(model, MokaParam, ...)
    held = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        for name, tree in (("base weights", frozen), ("adapter", adapter))
    }
    assert {name: plan.parts[name] for name in held} == held
    assert plan.parts["optimiser"] == 2 * held["adapter"] + 4  # two moments and a count
    assert plan.parts["batch"] == 2 * 4 * 64 * (4 + 4 + 1)
    assert plan.total == sum(plan.parts.values())
    plan.check()


def test_a_step_takes_more_with_more_examples_and_less_on_each_of_several_devices(config):
    one = plan_memory(abstract(config), config).parts
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=250))
    assert plan_memory(abstract(longer), longer).parts["a step"] > 2 * one["a step"]
    spread = dataclasses.replace(config, mesh=MeshConfig(fsdp=4))
    found = plan_memory(abstract(spread), spread)
    assert found.devices == 4
    assert found.parts["base weights"] < 0.35 * one["base weights"]
    assert found.parts["batch"] == one["batch"] // 4


def test_what_cannot_fit_is_refused_before_anything_is_loaded(config, monkeypatch):
    monkeypatch.setattr("moka_jax.train.memory._capacity", lambda: 200_000)
    plan = plan_weights(abstract(config))
    message = re.escape(f"this run needs {plan.total / 1e9:.2f} GB on each device (base weights")
    with pytest.raises(
        ConfigError, match=message + r".*cpu has 0\.00 GB; lower batch_size .* mesh\.fsdp or mesh\.tensor"
    ):
        plan.check()
    monkeypatch.setattr("moka_jax.train.memory._capacity", lambda: None)
    plan_weights(abstract(config)).check()
