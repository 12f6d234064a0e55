"""FlaxLM: likelihoods are the model's, whatever else is in the batch, and a stop text ends a generated one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance

from moka_core import ConfigError, DataError, ModelError
from moka_jax.evaluation import FlaxLM
from moka_jax.llama import Llama, LlamaConfig, generate
from moka_jax.llama.config import RopeConfig
from tests.moka_jax.train_toys import make_tokenizer


def make_model(**changes: Any) -> Llama:
    values = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **changes,
    }
    model = Llama(LlamaConfig.from_hf_config(values), rngs=nnx.Rngs(0))
    model.model.embed_tokens.embedding[...] *= 3  # likelier and less likely tokens
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return make_model()


def asked(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=entry, idx=number, metadata=("t", number, 1))
        for number, entry in enumerate(arguments)
    ]


def expected(model: Llama, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the whole of the model's logits for one row, nothing padded, summed in float64."""
    tokens = np.array([*context, *continuation])
    logits = np.asarray(model(jnp.asarray(tokens[None, :-1]))[0, len(context) - 1 :], np.float64)
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logs -= logits.max(-1, keepdims=True)
    found = logs[np.arange(len(continuation)), continuation]
    return float(found.sum()), bool((logits.argmax(-1) == continuation).all())


def test_likelihoods_are_those_of_each_row_alone(model):
    lm = FlaxLM(model, make_tokenizer())
    pairs = [("one", " a longer text"), ("x" * 30, " yes"), ("x" * 30, " y")]
    pairs += [("one", "a"), ("one", "b"), ("", "no context"), ("spaces ", "after")]  # two that differ in the last only
    encode = lm.tokenizer.encode
    tokens = [
        (encode(one.rstrip()) or [1], encode(one)[len(encode(one.rstrip())) :] + encode(two)) for one, two in pairs
    ]
    likeliest = generate(model, tokens[0][0], max_new_tokens=3)
    tokens += [(tokens[0][0], [*likeliest[:2], likeliest[2] ^ 1]), (tokens[0][0], likeliest)]
    wanted = [expected(model, *entry) for entry in tokens]
    assert [greedy for _, greedy in wanted] == [False] * (len(pairs) + 1) + [True]
    for batch_size in (1, 3, 16):
        lm = FlaxLM(model, make_tokenizer(), batch_size=batch_size)
        found = lm.loglikelihood(asked(*pairs))
        found += lm._loglikelihood_tokens([(None, *entry) for entry in tokens[len(pairs) :]])
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], rtol=2e-6)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_text_longer_than_the_context_is_read_in_windows(model):
    lm = FlaxLM(model, make_tokenizer(), batch_size=2)
    text = "every token is told once, " * 6
    tokens = lm.tokenizer.encode(text)
    assert 128 < len(tokens) < 192
    value = expected(model, [1], tokens[:64])[0]
    value += expected(model, tokens[63:64], tokens[64:128])[0]
    last = tokens[-65:]  # as much context as there is room for
    count = len(tokens) - 128
    value += expected(model, last[:-count], last[-count:])[0]
    short = expected(model, [1], lm.tokenizer.encode("one"))[0]
    found = lm.loglikelihood_rolling(asked((text,), ("one",)))
    np.testing.assert_allclose(found, [value, short], rtol=2e-6)


def test_padding_turns_no_row_by_other_angles():
    """With "dynamic" the longest row of a batch decides them beyond the original context, padding included."""
    model = make_model(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0})
    rope: RopeConfig = dataclasses.replace(model.config.rope, original_max_position=16)
    model.config = dataclasses.replace(model.config, rope=rope)
    lm = FlaxLM(model, make_tokenizer(), batch_size=4)
    pairs = [("x" * count, " yes") for count in (3, 20, 21, 30)]
    wanted = [expected(model, lm.tokenizer.encode(one), lm.tokenizer.encode(two))[0] for one, two in pairs]
    found = [value for value, _ in lm.loglikelihood(asked(*pairs))]
    np.testing.assert_allclose(found, wanted, rtol=2e-6)


def test_few_programs_are_compiled(model):
    lm = FlaxLM(model, make_tokenizer(), batch_size=2)
    from moka_jax.evaluation import _hidden, _score

    _hidden.clear_cache()
    _score.clear_cache()
    lm.loglikelihood(asked(*(("x" * count, " yes") for count in range(1, 40))))
    assert _hidden._cache_size() <= 7  # 16, 20, 24, 28, 32, 40 and 48
    assert _score._cache_size() <= 7


def test_generated_texts_end_before_a_stop_text(model):
    lm = FlaxLM(model, make_tokenizer(), batch_size=2)
    prompts = ["one", "another prompt", "the third"]
    free = lm.generate_until(asked(*((prompt, {"max_gen_toks": 12}) for prompt in prompts)))
    for prompt, text in zip(prompts, free, strict=True):
        tokens = generate(model, lm.prompt_tokens(prompt), max_new_tokens=12, stop_tokens=[2])
        assert text == lm.tokenizer.decode(tokens, skip_special_tokens=True)
    stop = free[0][2:4]
    cut = lm.generate_until(asked(*((prompt, {"max_gen_toks": 12, "until": [stop]}) for prompt in prompts)))
    assert cut == [text.split(stop)[0] for text in free]
    assert cut[0] != free[0]
    first = generate(model, lm.prompt_tokens("one"), max_new_tokens=1)[0]
    ended = FlaxLM(model, make_tokenizer(), stop_tokens=[first])
    assert ended.generate_until(asked(("one", {"max_gen_toks": 4}))) == [""]


def test_what_cannot_be_computed_is_refused(model):
    lm = FlaxLM(model, make_tokenizer(), batch_size=2)
    with pytest.raises(DataError, match=r"of 65 together at most; got 64 and 2"):
        lm.loglikelihood(asked(("x" * 64, "ab")))
    assert len(lm.loglikelihood(asked(("x" * 64, "a")))) == 1
    with pytest.raises(DataError, match="60 prompt tokens and 8 new ones exceed"):
        lm.generate_until(asked(("x" * 60, {"max_gen_toks": 8})))
    with pytest.raises(ConfigError, match=r"got {'num_beams': 2}"):
        lm.generate_until(asked(("x", {"num_beams": 2})))
    with pytest.raises(ConfigError, match="do_sample: true needs a temperature"):
        lm.generate_until(asked(("x", {"do_sample": True})))
    with pytest.raises(ConfigError, match="batch_size: expected at least 1; got 0"):
        FlaxLM(model, make_tokenizer(), batch_size=0)
    broken = nnx.clone(model)
    broken.model.norm.weight[...] = jnp.full_like(broken.model.norm.weight[...], jnp.nan)
    with pytest.raises(ModelError, match="logits are not finite"):
        FlaxLM(broken, make_tokenizer()).loglikelihood(asked(("x", "a")))
