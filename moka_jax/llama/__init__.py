"""A LLaMA in Flax NNX that loads Hugging Face checkpoints."""

from moka_jax.llama.config import LlamaConfig, RopeConfig
from moka_jax.llama.generate import check_prompts, folder_stop_tokens, generate, stream
from moka_jax.llama.load import load_llama, packed_weights
from moka_jax.llama.model import Llama
from moka_jax.llama.sampling import Sampling, filter_logits

__all__ = [
    "Llama",
    "LlamaConfig",
    "RopeConfig",
    "Sampling",
    "check_prompts",
    "filter_logits",
    "folder_stop_tokens",
    "generate",
    "load_llama",
    "packed_weights",
    "stream",
]
