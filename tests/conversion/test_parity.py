"""Parity of both backends, and the proof that the check can fail: every wrong convention is caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moka_jax.linear
import moka_jax.mixture
import moka_jax.nf4
from conversion import open_base, save_adapter
from conversion.parity import ParityReport, check_parity, compare, token_batches
from moka_core import Adapter, AdapterError, ConfigError, MokaConfig
from moka_core.probe import AdamW
from moka_jax.probe import JaxProbe
from moka_torch.probe import TorchProbe
from tests.tiny import random_adapter, save_tiny_llama

CONFIG = MokaConfig(r=5, num_shapes=3, scale=0.5, target_modules=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("parity") / "base")


@pytest.fixture(scope="module")
def adapter(base) -> Adapter:
    return random_adapter(open_base(base), CONFIG)


@pytest.fixture(scope="module")
def folder(adapter, tmp_path_factory):
    return save_adapter(adapter, tmp_path_factory.mktemp("parity") / "adapter")


@pytest.fixture(scope="module")
def reference(base, folder) -> TorchProbe:
    """PyTorch's side, never trained, so that every test compares with the same numbers."""
    return TorchProbe(base, folder)


def figures(report: ParityReport) -> dict[str, float]:
    return {row.name.split(" (")[0]: row.figure for row in report.rows}


def failures(report: ParityReport) -> set[str]:
    return {row.name.split(" (")[0] for row in report.rows if not row.passed}


@pytest.mark.parametrize("quantise", ["nf4-double", "nf4", "none"])
def test_both_backends_agree_on_every_stage(base, folder, quantise):
    report = check_parity(folder, base, quantise=quantise, steps=50, batch_size=2, length=32)
    assert report.passed, figures(report)
    seen = figures(report)
    if quantise != "none":
        assert {seen[name] for name in ("NF4 codes", "NF4 scales", "decoded weights")} == {0}
    # measured over 5 seeds: ΔW 1.3e-7, logits 8.4e-7, gradients 6.5e-6, 50 losses 1.5e-6
    assert len(report.losses["jax"]) == len(report.losses["torch"]) == 50
    assert abs(report.losses["torch"][0] - report.losses["torch"][-1]) > 0.1, "the adapter must move for this to count"


def use_blocks(monkeypatch, rearrange: Callable[[jax.Array], jax.Array]) -> None:
    """Make the JAX layers compute with the blocks [p, i, q, j] of every term put in another order."""

    def form(plan, mixture) -> jax.Array:
        total = jnp.zeros((plan.out_features, plan.in_features))
        for weight, factor_a, factor_b in zip(*mixture, strict=True):
            total += rearrange(jnp.einsum("c,cpq,cij->piqj", weight, factor_a, factor_b)).reshape(total.shape)
        return total

    def product(statics, x, keep, base, mixture):
        frozen = 0 if base is None else moka_jax.nf4.frozen_weight(base, (statics.plan.out_features, x.shape[-1]))
        return x @ (frozen + form(statics.plan, mixture)).T

    def delta(plan, config, factor_a, factor_b, gate_logits):
        return form(plan, (moka_jax.mixture.coefficients(plan, config, gate_logits), factor_a, factor_b))

    monkeypatch.setattr(moka_jax.linear, "mixture_product", product)
    monkeypatch.setattr(moka_jax.linear, "delta_weight", delta)


def use_config(monkeypatch, **changes) -> None:
    """Make the JAX layers take their coefficients from another config."""
    right = moka_jax.mixture.coefficients

    def wrong(plan, config, logits):
        config = dataclasses.replace(config, **changes)
        return right(plan, config, logits if config.gate == "softmax" else None)

    for module in (moka_jax.mixture, moka_jax.linear):
        monkeypatch.setattr(module, "coefficients", wrong)


def b_kron_a(monkeypatch):
    use_blocks(monkeypatch, lambda blocks: blocks.transpose(1, 0, 3, 2))


def column_major_reshape(monkeypatch):
    use_blocks(monkeypatch, lambda blocks: blocks.transpose(0, 1, 3, 2))


def missing_gate(monkeypatch):
    use_config(monkeypatch, gate="uniform")


def missing_scale(monkeypatch):
    use_config(monkeypatch, scale=1.0)


