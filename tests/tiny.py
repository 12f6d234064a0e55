"""A small random LLaMA as an ordinary model folder, and a random adapter for it: what several rooms' tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from conversion import BaseFolder
from moka_core import Adapter, MokaConfig, plan_model
from moka_core.architecture import Architecture
from tests.cases import random_factors


def save_tiny_llama(folder: Path, *, seed: int = 0, **fields) -> Path:
    """A two-layer LlamaForCausalLM with random weights, saved by transformers; every width is a multiple of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 256,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
            **fields,
        }
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def random_adapter(base: BaseFolder, config: MokaConfig, *, seed: int = 0) -> Adapter:
    """An adapter for every targeted layer of a base, no entry of it zero."""
    rng = np.random.default_rng(seed)
    plans = plan_model(config, Architecture.from_hf_config(base.config).linear_layers())
    layers = {path: random_factors(plan, config, rng) for path, plan in plans.items()}
    return Adapter(config=config, layers=layers, base_fingerprint=base.fingerprint, base_model=base.name)
