"""What a backend must be able to show for its numbers to be compared with another's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moka_core.nf4 import Nf4Weight

# The steps of a decoder layer in order of computation: the modules of a Hugging Face LLaMA, and between them, as
# "self_attn.attention", softmax(q kᵀ) v, which o_proj reads.
ATTENTION = "self_attn.attention"
LAYER_STEPS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    ATTENTION,
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Tokens (batch, time), int32, and which of them are learned, (batch, time), bool."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimiser of a parity run: AdamW with bias correction, decoupled decay, and a constant rate."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenTensor:
    """A tensor of the base model: as the model computes with it, float32, and as it is packed if it is."""

    value: np.ndarray
    packed: Nf4Weight | None = None


class ForwardProbe(Protocol):
    """A base model with a trained adapter on it, without dropout: its numbers, one tensor at a time.

    Args:
        label: what to call it: "JAX", "PyTorch", "float64".
    """

    label: str

    def frozen(self) -> Sequence[str]:
        """The base model's tensors by their names in a checkpoint; a tied output head is the embedding alone."""

    def frozen_tensor(self, name: str) -> FrozenTensor:
        """One of them, matrices (out, in)."""

    def adapted(self) -> Sequence[str]:
        """The paths of the adapted layers."""

    def delta(self, path: str) -> np.ndarray:
        """ΔW (out, in) of one of them."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(batch, time, vocab), of the model as it is used."""

    def trace(self, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name, output (batch, time, features)) of every module in order of computation, the adapter included.

        "model.embed_tokens"; for each layer i "model.layers.i." and each of `LAYER_STEPS`, then "model.layers.i";
        "model.norm"; "lm_head". One layer at a time is computed and held.
        """


class Probe(ForwardProbe, Protocol):
    """A `ForwardProbe` that can be trained.

    The loss is the mean cross-entropy of the learned tokens, each predicted from those before it.
    """

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """The loss, and its gradient by every trained array: "<path>.factor_a.0", …, "<path>.gate_logits"."""

    def train(self, batches: Sequence[Batch], optimiser: AdamW) -> list[float]:
        """The loss before each of the optimiser's steps, one a batch; the adapter is changed."""
