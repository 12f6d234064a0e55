"""Small random LLaMA folders written by transformers, and what transformers computes with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ROPE_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
ROPE_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
ROPE_YARN_IN_FULL = {
    **ROPE_YARN,
    "beta_fast": 12.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "truncate": False,
}
ROPE_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * k for k in range(8)],
    "long_factor": [1.0 + 0.7 * k for k in range(8)],
    "original_max_position_embeddings": 64,
}
ROPE_PROPORTIONAL = {
    "rope_type": "proportional",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "partial_rotary_factor": 0.5,
}

# name: (changes to the config, length of the input)
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "multi-head": ({"num_key_value_heads": 4}, 24),
    "grouped-query, tied head": ({"tie_word_embeddings": True}, 24),
    "one key head, own head_dim": ({"num_key_value_heads": 1, "head_dim": 24}, 24),
    "biases": ({"attention_bias": True, "mlp_bias": True}, 24),
    "bias of attention, large eps, split sums": (
        {"attention_bias": True, "rms_norm_eps": 0.3, "pretraining_tp": 2},
        24,
    ),
    "bias of the MLP": ({"mlp_bias": True}, 24),
    "mistral without window": ({"model_type": "mistral", "sliding_window": None, "head_dim": 24}, 24),
    "llama3 rope": ({"rope_parameters": ROPE_LLAMA3}, 160),
    "linear rope": ({"rope_parameters": ROPE_LINEAR}, 160),
    "dynamic rope beyond its context": ({"rope_parameters": ROPE_DYNAMIC, "max_position_embeddings": 64}, 160),
    "dynamic rope within its context": ({"rope_parameters": ROPE_DYNAMIC}, 160),
    "yarn rope": ({"rope_parameters": ROPE_YARN}, 160),
    "yarn rope, all fields": ({"rope_parameters": ROPE_YARN_IN_FULL}, 160),
    "yarn rope, own attention factor": ({"rope_parameters": {**ROPE_YARN, "attention_factor": 0.6}}, 160),
    "longrope beyond its context": ({"rope_parameters": ROPE_LONG}, 160),
    "longrope within its context": ({"rope_parameters": {**ROPE_LONG, "factor": 8.0}}, 64),
    "proportional rope": ({"rope_parameters": ROPE_PROPORTIONAL}, 160),
}

_ROPE_FREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_SHORT = {**ROPE_LONG, "long_factor": ROPE_LONG["short_factor"]}
# name: (a variant, changes that undo one of its switches)
UNDONE: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, _ROPE_FREE)
        for name in VARIANTS
        if "rope" in name and name != "dynamic rope within its context"  # there it is the default
    },
    "yarn's bounds and truncation": ("yarn rope, all fields", {"rope_parameters": ROPE_YARN}),
    "yarn's attention factor": ("yarn rope, own attention factor", {"rope_parameters": ROPE_YARN}),
    "longrope's long factors": ("longrope beyond its context", {"rope_parameters": _SHORT}),
    "the part that proportional rope turns": (
        "proportional rope",
        {"rope_parameters": {**ROPE_PROPORTIONAL, "partial_rotary_factor": 1.0}},
    ),
    "eps": ("bias of attention, large eps, split sums", {"rms_norm_eps": 1e-6}),
}


def build_llama(**changes: Any) -> LlamaForCausalLM | MistralForCausalLM:
    """A small model with the weights that transformers draws; `model_type` may be "mistral"."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    values = copy.deepcopy({**values, **changes})  # transformers completes rope_parameters in place
    if values.pop("model_type", "llama") == "mistral":
        return MistralForCausalLM(MistralConfig(**values)).eval()
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def save_llama(folder: Path, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM | MistralForCausalLM:
    """A model whose every tensor is random and whose logits are far from uniform, saved in the folder."""
    model = random_llama(seed=seed, **changes)
    model.save_pretrained(folder)
    return model


def random_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM | MistralForCausalLM:
    """The model of `save_llama`, in memory only."""
    model = build_llama(**changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(
                    0, 0.5 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5, generator=generator
                )
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def random_tokens(length: int, *, batch: int = 2, vocabulary: int = 97, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (batch, length)).astype(np.int32)


@torch.no_grad()
def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@torch.no_grad()
def torch_greedy(model, prompt: list[int], count: int, **arguments: Any) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, **arguments
    )
    return found[0, len(prompt) :].tolist()


def error_of_range(found: np.ndarray, expected: np.ndarray) -> float:
    """max|found - expected| / (max - min of expected)."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.ptp(expected))