def low_nibble_first(monkeypatch):
    right = moka_jax.nf4.decoded_weight

    def wrong(arrays, shape):
        return right(arrays | {"codes": (arrays["codes"] << 4) | (arrays["codes"] >> 4)}, shape)

    monkeypatch.setattr(moka_jax.nf4, "decoded_weight", wrong)


MIXTURE_STAGES = {"ΔW, JAX, against float64", "logits", "gradients"}


@pytest.mark.parametrize(
    ("convention", "caught_by"),
    [
        (b_kron_a, MIXTURE_STAGES),
        (column_major_reshape, MIXTURE_STAGES),
        (missing_gate, MIXTURE_STAGES),
        (missing_scale, MIXTURE_STAGES),
        (low_nibble_first, {"decoded weights", "logits", "gradients"}),
    ],
)
def test_a_wrong_convention_fails_the_check(monkeypatch, base, adapter, reference, convention, caught_by):
    convention(monkeypatch)
    batches = token_batches(base, 256, count=1, batch_size=2, length=32, seed=0)
    report = compare(JaxProbe(open_base(base), adapter), reference, adapter, batches, optimiser=AdamW(), steps=0)
    assert not report.passed
    assert caught_by <= failures(report), figures(report)
    assert "ΔW, PyTorch, against float64" not in failures(report), "the reference itself must stay right"


def test_the_same_comparison_passes_without_the_fault(base, adapter, reference):
    batches = token_batches(base, 256, count=1, batch_size=2, length=32, seed=0)
    report = compare(JaxProbe(open_base(base), adapter), reference, adapter, batches, optimiser=AdamW(), steps=0)
    assert report.passed, figures(report)


def test_losses_that_part_fail_the_check(base, adapter, folder):
    """The training stage alone can fail: another learning rate on one side."""

    class Faster(JaxProbe):
        def train(self, batches, optimiser):
            return super().train(batches, dataclasses.replace(optimiser, learning_rate=1.1 * optimiser.learning_rate))

    batches = token_batches(base, 256, count=10, batch_size=2, length=32, seed=0)
    report = compare(
        Faster(open_base(base), adapter), TorchProbe(base, folder), adapter, batches, optimiser=AdamW(), steps=10
    )
    assert failures(report) == {"losses of 10 optimiser steps"}


def test_a_figure_that_is_not_a_number_does_not_pass(base, adapter, reference):
    class Broken(JaxProbe):
        def logits(self, tokens):
            return np.full_like(super().logits(tokens), np.nan)

    batches = token_batches(base, 256, count=1, batch_size=2, length=32, seed=0)
    report = compare(Broken(open_base(base), adapter), reference, adapter, batches, optimiser=AdamW(), steps=0)
    assert "logits" in failures(report)


@pytest.mark.parametrize("stage", ["deltas", "gradients"])
def test_a_nan_in_the_first_of_several_arrays_does_not_pass(base, adapter, reference, stage):
    """The worst figure must not be overwritten by the finite ones that come after it."""

    class Broken(JaxProbe):
        def deltas(self):
            for index, (path, delta) in enumerate(super().deltas()):
                yield path, delta * np.nan if stage == "deltas" and index == 0 else delta

        def gradients(self, batch):
            loss, grads = super().gradients(batch)
            first = next(iter(grads))
            return loss, {**grads, first: grads[first] * np.nan} if stage == "gradients" else grads

    batches = token_batches(base, 256, count=1, batch_size=2, length=32, seed=0)
    report = compare(Broken(open_base(base), adapter), reference, adapter, batches, optimiser=AdamW(), steps=0)
    assert failures(report) == {"ΔW, JAX, against float64" if stage == "deltas" else "gradients"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_bitsandbytes_packed_before_is_compared_in_float32(base, tmp_path, dtype):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), quantization_config=nf4)
    model.save_pretrained(tmp_path / "packed")
    packed = open_base(tmp_path / "packed")
    save_adapter(random_adapter(packed, CONFIG), tmp_path / "adapter")
    report = check_parity(tmp_path / "adapter", tmp_path / "packed", steps=2, length=32)
    assert report.passed, figures(report)
    assert figures(report)["decoded weights"] == 0


@pytest.mark.parametrize("options", [{"steps": -1}, {"batch_size": 0}, {"length": 1}])
def test_numbers_out_of_range_are_refused(base, folder, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected at least"):
        check_parity(folder, base, **options)


def test_an_adapter_for_another_base_is_refused_before_anything_is_compared(folder, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="trained on another base model"):
        check_parity(folder, other, steps=0)
