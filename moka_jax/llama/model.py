"""LLaMA in Flax NNX: attribute names as in a Hugging Face checkpoint, layers stacked and scanned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import Architecture
from moka_jax.llama.config import LlamaConfig, RopeConfig
from moka_jax.stack import Stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Keys and values of what was read so far.

    Holds: keys and values are (layers, batch, capacity, kv heads, head_dim); positions < length are filled.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


class RmsNorm(nnx.Module):
    """y = weight · x / √(mean(x²) + eps), the quotient in float32, rounded to the dtype of x before the product."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * normed.astype(x.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """The angle per position of every pair of channels, (head_dim / 2,), float32.

    θ_k = theta^(-2k / head_dim); "linear" divides by factor; "llama3" divides wavelengths longer than
    original/low by factor, keeps those shorter than original/high, and blends between.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1) / np.power(np.float32(rope.theta), exponents)).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = (rope.original_max_position / f for f in (rope.low_freq_factor, rope.high_freq_factor))
        scaled = np.where(wavelengths > low, frequencies / rope.factor, frequencies)
        smooth = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        return np.where((wavelengths <= low) & (wavelengths >= high), blended, scaled).astype(np.float32)
    return frequencies


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotary embedding of x (batch, time, heads, head_dim), the two halves of the channels being the pairs."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cosines + turned * sines


class Attention(nnx.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        sizes = config.architecture
        self.heads, self.kv_heads, self.head_dim = (
            sizes.num_attention_heads,
            sizes.num_key_value_heads,
            sizes.head_dim,
        )
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim

        def linear(in_: int, out: int) -> nnx.Linear:
            return nnx.Linear(in_, out, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)

        self.q_proj = linear(sizes.hidden_size, queries)
        self.k_proj = linear(sizes.hidden_size, keys)
        self.v_proj = linear(sizes.hidden_size, keys)
        self.o_proj = linear(queries, sizes.hidden_size)

    def __call__(
        self,
        x: jax.Array,
        cosines: jax.Array,
        sines: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        batch, time = x.shape[:2]
        q = rotate(self.q_proj(x).reshape(batch, time, self.heads, self.head_dim), cosines, sines)
        k = rotate(self.k_proj(x).reshape(batch, time, self.kv_heads, self.head_dim), cosines, sines)
        v = self.v_proj(x).reshape(batch, time, self.kv_heads, self.head_dim)
        if cache is None:
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            assert start is not None
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), start, axis=1)
            cache = (k, v)
            seen = jnp.arange(k.shape[1])[None, :] <= start + jnp.arange(time)[:, None]
            y = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        return self.o_proj(y.reshape(batch, time, self.heads * self.head_dim)), cache


class Mlp(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        hidden, inner = config.architecture.hidden_size, config.architecture.intermediate_size

        def linear(in_: int, out: int) -> nnx.Linear:
            return nnx.Linear(in_, out, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)

        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One pre-norm block: attention, then the gated MLP, each added to the stream."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        hidden = config.architecture.hidden_size
        self.input_layernorm = RmsNorm(hidden, config.rms_norm_eps)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RmsNorm(hidden, config.rms_norm_eps)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        cosines: jax.Array,
        sines: jax.Array,
        start: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), cosines, sines, cache, start)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LlamaModel(nnx.Module):
    """Embedding, decoder layers and the last norm: what a checkpoint calls `model`."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, remat: bool, rngs: nnx.Rngs) -> None:
        sizes = config.architecture
        self.embed_tokens = nnx.Embed(sizes.vocab_size, sizes.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = Stack.create(
            lambda layer_rngs: DecoderLayer(config, dtype=dtype, rngs=layer_rngs),
            sizes.num_hidden_layers,
            rngs=rngs,
            remat=remat,
        )
        self.norm = RmsNorm(sizes.hidden_size, config.rms_norm_eps)


class Llama(nnx.Module):
    """A LLaMA-family causal language model.

    Args:
        config: the architecture.
        dtype: of activations and products, float32 or bfloat16; norms, rotary angles, softmax and logits
            are float32.
        remat: recompute each layer's inside in the backward pass: less memory, a third more work.
        rngs: draws random weights; `load_llama` puts a checkpoint's in their place.
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: jnp.dtype = jnp.float32, remat: bool = True, rngs: nnx.Rngs
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.base_fingerprint: str | None = None
        self.base_model: str | None = None
        self.model = LlamaModel(config, dtype=dtype, remat=remat, rngs=rngs)
        sizes = config.architecture
        tied = sizes.tie_word_embeddings
        self.lm_head = (
            None if tied else nnx.Linear(sizes.hidden_size, sizes.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        )

    @property
    def architecture(self) -> Architecture:
        return self.config.architecture

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            tokens: (batch, time), int; padding on the right is harmless, since attention is causal.

        Returns:
            (batch, time, vocab), float32.
        """
        hidden, _ = self._hidden(tokens, jnp.arange(tokens.shape[1]), None)
        return self._logits(hidden)

    def decode(self, tokens: jax.Array, cache: KvCache) -> tuple[jax.Array, KvCache]:
        """Logits after the last of `tokens`, (batch, vocab), float32, and the cache that has read them.

        Args:
            tokens: (batch, time), read at positions cache.length, …; the cache must have room for them.
        """
        positions = cache.length + jnp.arange(tokens.shape[1])
        hidden, filled = self._hidden(tokens, positions, cache)
        assert filled is not None
        return self._logits(hidden[:, -1]), filled

    def new_cache(self, batch: int, capacity: int) -> KvCache:
        """An empty cache for `capacity` positions."""
        sizes = self.architecture
        shape = (sizes.num_hidden_layers, batch, capacity, sizes.num_key_value_heads, sizes.head_dim)
        # two arrays, not one twice: a compiled step donates both
        keys, values = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return KvCache(keys=keys, values=values, length=jnp.zeros((), jnp.int32))

    def _hidden(
        self, tokens: jax.Array, positions: jax.Array, cache: KvCache | None
    ) -> tuple[jax.Array, KvCache | None]:
        frequencies = jnp.asarray(rope_frequencies(self.config.rope, self.architecture.head_dim))
        angles = positions.astype(jnp.float32)[:, None] * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)[None, :, None, :]
        cosines, sines = jnp.cos(angles).astype(self.dtype), jnp.sin(angles).astype(self.dtype)
        x = self.model.embed_tokens(tokens)
        own = None if cache is None else (cache.keys, cache.values)
        start = None if cache is None else cache.length
        x, own = self.model.layers(x, cosines, sines, start, per_layer=own)
        if cache is not None:
            assert own is not None
            assert start is not None
            cache = KvCache(keys=own[0], values=own[1], length=start + tokens.shape[1])
        return self.model.norm(x), cache

    def _logits(self, hidden: jax.Array) -> jax.Array:
        if self.lm_head is not None:
            return self.lm_head(hidden).astype(jnp.float32)
        return self.model.embed_tokens.attend(hidden).astype(jnp.float32)
