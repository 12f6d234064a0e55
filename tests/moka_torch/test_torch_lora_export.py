"""The LoRA folder in plain PEFT: it loads without a word where MoKA is not installed, and at full rank it is ΔW."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.numpy import load_file

from conversion import open_base, save_adapter
from conversion.logits_error import logits_error
from conversion.lora import export_lora
from moka_core import Architecture, MokaConfig
from moka_core.oracle import dense_delta
from moka_torch.adapter_logits import adapter_logits
from moka_torch.probe import load_base
from tests.tiny import random_adapter, save_tiny_llama

CONFIG = MokaConfig(r=6, num_shapes=3, dropout=0.0, scale=0.02, target_modules=("q_proj", "v_proj", "down_proj"))
PLAIN_PEFT = """
import json, logging, sys, warnings

class NoMoka:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moka_core", "moka_torch", "moka_jax", "moka_cli", "conversion"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, NoMoka())
warnings.simplefilter("error", UserWarning)
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, lora = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A}
sizes = {name: float(module.get_delta_weight("default").norm()) for name, module in layers.items()}
print(json.dumps({"config": type(model.peft_config["default"]).__name__, "sizes": sizes}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return random_adapter(open_base(base), CONFIG)


def linear_layers(base) -> list[str]:
    return list(Architecture.from_hf_config(open_base(base).config).linear_layers())


def lora_layers(model) -> dict:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if getattr(module, "lora_A", None)
    }


def test_plain_peft_loads_it_without_moka_and_without_a_warning(base, adapter, tmp_path):
    export_lora(adapter, tmp_path / "lora", rank=8, linear_layers=linear_layers(base))
    command = [sys.executable, "-c", PLAIN_PEFT, str(base), str(tmp_path / "lora")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["config"] == "LoraConfig"
    assert {name.removeprefix("base_model.model.") for name in printed["sizes"]} == set(adapter.layers)
    assert min(printed["sizes"].values()) > 0
    for word in ("missing", "unexpected", "unknown", "adapter"):
        assert word not in done.stderr.lower()


@pytest.mark.parametrize("known", [True, False], ids=["names", "whole paths"])
def test_at_full_rank_each_layer_is_delta_and_no_other_layer_is_touched(base, adapter, tmp_path, known):
    """v_proj (64x128) has 64 singular values; the rest of its rank 128 is zeros."""
    export_lora(adapter, tmp_path / "lora", rank=128, linear_layers=linear_layers(base) if known else None)
    targets = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert targets == (["down_proj", "q_proj", "v_proj"] if known else sorted(adapter.layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(load_base(base, quantise="none"), str(tmp_path / "lora"))
    layers = lora_layers(model)
    assert layers.keys() == adapter.layers.keys()
    worst = 0.0
    for path, layer in layers.items():
        assert layer.scaling["default"] == 1.0
        delta = layer.get_delta_weight("default").detach().numpy()
        oracle = dense_delta(adapter.layers[path], adapter.layer_config(path))
        worst = max(worst, float(np.linalg.norm(delta - oracle) / np.linalg.norm(oracle)))
    assert worst < 1e-5  # measured: 2.7e-7, the product in float32
    assert not any(parameter.requires_grad for parameter in model.parameters()), "inference_mode"


def test_an_adapter_of_some_layers_only_targets_these(base, adapter, tmp_path):
    some = {path: layer for path, layer in adapter.layers.items() if "layers.1." in path and "q_proj" in path}
    half = type(adapter)(config=adapter.config, layers=some, base_fingerprint=adapter.base_fingerprint)
    export_lora(half, tmp_path / "lora", rank=4, linear_layers=linear_layers(base))
    model = PeftModel.from_pretrained(load_base(base, quantise="none"), str(tmp_path / "lora"))
    assert list(lora_layers(model)) == ["model.layers.1.self_attn.q_proj"]


def test_the_config_is_what_peft_itself_would_write(adapter, tmp_path):
    export_lora(adapter, tmp_path / "lora", rank=8)
    written = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftConfig.from_pretrained(tmp_path / "lora")
    theirs = LoraConfig(
        r=8, lora_alpha=8, target_modules=sorted(adapter.layers), task_type="CAUSAL_LM", inference_mode=True
    ).to_dict()
    assert isinstance(loaded, LoraConfig)
    assert written.keys() <= theirs.keys()
    own = {**loaded.to_dict(), "peft_version": theirs["peft_version"], "base_model_name_or_path": None}
    assert {key: own[key] for key in theirs} == theirs


def test_the_lora_computes_what_the_adapter_does_up_to_its_error(base, adapter, tmp_path):
    save_adapter(adapter, tmp_path / "moka")
    for rank in (4, 128):
        export_lora(adapter, tmp_path / f"rank-{rank}", rank=rank)
    tokens = [np.random.default_rng(seed).integers(0, 256, (2, 16), dtype=np.int32) for seed in (0, 1)]
    folders = [tmp_path / name for name in ("moka", "rank-4", "rank-128")]
    alone, adapted, coarse, full = adapter_logits(base, folders, tokens, quantise="none")
    assert adapted.shape == (2, 2, 16, 256)
    with torch.no_grad():
        again = load_base(base, quantise="none")(input_ids=torch.from_numpy(tokens[1]).long()).logits.numpy()
    np.testing.assert_array_equal(alone[1], again)
    exact, rough = logits_error(alone, adapted, full), logits_error(alone, adapted, coarse)
    assert exact.lost < 3e-5  # measured: 7.9e-6, the rounding of two float32 models
    assert exact.error.changed == 0
    assert 0.05 < rough.lost < 1.5
    assert rough.positions == 64
    assert rough.effect == exact.effect
    assert rough.effect.largest > 0.01


def test_half_precision_factors_are_loaded_as_they_are(base, adapter, tmp_path):
    report = export_lora(adapter, tmp_path / "lora", rank=128, dtype="bfloat16")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    model = PeftModel.from_pretrained(load_base(base, quantise="none"), str(tmp_path / "lora"))
    path = report.worst.path
    delta = lora_layers(model)[path].get_delta_weight("default").detach().numpy()
    oracle = dense_delta(adapter.layers[path], adapter.layer_config(path))
    error = float(np.linalg.norm(delta - oracle) / np.linalg.norm(oracle))
    assert error == pytest.approx(report.worst.relative, rel=1e-3)
    assert 1e-4 < error < 1e-2
