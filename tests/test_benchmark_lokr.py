"""The comparison with PEFT's LoKr: it runs, the pairs are fair, and what is kept is counted rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.lokr import LOKR, OURS, PAIRS, SHAPES, Pair
from tests.test_benchmarks import run_quick


def test_it_runs_to_its_end(tmp_path):
    result, text = run_quick("lokr", tmp_path)
    assert [case["pair"] for case in result["cases"]] == list(PAIRS)
    for case in result["cases"]:
        assert not case["failures"]
        assert all(times["median"] > 0 for times in case["variants"].values())
        one, other = case["parameters"].values()
        assert abs(one / other - 1) <= 0.02
        assert f"Parameters: MoKA {case['parameters'][OURS]}, LoKr {case['parameters'][LOKR]} (" in text
        kept = {name: found["without_x"] for name, found in case["kept_bytes"].items()}
        assert kept[LOKR] >= 4 * 96 * 128  # ΔW
        assert kept[OURS] <= 16 * 10  # the coefficients, for which the float64 softmax is kept as well
        assert kept["frozen base"] == 0
        assert case["kept_bytes"][OURS]["with_x"] == kept[OURS] + 4 * 16 * 128
    assert "Kept for the backward" in text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_has_equal_numbers(shape, pair):
    layers = Pair(*SHAPES[shape], pair, "float32", "cpu")
    assert abs(layers.parameters[LOKR] / layers.parameters[OURS] - 1) <= 0.02


def test_a_pair_of_one_term_is_the_same_function():
    layers = Pair(96, 128, "one", "float32", "cpu")
    lokr: Any = layers.variants[LOKR]()
    ours: Any = layers.variants[OURS]()
    with torch.no_grad():
        tensors = ours.tensors("default")
        tensors["factor_a.0"][0].copy_(lokr.lokr_w1["default"])
        tensors["factor_b.0"][0].copy_(lokr.lokr_w2["default"])
        x, _ = layers.batch(5)
        base = layers.base(x)
        moved = lokr(x) - base
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(ours(x) - base, moved, rtol=1e-4, atol=1e-6)  # measured: 1e-7 absolute
