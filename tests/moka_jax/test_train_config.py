"""Training settings: reading, overriding, and every refusal by its message."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest

import moka_jax.train.overrides
import moka_jax.train.stopping
from moka_core import PRESETS, ConfigError
from moka_jax.train import (
    EarlyStopping,
    OptimiserConfig,
    Profile,
    TrainConfig,
    merge_overrides,
    parse_overrides,
)
from moka_jax.train.optimiser import OPTIONS

YAML = """
base: models/llama
output: runs/one
steps: 100
batch_size: 4
quantise: none
adapter: {preset: paper, r: 4, target_modules: [q_proj, up_proj]}
data: {train: train.jsonl, eval: held.jsonl}
optimiser: {learning_rate: 5e-3, warmup_steps: 10}
"""


def values(**changes: Any) -> dict[str, Any]:
    base = {"base": "b", "output": "o", "steps": 10, "batch_size": 2, "data": {"train": "t"}}
    return base | {"optimiser": {"learning_rate": 1e-3}} | changes


def test_a_yaml_file_with_overrides_becomes_a_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    config = TrainConfig.from_yaml(path, ["optimiser.b2=0.95", "seed=7", "adapter.scale=2e0", "data.eval=null"])
    assert config.optimiser == OptimiserConfig(learning_rate=0.005, warmup_steps=10, b2=0.95)
    assert (config.seed, config.steps, config.quantise, config.data.eval) == (7, 100, "none", None)
    adapter = config.adapter.moka_config()
    assert (adapter.r, adapter.scale, adapter.target_modules) == (4, 2.0, ("q_proj", "up_proj"))


def test_a_config_survives_json(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    config = TrainConfig.from_yaml(path)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_rate_that_pyyaml_reads_as_text_is_a_number() -> None:
    assert TrainConfig.from_dict(values(optimiser={"learning_rate": "5e-3"})).optimiser.learning_rate == 0.005


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "config: unknown 'stepz' (did you mean 'steps'?)"),
        ({"data": {"train": "t", "max_len": 3}}, "data: unknown 'max_len' (did you mean 'max_length'?)"),
        ({"optimiser": {"learning_rte": 1}}, "optimiser: unknown 'learning_rte' (did you mean 'learning_rate'?)"),
        ({"optimiser": {"name": "lion"}}, "optimiser: missing learning_rate; needed: learning_rate"),
        (
            {"learning_rate": 1e-3},
            "config: unknown 'learning_rate'; it is a setting of optimiser: optimiser.learning_rate",
        ),
        ({"max_length": 9}, "config: unknown 'max_length'; it is a setting of data: data.max_length"),
        ({"r": 9}, "config: unknown 'r'; it is a setting of adapter: adapter.r"),
        (
            {"optimiser": {}, "adapter": {"start": "there"}},
            "optimiser.learning_rate: expected a number, as a preset's is for a fresh adapter and this run goes on",
        ),
        ({"optimiser": {"learning_rate": 10**400}}, "optimiser.learning_rate: expected a finite number; got 1000"),
        ({"adapter": {"dropout": 1.5}}, "adapter.dropout: expected 0 <= dropout < 1; got 1.5"),
        ({"data": {}}, "data: missing train; needed: train"),
        ({"data": "t"}, "data: expected settings (key: value); got 't'"),
        ({"data": {1: 2}}, "data: expected names as keys; got 1"),
        ({"data": {"train": ""}}, "data.train: expected a path; got ''"),
        ({"data": {"train": "t", "max_length": 1}}, "data.max_length: expected a whole number >= 2; got 1"),
        ({"data": {"train": "t", "chat_template": 1}}, "data.chat_template: expected one of True, False; got 1"),
        ({"adapter": {"rr": 1}}, "adapter: unknown 'rr' (did you mean 'r'?)"),
        ({"adapter": {"preset": "papr"}}, "adapter.preset: expected one of recommended, paper, paper-s"),
        ({"adapter": {"r": 0}}, "r: expected a whole number >= 1; got 0"),
        ({"adapter": {"preset": "paper-s", "gate": "hard"}}, "gate: expected one of softmax, uniform; got 'hard'"),
        ({"steps": 0}, "steps: expected a whole number >= 1; got 0"),
        ({"steps": True}, "steps: expected a whole number >= 1; got True"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number >= 1; got 2.0"),
        ({"accumulate": 0}, "accumulate: expected a whole number >= 1; got 0"),
        ({"eval_batches": 0}, "eval_batches: expected a whole number >= 1; got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: expected a whole number >= 1; got 0"),
        ({"log_every": 0}, "log_every: expected a whole number >= 1; got 0"),
        ({"seed": 2**32}, "seed: expected a whole number, 0 <= seed < 4294967296; got 4294967296"),
        ({"quantise": "int8"}, "quantise: expected one of nf4-double, nf4, none; got 'int8'"),
        ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16; got 'float16'"),
        ({"base": 3}, "base: expected a path; got 3"),
        (
            {"optimiser": {"learning_rate": 1e-3, "warmup_steps": 10}},
            "optimiser.warmup_steps: expected fewer than steps (10); got 10",
        ),
        ({"optimiser": {"learning_rate": 0}}, "optimiser.learning_rate: expected learning_rate > 0; got 0.0"),
        ({"optimiser": {"learning_rate": "fast"}}, "optimiser.learning_rate: expected a finite number; got 'fast'"),
        ({"optimiser": {"learning_rate": "nan"}}, "optimiser.learning_rate: expected a finite number; got nan"),
        ({"optimiser": {"learning_rate": 1, "b1": 1}}, "optimiser.b1: expected 0 <= b1 < 1; got 1.0"),
        (
            {"optimiser": {"learning_rate": 1, "final_fraction": 2}},
            "optimiser.final_fraction: expected 0 <= final_fraction <= 1; got 2.0",
        ),
        ({"optimiser": {"learning_rate": 1, "clip_norm": 0}}, "optimiser.clip_norm: expected clip_norm > 0; got 0.0"),
        (
            {"optimiser": {"learning_rate": 1, "weight_decay": -1}},
            "optimiser.weight_decay: expected weight_decay >= 0; got -1.0",
        ),
        ({"optimiser": {"learning_rate": 1, "eps": 0}}, "optimiser.eps: expected eps > 0; got 0.0"),
        (
            {"optimiser": {"learning_rate": 1, "name": "sgd"}},
            "optimiser.name: expected one of adamw, lion, adafactor; got 'sgd'",
        ),
        (
            {"optimiser": {"learning_rate": 1, "schedule": "step"}},
            "optimiser.schedule: expected one of cosine, linear, constant; got 'step'",
        ),
        (
            {"optimiser": {"learning_rate": 1, "schedule": "constant", "final_fraction": 0.1}},
            "optimiser.final_fraction: schedule 'constant' does not read it; leave it out",
        ),
        ({"data": {"train": "t", "packing": "yes"}}, "data.packing: expected one of True, False; got 'yes'"),
        ({"max_skipped_steps": -1}, "max_skipped_steps: expected a whole number >= 0; got -1"),
        ({"tensorboard": 1}, "tensorboard: expected one of True, False; got 1"),
        ({"early_stopping": 3}, "early_stopping: expected settings (key: value); got 3"),
        ({"early_stopping": {}}, "early_stopping: missing patience; needed: patience"),
        ({"early_stopping": {"patience": 0}}, "early_stopping.patience: expected a whole number >= 1; got 0"),
        (
            {"early_stopping": {"patience": 2, "min_delta": -0.5}},
            "early_stopping.min_delta: expected min_delta >= 0; got -0.5",
        ),
        ({"early_stopping": {"patienc": 2}}, "early_stopping: unknown 'patienc' (did you mean 'patience'?)"),
        (
            {"early_stopping": {"patience": 2}},
            "early_stopping: expected data.eval, the examples whose loss it watches; got none; "
            "name a file of held-out examples, or leave early_stopping out",
        ),
        ({"profile": {"start": 0, "steps": 1}}, "profile.start: expected a whole number >= 1; got 0"),
        ({"profile": {"start": 1, "steps": 0}}, "profile.steps: expected a whole number >= 1; got 0"),
        ({"profile": {"start": 8, "steps": 4}}, "profile: expected steps up to steps (10); got 8 to 11"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        TrainConfig.from_dict(values(**changes))


def test_an_option_that_an_optimiser_does_not_read_is_refused() -> None:
    """Every option with every optimiser: it is either in the optimiser's table, or an error that names who reads it."""
    readers = {"b1": "adamw and lion", "b2": "adamw and lion", "eps": "adamw"}
    for name, options in OPTIONS.items():
        for option, told in readers.items():
            settings: dict[str, Any] = {"learning_rate": 1, "name": name, option: 0.5}
            if option in options:
                assert getattr(OptimiserConfig(**settings), option) == 0.5
                continue
            message = f"optimiser.{option}: {name} does not read it ({told} would); leave it out"
            with pytest.raises(ConfigError, match=re.escape(message)):
                OptimiserConfig(**settings)


