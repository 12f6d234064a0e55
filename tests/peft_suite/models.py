"""Local stand-ins for the tiny models that PEFT's tests ask a hub for: random weights under the same names."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

_SMALL = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_SMALL,
}
_OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 64, **_SMALL}

CONFIGS: dict[str, PretrainedConfig] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(
        num_hidden_layers=2, num_attention_heads=4, dropout=0.0, **_OPT
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SMALL
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **_SMALL
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**_LLAMA_LIKE),
    "peft-internal-testing/tiny-dummy-qwen2": Qwen2Config(**_LLAMA_LIKE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(head_dim=8, **_LLAMA_LIKE),
    # PEFT counts its 24 q_proj and v_proj; the width is a multiple of what the quantisers take in blocks
    "peft-internal-testing/opt-125m": OPTConfig(
        num_hidden_layers=12,
        num_attention_heads=4,
        dropout=0.0,
        **{**_OPT, "hidden_size": 128, "word_embed_proj_dim": 128},
    ),
}


def make_models(folder: Path) -> None:
    """Save every model under its name in `folder`; what is there already is kept."""
    for name, config in CONFIGS.items():
        if not (folder / name / "config.json").is_file():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
