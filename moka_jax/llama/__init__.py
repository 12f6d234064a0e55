"""A LLaMA in Flax NNX that loads Hugging Face checkpoints."""

from moka_jax.llama.config import LlamaConfig, RopeConfig
from moka_jax.llama.generate import generate
from moka_jax.llama.load import load_llama, packed_weights
from moka_jax.llama.model import Llama

__all__ = ["Llama", "LlamaConfig", "RopeConfig", "generate", "load_llama", "packed_weights"]