def test_every_optimiser_has_its_own_defaults() -> None:
    read = {name: OptimiserConfig(learning_rate=1, name=name) for name in ("adamw", "lion", "adafactor")}
    assert {name: (c.b1, c.b2, c.eps) for name, c in read.items()} == {
        "adamw": (0.9, 0.999, 1e-8),
        "lion": (0.9, 0.99, None),
        "adafactor": (None, None, None),
    }
    for config in read.values():  # what was filled in is no option that was given by mistake
        assert OptimiserConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name", ["adamw8bit", "adamw_8bit", "lion_8bit", "paged_adamw_32bit", "AdamW8bit"])
def test_optimisers_of_bitsandbytes_are_refused_with_the_reason(name: Any) -> None:
    message = (
        f"optimiser.name: '{name}' is one of bitsandbytes' optimisers, for PyTorch; optax has none with 8-bit or paged "
        "moments, and those of an adapter are small (AdamW: 8 bytes a trained parameter); "
        "use one of adamw, lion, adafactor"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptimiserConfig(learning_rate=1, name=name)


def test_settings_of_their_own_survive_json_and_overrides() -> None:
    data = {"train": "t", "eval": "e"}
    changes = {"early_stopping": {"patience": 3, "min_delta": "1e-2"}, "profile": {"start": 2, "steps": 3}}
    config = TrainConfig.from_dict(values(data=data, **changes))
    assert config.early_stopping == EarlyStopping(patience=3, min_delta=0.01)
    assert config.profile == Profile(start=2, steps=3)
    assert config.profile.last == 4
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    off = merge_overrides(config.to_dict(), parse_overrides(["early_stopping=null", "profile=null"]))
    assert (TrainConfig.from_dict(off).early_stopping, TrainConfig.from_dict(off).profile) == (None, None)
    with pytest.raises(ConfigError, match=re.escape("profile: expected Profile or None; got {'start': 1, 'steps': 1}")):
        dataclasses.replace(config, profile={"start": 1, "steps": 1})  # type: ignore[arg-type]


def test_the_values_that_stand_at_a_limit_are_accepted() -> None:
    optimiser = {"learning_rate": 1, "final_fraction": 1, "weight_decay": 0, "clip_norm": None, "b1": 0}
    config = TrainConfig.from_dict(values(optimiser=optimiser, seed=2**32 - 1, accumulate=1))
    assert (config.optimiser.final_fraction, config.optimiser.clip_norm, config.seed) == (1.0, None, 2**32 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "key 'steps' is given twice; give it once"),
        ("steps: [1", "not valid YAML"),
        ("- steps\n", "expected settings such as 'steps: 100'; got ['steps']"),
        ("", "expected settings such as 'steps: 100'; got None"),
        ("steps: 1\n", "config: missing base, output, data, batch_size"),
    ],
)
def test_a_bad_yaml_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        TrainConfig.from_yaml(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_yaml_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: expected a YAML file that can be read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["steps"], "override 'steps': expected key=value or key.sub=value"),
        (["=3"], "override '=3': expected key=value"),
        (["data..train=3"], "override 'data..train=3': expected key=value"),
        (["a=[1"], "override 'a=[1': the value is not valid YAML"),
        (["a=1", "a=2"], "override 'a=2': 'a' is set twice"),
        (["a=1", "a.b=2"], "override 'a.b=2': 'a' was set to one value before"),
        (["a.b=1", "a=2"], "override 'a=2': 'a' is set twice"),
    ],
)
def test_a_bad_override_is_refused_by_name(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_overrides(items)


def test_an_override_below_a_single_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("override data.train.x: data.train is one value ('t')")):
        merge_overrides({"data": {"train": "t"}}, {"data": {"train": {"x": 1}}})


