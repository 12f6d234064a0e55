"""Generation with a cache: the same tokens as a full forward pass, and as transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion.base_weights import open_base
from moka_core import DataError
from moka_jax import import_adapter
from moka_jax.llama import generate, load_llama
from moka_jax.llama.generate import _step
from tests.moka_jax.toys import leaves, random_adapter, run, tiny_llama


def next_tokens(model, tokens: list[int], count: int) -> list[int]:
    """Greedy continuation by full forward passes over a padded input, without a cache."""
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    given = list(tokens)
    for _ in range(count):
        padded = np.zeros((1, len(tokens) + count), np.int32)
        padded[0, : len(given)] = given
        given.append(int(np.asarray(logits(state, padded))[0, len(given) - 1].argmax()))
    return given[len(tokens) :]


@pytest.mark.parametrize(("steps", "packed"), [((1,) * 6, False), ((4, 1, 3), True)], ids=["dense", "NF4"])
def test_decoding_with_a_cache_equals_the_full_forward_pass_at_each_position(steps, packed):
    model = tiny_llama(packed=packed)
    import_adapter(model, random_adapter(model))
    tokens = np.random.default_rng(0).integers(0, 40, (2, sum(steps)))
    full = run(model, tokens)
    graphdef, state = nnx.split(model)
    decode = jax.jit(lambda state, tokens, cache: nnx.merge(graphdef, state).decode(tokens, cache))
    cache, read = model.new_cache(2, sum(steps) + 3), 0  # more room than needed: unfilled places must not count
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e3) if leaf.ndim > 1 else leaf, cache)
    for step in steps:
        logits, cache = decode(state, tokens[:, read : read + step], cache)
        read += step
        assert cache.lengths.tolist() == [read, read]
        np.testing.assert_allclose(logits, full[:, read - 1], rtol=0, atol=2e-6 * np.ptp(full))


def test_generate_equals_uncached_greedy_and_leaves_the_model_alone():
    model = tiny_llama()
    import_adapter(model, random_adapter(model))
    before = leaves(model)
    prompt = [3, 1, 4, 1, 5]
    found = generate(model, prompt, max_new_tokens=12)
    assert found == next_tokens(model, prompt, 12)
    assert len(set(found)) > 2
    assert generate(model, np.array(prompt), max_new_tokens=12) == found
    after = leaves(model)
    assert all(np.array_equal(after[path], array) for path, array in before.items())
    assert run(model, np.array([prompt])).shape == (1, 5, 40)  # no buffer of it was given away


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    model, prompt = tiny_llama(), [7, 8, 9]
    free = generate(model, prompt, max_new_tokens=12)
    stop = free[5]
    assert generate(model, prompt, max_new_tokens=12, stop_tokens={stop, 39}) == free[: free.index(stop)]
    assert generate(model, prompt, max_new_tokens=12, stop_tokens=(free[0],)) == []
    assert generate(model, prompt, max_new_tokens=0) == []


def test_the_prompt_and_each_step_are_compiled_once():
    model = tiny_llama()
    generate(model, [1, 2, 3, 4], max_new_tokens=7)
    before = _step._cache_size()
    generate(model, [4, 3, 2, 1], max_new_tokens=7)
    generate(tiny_llama(), [5, 5, 5, 5], max_new_tokens=7)  # another model of the same structure
    assert _step._cache_size() == before
    generate(model, [1, 2, 3, 4], max_new_tokens=8)
    assert _step._cache_size() == before + 2  # another cache: the prompt and the single step, no more


def test_in_bfloat16_the_cache_is_too_and_generation_works(tmp_path):
    model = tiny_llama()
    cache = model.new_cache(1, 4)
    assert cache.keys.dtype == jnp.float32
    assert cache.keys is not cache.values
    pytest.importorskip("torch")
    from tests.moka_jax.hf_models import save_llama

    save_llama(tmp_path)
    small = load_llama(open_base(tmp_path, quantise="nf4"), dtype=jnp.bfloat16)
    assert small.new_cache(1, 4).keys.dtype == jnp.bfloat16
    assert len(generate(small, [1, 2, 3], max_new_tokens=5)) == 5


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 4, "expected at least one prompt token; got none"),
        ([1] * 49, 0, "49 prompt tokens and 0 new ones exceed the model's context of 48"),
        ([1] * 40, 9, "40 prompt tokens and 9 new ones exceed the model's context of 48; .* at most 8 tokens"),
        ([3, 40, -1, 41], 4, "expected tokens from 0 to 39; got -1, 40, 41"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt, count, message):
    with pytest.raises(DataError, match=message):
        generate(tiny_llama(), prompt, max_new_tokens=count)


@pytest.mark.parametrize("variant", ["grouped-query, tied head", "llama3 rope"])
def test_64_tokens_are_those_of_transformers(tmp_path, variant):
    pytest.importorskip("torch")
    from tests.moka_jax.hf_models import VARIANTS, save_llama, torch_greedy

    reference = save_llama(tmp_path, **VARIANTS[variant][0])
    prompt = [5, 17, 92, 3, 44]
    model = load_llama(open_base(tmp_path, quantise="none"))
    expected = torch_greedy(reference, prompt, 64)
    assert len(set(expected)) > 3
    found = generate(model, prompt, max_new_tokens=64)
    assert found == expected
    stop = expected[20]
    stopped = torch_greedy(reference, prompt, 64, eos_token_id=stop)
    assert [*generate(model, prompt, max_new_tokens=64, stop_tokens={stop}), stop] == stopped


def test_rows_of_different_length_are_decoded_as_each_alone():
    model = tiny_llama()
    import_adapter(model, random_adapter(model))
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 40, length) for length in (5, 2, 7)]
    later = rng.integers(0, 40, (3, 3))
    padded = np.zeros((3, 7), np.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    logits, cache = model.decode(padded, model.new_cache(3, 12), jnp.array([5, 2, 7]))
    found = [logits]
    for step in range(3):
        logits, cache = model.decode(later[:, step : step + 1], cache)
        found.append(logits)
    for index, tokens in enumerate(rows):
        whole = run(model, np.concatenate([tokens, later[index]])[None])[0]
        for step in range(4):
            expected = whole[len(tokens) + step - 1]
            np.testing.assert_allclose(found[step][index], expected, rtol=0, atol=2e-6 * np.ptp(whole))
    assert cache.lengths.tolist() == [8, 5, 10]
