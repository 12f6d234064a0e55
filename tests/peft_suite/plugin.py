"""A pytest plugin that puts our cases in the place of PEFT's own into PEFT's test modules, before they are collected.

PEFT's lists of cases are taken over whole. Where a test has its list beside it, the rows of a method that can do what
the test is about are rewritten to MoKA; tests of one other method alone are left out.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable
from typing import Any

import pytest
from peft import LoraConfig

from tests.peft_suite import cases

LISTS = {
    "test_custom_models": {
        "TEST_CASES": cases.CUSTOM,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.SEVERAL_ACTIVE,
        "MIXED_ADAPTER_TEST_CASES": cases.MIXED_BATCHES,
        "ALL_PEFT_CONFIG_CLASSES": [cases.MokaConfig],
    },
    "test_decoder_models": {"ALL_CONFIGS": cases.DECODERS},
    "test_quantization": {"TEST_CASES": cases.QUANTISED},
}


def pytest_configure(config: pytest.Config) -> None:
    for name, attribute in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if importlib.util.find_spec(name) is None:  # PEFT's test helpers import them; none of these tests uses them
            stand_in = types.ModuleType(name)
            setattr(stand_in, attribute, type(attribute, (), {}))
            stand_in.__spec__ = importlib.util.spec_from_loader(name, None)
            sys.modules[name] = stand_in


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):
        module: Any = collector.obj
        for name, ours in LISTS.get(module.__name__.rpartition(".")[2], {}).items():
            getattr(module, name)[:] = ours
        common = sys.modules.get("peft_tests.testing_common") or sys.modules.get("tests.testing_common")
        if common is not None:
            # the classes that PEFT's own skips let pass: methods with mixed batches and with Conv1D
            common.RoadConfig = common.LoHaConfig = cases.MokaConfig


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        (kept if _is_ours(item) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def _is_ours(item: pytest.Item) -> bool:
    """Whether a test is run with a MokaConfig."""
    callspec = getattr(item, "callspec", None)
    values: Iterable[Any] = () if callspec is None else callspec.params.values()
    return any(value is cases.MokaConfig or isinstance(value, cases.MokaConfig) for value in values)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rewrite the rows of lists that stand beside a test: (name, LoraConfig, LoraConfig) to the same with MoKA."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        rows = mark.args[1] if len(mark.args) > 1 else []
        if not isinstance(rows, list):
            continue
        for index, row in enumerate(rows):
            if isinstance(row, tuple) and any(type(value) is LoraConfig for value in row):
                rows[index] = tuple(_moka(value) for value in row)


def _moka(value: Any) -> Any:
    ours = type(value) is LoraConfig and set(value.target_modules or ["none"]) <= {"lin0", "lin1", "conv1d"}
    return cases.like(value) if ours else value