def test_merging_leaves_its_arguments_alone() -> None:
    old = {"data": {"train": "t", "eval": "e"}}
    assert merge_overrides(old, {"data": {"eval": None}, "seed": 1}) == {
        "data": {"train": "t", "eval": None},
        "seed": 1,
    }
    assert old == {"data": {"train": "t", "eval": "e"}}


PACKED = {"data": {"train": "t", "packing": True}}


def test_meaning_leaves_out_cadence_and_places_but_not_what_decides_the_adapter() -> None:
    config = TrainConfig.from_dict(values())
    same = TrainConfig.from_dict(
        values(
            output="p",
            eval_every=3,
            checkpoint_every=3,
            keep_checkpoints=9,
            log_every=5,
            max_skipped_steps=0,
            tensorboard=True,
            profile={"start": 1, "steps": 1},
            early_stopping={"patience": 1},
            data={"train": "elsewhere", "eval": "there"},
        )
    )
    assert config.meaning() == same.meaning()
    for changes in ({"seed": 1}, {"steps": 11}, {"batch_size": 3}, {"eval_batches": 4}, {"adapter": {"r": 5}}, PACKED):
        assert TrainConfig.from_dict(values(**changes)).meaning() != config.meaning(), changes


def test_a_constant_rate_does_not_depend_on_the_number_of_steps() -> None:
    optimiser = {"learning_rate": 1e-3, "schedule": "constant"}
    short, long = (TrainConfig.from_dict(values(optimiser=optimiser, steps=steps)) for steps in (10, 20))
    assert short.meaning() == long.meaning()


