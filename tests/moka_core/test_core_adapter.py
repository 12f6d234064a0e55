"""The adapter value's validator: every problem, all at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moka_core import Adapter, AdapterError, LayerFactors, MokaConfig, plan_layer
from moka_core.adapter import expected_tensors
from tests.cases import CASES, random_factors, random_layer

CONFIG = MokaConfig(r=3, num_shapes=2)
PLAN = plan_layer(CONFIG, 12, 8)


def layer(**changes: Any) -> LayerFactors:
    return dataclasses.replace(random_factors(PLAN, CONFIG, np.random.default_rng(0)), **changes)


def adapter(layers: dict[Any, LayerFactors] | None = None, **changes: Any) -> Adapter:
    return Adapter(config=CONFIG, layers={"model.a": layer()} if layers is None else layers, **changes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sound_adapter_of_every_case_passes_in_both_dtypes(case: Any) -> None:
    value = random_layer(case)
    Adapter(config=case.config, layers={"layer": value}).validate()
    halved = {name: array.astype(ml_dtypes.bfloat16) for name, array in value.tensors()}
    Adapter(config=case.config, layers={"layer": LayerFactors.from_tensors(case.plan, case.config, halved)}).validate()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trainable_counts_what_is_stored_and_what_the_plan_promises(case: Any) -> None:
    value = Adapter(config=case.config, layers={"layer": random_layer(case)})
    assert value.trainable == case.plan.trainable(case.config)
    shapes = {name: array.shape for name, array in random_layer(case).tensors()}
    assert shapes == expected_tensors(case.plan, case.config)


def test_one_error_lists_every_problem_of_every_layer() -> None:
    good = layer()
    nan = good.factor_a[0].copy()
    nan[1, 0, 0] = np.nan
    infinite = good.gate_logits.copy()  # type: ignore[union-attr]
    infinite[2] = -np.inf
    layers = {
        "m.missing": layer(factor_a=good.factor_a[:1], gate_logits=None),
        "m.extra": layer(factor_b=(*good.factor_b, good.factor_b[0])),
        "m.nan": layer(factor_a=(nan, good.factor_a[1]), gate_logits=infinite),
        "m.turned": layer(factor_b=(good.factor_b[0].transpose(0, 2, 1), good.factor_b[1])),
        "m.dtype": layer(factor_a=(good.factor_a[0].astype(np.float64), good.factor_a[1].astype(np.int8))),
        "m.swapped": layer(plan=plan_layer(dataclasses.replace(CONFIG, r=2), 12, 8)),
    }
    with pytest.raises(AdapterError) as caught:
        adapter(layers).validate()
    text = str(caught.value)
    assert text.startswith("adapter is not valid (")
    _, a_out, a_in = good.factor_a[1].shape
    for expected in (
        f"m.missing: missing factor_a.1 (1, {a_out}, {a_in})",
        "m.missing: missing gate_logits (3,)",
        "m.extra: unexpected factor_b.2",
        "m.nan: factor_a.0 has NaN or infinite entries",
        "m.nan: gate_logits has NaN or infinite entries",
        f"m.turned: factor_b.0 expected shape {good.factor_b[0].shape}, got ",
        "m.dtype: factor_a.0 expected dtype float32, bfloat16 or float16, got float64",
        "m.dtype: factor_a.1 expected dtype float32, bfloat16 or float16, got int8",
        "m.swapped: its shapes are not those that the config gives to a 12x8 layer",
    ):
        assert expected in text
    assert f"({len(text.splitlines()) - 1} problems)" in text


def test_a_gate_where_the_config_has_none_is_refused() -> None:
    uniform = dataclasses.replace(CONFIG, gate="uniform")
    with pytest.raises(AdapterError, match=r"\(1 problem\):\n  model.a: unexpected gate_logits"):
        Adapter(config=uniform, layers={"model.a": layer()}).validate()


def test_an_infinite_bfloat16_entry_is_found() -> None:
    factor = layer().factor_a[0].astype(ml_dtypes.bfloat16)
    factor[0, 0, 0] = np.inf
    with pytest.raises(AdapterError, match=r"factor_a\.0 has NaN or infinite entries"):
        adapter({"model.a": layer(factor_a=(factor, layer().factor_a[1]))}).validate()


def test_a_big_endian_array_is_refused_rather_than_misread() -> None:
    swapped = layer().gate_logits.astype(">f4")  # type: ignore[union-attr]
    with pytest.raises(AdapterError, match="gate_logits expected dtype float32, bfloat16 or float16, got >f4"):
        adapter({"model.a": layer(gate_logits=swapped)}).validate()


def test_an_adapter_without_layers_is_refused() -> None:
    with pytest.raises(AdapterError, match="expected at least one layer, got none"):
        adapter({}).validate()


@pytest.mark.parametrize("path", ["", "a..b", ".a", "a b", "a\nb", 3])
def test_a_layers_name_that_no_file_could_give_back_is_refused(path: Any) -> None:
    with pytest.raises(AdapterError, match="expected a layer's dotted path"):
        adapter({path: layer()}).validate()


@pytest.mark.parametrize("field", ["base_fingerprint", "base_model"])
def test_a_base_that_json_cannot_hold_is_refused_before_anything_is_written(field: str) -> None:
    with pytest.raises(AdapterError, match=f"{field}: expected a string or None, got "):
        adapter(**{field: Path("folder")}).validate()
