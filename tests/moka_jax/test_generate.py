"""Generation with a cache: the same tokens as a full forward pass, and as transformers."""

from __future__ import annotations

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion.base_weights import open_base
from moka_core import ConfigError, DataError, ModelError
from moka_jax import import_adapter
from moka_jax.llama import Sampling, filter_logits, folder_stop_tokens, generate, load_llama, stream
from moka_jax.llama.generate import _step
from tests.moka_jax.toys import leaves, random_adapter, run, tiny_llama

MODULE = importlib.import_module("moka_jax.llama.generate")  # the package's attribute of that name is the function


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
    generate(tiny_llama(), [5, 5, 5], max_new_tokens=7)  # another model of the same structure
    for length in range(1, 17):
        generate(model, [1] * length, max_new_tokens=min(7, 16 - length))
    assert _step._cache_size() == before  # up to 16 tokens are one length
    generate(model, [1] * 12, max_new_tokens=7)
    assert _step._cache_size() == before + 2  # a larger cache: the prompt and the single step, no more
    for length in (9, 10, 13, 16):
        generate(model, [1] * length, max_new_tokens=20 - length)
    assert _step._cache_size() == before + 2
    for temperature, seed in ((0.5, 1), (0.7, 2), (1.1, 3)):
        generate(model, [1, 2], max_new_tokens=5, sampling=Sampling(temperature=temperature, seed=seed))
    assert _step._cache_size() == before + 4  # to draw is another program; its numbers are not part of it


# --- several prompts

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8], [3, 1, 4, 1, 5]]  # with 10 tokens more all are one length
WARM = Sampling(temperature=2.0, top_k=20, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_greedy_rows_of_a_batch_are_what_each_is_alone(model):
    alone = [generate(model, prompt, max_new_tokens=10) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) == 3  # two prompts are equal
    assert generate(model, PROMPTS, max_new_tokens=10) == alone
    assert generate(model, [np.array(prompt) for prompt in PROMPTS[:1]], max_new_tokens=10) == alone[:1]
    assert generate(model, np.array([[3, 1], [9, 9]]), max_new_tokens=0) == [[], []]


def test_each_row_ends_at_its_own_stop_token_and_the_loop_when_all_have(model, monkeypatch):
    free = generate(model, PROMPTS, max_new_tokens=10)
    stops = {free[0][4], free[1][2]}
    expected = [row[: next((i for i, token in enumerate(row) if token in stops), 10)] for row in free]
    assert len({len(row) for row in expected}) > 1
    steps = []
    monkeypatch.setattr(MODULE, "_step", lambda *arguments: steps.append(1) or _step(*arguments))
    assert generate(model, PROMPTS, max_new_tokens=10, stop_tokens=stops) == expected
    assert len(steps) == min(max(len(row) for row in expected) + 1, 10)


def test_without_a_limit_each_row_goes_to_the_end_of_the_context(model):
    prompts = [[7] * 44, [7] * 47, [7] * 48, [1, 2] * 20]
    found = generate(model, prompts, max_new_tokens=None)
    assert [len(row) for row in found] == [4, 1, 0, 8]
    assert found[3] == next_tokens(model, prompts[3], 8)


def test_a_draw_depends_on_the_seed_and_the_rows_key_and_on_no_other_row(model):
    found = generate(model, PROMPTS, max_new_tokens=10, sampling=WARM)
    assert generate(model, PROMPTS, max_new_tokens=10, sampling=WARM) == found
    assert found[0] != found[3]  # equal prompts, keys 0 and 3
    for key, prompt in enumerate(PROMPTS):
        assert generate(model, prompt, max_new_tokens=10, sampling=WARM, row_keys=[key]) == found[key]
    shuffled = generate(model, PROMPTS[::-1], max_new_tokens=10, sampling=WARM, row_keys=[3, 2, 1, 0])
    assert shuffled == found[::-1]
    same = generate(model, [PROMPTS[0]] * 4, max_new_tokens=10, sampling=WARM, row_keys=[5, 5, 6, 0])
    assert same[0] == same[1] != same[2]
    assert same[3] == found[0]
    other = generate(model, PROMPTS, max_new_tokens=10, sampling=dataclasses.replace(WARM, seed=12))
    assert all(row != before for row, before in zip(other, found, strict=True))


def test_tokens_are_drawn_with_the_probabilities_of_the_model(model):
    """The first two tokens of 4096 rows against the exact joint probabilities, in a model of 40 tokens."""
    sampling, prompt, count = Sampling(temperature=0.4, top_k=8, top_p=0.9, seed=5), [3, 1, 4], 2048
    found = np.array(generate(model, [prompt] * count, max_new_tokens=2, sampling=sampling))
    texts = np.array([[*prompt, token] for token in range(40)])
    after = run(model, texts)  # the last two positions of each give the first token's logits, and the second's

    def surprise(**settings):
        """Chi-square of the pairs that were drawn, over its degrees of freedom; infinite if one was impossible."""
        first, second = (
            np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits), **settings), axis=-1), np.float64)
            for logits in (after[0, -2], after[:, -1])
        )
        expected, drawn = count * first[:, None] * second, np.zeros((40, 40))
        np.add.at(drawn, (found[:, 0], found[:, 1]), 1)
        if drawn[expected == 0].any():
            return np.inf
        possible = expected > 0
        return float(((drawn - expected)[possible] ** 2 / expected[possible]).sum() / (possible.sum() - 1))

    # the mean is 1, the spread √(2 / 24) = 0.29
    assert surprise(temperature=0.4, top_k=8, top_p=0.9) < 2.2  # measured: 0.93
    assert surprise(temperature=0.5, top_k=8, top_p=0.9) > 3  # measured: 8.1
    assert surprise(temperature=0.4, top_k=8) > 3  # measured: 5.6
    assert surprise(temperature=0.4, top_k=3, top_p=0.9) == np.inf


