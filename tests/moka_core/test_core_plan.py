"""Shapes, targets and counts: the published totals, the order of shapes, and which layers a target names."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from moka_core import (
    ConfigError,
    KronShape,
    LayerPlan,
    MokaConfig,
    ShapeGroup,
    TargetError,
    architecture,
    plan_layer,
    plan_model,
    preset,
)
from moka_core.plan import balanced_shapes, block_shape, divisors, lora_parameters, matches

DIMS = [(64, 64), (96, 24), (16, 144), (13, 7), (17, 60), (1, 12), (2, 2), (1024, 4096)]


@pytest.mark.parametrize(
    ("arch", "name", "published"),
    [
        ("llama2-7b", "paper", 5_243_520),
        ("llama3-8b", "paper", 3_932_800),
        ("llama2-7b", "paper-s", 4_195_328),
        ("llama3-8b", "paper-s", 2_097_664),
    ],
)
def test_a_preset_trains_as_many_parameters_as_published(arch: str, name: str, published: int) -> None:
    model = architecture(arch)
    config = preset(name, model)
    plans = plan_model(config, model.linear_layers())
    assert len(plans) == 2 * model.num_hidden_layers
    assert sum(plan.trainable(config) for plan in plans.values()) == published


@pytest.mark.parametrize(("arch", "trained"), [("llama2-7b", 5_079_520), ("llama3-8b", 4_784_608)])
def test_the_recommended_preset_trains_as_many_parameters_as_the_guide_says(arch: str, trained: int) -> None:
    """By hand, LLaMA3-8B, a layer: q 3·8192, k and v 5120 + 2·4096 each, up and down 18432 + 2·15360 each, 15 gates."""
    config = preset("recommended")
    plans = plan_model(config, architecture(arch).linear_layers())
    assert sum(plan.trainable(config) for plan in plans.values()) == trained
    assert f"{trained:,}" in (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()


def test_lora_for_comparison_trains_as_many_parameters_as_published() -> None:
    layers = architecture("llama3-8b").linear_layers()
    assert lora_parameters(layers, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], 32) == 56_623_104


def test_the_gate_costs_one_parameter_a_term_and_the_uniform_gate_none() -> None:
    gated = MokaConfig()
    uniform = dataclasses.replace(gated, gate="uniform")
    plan = plan_layer(gated, 64, 64)
    assert plan.trainable(gated) - plan.trainable(uniform) == gated.r


@pytest.mark.parametrize("number", [1, 2, 12, 13, 49, 4096, 11008])
def test_divisors_are_all_of_them_in_order(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize(("out", "in_"), DIMS)
def test_balanced_shapes_come_fewest_parameters_first_then_squarest(out: int, in_: int) -> None:
    shapes = balanced_shapes(out, in_)

    def rank(shape: KronShape) -> tuple[int, float]:
        skew = abs(math.log2(shape.a_out / shape.a_in)) + abs(math.log2(shape.b_out / shape.b_in))
        return shape.a_out * shape.a_in + shape.b_out * shape.b_in, round(skew, 6)

    assert [rank(shape) for shape in shapes] == sorted(rank(shape) for shape in shapes)
    assert len(set(shapes)) == len(shapes)
    every = {(a, b, out // a, in_ // b) for a in divisors(out) for b in divisors(in_)}
    left_out = every - {dataclasses.astuple(shape) for shape in shapes}
    assert all(a * b + c * d >= out * in_ for a, b, c, d in left_out)


def test_the_first_shapes_of_a_llama_layer_are_these() -> None:
    assert [dataclasses.astuple(shape) for shape in balanced_shapes(4096, 4096)[:5]] == [
        (64, 64, 64, 64),
        (32, 128, 128, 32),
        (128, 32, 32, 128),
        (16, 256, 256, 16),
        (256, 16, 16, 256),
    ]


def test_a_prime_layer_has_the_two_rank_one_shapes() -> None:
    plan = plan_layer(MokaConfig(r=5, num_shapes=5), 13, 7)
    assert [(group.shape, group.copies) for group in plan.groups] == [
        (KronShape(1, 7, 13, 1), 3),
        (KronShape(13, 1, 1, 7), 2),
    ]


@pytest.mark.parametrize(("out", "in_"), DIMS)
@pytest.mark.parametrize(("r", "num_shapes"), [(1, 5), (3, 5), (10, 5), (11, 4), (7, 1000)])
def test_terms_are_spread_evenly_over_the_balanced_shapes(out: int, in_: int, r: int, num_shapes: int) -> None:
    plan = plan_layer(MokaConfig(r=r, num_shapes=num_shapes), out, in_)
    copies = [group.copies for group in plan.groups]
    assert plan.terms == r == len(plan.term_shapes())
    assert copies == sorted(copies, reverse=True)
    assert copies[0] - copies[-1] <= 1
    shapes = [group.shape for group in plan.groups]
    assert shapes == balanced_shapes(out, in_)[: len(shapes)]
    assert len(shapes) == min(num_shapes, r, len(balanced_shapes(out, in_)))


@pytest.mark.parametrize(("out", "in_"), [*(dims for dims in DIMS if math.prod(dims) >= 9), (1, 9), (9, 1)])
@pytest.mark.parametrize(("r", "lora_terms"), [(1, 1), (3, 1), (5, 2), (4, 4), (9, 7)])
def test_lora_terms_come_first_and_the_balanced_shapes_have_the_others(
    out: int, in_: int, r: int, lora_terms: int
) -> None:
    plan = plan_layer(MokaConfig(r=r, num_shapes=3, lora_terms=lora_terms), out, in_)
    first, *others = plan.groups
    assert plan.terms == r
    assert dataclasses.astuple(first.shape) == (1, in_, out, 1)
    left = [shape for shape in balanced_shapes(out, in_) if shape != first.shape]
    assert first.copies == (lora_terms if left else r)
    assert [group.shape for group in others] == left[: min(3, r - lora_terms)]


def test_more_lora_terms_than_terms_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("lora_terms: expected at most 2 of the terms (r); got 3")):
        MokaConfig(r=2, lora_terms=3)
    own = MokaConfig(r=4, lora_terms=3, r_pattern=(("q_proj", 2),))
    with pytest.raises(ConfigError, match=re.escape("lora_terms: expected at most 2 of the terms (r); got 3")):
        own.for_layer("q_proj", 8, 8)


@pytest.mark.parametrize("identity", ["a", "b"])
@pytest.mark.parametrize(("out", "in_"), [(4096, 4096), (1024, 4096), (13, 7), (36, 24)])
def test_an_identity_mixture_has_the_block_nearest_to_the_asked_size(out: int, in_: int, identity: Any) -> None:
    shape = block_shape(out, in_, entries=4096, identity=identity)
    fixed = (shape.a_out, shape.a_in) if identity == "a" else (shape.b_out, shape.b_in)
    stored = shape.parameters(identity)
    assert fixed[0] == fixed[1]
    assert (shape.out_features, shape.in_features) == (out, in_)
    options = [out * in_ // (k * k) for k in divisors(math.gcd(out, in_))]
    assert abs(math.log(stored / 4096)) == min(abs(math.log(option / 4096)) for option in options)


def test_an_explicit_plan_is_taken_for_its_dims_and_the_rule_for_others() -> None:
    mine = LayerPlan(out_features=16, in_features=8, groups=(ShapeGroup(KronShape(16, 1, 1, 8), 2),))
    config = MokaConfig(r=2, num_shapes=2, shapes=(mine,))
    assert plan_layer(config, 16, 8) is mine
    assert plan_layer(config, 8, 16) == plan_layer(MokaConfig(r=2, num_shapes=2), 8, 16)


def test_a_shape_that_does_not_divide_is_refused_with_the_divisors() -> None:
    with pytest.raises(ConfigError) as caught:
        LayerPlan(out_features=12, in_features=4096, groups=(ShapeGroup(KronShape(5, 64, 2, 64), 1),))
    assert "shape (5x64) ⊗ (2x64) multiplies to 10x4096" in str(caught.value)
    assert "a_out and b_out must multiply to 12 (divisors: 1, 2, 3, 4, 6, 12)" in str(caught.value)
    assert "a_in and b_in to 4096 (divisors: 1, 2, 4," in str(caught.value)


@pytest.mark.parametrize(("out", "in_"), [(0, 64), (64, 0), (-4, 4), (4.0, 4), (True, 4)])
@pytest.mark.parametrize("settings", [{}, {"identity": "a"}])
def test_a_layer_without_dimensions_is_refused(out: Any, in_: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="to be a whole number >= 1"):
        plan_layer(MokaConfig(**settings), out, in_)


@pytest.mark.parametrize(("settings", "most"), [({}, 5 * 64), ({"num_shapes": 2}, 2 * 64), ({"identity": "a"}, 64)])
def test_more_terms_than_can_differ_are_refused(settings: dict[str, Any], most: int) -> None:
    assert plan_layer(MokaConfig(r=most, **settings), 4, 16).terms == most
    message = f"r: expected at most {most} terms on a layer 4x16, .*; got {most + 1}; lower r"
    with pytest.raises(ConfigError, match=message):
        plan_layer(MokaConfig(r=most + 1, **settings), 4, 16)


PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.xup_proj",
    "q_proj",
    "q_proj.inner",
    "lm_head",
    "head.lm_head",
    "a.b.c",
    "aXbXc",
]
TARGETS: list[list[str] | str] = [
    ["q_proj"],
    ["proj"],
    ["self_attn.q_proj"],
    ["0.self_attn.q_proj"],
    ["attn.q_proj"],
    ["model.layers.1.mlp.up_proj", "lm_head"],
    ["b.c"],
    ["a.b.c"],
    [".*q_proj"],
    ["q_proj", "no_such"],
    r".*\.q_proj",
    "q_proj",
    r"q_proj|lm_head",
    r".*(q|v)_proj",
    r"model\.layers\.1\..*",
    "a.b.c",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_a_target_names_the_layers_that_it_names_in_peft(targets: list[str] | str) -> None:
    lora = LoraConfig(target_modules=targets)
    theirs = [path for path in PATHS if check_target_module_exists(lora, path)]
    assert [path for path in PATHS if matches(targets, path)] == theirs


def test_the_examples_above_can_tell_targets_apart() -> None:
    found = {tuple(path for path in PATHS if matches(targets, path)) for targets in TARGETS}
    assert len(found) > 8


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"]])
def test_all_linear_is_every_linear_layer_but_the_output_head(targets: Any) -> None:
    layers = architecture("smollm2-135m").linear_layers()
    plans = plan_model(MokaConfig(target_modules=targets), layers)
    assert set(layers) - set(plans) == {"lm_head"}


def test_a_plan_keeps_each_layers_own_dimensions() -> None:
    layers = architecture("llama3-8b").linear_layers()
    plans = plan_model(MokaConfig(target_modules="all-linear"), layers)
    assert {path: (plan.out_features, plan.in_features) for path, plan in plans.items()} == {
        path: dims for path, dims in layers.items() if path != "lm_head"
    }


LAYERS = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.self_attn.v_proj": (8, 16)}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_prj"],
            "'q_prj' matches no linear layer of this model; did you mean 'q_proj', 'v_proj'? Its linear layers: ",
        ),
        (["q_proj", "w1"], "'w1' matches no linear layer of this model; nothing there has a similar name. Its linear"),
        (["proj"], "target_modules: 'proj' matches no linear layer of this model; did you mean"),
        (
            "q_proj",
            "target_modules: 'q_proj' matches no linear layer of this model: text is a regular expression for a "
            "layer's whole path; give names as a list, such as [q_proj]. Its linear layers: q_proj, v_proj",
        ),
        ("q_proj, v_proj", "give names as a list, such as [q_proj, v_proj]. Its linear"),
        (".*self_attn.q_prj", "whole path; give names as a list, such as [q_proj, v_proj]. Its linear"),
        (
            ".*w1",
            "'.*w1' matches no linear layer of this model: text is a regular expression for a layer's whole path; "
            "give names as a list. Its linear layers: q_proj, v_proj",
        ),
        ("[", "target_modules: '[' is no regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_near_misses(targets: Any, message: str) -> None:
    with pytest.raises((TargetError, ConfigError), match=re.escape(message)):
        plan_model(MokaConfig(target_modules=targets), LAYERS)


def test_a_model_without_linear_layers_is_an_error() -> None:
    with pytest.raises(TargetError, match="Its linear layers: none at all"):
        plan_model(MokaConfig(target_modules="all-linear"), {})
