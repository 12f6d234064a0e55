"""The numbers of a LLaMA-family architecture: named ones built in, others from a model folder's config.json."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moka_core.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Widths and counts of a LLaMA-family decoder: what shapes and parameter counts follow from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Architecture:
        """The numbers of a Hugging Face `config.json` of a LLaMA-family model.

        Raises:
            ModelError: a number is missing or is no positive whole number; all are listed.
        """
        problems = []

        def number(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name}: expected a positive whole number; got {value!r}")
                return 1
            return value

        heads = number("num_attention_heads")
        hidden = number("hidden_size")
        result = cls(
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", heads),
            head_dim=number("head_dim", max(hidden // heads, 1)),
            vocab_size=number("vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
        if not problems and heads % result.num_key_value_heads:
            problems.append(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({heads}); "
                f"got {result.num_key_value_heads}"
            )
        if problems:
            raise ModelError("config.json: " + "; ".join(problems))
        return result

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear layer, by its dotted path in a Hugging Face checkpoint."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        block = {
            "self_attn.q_proj": (queries, self.hidden_size),
            "self_attn.k_proj": (keys, self.hidden_size),
            "self_attn.v_proj": (keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        layers = {
            f"model.layers.{index}.{name}": dims
            for index in range(self.num_hidden_layers)
            for name, dims in block.items()
        }
        return {**layers, "lm_head": (self.vocab_size, self.hidden_size)}

    def parameters(self) -> int:
        """Number of parameters of the whole base model (norms and embeddings included)."""
        linear = sum(out * in_ for out, in_ in self.linear_layers().values())
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return linear + embedding + self.hidden_size * (2 * self.num_hidden_layers + 1)


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    head_dim: int = 0,
    tied: bool = False,
) -> Architecture:
    return Architecture(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, tied=True),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32768),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, tied=True),
}


def architecture(name: str) -> Architecture:
    """The built-in architecture of that name; no weights are needed.

    Raises:
        ModelError: the name is unknown; the nearest names are given.

    >>> architecture("llama2-7b").hidden_size
    4096
    """
    try:
        return ARCHITECTURES[name.lower()]
    except KeyError:
        near = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"unknown architecture {name!r}{hint or ';'} known: {', '.join(ARCHITECTURES)}") from None