# --- as it goes


def test_a_stream_gives_each_token_as_soon_as_it_is_there(model, monkeypatch):
    steps = []
    monkeypatch.setattr(MODULE, "_step", lambda *arguments: steps.append(1) or _step(*arguments))
    expected = generate(model, PROMPTS[0], max_new_tokens=10)
    steps.clear()
    tokens = stream(model, PROMPTS[0], max_new_tokens=10)
    assert not steps
    assert next(tokens) == expected[0]
    assert len(steps) == 1
    assert [expected[0], *tokens] == expected


def test_a_stream_of_several_prompts_has_none_where_a_row_has_ended(model):
    free = generate(model, PROMPTS, max_new_tokens=10)
    stop = free[1][2]
    expected = generate(model, PROMPTS, max_new_tokens=10, stop_tokens=[stop])
    told, steps = [], list(stream(model, PROMPTS, max_new_tokens=10, stop_tokens=[stop]))
    assert [[token for token in row if token is not None] for row in zip(*steps, strict=True)] == expected
    assert steps[-1].count(None) < 4
    assert any(None in step for step in steps)
    again = generate(
        model, PROMPTS, max_new_tokens=10, stop_tokens=[stop], on_token=lambda row, token: told.append((row, token))
    )
    assert again == expected
    assert told == [(row, token) for step in steps for row, token in enumerate(step) if token is not None]


