"""Tiny LLaMA models, dense and 4-bit, saved once a session."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import moka_core
from moka_core import Adapter
from moka_torch import exact_on_cpu
from moka_torch.targets import plan_targets
from tests.cases import random_factors

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def tiny_config(**changes) -> LlamaConfig:
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def load(base_folder):
    """load(), load(bits=4), load(dtype=…): the tiny model, in eval mode."""

    def load(bits=None, dtype=torch.float32):
        quantised = {} if bits is None else {"quantization_config": NF4}
        model = LlamaForCausalLM.from_pretrained(base_folder, dtype=dtype, **quantised)
        if bits is not None:
            assert exact_on_cpu(model) == 14
        return model

    return load


@pytest.fixture
def settings():
    return moka_core.MokaConfig(r=5, num_shapes=2, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))


def random_adapter(model, config, seed=0, fingerprint=None) -> Adapter:
    """An adapter for `model` with no entry near zero."""
    rng = np.random.default_rng(seed)
    plans = plan_targets(config, model)
    return Adapter(
        config=config,
        layers={path: random_factors(plan, config, rng) for path, plan in plans.items()},
        base_fingerprint=fingerprint,
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits
