"""The config and its presets: what is refused by which message, and that a written config reads back equal."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from moka_core import (
    PRESETS,
    ConfigError,
    KronShape,
    LayerPlan,
    ModelError,
    MokaConfig,
    MokaError,
    ShapeGroup,
    architecture,
    preset,
)
from moka_core.architecture import ARCHITECTURES, Architecture
from tests.cases import CASES

SQUARE = LayerPlan(out_features=16, in_features=16, groups=(ShapeGroup(KronShape(4, 4, 4, 4), 2),))
SKEW = LayerPlan(out_features=16, in_features=16, groups=(ShapeGroup(KronShape(2, 8, 8, 2), 2),))

REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"r": 0}, "r: expected a whole number >= 1; got 0"),
    ({"r": 2.0}, "r: expected a whole number >= 1; got 2.0"),
    ({"r": True}, "r: expected a whole number >= 1; got True"),
    ({"r": "10"}, "r: expected a whole number >= 1; got '10'"),
    ({"num_shapes": -1}, "num_shapes: expected a whole number >= 1; got -1"),
    ({"lora_terms": -1}, "lora_terms: expected a whole number >= 0; got -1"),
    ({"lora_terms": True}, "lora_terms: expected a whole number >= 0; got True"),
    ({"lora_terms": 1, "identity": "a"}, "lora_terms: expected 0 with identity='a'; got 1"),
    ({"lora_terms": 3, "r": 2}, "lora_terms: expected at most 2 of the terms (r); got 3"),
    ({"block_entries": None}, "block_entries: expected a whole number >= 1; got None"),
    ({"gate": "sigmoid"}, "gate: expected one of softmax, uniform; got 'sigmoid'"),
    ({"gate": ["softmax"]}, "gate: expected one of softmax, uniform; got ['softmax']"),
    ({"scaling": "rslora"}, "scaling: expected one of none, stable; got 'rslora'"),
    ({"execution": "fast"}, "execution: expected one of auto, factored, merged; got 'fast'"),
    ({"execution": ["merged"]}, "execution: expected one of auto, factored, merged; got ['merged']"),
    ({"execution": "dense"}, "execution: 'dense' is numpy.kron in float64"),
    ({"zero_factor": "c"}, "zero_factor: expected one of a, b; got 'c'"),
    ({"identity": True}, "identity: expected one of none, a, b; got True"),
    (
        {"identity": "b"},
        "zero_factor: factor 'b' is the fixed identity, so it cannot start at zero; set zero_factor='a'",
    ),
    ({"identity": "a", "zero_factor": "a"}, "set zero_factor='b'"),
    ({"scale": 0}, "scale: expected a number other than 0; 0 would switch the adapter off for good"),
    ({"scale": math.nan}, "scale: expected a finite number; got nan"),
    ({"scale": math.inf}, "scale: expected a finite number; got inf"),
    ({"scale": 10**400}, "scale: expected a finite number; got 1000"),
    *(
        ({"scale": scale}, f"scale: expected a magnitude that float32 holds, 1.18e-38 to 3.4e+38; got {scale!r}")
        for scale in (1e200, -1e308, 3.4028236e38, 1e-200, -1.1754942e-38)
    ),
    ({"scale_pattern": {"q_proj": 1e39}}, "scale_pattern[q_proj]: expected a magnitude that float32 holds"),
    ({"scale": "1"}, "scale: expected a finite number; got '1'"),
    ({"scale": True}, "scale: expected a finite number; got True"),
    ({"r_pattern": {"q_proj": 0}}, "r_pattern[q_proj]: expected a whole number >= 1; got 0"),
    ({"r_pattern": {"": 2}}, "r_pattern: expected a layer's path, or a regular expression; got ''"),
    ({"scale_pattern": {"q_proj": 0.0}}, "scale_pattern[q_proj]: expected a number other than 0"),
    ({"scale_pattern": {"(": 2.0}}, "scale_pattern: '(' is no regular expression"),
    ({"shapes_pattern": {"q_proj": [[1, 4, 4, 4, 4]]}}, "shapes_pattern[q_proj]: expected a LayerPlan"),
    ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1; got 1.0"),
    ({"dropout": -0.1}, "dropout: expected 0 <= dropout < 1; got -0.1"),
    ({"dropout": math.nan}, "dropout: expected a finite number; got nan"),
    ({"target_modules": ()}, "target_modules: expected at least one name, none of them empty; got ()"),
    ({"target_modules": ""}, "target_modules: expected at least one name, none of them empty; got ''"),
    ({"target_modules": ("q_proj", "")}, "none of them empty; got ('q_proj', '')"),
    ({"target_modules": ("q_proj", 3)}, "target_modules: expected strings; got ('q_proj', 3)"),
    ({"target_modules": None}, "target_modules: expected names or one regular expression; got None"),
    ({"target_modules": {"q_proj": 1}}, "target_modules: expected names or one regular expression"),
    ({"r": 3, "shapes": (SQUARE,)}, "shapes[16x16]: expected 3 terms in all (r); got 2"),
    ({"r": 2, "shapes": (SQUARE, SKEW)}, "shapes: one plan for each (out, in); got 16x16, 16x16"),
    ({"r": 2, "identity": "a", "shapes": (SKEW,)}, "identity='a' needs a square factor_a; got 2x8 in (2x8) ⊗ (8x2)"),
    ({"r": 2, "identity": "b", "zero_factor": "a", "shapes": (SKEW,)}, "needs a square factor_b; got 8x2"),
    ({"shapes": ("16x16",)}, "shapes: expected LayerPlans; got ('16x16',)"),
    ({"shapes": {"16x16": []}}, "shapes: expected LayerPlans; got {'16x16': []}"),
)

REFUSED_WRITTEN: tuple[tuple[Any, str], ...] = (
    ({"rank": 4}, "MokaConfig: unknown 'rank'; known: r, num_shapes"),
    ({"zero_factr": "a", "numshapes": 3}, "'numshapes' (did you mean 'num_shapes'?), 'zero_factr' (did you mean"),
    ({1: 2, "q": 3}, "MokaConfig: unknown 1, 'q'; known: r,"),
    ([("r", 4)], "MokaConfig: expected names and their values; got [('r', 4)]"),
    ({"shapes": []}, 'shapes: expected {"OUTxIN": [[copies, a_out, a_in, b_out, b_in], ...]}; got []'),
    ({"shapes": {"16": []}}, "shapes: expected a key such as \"4096x1024\" (out x in); got '16'"),
    ({"shapes": {"016x16": []}}, "got '016x16'"),
    ({"shapes": {"0x16": []}}, "got '0x16'"),
    ({"shapes": {"16x16\n": []}}, "got '16x16\\n'"),
    ({"shapes": {"1٦x16": []}}, "got '1٦x16'"),
    ({"shapes": {"9" * 5000 + "x16": []}}, "shapes: expected a key such as"),
    ({"shapes": {"1000000000000000003x16": [[1, 1, 1, 1, 1]]}}, "shapes: expected a key such as"),
    ({"shapes": {"16x16": 3}}, "shapes[16x16]: expected a list of [copies, a_out, a_in, b_out, b_in]; got 3"),
    ({"shapes": {"16x16": []}}, "plan for 16x16: expected at least one shape; got none"),
    (
        {"shapes": {"16x16": [[1, 4, 4, 4]]}},
        "shapes[16x16]: expected [copies, a_out, a_in, b_out, b_in]; got [1, 4, 4, 4]",
    ),
    ({"shapes": {"16x16": ["44444"]}}, "shapes[16x16]: expected [copies, a_out, a_in, b_out, b_in]; got '44444'"),
    ({"shapes": {"16x16": [[10, 4, 4, 4, 4.0]]}}, "expected b_in to be a whole number >= 1; got 4.0"),
    ({"shapes": {"16x16": [[10, 4, 4, 4, True]]}}, "expected b_in to be a whole number >= 1; got True"),
    ({"shapes": {"16x16": [[0, 4, 4, 4, 4]]}}, "expected copies to be a whole number >= 1; got 0"),
    ({"shapes": {"16x16": [[10, 4, 4, 4, 3]]}}, "a_in and b_in to 16 (divisors: 1, 2, 4, 8, 16)"),
    ({"shapes": {"16x16": [[5, 4, 4, 4, 4], [5, 4, 4, 4, 4]]}}, "a shape stands twice; give it once, with more copies"),
)


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields)[:60] for fields, _ in REFUSED])
def test_every_field_out_of_its_range_is_refused_with_name_rule_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MokaConfig(**fields)


@pytest.mark.parametrize(
    ("values", "message"), REFUSED_WRITTEN, ids=[str(values)[:60] for values, _ in REFUSED_WRITTEN]
)
def test_a_written_config_with_a_wrong_name_or_shape_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MokaConfig.from_dict(values)


def test_every_field_has_a_refused_value_in_the_tables_above() -> None:
    tested = {name for fields, _ in REFUSED for name in fields}
    assert tested == {field.name for field in dataclasses.fields(MokaConfig)}


def test_every_error_is_a_moka_error_and_a_value_error() -> None:
    assert issubclass(ConfigError, MokaError)
    assert issubclass(MokaError, ValueError)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_config_survives_json_with_its_explicit_shapes(case: Any) -> None:
    config = case.config
    assert MokaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert bool(config.to_dict()["shapes"]) == bool(case.shapes)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", ("q_proj",)])
def test_every_kind_of_target_survives_json_in_its_kind(targets: Any) -> None:
    config = MokaConfig(target_modules=targets)
    again = MokaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.target_modules == targets


def test_to_dict_states_every_field_so_that_nothing_rests_on_a_default() -> None:
    assert set(MokaConfig().to_dict()) == {field.name for field in dataclasses.fields(MokaConfig)}


def test_from_dict_leaves_the_callers_dict_alone() -> None:
    values: dict[str, Any] = {"r": 2, "shapes": {"16x16": [[2, 4, 4, 4, 4]]}, "target_modules": ["q_proj"]}
    before = json.dumps(values)
    assert MokaConfig.from_dict(values).shapes == (SQUARE,)
    assert json.dumps(values) == before


def test_a_set_of_targets_gives_one_order_whatever_the_hash_seed() -> None:
    names = {"v_proj", "q_proj", "up_proj", "down_proj", "o_proj"}
    assert MokaConfig(target_modules=names).target_modules == tuple(sorted(names))  # type: ignore[arg-type]


def test_a_config_is_hashable_and_cannot_be_changed() -> None:
    config = MokaConfig(r=2, shapes=[SQUARE], target_modules=["q_proj"])  # type: ignore[arg-type]
    assert hash(config) == hash(MokaConfig(r=2, shapes=(SQUARE,), target_modules=("q_proj",)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]


def test_the_paper_preset_is_the_papers_setting() -> None:
    assert preset("paper") == MokaConfig(
        r=10,
        num_shapes=5,
        gate="softmax",
        scaling="none",
        scale=1.0,
        identity="none",
        zero_factor="b",
        dropout=0.1,
        target_modules=("q_proj", "v_proj"),
    )


def test_the_recommended_preset_is_the_one_of_the_accuracy_study() -> None:
    assert preset("recommended") == MokaConfig(
        r=3,
        num_shapes=5,
        lora_terms=1,
        gate="softmax",
        scaling="stable",
        scale=30.0,
        identity="none",
        zero_factor="b",
        dropout=0.1,
        target_modules=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    )


def test_paper_s_takes_its_terms_from_the_models_attention() -> None:
    assert preset("paper-s", architecture("llama2-7b")).r == 16
    assert preset("paper-s", architecture("llama3-8b")).r == 8
    with pytest.raises(ConfigError, match="preset 'paper-s' depends on the model's attention; pass its architecture"):
        preset("paper-s")


def test_every_preset_that_is_listed_can_be_had() -> None:
    for name in PRESETS:
        assert preset(name, architecture("llama3-8b"), dropout=0.0).dropout == 0.0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("papre", {}, "unknown preset 'papre'; did you mean 'paper'? known: recommended, paper, paper-s"),
        ("zzz", {}, "unknown preset 'zzz'; known: recommended, paper, paper-s"),
        ("paper", {"rr": 4}, "preset overrides: unknown 'rr' (did you mean 'r'?); known: r,"),
        ("paper", {"r": 0}, "r: expected a whole number >= 1; got 0"),
    ],
)
def test_an_unknown_preset_or_override_is_refused_by_name(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        preset(name, **overrides)


# Parameters of the released checkpoints, as counted from their tensors.
RELEASED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_built_in_architecture_has_the_released_models_parameter_count() -> None:
    assert {name: model.parameters() for name, model in ARCHITECTURES.items()} == RELEASED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama2-7B-chat", "unknown architecture 'llama2-7B-chat'; did you mean llama2-7b"),
        ("gpt", "unknown architecture 'gpt'; known: llama2-7b, llama2-13b"),
    ],
)
def test_an_unknown_architecture_is_refused_with_the_nearest_names(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        architecture(name)


def test_an_architectures_name_may_be_spelled_in_capitals() -> None:
    assert architecture("LLaMA3-8B") is ARCHITECTURES["llama3-8b"]


HF_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


def test_what_a_config_json_leaves_out_follows_from_what_it_says() -> None:
    model = Architecture.from_hf_config(HF_CONFIG)
    assert (model.num_key_value_heads, model.head_dim, model.tie_word_embeddings) == (4, 16, False)
    explicit = Architecture.from_hf_config({**HF_CONFIG, "num_key_value_heads": 2, "head_dim": 32})
    layers = explicit.linear_layers()
    assert layers["model.layers.1.self_attn.q_proj"] == (128, 64)
    assert layers["model.layers.1.self_attn.v_proj"] == (64, 64)
    assert layers["model.layers.0.self_attn.o_proj"] == (64, 128)
    assert layers["model.layers.0.mlp.down_proj"] == (64, 128)
    assert len(layers) == 2 * 7 + 1


def test_every_bad_number_of_a_config_json_is_listed_at_once() -> None:
    bad = {**HF_CONFIG, "hidden_size": "64", "num_hidden_layers": 0, "num_key_value_heads": 2.0, "head_dim": True}
    del bad["vocab_size"]
    with pytest.raises(ModelError) as caught:
        Architecture.from_hf_config(bad)
    for text in (
        "hidden_size: expected a positive whole number; got '64'",
        "num_hidden_layers: expected a positive whole number; got 0",
        "num_key_value_heads: expected a positive whole number; got 2.0",
        "head_dim: expected a positive whole number; got True",
        "vocab_size: expected a positive whole number; got None",
    ):
        assert text in str(caught.value)


def test_key_heads_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(ModelError, match=re.escape("expected a divisor of num_attention_heads (4); got 3")):
        Architecture.from_hf_config({**HF_CONFIG, "num_key_value_heads": 3})
