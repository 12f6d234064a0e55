"""The numbers of a LLaMA-family architecture: named ones built in, others from a model folder's config.json."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moka_core.errors import ModelError


class ModelFields:
    """The fields of a `config.json`, read one by one, and everything that is wrong with them.

    A field that is null counts as absent, as in transformers. What cannot be used is noted in `problems`, and a
    placeholder of the right type comes back, so that one error can list it all.

    Args:
        values: the fields.
        problems: where to note what is wrong; a new list if None.
        inside: the name of the field that holds these, for the messages.

    >>> fields = ModelFields({"hidden_size": 64, "rms_norm_eps": 0})
    >>> fields.whole("hidden_size"), fields.number("rms_norm_eps", 1e-6)
    (64, 1.0)
    >>> fields.problems
    ['rms_norm_eps: expected a positive number; got 0']
    """

    def __init__(self, values: Mapping[str, Any], *, problems: list[str] | None = None, inside: str = "") -> None:
        self.values = values
        self.problems = [] if problems is None else problems
        self._prefix = f"{inside}." if inside else ""

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it stands, or the default if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(name, "a positive whole number", value)
            return 1
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(name, default)
        if not is_positive(value):
            self.refuse(name, "a positive number", value)
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false", value)
            return default
        return value

    def refuse(self, name: str, expected: str, got: Any) -> None:
        """Note that a field is not what is expected."""
        self.problems.append(f"{self._prefix}{name}: expected {expected}; got {got!r}")

    def check(self) -> None:
        """Raise one ModelError with all problems, if there are any."""
        if self.problems:
            raise ModelError("config.json: " + "; ".join(self.problems))


def is_positive(value: Any) -> bool:
    """Whether a value of a JSON file is a positive number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


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
        fields = ModelFields(config)
        result = cls.from_fields(fields)
        fields.check()
        return result

    @classmethod
    def from_fields(cls, fields: ModelFields) -> Architecture:
        """The numbers, what is wrong with them being added to `fields.problems`."""
        before = len(fields.problems)
        heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
        silent_mistral = fields.get("model_type") == "mistral" and "num_key_value_heads" not in fields.values
        result = cls(
            hidden_size=hidden,
            intermediate_size=fields.whole("intermediate_size"),
            num_hidden_layers=fields.whole("num_hidden_layers"),
            num_attention_heads=heads,
            # 8 is what transformers takes for a Mistral without the key
            num_key_value_heads=fields.whole("num_key_value_heads", 8 if silent_mistral else heads),
            head_dim=fields.whole("head_dim", max(hidden // heads, 1)),
            vocab_size=fields.whole("vocab_size"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        )
        if len(fields.problems) > before:
            return result
        if heads % result.num_key_value_heads:
            fields.problems.append(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({heads}); "
                f"got {result.num_key_value_heads}"
            )
        if fields.get("head_dim") is None and hidden % heads:
            fields.problems.append(f"head_dim: expected it, as {heads} heads do not divide hidden_size ({hidden})")
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
