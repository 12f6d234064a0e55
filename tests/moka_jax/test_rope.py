"""Rotary position embedding against transformers': every scaling, its frequencies, and decoding with a cache."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion.base_weights import open_base
from moka_jax.llama import RopeConfig, load_llama
from moka_jax.llama.rope import frequencies_at, rope_frequencies

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.moka_jax.hf_models import (  # noqa: E402
    ROPE_DYNAMIC,
    ROPE_LINEAR,
    ROPE_LLAMA3,
    ROPE_LONG,
    ROPE_PROPORTIONAL,
    ROPE_YARN,
    ROPE_YARN_IN_FULL,
    error_of_range,
    random_llama,
    random_tokens,
    save_llama,
    torch_logits,
)

LIMIT = 1e-4  # of the logits' range


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        ROPE_LLAMA3,
        {**ROPE_LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192, "factor": 32.0},
        ROPE_YARN,
        ROPE_YARN_IN_FULL,
        {**ROPE_YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768, "factor": 4.0},
        {**ROPE_YARN, "factor": None, "beta_fast": 64, "attention_factor": 1.5},
        ROPE_PROPORTIONAL,
        {**ROPE_PROPORTIONAL, "partial_rotary_factor": 0.3, "factor": 1.0},
        ROPE_DYNAMIC,
        ROPE_LONG,
        {**ROPE_LONG, "factor": 32.0},
        {**ROPE_LONG, "attention_factor": 1.25},
    ],
    ids=[
        "default",
        "linear",
        "llama3",
        "llama 3.2",
        "yarn",
        "yarn in full",
        "yarn 128k",
        "yarn by ratio",
        "proportional",
        "proportional 0.3",
        "dynamic",
        "longrope by ratio",
        "longrope by factor",
        "longrope, own attention factor",
    ],
)
def test_rope_frequencies_are_those_of_transformers_to_the_last_bits(parameters, head_dim):
    """At position 100,000 an error of one part in 10⁶ would turn a pair of channels by 0.1."""
    from transformers import LlamaConfig as HfConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    factors = {
        name: [1 + 0.01 * len(name) * k for k in range(head_dim // 2)]
        for name in ("short_factor", "long_factor")
        if name in parameters
    }
    parameters = {**parameters, **factors}
    config = HfConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    reference = LlamaRotaryEmbedding(config)
    rope = RopeConfig.from_hf_config({"rope_parameters": parameters, "max_position_embeddings": 131072})
    found = rope_frequencies(rope, head_dim)
    assert found.dtype == np.float32
    # four units in the last place of a float32
    np.testing.assert_allclose(found, reference.inv_freq.numpy(), rtol=5e-7, atol=0)
    assert rope.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-12)
    lengths = [1, 63, 64, 65, 200_000]
    at = np.asarray(frequencies_at(rope, head_dim, jnp.array(lengths)))
    for row, length in zip(np.broadcast_to(at, (len(lengths), head_dim // 2)), lengths, strict=True):
        fresh = LlamaRotaryEmbedding(config)
        fresh(torch.zeros(1), torch.tensor([[length - 1]]))
        np.testing.assert_allclose(row, fresh.inv_freq.numpy(), rtol=5e-7, atol=0)


def test_rope_settings_of_older_config_files_are_read_the_same():
    old = {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in ROPE_LLAMA3.items() if k != "rope_theta"}}
    new = {"rope_parameters": {**ROPE_LLAMA3, "rope_theta": 500000.0}}
    oldest = {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    read = RopeConfig.from_hf_config
    assert read(old) == read(new)
    assert read(new).original_max_position == 32
    assert read(oldest) == RopeConfig(theta=500000.0, kind="linear", factor=2.0)
    assert read({"rope_theta": 7.0, "rope_scaling": None}) == RopeConfig(theta=7.0)
    assert hash(read({"rope_parameters": ROPE_LONG})) == hash(read({"rope_parameters": ROPE_LONG}))


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        # a Phi-style context outside of the rotary settings goes before the one inside
        ({"original_max_position_embeddings": 48, "rope_parameters": {**ROPE_LLAMA3}}, {"original_max_position": 48}),
        ({"rope_scaling": {**ROPE_LINEAR, "factor": 2.0}, "rope_parameters": ROPE_LINEAR}, {"factor": 2.0}),
        (
            {"rope_scaling": {k: v for k, v in ROPE_YARN.items() if "original" not in k}},
            {"original_max_position": 256},
        ),
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"theta": 5000.0}),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "proportional"}}, {"partial": 0.5}),
    ],
)
def test_rope_settings_in_other_places_are_read_as_transformers_does(changes, moved):
    from transformers import LlamaConfig as HfConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256, **changes}
    rope = RopeConfig.from_hf_config(config)
    assert {name: getattr(rope, name) for name in moved} == moved
    reference = LlamaRotaryEmbedding(HfConfig(**copy.deepcopy(config)))
    np.testing.assert_allclose(rope_frequencies(rope, 16), reference.inv_freq.numpy(), rtol=5e-7, atol=0)
    assert rope.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("rope", "context"), [(ROPE_DYNAMIC, 24), ({**ROPE_LONG, "original_max_position_embeddings": 24}, 256)]
)
def test_decoding_beyond_the_first_context_is_as_transformers_with_a_cache(tmp_path, rope, context):
    """Keys that are in the cache stay as they were turned, so this is not what a forward pass over the whole gives."""
    changes = {"rope_parameters": rope, "max_position_embeddings": context}
    tokens, steps = random_tokens(30), (20, 1, 1, 1, 1, 1, 1, 1, 1, 2)
    reference = save_llama(tmp_path, **changes)
    model = load_llama(open_base(tmp_path, quantise="none"))
    graphdef, state = nnx.split(model)
    decode = jax.jit(lambda state, tokens, cache: nnx.merge(graphdef, state).decode(tokens, cache))
    cache, theirs, read = model.new_cache(2, 30), None, 0
    for step in steps:
        new = tokens[:, read : read + step]
        logits, cache = decode(state, new, cache)
        with torch.no_grad():
            answer = reference(torch.tensor(new, dtype=torch.long), past_key_values=theirs, use_cache=True)
        theirs, read = answer.past_key_values, read + step
        assert error_of_range(np.asarray(logits), answer.logits[:, -1].numpy()) <= LIMIT  # measured: 3.7e-7 to 2.3e-6
    whole = torch_logits(random_llama(**changes), tokens)[:, -1]
    assert error_of_range(np.asarray(logits), whole) > 100 * LIMIT  # measured: 0.20 and 0.25
