"""The cost model: what it must choose where the choice is plain, and the refusal of unknown names."""

from __future__ import annotations

import itertools

import pytest

from moka_core import ConfigError, KronShape, MokaConfig, plan_layer
from moka_core.execution import costs, first_factor, plan_execution
from tests.cases import CASES

CONFIG = MokaConfig()
PLAN = plan_layer(CONFIG, 2048, 2048)


def forward(tokens: int, **options) -> str:
    return plan_execution(PLAN, CONFIG, tokens, **options).forward


def test_few_tokens_are_factored_and_many_merged():
    for backend in ("cpu", "gpu"):
        assert forward(1, own_product=False, backend=backend) == "factored"
        assert forward(8192, own_product=False, backend=backend) == "merged"


@pytest.mark.parametrize("own_product", [False, True])
def test_the_choice_changes_at_most_once_as_tokens_grow(own_product):
    choices = [forward(tokens, own_product=own_product) for tokens in range(1, 4096, 7)]
    assert choices == sorted(choices)
    assert choices[0] == "factored"


def test_adding_to_a_weight_that_is_multiplied_anyway_makes_merged_cheaper():
    for tokens in (1, 64, 4096):
        own, added = (costs(PLAN, "none", tokens, own_product=own) for own in (True, False))
        assert own.merged - added.merged >= tokens * 2048 * 2048
        assert (own.factored, own.gradient_factored) == (added.factored, added.gradient_factored)


def test_the_gradient_of_a_small_layer_comes_from_the_full_weight_gradient_and_that_of_a_large_one_from_halves():
    small, large = plan_layer(CONFIG, 576, 576), plan_layer(CONFIG, 4096, 4096)
    assert plan_execution(small, CONFIG, 512).gradient == "merged"
    assert plan_execution(large, CONFIG, 512).gradient == "factored"


def test_a_block_diagonal_mixture_never_needs_the_full_weight_gradient():
    block = MokaConfig(r=8, identity="a", num_shapes=1)
    plan = plan_layer(block, 2048, 2048)
    assert plan_execution(plan, block, 512).forward == "factored"
    for execution in ("auto", "factored", "merged"):
        assert plan_execution(plan, block, 512, execution=execution).gradient == "factored"


def test_a_named_execution_is_taken_as_it_is_from_the_call_or_else_from_the_config():
    assert forward(4096, execution="factored") == "factored"
    assert forward(1, execution="merged") == "merged"
    named = MokaConfig(execution="merged")
    assert plan_execution(PLAN, named, 1).forward == "merged"
    assert plan_execution(PLAN, named, 1, execution="factored").forward == "factored"
    assert plan_execution(PLAN, named, 1, execution="factored").gradient == "factored"


def test_unknown_executions_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'fast'"):
        forward(1, execution="fast")
    with pytest.raises(ConfigError, match=r"'dense' is numpy.kron in float64, which no layer trains with"):
        MokaConfig(execution="dense")  # type: ignore[arg-type]


def test_the_first_factor_is_the_one_that_costs_less():
    for a_out, a_in, b_out, b_in in itertools.product((1, 3, 8), repeat=4):
        shape = KronShape(a_out, a_in, b_out, b_in)
        b_first = a_in * b_in * b_out + a_in * a_out * b_out
        a_first = a_out * a_in * b_in + a_out * b_in * b_out
        if a_first != b_first:
            assert first_factor(shape) == ("a" if a_first < b_first else "b")
    assert {first_factor(group.shape) for case in CASES for group in case.plan.groups} == {"a", "b"}


def test_the_order_makes_the_factored_way_cheaper_for_long_factors():
    """(16x256) ⊗ (256x16): 32 half-product entries a token and copy for every 4096 of the other order."""
    from moka_core.execution import _halves

    shape = KronShape(16, 256, 256, 16)
    assert _halves(shape, "b") == (16 * _halves(shape, "a")[0], 256 * _halves(shape, "a")[1])