def test_a_streams_arguments_are_checked_before_its_first_token():
    with pytest.raises(DataError, match="expected tokens from 0 to 39; got 40"):
        stream(tiny_llama(), [40])


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
    ("prompts", "count", "message"),
    [
        ([], 4, "generate: expected at least one prompt; got none"),
        ([[]], 4, "generate: prompt 1 of 1: expected at least one prompt token; got none"),
        ([1] * 49, 0, "49 prompt tokens and 0 new ones exceed the model's context of 48"),
        ([1] * 49, None, "49 prompt tokens and 0 new ones exceed the model's context of 48"),
        ([1] * 40, 9, "40 prompt tokens and 9 new ones exceed the model's context of 48; .* at most 8 tokens"),
        ([1], -1, "expected max_new_tokens of at least 0; got -1"),
        ([3, 40, -1, 41], 4, "generate: expected tokens from 0 to 39; got -1, 40, 41"),
        ([[1], [1] * 45, [2]], 4, "generate: prompt 2 of 3: 45 prompt tokens and 4 new ones exceed"),
        ([[1], [40], []], 4, r"\n  prompt 2 of 3: expected tokens .* got 40\n  prompt 3 of 3: expected at least one"),
        ([1.5, 2.0], 4, r"generate: expected a list of token numbers; got 1.5"),
        ([[1], "text"], 4, "prompt 2 of 2: expected a list of token numbers; got 'text'"),
        ("text", 4, "generate: expected a list of token numbers; got 't'"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, count, message):
    with pytest.raises(DataError, match=message):
        generate(tiny_llama(), prompts, max_new_tokens=count)


@pytest.mark.parametrize("keys", [[0, 1, 2], [0], [0, -1], [0, 2**32]])
def test_row_keys_that_do_not_fit_are_refused(keys):
    with pytest.raises(ConfigError, match=r"row_keys: expected 2 whole numbers from 0 to 4294967295; got \[0"):
        generate(tiny_llama(), [[1], [2]], max_new_tokens=4, row_keys=keys)


def test_logits_that_are_not_finite_are_an_error_and_no_text():
    model = tiny_llama()
    model.lm_head.kernel[...] = model.lm_head.kernel[...].at[3, 5].set(jnp.nan)
    with pytest.raises(
        ModelError, match="logits are not finite, after 0 new tokens, for prompt 1 of 2; its weights or"
    ):
        generate(model, [[1, 2], [3]], max_new_tokens=3)


def test_a_text_may_not_grow_over_the_border_of_longrope(tmp_path):
    """Before and beyond it a text is what transformers makes of it; over it, the cache would not be."""
    pytest.importorskip("torch")
    from tests.moka_jax.hf_models import VARIANTS, save_llama, torch_greedy

    reference = save_llama(tmp_path, **VARIANTS["longrope beyond its context"][0])
    model = load_llama(open_base(tmp_path, quantise="none"))
    message = (
        "60 prompt tokens and 5 new ones exceed 64, beyond which rope type 'longrope' would have .* at most 4 tokens"
    )
    with pytest.raises(DataError, match=message):
        generate(model, [[1], [5] * 60], max_new_tokens=5)
    before, beyond = list(range(1, 41)), list(range(1, 71))
    both = generate(model, [before, beyond], max_new_tokens=20)
    assert both == [torch_greedy(reference, prompt, 20) for prompt in (before, beyond)]
    assert [len(row) for row in generate(model, [[1] * 60, [1] * 250], max_new_tokens=None)] == [4, 6]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 7]}, "config.json": {"eos_token_id": 3}}, [2, 7]),
        ({"generation_config.json": {"eos_token_id": 2}, "config.json": {}}, [2]),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 3}}, []),  # as in transformers
        ({"config.json": {"eos_token_id": [3]}}, [3]),
        ({"config.json": {"eos_token_id": None}}, []),
    ],
)
def test_the_tokens_that_end_a_text_are_read_as_transformers_does(tmp_path, files, expected):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    assert folder_stop_tokens(tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id: expected a token or a list of tokens; got '</s>'"),
        ('{"eos_token_id": [2, -1]}', r"eos_token_id: expected a token or a list of tokens; got \[2, -1\]"),
        ("{", "generation_config.json: expected JSON"),
    ],
)
def test_stop_tokens_that_cannot_be_read_are_an_error(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        folder_stop_tokens(tmp_path)


@pytest.mark.parametrize("variant", ["grouped-query, tied head", "llama3 rope", "yarn rope"])
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
