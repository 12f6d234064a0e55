"""LLaMA in Flax NNX: attribute names as in a Hugging Face checkpoint, layers stacked and scanned."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from moka_core import Architecture, ConfigError
from moka_jax.llama.config import Attend, LlamaConfig
from moka_jax.llama.rope import rotate, turns
from moka_jax.sharding import Layout
from moka_jax.stack import Stack


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Keys and values of what was read so far.

    Holds: keys and values are (layers, batch, capacity, kv heads, head_dim); in row b the positions < lengths[b] are
    filled, lengths being (batch,) int32.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array


class RmsNorm(nnx.Module):
    """y = weight · x / √(mean(x²) + eps), the quotient in float32, rounded to the dtype of x before the product."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * normed.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs) -> None:
        sizes = config.architecture
        self.attend = attend
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
        mask: jax.Array | None,
        cache: tuple[jax.Array, jax.Array] | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        batch, time = x.shape[:2]
        q = rotate(self.q_proj(x).reshape(batch, time, self.heads, self.head_dim), cosines, sines)
        k = rotate(self.k_proj(x).reshape(batch, time, self.kv_heads, self.head_dim), cosines, sines)
        v = self.v_proj(x).reshape(batch, time, self.kv_heads, self.head_dim)
        if cache is None:
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=self.attend)
        else:
            assert start is not None
            k, v = _append(cache[0], k, start), _append(cache[1], v, start)
            cache = (k, v)
            y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.o_proj(y.reshape(batch, time, self.heads * self.head_dim)), cache


