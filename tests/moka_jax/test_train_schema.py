"""The JSON schema of a run: takes what `TrainConfig` takes, refuses what is misspelt, missing or of a wrong type."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from moka_cli.main import main
from moka_core import Architecture, ConfigError, architecture
from moka_jax.train import TrainConfig
from moka_jax.train.schema import run_schema
from tests.moka_jax.train_toys import LEAST_CONFIG as LEAST


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


FULL = LEAST | {
    "data": {"train": "t", "eval": None, "max_length": 9, "packing": True},
    "optimiser": {"name": "lion", "learning_rate": 1, "b1": 0.5, "clip_norm": None, "schedule": "linear"},
    "mesh": {"data": 2},
    "profile": {"start": 1, "steps": 2},
    "early_stopping": None,
    "adapter": {
        "preset": "paper",
        "target_modules": "all-linear",
        "shapes": {"4x4": [[10, 2, 2, 2, 2]]},
        "r_pattern": {"q_proj": 4},
        "shapes_pattern": {"v_proj": [[3, 2, 2, 2, 2]]},
        "scale_pattern": {"k_proj": 2.0},
    },
}


@pytest.mark.parametrize(
    "values",
    [
        LEAST,
        FULL,
        {key: value for key, value in LEAST.items() if key != "optimiser"} | {"adapter": {"preset": "recommended"}},
        LEAST | {"adapter": {"start": "there", "preset": None, "r": None}},
    ],
)
def test_a_valid_config_is_taken_as_typed_and_as_it_is_noted(validator, values):
    config = TrainConfig.from_dict(values)
    validator.validate(values)
    validator.validate(json.loads(json.dumps(config.to_dict())))


def test_a_config_whose_preset_is_written_out_is_taken(validator):
    model: Architecture = architecture("llama3-8b")
    config = TrainConfig.from_dict(LEAST | {"adapter": {"preset": "paper-s"}})
    written_out = config.to_dict() | {"adapter": config.adapter.resolved(model).to_dict()}
    validator.validate(json.loads(json.dumps(written_out)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("learning_rate",), 1e-3),
        (("data", "trian"), "t"),
        (("optimiser", "lr"), 1e-3),
        (("adapter", "rank"), 8),
        (("mesh", "model"), 2),
        (("adapter", "preset"), "papier"),
        (("quantise",), "int8"),
        (("steps",), "many"),
        (("batch_size",), 1.5),
        (("data", "packing"), "yes"),
        (("optimiser", "clip_norm"), [1]),
        (("early_stopping",), {"min_delta": 0.1}),
        (("adapter", "shapes"), {"4x4": [[1, 2, 2, 2]]}),
        (("adapter", "r_pattern"), ["q_proj"]),
        (("base",), None),
    ],
)
def test_what_a_run_refuses_the_schema_refuses(validator, place, value):
    values = copy.deepcopy(FULL)
    inside = values
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    with pytest.raises(ConfigError):
        TrainConfig.from_dict(values)
    assert not validator.is_valid(values)


def numbers(schema: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The place and the schema of every number that a run can set."""
    for kind in [schema, *schema.get("anyOf", [])]:
        if kind.get("type") in ("integer", "number"):
            yield place, kind
        for name, inner in kind.get("properties", {}).items():
            yield from numbers(inner, (*place, name))


# A run refuses these for another setting's value: they are what the test would have to change beside them.
BESIDE: dict[tuple[str, ...], dict[tuple[str, ...], Any]] = {
    ("steps",): {("optimiser", "warmup_steps"): 0, ("profile",): None},
    ("adapter", "r"): {("adapter", "shapes"): {}},
    ("profile", "start"): {("steps",): 10},
    ("profile", "steps"): {("steps",): 10},
    ("optimiser", "eps"): {("optimiser", "name"): "adamw"},
    ("optimiser", "final_fraction"): {("optimiser", "schedule"): "cosine"},
    ("early_stopping", "patience"): {("data", "eval"): "e", ("early_stopping",): {}},
    ("early_stopping", "min_delta"): {("data", "eval"): "e", ("early_stopping",): {"patience": 1}},
}
RANGED = [(".".join(place), place, kind) for place, kind in numbers(run_schema())]


@pytest.mark.parametrize(("place", "kind"), [entry[1:] for entry in RANGED], ids=[entry[0] for entry in RANGED])
def test_the_ranges_of_the_schema_are_those_of_a_run(validator, place, kind):
    """At each end of a number's range, the last value that is taken and the first that is not."""
    step = 1 if kind["type"] == "integer" else 1e-9
    ends = {"minimum": -step, "maximum": step, "exclusiveMinimum": 0, "exclusiveMaximum": 0}
    found = [name for name in ends if name in kind]
    assert found or kind.get("not") == {"const": 0}, "a number without a range"

    def check(value: float, taken: bool) -> None:
        values = copy.deepcopy(FULL)
        for where, own in {**BESIDE.get(place, {}), place: value}.items():
            inside = values
            for key in where[:-1]:
                inside = inside.setdefault(key, {})
            inside[where[-1]] = own
        assert validator.is_valid(values) == taken
        if taken:
            TrainConfig.from_dict(values)
        else:
            with pytest.raises(ConfigError, match=f"{place[-1]}: expected"):
                TrainConfig.from_dict(values)

    if not found:
        check(0, taken=False)
        check(-1.0, taken=True)
    for name in found:
        inwards = step if "inimum" in name else -step
        check(kind[name] + ends[name], taken=False)
        check(kind[name] + (inwards if ends[name] == 0 else 0), taken=True)


@pytest.mark.parametrize("key", run_schema()["required"])
def test_what_must_be_there(validator, key):
    values = {name: value for name, value in LEAST.items() if name != key}
    with pytest.raises(ConfigError, match=f"missing {key}"):
        TrainConfig.from_dict(values)
    assert not validator.is_valid(values)


def test_every_setting_is_described_and_has_its_default():
    def of(schema: dict[str, Any]) -> dict[str, Any]:
        return next((part for part in schema.get("anyOf", []) if "properties" in part), schema)

    def walk(schema: dict[str, Any], path: str) -> None:
        for name, inner in of(schema).get("properties", {}).items():
            assert len(inner["description"]) > 5, f"{path}{name}"
            walk(inner, f"{path}{name}.")

    schema = run_schema()
    walk(schema, "")
    properties = schema["properties"]
    assert (properties["dtype"]["default"], properties["data"]["properties"]["max_length"]["default"]) == (
        "bfloat16",
        512,
    )
    assert properties["optimiser"]["properties"]["schedule"]["enum"] == ["cosine", "linear", "constant"]


def test_the_command_prints_it_without_a_config(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--schema"])
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out) == run_schema()
