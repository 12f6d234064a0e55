"""A small random LLaMA as an ordinary model folder, and a random adapter for it: what several rooms' tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

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


def write_run(folder: Path, base: Path, *, train: int, eval: int, **settings: Any) -> Path:
    """The config file of a short run in float32 on examples "add n n" -> "gives 2n", whose output is `folder`/out.

    Args:
        train, eval: how many examples there are of either kind.
        settings: of `TrainConfig`, added to those that are the same for all; those of `data` are added one by one.
    """
    for name, count in (("train", train), ("eval", eval)):
        rows = [{"prompt": f"add {n} {n}", "completion": f"gives {2 * n}"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")}
    config = {
        "base": str(base),
        "output": str(folder / "out"),
        "dtype": "float32",
        "optimiser": {"learning_rate": 0.01},
        **settings,
        "data": {**files, "max_length": 96, **settings.get("data", {})},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def random_adapter(base: BaseFolder, config: MokaConfig, *, seed: int = 0) -> Adapter:
    """An adapter for every targeted layer of a base, no entry of it zero."""
    rng = np.random.default_rng(seed)
    plans = plan_model(config, Architecture.from_hf_config(base.config).linear_layers())
    layers = {path: random_factors(plan, config, rng) for path, plan in plans.items()}
    return Adapter(config=config, layers=layers, base_fingerprint=base.fingerprint, base_model=base.name)
