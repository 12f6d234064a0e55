"""What a token is drawn from, against transformers' own filters; draws that depend on nothing else; refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moka_core import ConfigError
from moka_jax.llama import Sampling, filter_logits
from moka_jax.llama.sampling import draw


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 60, 61, 200])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 0.999])
def test_filtered_logits_are_those_of_transformers(temperature, top_k, top_p):
    """Same order, same tokens kept (ties included), same probabilities."""
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (16, 61)).astype(np.float32)
    logits[8:] = np.round(logits[8:])  # many are equally likely
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [] if top_k is None else [TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]
    expected = torch.tensor(logits)
    for warper in warpers:
        expected = warper(None, expected)
    found = np.asarray(filter_logits(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p))
    # of equally likely tokens at the border torch keeps those that its sort puts last, which is not defined
    settled = slice(8) if top_p is not None else slice(None)
    np.testing.assert_array_equal(np.isfinite(found)[settled], np.isfinite(expected.numpy())[settled])
    np.testing.assert_array_equal(np.isfinite(found).sum(-1), np.isfinite(expected.numpy()).sum(-1))
    chances = np.asarray(jax.nn.softmax(found, axis=-1))
    np.testing.assert_allclose(
        chances[settled], expected.softmax(-1).numpy()[settled], rtol=0, atol=1e-6
    )  # measured: 3e-7


def test_top_p_keeps_the_fewest_tokens_that_reach_it_and_always_one():
    logits = jnp.log(jnp.array([0.125, 0.5, 0.25, 0.125]))
    for top_p, kept in (
        (1e-9, [1]),
        (0.4, [1]),
        (0.6, [1, 2]),
        (0.75, [1, 2]),
        (0.76, [1, 2, 3]),
        (0.999, [0, 1, 2, 3]),
    ):
        assert np.flatnonzero(np.isfinite(filter_logits(logits, top_p=top_p))).tolist() == kept
    # top_p is of what top_k has left: 0.5 of 0.75 reach 0.6
    assert np.flatnonzero(np.isfinite(filter_logits(logits, top_k=2, top_p=0.6))).tolist() == [1]


@pytest.mark.parametrize("narrow", [{"top_k": 1, "temperature": 3.0}, {"temperature": 1e-6}, {"top_p": 1e-9}])
def test_what_leaves_one_token_draws_the_most_likely(narrow):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 30)), jnp.float32)
    drawn = draw(filter_logits(logits, **narrow), np.uint32(1), np.arange(50, dtype=np.uint32), np.int32(0))
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_no_temperature_overflows():
    logits = jnp.array([1e30, 1e30 - 1e24, -3e38])
    for temperature in (1e-6, 1e6):
        chances = np.asarray(jax.nn.softmax(filter_logits(logits, temperature=temperature)))
        assert chances.sum() == pytest.approx(1)
        assert np.isfinite(chances).all()


def test_draws_have_the_right_probabilities_over_rows_steps_and_seeds():
    """Chi-square over its 4 degrees of freedom: the mean is 1; 6 and more comes once in 15,000 times."""
    chances = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = jnp.log(jnp.asarray(chances, jnp.float32))
    many, count = np.arange(20_000, dtype=np.uint32), 20_000
    one = jax.jit(lambda seed, key, step: draw(logits[None], seed, key[None], step)[0])
    drawn = {
        "rows": draw(jnp.tile(logits, (count, 1)), np.uint32(3), many, np.int32(0)),
        "steps": jax.vmap(lambda step: one(np.uint32(3), np.uint32(7), step))(many.astype(np.int32)),
        "seeds": jax.vmap(lambda seed: one(seed, np.uint32(7), np.int32(2)))(many),
    }
    for name, tokens in drawn.items():
        found = np.bincount(np.asarray(tokens), minlength=5)

        def surprise(expected, found=found):
            return float(((found - count * expected) ** 2 / (count * expected)).sum() / 4)

        assert surprise(chances) < 6, name  # measured: 2.0, 0.2, 1.0; 11 to 19 with the others
        assert surprise(np.array([0.48, 0.22, 0.15, 0.1, 0.05])) > 6, name
    pairs = np.stack([np.asarray(tokens) for tokens in drawn.values()])
    assert all((pairs[a] == pairs[b]).mean() < 0.4 for a, b in ((0, 1), (0, 2), (1, 2)))  # 0.33 if independent


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature: expected 0 .the most likely token. or a number from 1e-06 on; got -1"),
        ({"temperature": 1e-9}, "got 1e-09"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"temperature": float("inf")}, "temperature: .* got inf"),
        ({"temperature": "hot"}, "temperature: .* got 'hot'"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected a whole number of at least 1; got 0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: .* got 2.5"),
        ({"temperature": 1.0, "top_p": 0}, "top_p: expected a number above 0 and at most 1; got 0"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p: .* got 1.01"),
        ({"top_p": 0.9}, "top_p: expected none at temperature 0, where nothing is drawn; got 0.9; set a temperature"),
        ({"top_k": 5}, "top_k: expected none at temperature 0"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 4294967295; got -1"),
        ({"seed": 2**32}, "seed: .* got 4294967296"),
        ({"temperature": -1, "top_k": 0, "top_p": 2, "seed": 0.5}, "temperature: .*; top_k: .*; top_p: .*; seed: "),
    ],
)
def test_settings_out_of_range_are_refused_all_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
