"""Gradients in parity, above all of gates: rounding that cancellation makes visible passes, a wrong one does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from conversion import open_base, save_adapter
from conversion.causes import relative
from conversion.comparisons import GRADIENT_BOUND, Row, gate_scale, gradient_rows
from conversion.oracle_probe import OracleProbe
from conversion.parity import compare
from moka_core import LayerFactors, MokaConfig
from moka_core.probe import AdamW
from moka_jax.probe import JaxProbe
from moka_torch.probe import TorchProbe
from tests.tiny import random_adapter

GATE = ".gate_logits"
Gradients = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def both(sides) -> tuple[Gradients, Gradients]:
    """The gradients of both backends at the shared adapter."""
    return sides.jax.gradients(sides.batches[0])[1], sides.torch.gradients(sides.batches[0])[1]


def softmax(layer: LayerFactors) -> np.ndarray:
    weights = np.exp(layer.gate_logits - layer.gate_logits.max())
    return weights / weights.sum()


def products(layer: LayerFactors, path: str, gradients: Gradients, factor: str) -> np.ndarray:
    """d_i = ⟨∂L/∂F_i, F_i⟩ of every term, in float64."""
    found = [
        (array.astype(np.float64) * gradients[f"{path}.{name}"]).sum(axis=(1, 2))
        for name, array in layer.tensors()
        if name.startswith(factor)
    ]
    return np.concatenate(found)


def rows_of(sides, ours: Gradients, theirs: Gradients) -> list[Row]:
    return list(gradient_rows((0.0, ours), (0.0, theirs), sides.adapter.layers))


def test_the_equations_that_the_scale_rests_on_hold(sides, both):
    for path, layer in sides.adapter.layers.items():
        gradients = both[1]
        by_a, by_b = (products(layer, path, gradients, factor) for factor in ("factor_a", "factor_b"))
        np.testing.assert_allclose(by_a, by_b, atol=3e-6 * np.abs(by_b).max())  # measured: 5e-7
        expected = by_b - softmax(layer) * by_b.sum()
        np.testing.assert_allclose(gradients[path + GATE], expected, atol=3e-6 * np.abs(by_b).max())
        own = {name: gradients[f"{path}.{name}"] for name, _ in layer.tensors()}
        assert gate_scale(layer, own) >= np.linalg.norm(by_b)


def without_centring(layer: LayerFactors, path: str, gradients: Gradients) -> np.ndarray:
    return products(layer, path, gradients, "factor_b")


def of_a_uniform_gate(layer: LayerFactors, path: str, gradients: Gradients) -> np.ndarray:
    found = products(layer, path, gradients, "factor_b")
    return found - found.mean()


def in_another_order(layer: LayerFactors, path: str, gradients: Gradients) -> np.ndarray:
    return gradients[path + GATE][::-1]


def one_percent_off(layer: LayerFactors, path: str, gradients: Gradients) -> np.ndarray:
    return 1.01 * gradients[path + GATE]


@pytest.mark.parametrize("wrong", [without_centring, of_a_uniform_gate, in_another_order, one_percent_off])
def test_a_wrong_gradient_of_one_layers_gates_does_not_pass(sides, both, wrong: Callable[..., np.ndarray]):
    ours, theirs = both
    assert all(row.passed for row in rows_of(sides, ours, theirs))
    for path, layer in sides.adapter.layers.items():
        changed = ours | {path + GATE: wrong(layer, path, ours).astype(np.float32)}
        *_, row = rows_of(sides, changed, theirs)
        assert row.figure > 2 * GRADIENT_BOUND, path  # measured: at least 3.7 times, for one percent
        assert row.worst == path + GATE
        lost = ours | {path + GATE: ours[path + GATE] * np.nan}
        assert [row.passed for row in rows_of(sides, lost, theirs)] == [False, True, False]


def test_a_wrong_gradient_of_one_factor_and_one_that_is_off_everywhere_do_not_pass(sides, both):
    ours, theirs = both
    for name in theirs:
        if name.endswith(GATE):
            continue
        _, row, _ = rows_of(sides, ours | {name: np.float32(1.002) * ours[name]}, theirs)
        assert not row.passed
        assert row.worst == name
    scaled = {name: np.float32(1.0002) * value for name, value in ours.items()}
    assert [row.passed for row in rows_of(sides, scaled, theirs)] == [False, True, True]
    lacking = {name: value for name, value in ours.items() if name != next(iter(theirs))}
    (row,) = rows_of(sides, lacking, theirs)
    assert row.figure == np.inf
    assert row.worst == f"{next(iter(theirs))}: in one backend only"


def test_a_gradient_that_is_nothing_in_one_backend_and_almost_nothing_in_the_other_agrees(sides, both):
    """As of gates of `paper-s`, whose terms stay equal."""
    _, theirs = both
    for path, layer in sides.adapter.layers.items():
        scale = gate_scale(layer, {name: theirs[f"{path}.{name}"] for name, _ in layer.tensors()})
        zero = theirs | {path + GATE: np.zeros(layer.plan.terms, np.float32)}
        for share, passes in ((1e-6, True), (1e-3, False)):
            ours = zero | {path + GATE: np.full(layer.plan.terms, share * scale, np.float32)}
            *_, row = rows_of(sides, ours, zero)
            assert row.passed is passes, (path, row)
        assert row.figure == pytest.approx(1e-3 * np.sqrt(layer.plan.terms))


def test_equal_terms_whose_gates_gradient_is_nothing_but_rounding_agree(sides, tmp_path):
    """Terms that are one in four guises, c·A ⊗ B/c, have gates whose gradient is zero but for rounding."""
    base = open_base(sides.base)
    config = MokaConfig(r=4, num_shapes=1, target_modules=("q_proj", "v_proj"))
    adapter = random_adapter(base, config)

    def alike(layer: LayerFactors) -> LayerFactors:
        guises = {"factor_a.0": [1, 3, 0.7, -1.9], "factor_b.0": [1, 1 / 3, 1 / 0.7, -1 / 1.9], "gate_logits": [0] * 4}
        arrays = {
            name: np.float32(guises[name]).reshape(-1, *[1] * (array.ndim - 1)) * array[:1]
            for name, array in layer.tensors()
        }
        return LayerFactors.from_tensors(layer.plan, config, arrays)

    adapter = dataclasses.replace(adapter, layers={path: alike(layer) for path, layer in adapter.layers.items()})
    folder = save_adapter(adapter, tmp_path / "adapter")
    ours, theirs = JaxProbe(base, adapter), TorchProbe(sides.base, folder)
    report = compare(ours, theirs, OracleProbe(base, adapter), sides.batches, optimiser=AdamW(), train=0)
    assert report.passed
    one, other = (side.gradients(sides.batches[0])[1] for side in (ours, theirs))
    apart = [relative(one[name], other[name]) for name in one if name.endswith(GATE)]
    assert min(apart) > 100 * GRADIENT_BOUND, "a gate's gradient agrees by itself: nothing was tested"