def _append(held: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`held` (batch, capacity, …) with row b of `new` (batch, time, …) written from position start[b] on."""

    def write(held: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), start, axis=0)

    return jax.vmap(write)(held, new, start)


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

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, attend: Attend, rngs: nnx.Rngs) -> None:
        hidden = config.architecture.hidden_size
        self.input_layernorm = RmsNorm(hidden, config.rms_norm_eps)
        self.self_attn = Attention(config, dtype=dtype, attend=attend, rngs=rngs)
        self.post_attention_layernorm = RmsNorm(hidden, config.rms_norm_eps)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        cosines: jax.Array,
        sines: jax.Array,
        mask: jax.Array | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), cosines, sines, mask, cache, start)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LlamaModel(nnx.Module):
    """Embedding, decoder layers and the last norm: what a checkpoint calls `model`."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, remat: bool, attend: Attend, rngs: nnx.Rngs) -> None:
        sizes = config.architecture
        self.embed_tokens = nnx.Embed(sizes.vocab_size, sizes.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = Stack.create(
            lambda layer_rngs: DecoderLayer(config, dtype=dtype, attend=attend, rngs=layer_rngs),
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
        attend: how attention is computed: "xla" anywhere; "cudnn", flash attention on NVIDIA GPUs, in bfloat16.
        rngs: draws random weights; `load_llama` puts a checkpoint's in their place.

    Raises:
        ConfigError: "cudnn" on another backend, in another dtype, or with heads that it does not take.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = True,
        attend: Attend = "xla",
        rngs: nnx.Rngs,
    ) -> None:
        _check_attend(attend, dtype, config.architecture.head_dim)
        self.config = config
        self.dtype = dtype
        self.base_fingerprint: str | None = None
        self.base_model: str | None = None
        self.base_quantisation: str | None = None
        self.layout: Layout | None = None
        self.model = LlamaModel(config, dtype=dtype, remat=remat, attend=attend, rngs=rngs)
        sizes = config.architecture
        tied = sizes.tie_word_embeddings
        self.lm_head = (
            None if tied else nnx.Linear(sizes.hidden_size, sizes.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        )

    @property
    def architecture(self) -> Architecture:
        """The dimensions that shape plans are made from."""
        return self.config.architecture

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """Logits of the next token at every position.

        With the rope types "dynamic" and "longrope" the longest text of the batch, padding included, decides by which
        angles all are turned, as in transformers; up to `config.rope.original_max_position` it makes no difference.

        Args:
            tokens: (batch, time), int; padding on the right is harmless, since attention is causal.
            positions: (batch, time), int, for the rotary embedding; 0, 1, … if None.
            segments: (batch, time), int: a token sees only those of its own segment, so that several texts can stand
                in one row. Their positions should restart.

        Returns:
            (batch, time, vocab), float32.
        """
        return self.head(self.hidden(tokens, positions=positions, segments=segments))

    def hidden(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segments: jax.Array | None = None
    ) -> jax.Array:
        """What the output head reads, (batch, time, hidden), in the model's dtype; the arguments of a call."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
        return self._run(tokens, positions, jnp.max(positions) + 1, mask, None)[0]

    def decode(self, tokens: jax.Array, cache: KvCache, counts: jax.Array | None = None) -> tuple[jax.Array, KvCache]:
        """Logits after the last token of every row, (batch, vocab), float32, and the cache that has read them.

        With the rope types "dynamic" and "longrope" each row is turned by the angles of its length so far, as in
        transformers; a row that grows beyond `config.rope.original_max_position` leaves its older keys as they were,
        so that its logits are no longer those of a forward pass over the whole of it (`generate` refuses that).

        Args:
            tokens: (batch, time), read at positions cache.lengths, …; the cache must have room for them.
            counts: (batch,), int32, at least 1: how many tokens of each row are meant, the others being padding on
                the right; all of them if None.
        """
        time, capacity = tokens.shape[1], cache.keys.shape[2]
        if counts is None:
            counts = jnp.full(tokens.shape[:1], time, jnp.int32)
        positions = cache.lengths[:, None] + jnp.arange(time)
        # what padding leaves in the cache stands behind all positions that a row has reached, until it is overwritten
        mask = (jnp.arange(capacity) <= positions[:, :, None])[:, None]
        lengths = cache.lengths + counts
        hidden, filled = self._run(tokens, positions, lengths, mask, cache)
        assert filled is not None
        last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]
        return self.head(last), KvCache(keys=filled[0], values=filled[1], lengths=lengths)

    def new_cache(self, batch: int, capacity: int) -> KvCache:
        """An empty cache for `capacity` positions."""
        sizes = self.architecture
        shape = (sizes.num_hidden_layers, batch, capacity, sizes.num_key_value_heads, sizes.head_dim)
        # two arrays, not one twice: a compiled step donates both
        keys, values = jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)
        return KvCache(keys=keys, values=values, lengths=jnp.zeros((batch,), jnp.int32))

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        mask: jax.Array | None,
        cache: KvCache | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cosines, sines = turns(self.config.rope, self.architecture.head_dim, positions, lengths, self.dtype)
        x = self.embed(tokens)
        own = None if cache is None else (cache.keys, cache.values)
        start = None if cache is None else cache.lengths
        x, own = self.model.layers(x, cosines, sines, mask, start, per_layer=own)
        return self.model.norm(x), own

    def embed(self, tokens: jax.Array) -> jax.Array:
        """What the first layer reads, (batch, time, hidden), in the model's dtype."""
        table = self.model.embed_tokens.embedding[...]
        if self.layout is not None:
            table = jax.lax.with_sharding_constraint(table, self.layout.used(("vocab", "embed"), table.shape))
        x = jnp.take(table.astype(self.dtype), tokens, axis=0)
        if self.layout is not None and len(tokens) % self.layout.batch_shards == 0:
            x = jax.lax.with_sharding_constraint(x, self.layout.batch())
        return x

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits, (..., vocab), float32, of what `hidden` gives."""
        if self.lm_head is not None:
            return self.lm_head(hidden).astype(jnp.float32)
        return self.model.embed_tokens.attend(hidden).astype(jnp.float32)


def _check_attend(attend: Attend, dtype: jnp.dtype, head_dim: int) -> None:
    if attend not in ("xla", "cudnn"):
        raise ConfigError(f"attend: expected xla or cudnn; got {attend!r}")
    if attend == "xla":
        return
    problems = []
    if jax.default_backend() != "gpu":
        problems.append(f"an NVIDIA GPU (this is {jax.default_backend()})")
    if dtype not in (jnp.bfloat16, jnp.float16):
        problems.append(f"bfloat16 (this is {jnp.dtype(dtype).name})")
    if head_dim % 8 or head_dim > 128:
        problems.append(f"heads of a multiple of 8 up to 128 entries (these have {head_dim})")
    if problems:
        raise ConfigError(f"attend: 'cudnn' needs {', and '.join(problems)}; use 'xla'")
