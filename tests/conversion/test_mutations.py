"""Thousands of spoilt adapter folders: each is refused with a message of ours, or means exactly what it meant."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import signal
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversion import load_adapter, open_base, save_adapter
from moka_core import Adapter, AdapterError, LayerFactors, LayerPlan, MokaConfig, ShapeGroup
from moka_core.plan import KronShape
from tests.conversion.mutations import CONFIG, MUTATIONS, WEIGHTS
from tests.tiny import random_adapter, save_tiny_llama

SEEDS = 11  # of each mutation on each folder
SECONDS, MEGABYTES = 20, 200  # that one reading, and all of them together, may take


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="module")
def corpus(base, tmp_path_factory) -> dict[str, Path]:
    """Valid folders of every kind, by what is special about them."""
    root = tmp_path_factory.mktemp("corpus")
    opened = open_base(base)
    targets = ("q_proj", "o_proj")  # of equal shape, so that their tensors can be swapped
    plain = random_adapter(opened, MokaConfig(r=4, num_shapes=2, target_modules=targets))
    block = MokaConfig(r=3, identity="a", block_entries=64, target_modules=targets)
    shapes = (ShapeGroup(KronShape(8, 8, 8, 8), 3), ShapeGroup(KronShape(4, 8, 16, 8), 1))
    own = MokaConfig(
        r=4,
        num_shapes=2,
        gate="uniform",
        scaling="stable",
        target_modules=targets,
        shapes_pattern={"0.self_attn.q_proj": LayerPlan(out_features=64, in_features=64, groups=shapes)},
        scale_pattern={"1.self_attn.q_proj": 0.5},
    )
    adapters = {
        "MoKA": plain,
        "MoKA_s": random_adapter(opened, block),
        "bfloat16": half(plain),
        "patterns": random_adapter(opened, own),
        "one layer": dataclasses.replace(plain, layers=dict(list(plain.layers.items())[:1])),
    }
    folders = {name: save_adapter(adapter, root / name) for name, adapter in adapters.items()}
    folders["written by PEFT"] = by_peft(base, plain, root / "peft")
    folders["written by JAX"] = by_jax(opened, plain, root / "jax")
    return folders


def half(adapter: Adapter) -> Adapter:
    layers = {}
    for path, layer in adapter.layers.items():
        tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in layer.tensors()}
        layers[path] = LayerFactors.from_tensors(layer.plan, adapter.config, tensors)
    return dataclasses.replace(adapter, layers=layers)


def by_peft(base: Path, adapter: Adapter, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM

    import moka_torch

    moka_torch.import_adapter(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(folder)
    return folder


def by_jax(opened: Any, adapter: Adapter, folder: Path) -> Path:
    from moka_jax import export_adapter, import_adapter
    from moka_jax.llama import load_llama

    return save_adapter(export_adapter(import_adapter(load_llama(opened), adapter)), folder)


def meaning(adapter: Adapter) -> dict[str, Any]:
    """All that decides what an adapter computes, and on which base."""
    own = {path: adapter.layer_config(path) for path in adapter.layers}
    fields = ("r", "gate", "scaling", "scale", "identity", "zero_factor", "dropout")
    return {
        "base": (adapter.base_fingerprint, adapter.base_quantisation),
        "config": {path: tuple(getattr(config, name) for name in fields) for path, config in own.items()},
        "plans": {path: layer.plan for path, layer in adapter.layers.items()},
        "bits": {
            f"{path}.{name}": (str(array.dtype), array.shape, array.tobytes())
            for path, layer in adapter.layers.items()
            for name, array in layer.tensors()
        },
    }


def hung(*_: object) -> None:
    raise TimeoutError(f"reading took more than {SECONDS} s")


@pytest.fixture
def no_hanging():
    before = signal.signal(signal.SIGALRM, hung)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def spoilt(source: Path, target: Path, name: str, seed: int) -> Path:
    """A fresh copy of a folder with one mutation."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    MUTATIONS[name](target, np.random.default_rng([seed, zlib.crc32(name.encode())]))
    return target


@pytest.mark.usefixtures("no_hanging")
def test_every_mutation_is_refused_by_name_or_changes_nothing(corpus, tmp_path):
    originals = {kind: meaning(load_adapter(folder)) for kind, folder in corpus.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in MUTATIONS}
    for name in MUTATIONS:
        for kind, source in corpus.items():
            for seed in range(SEEDS):
                folder = spoilt(source, tmp_path / "spoilt", name, seed)
                signal.alarm(SECONDS)
                try:
                    adapter = load_adapter(folder)
                except AdapterError as error:
                    message = str(error)
                    assert any(file in message for file in (str(folder), CONFIG, WEIGHTS)), (name, kind, seed, message)
                    outcomes[name]["refused"] += 1
                    continue
                signal.alarm(0)
                assert meaning(adapter) == originals[kind], (name, kind, seed)
                outcomes[name]["the same"] += 1
    signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    total = sum((count for count in outcomes.values()), Counter())
    print(f"{total.total()} mutations: {dict(total)}; peak memory +{grown:.0f} MB")
    for name, count in outcomes.items():
        print(f"  {name}: {dict(count)}")
    assert total.total() >= 2000
    assert all(count["refused"] for count in outcomes.values()), outcomes
    assert grown < MEGABYTES


@pytest.mark.usefixtures("no_hanging")
def test_peft_loads_no_mutation_as_something_else(base, corpus, tmp_path):
    """PEFT reads the files by itself: what it says of them is its own, but no other adapter comes out."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import moka_torch

    source = corpus["written by PEFT"]
    expected = meaning(load_adapter(source))["bits"]
    refused = 0
    for number, name in enumerate(list(MUTATIONS) * 4):
        folder = spoilt(source, tmp_path / "spoilt", name, 100 + number)
        model = AutoModelForCausalLM.from_pretrained(base)
        signal.alarm(SECONDS)
        try:
            loaded = PeftModel.from_pretrained(model, folder)
        except Exception:  # noqa: BLE001  PEFT's, safetensors' and Python's own errors are as good as ours here
            refused += 1
            continue
        finally:
            signal.alarm(0)
        found = moka_torch.export_adapter(loaded)
        assert meaning(found)["bits"] == expected, (name, number)
        with torch.no_grad():
            assert torch.isfinite(loaded(torch.arange(5)[None]).logits).all()
    assert refused > 60
