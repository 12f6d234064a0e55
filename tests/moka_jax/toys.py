"""Small NNX models, ours and others, and adapters with no entry near zero for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moka_core import Adapter, Architecture, MokaConfig, plan_model, quantise_nf4
from moka_jax import MokaParam, Nf4Linear
from moka_jax.llama import Llama, LlamaConfig, RopeConfig
from moka_jax.sites import linear_sites

CONFIG = MokaConfig(r=5, num_shapes=2, dropout=0.0, target_modules=("q_proj", "v_proj"))


class Foreign(nnx.Module):
    """A model that is not ours: layers in a list, a dict, a Sequential and a plain dict, and Flax's own attention."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, use_bias=False, rngs=rngs)])
        self.named = nnx.Dict(inner=nnx.Linear(8, 8, rngs=rngs))
        self.sequence = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 8, rngs=rngs))
        self.plain = nnx.data({"last": nnx.Linear(8, 4, rngs=rngs)})

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        x = x + self.blocks[1](nnx.relu(self.blocks[0](x)))
        return self.plain["last"](x + self.sequence(self.named["inner"](x)))


FOREIGN_SITES = [*(f"attention.{name}" for name in ("key", "out", "query", "value")), "blocks.0", "blocks.1"]
FOREIGN_SITES += ["named.inner", "plain.last", "sequence.layers.0", "sequence.layers.2"]


@functools.cache
def _llama() -> Llama:
    architecture = Architecture(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=40,
        tie_word_embeddings=False,
    )
    config = LlamaConfig(architecture=architecture, rope=RopeConfig(), rms_norm_eps=1e-5, max_position_embeddings=48)
    return Llama(config, rngs=nnx.Rngs(0))


def tiny_llama(*, packed: bool = False) -> Llama:
    """A new random LLaMA of three layers; packed: its attention's weights are NF4."""
    model = nnx.clone(_llama())
    if packed:
        attention = model.model.layers.block.self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            kernels = np.asarray(getattr(attention, name).kernel[...])
            setattr(attention, name, Nf4Linear.from_nf4([quantise_nf4(kernel.T) for kernel in kernels]))
    return model


def random_adapter(model: nnx.Module, config: MokaConfig = CONFIG, *, seed: int = 0, **fields) -> Adapter:
    """A trained-looking adapter that fits the model."""
    from tests.cases import random_factors

    rng = np.random.default_rng(seed)
    plans = plan_model(config, {name: site.dims for site in linear_sites(model) for name in site.names})
    layers = {name: random_factors(plan, config, rng) for name, plan in plans.items()}
    return Adapter(config=config, layers=layers, **fields)


def randomise(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """The model with every trained entry of its adapter drawn anew, none near zero; changed in place."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(rng.uniform(0.2, 1.0, leaf.shape) * rng.choice([-1.0, 1.0], leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model, MokaParam)))
    return model


def run(model: nnx.Module, *inputs) -> np.ndarray:
    """The model's output, compiled."""
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(state, *inputs))


def leaves(model: nnx.Module) -> dict[tuple, np.ndarray]:
    """Copies of all variables by path."""
    return {path: np.array(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}
