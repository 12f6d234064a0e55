"""Small random LLaMA folders written by transformers, and what transformers computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# name: (changes to the config, length of the input)
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "multi-head": ({"num_key_value_heads": 4}, 24),
    "grouped-query, tied head": ({"tie_word_embeddings": True}, 24),
    "one key head, own head_dim": ({"num_key_value_heads": 1, "head_dim": 24}, 24),
    "biases": ({"attention_bias": True, "mlp_bias": True}, 24),
    "llama3 rope": ({"rope_parameters": ROPE_LLAMA3}, 160),
    "linear rope": ({"rope_parameters": ROPE_LINEAR}, 160),
}


def save_llama(folder: Path, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A model whose every tensor is random and whose logits are far from uniform, saved in the folder."""
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
    model = LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(
                    0, 0.5 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5, generator=generator
                )
    model.save_pretrained(folder)
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
