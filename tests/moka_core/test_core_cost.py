"""The cost model: what it must choose where the choice is plain, and the refusal of unknown names."""

from __future__ import annotations

import pytest

from moka_core import ConfigError, MokaConfig, plan_layer
from moka_core.cost import choose_execution, resolve_execution

CONFIG = MokaConfig()
PLAN = plan_layer(CONFIG, 2048, 2048)


def test_few_tokens_are_factored_and_many_merged():
    assert choose_execution(PLAN, CONFIG, 1) == "factored"
    assert choose_execution(PLAN, CONFIG, 4096) == "merged"


def test_the_choice_changes_once_as_tokens_grow():
    choices = [choose_execution(PLAN, CONFIG, tokens) for tokens in range(1, 512)]
    assert choices == sorted(choices)
    assert len(set(choices)) == 2


def test_adding_to_a_weight_that_is_multiplied_anyway_makes_merged_cheaper():
    tokens = [t for t in range(1, 512) if choose_execution(PLAN, CONFIG, t) == "factored"][-1]
    assert choose_execution(PLAN, CONFIG, tokens, own_product=False) == "merged"


def test_a_block_diagonal_mixture_is_factored():
    block = MokaConfig(r=8, identity="a", num_shapes=1)
    assert choose_execution(plan_layer(block, 2048, 2048), block, 512) == "factored"


def test_a_named_execution_is_taken_as_it_is_and_an_unknown_one_refused():
    assert resolve_execution("factored", PLAN, CONFIG, 4096) == "factored"
    assert resolve_execution("merged", PLAN, CONFIG, 1) == "merged"
    assert resolve_execution("auto", PLAN, CONFIG, 1) == "factored"
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'dense'"):
        resolve_execution("dense", PLAN, CONFIG, 1)  # type: ignore[arg-type]