def test_the_examples_in_the_docstrings_hold() -> None:
    for module, examples in ((moka_jax.train.overrides, 1), (moka_jax.train.stopping, 3)):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted) == (0, examples)


def test_how_the_adapter_is_computed_is_no_part_of_what_a_run_means() -> None:
    """A run may go on with another execution."""
    settings = ({"preset": "paper"}, {"preset": "paper", "execution": "merged"}, {"preset": "paper", "r": 4})
    plain, merged, other = (TrainConfig.from_dict(values(adapter=adapter)).meaning() for adapter in settings)
    assert plain == merged
    assert plain != other


def test_a_run_takes_the_learning_rate_of_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(optimiser: dict[str, Any] | None, **adapter: Any) -> float:
        settings = {
            key: value for key, value in values(adapter=adapter, optimiser=optimiser).items() if value is not None
        }
        return TrainConfig.from_dict(settings).optimiser.learning_rate

    tuned = dataclasses.replace(PRESETS["paper"], learning_rate=0.0123)
    monkeypatch.setitem(PRESETS, "paper", tuned)
    assert rate(None) == rate({}) == rate({"warmup_steps": 2}, dropout=0.0, target_modules=["q_proj"], r=10) == 0.0123
    assert rate({"learning_rate": 1.0}) == 1.0
    for optimiser, adapter in (({"name": "lion"}, {}), ({}, {"preset": "paper-s"})):
        with pytest.raises(ConfigError, match="optimiser: missing learning_rate"):
            rate(optimiser, **adapter)
    for optimiser in (None, {}):
        with pytest.raises(ConfigError, match="learning_rate: expected a number, as a preset's is for a fresh adapter"):
            rate(optimiser, start="folder")
    assert rate({}, preset="recommended", scale=30, scale_pattern={}) == PRESETS["recommended"].learning_rate
    told = "of the preset paper, 0.0123, is not taken with another adapter.r and adapter.gate"
    for optimiser in (None, {"warmup_steps": 2}):
        with pytest.raises(ConfigError, match=re.escape(told)):
            rate(optimiser, r=4, gate="uniform", dropout=0.0)
