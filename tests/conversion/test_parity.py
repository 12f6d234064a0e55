"""Parity of both backends, and the proof that the check can fail: every wrong convention is caught."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import conversion.parity
import moka_jax.linear
import moka_jax.mixture
import moka_jax.nf4
import moka_torch.probe
from conversion import load_adapter, open_base, save_adapter
from conversion.parity import ParityReport, check_parity, compare_with_oracle
from moka_core import Adapter, AdapterError, ConfigError, LayerFactors, ModelError, MokaConfig
from moka_jax.probe import JaxProbe
from moka_torch.probe import TorchProbe
from tests.conversion.conftest import PARITY_ADAPTER, ROPE
from tests.tiny import random_adapter, save_tiny_llama

ROOT = Path(__file__).parents[2]

# the proof is about the code as users compile it
pytestmark = pytest.mark.usefixtures("optimised")


class Changed:
    """A probe with some of its methods replaced."""

    def __init__(self, probe, **methods) -> None:
        self._probe = probe
        vars(self).update(methods)

    def __getattr__(self, name):
        return getattr(self._probe, name)


def figures(report: ParityReport) -> dict[str, float]:
    return {row.name.split(" (")[0]: row.figure for row in report.rows}


def failures(report: ParityReport) -> set[str]:
    return {row.name.split(" (")[0] for row in report.rows if not row.passed}


@pytest.mark.parametrize(("quantise", "steps"), [("nf4-double", 50), ("none", 5)])
def test_both_backends_agree_on_every_stage(sides, quantise, steps):
    report = check_parity(sides.folder, sides.base, quantise=quantise, train=steps, batch_size=2, length=32)
    assert report.passed, figures(report)
    seen = figures(report)
    if quantise != "none":
        assert {seen[name] for name in ("NF4 codes", "NF4 scales", "decoded weights")} == {0}
    # measured over 5 seeds: ΔW 1.3e-7, logits 8.4e-7, gradients 2.1e-6, 50 losses 1.5e-6
    assert len(report.losses["jax"]) == len(report.losses["torch"]) == steps
    moved = abs(report.losses["torch"][0] - report.losses["torch"][-1])
    # measured: 0.056 in 50 steps, 0.005 in 5
    assert moved > (0.03 if steps == 50 else 0.002), "the adapter must move for this to count"
    assert report.diagnosis is None
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["passed"] is True


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


STAGES = {"logits", "next tokens"}
CONVENTIONS = [
    (b_kron_a, "ΔW, JAX, against float64", "the order of the Kronecker product: B ⊗ A in place of A ⊗ B"),
    (column_major_reshape, "ΔW, JAX, against float64", "the order of the input: x is read column by column"),
    (missing_gate, "ΔW, JAX, against float64", "the gates: every term counts 1/6 = 0.1667, as without a gate"),
    (missing_scale, "ΔW, JAX, against float64", "the scale: ΔW is 2 times what it should be"),
    (low_nibble_first, "decoded weights", "nibble order: codes and scales are equal, but the low half"),
]


@pytest.mark.parametrize(("convention", "caught_by", "cause"), CONVENTIONS)
def test_a_wrong_convention_fails_the_check_of_one_backend(monkeypatch, sides, convention, caught_by, cause):
    convention(monkeypatch)
    report = compare_with_oracle(JaxProbe(open_base(sides.base), sides.adapter), sides.truth, sides.batches[0].tokens)
    assert not report.passed
    assert {caught_by, "outputs of 36 modules", *STAGES} <= failures(report), figures(report)
    assert report.diagnosis.module == "model.layers.0.self_attn.q_proj"
    assert report.diagnosis.cause.startswith(cause), report.diagnosis
    assert "in JAX; " in report.diagnosis.cause
    assert ": all " in report.diagnosis.cause


def test_a_wrong_convention_fails_the_check_of_both_backends(monkeypatch, sides):
    convention, caught_by, cause = CONVENTIONS[0]
    convention(monkeypatch)
    report = sides.both(jax=JaxProbe(open_base(sides.base), sides.adapter), train=10)
    assert {caught_by, "gradients", *STAGES} <= failures(report), figures(report)
    assert "ΔW, PyTorch, against float64" not in failures(report), "the reference itself must stay right"
    assert report.diagnosis.module == "model.layers.0.self_attn.q_proj"
    assert report.diagnosis.cause.startswith(f"{cause}, in JAX; adapted layers: all 9 of them differ")
    assert report.losses == {}
    assert "10 optimiser steps: not compared, as what comes before them differs" in report.notes


def test_losses_that_part_fail_the_check(sides):
    """The training stage alone can fail: another learning rate on one side."""
    before = jax.tree.map(lambda leaf: leaf, nnx.state(sides.jax.model))

    def faster(batches, optimiser):
        return sides.jax.train(batches, dataclasses.replace(optimiser, learning_rate=1.1 * optimiser.learning_rate))

    other = TorchProbe(sides.base, sides.folder)  # it is trained
    report = sides.both(jax=Changed(sides.jax, train=faster), torch=other, train=10)
    nnx.update(sides.jax.model, before)
    assert failures(report) == {"losses of 10 optimiser steps"}
    gaps = np.abs(np.subtract(report.losses["jax"], report.losses["torch"]))
    assert report.diagnosis.module == f"step {np.flatnonzero(gaps > 1e-4)[0]}"
    assert report.diagnosis.cause.startswith("the optimiser: ")


def test_a_figure_that_is_not_a_number_does_not_pass(sides):
    def logits(tokens):
        return np.full_like(sides.jax.logits(tokens), np.nan)

    report = sides.both(jax=Changed(sides.jax, logits=logits))
    assert "logits" in failures(report)
    assert report.diagnosis.cause.startswith("JAX's logits are not what its modules give one by one")
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["diagnosis"]["figure"] is None


@pytest.mark.parametrize("stage", ["delta", "gradients"])
def test_a_nan_in_the_first_of_several_arrays_does_not_pass(sides, stage):
    """The worst figure must not be overwritten by the finite ones that come after it."""
    first = next(iter(sides.adapter.layers))

    def delta(path):
        return sides.jax.delta(path) * (np.nan if path == first else 1)

    def gradients(batch):
        loss, grads = sides.jax.gradients(batch)
        name = next(iter(grads))
        return loss, {**grads, name: grads[name] * np.nan}

    report = sides.both(jax=Changed(sides.jax, **{stage: {"delta": delta, "gradients": gradients}[stage]}))
    expected = {"delta": {"ΔW, JAX, against float64"}, "gradients": {"gradients", "gradient of each factor"}}
    assert failures(report) == expected[stage]
    if stage == "delta":
        assert report.diagnosis.module == first
        assert report.diagnosis.cause.startswith("ΔW has NaN or infinite entries, in JAX; adapted layers: this one")
    else:
        assert report.diagnosis.cause == "the backward pass: every module's output agrees"


def test_a_tensor_that_one_side_lacks_is_named(sides):
    names = [name for name in sides.torch.frozen() if name != "lm_head.weight"]
    probe = Changed(sides.torch, frozen=lambda: names)
    report = compare_with_oracle(probe, sides.truth, sides.batches[0].tokens)
    assert failures(report) == {"frozen tensors"}
    assert report.diagnosis.module == "lm_head"
    assert report.diagnosis.figure == 1
    assert report.diagnosis.cause.startswith("lm_head.weight is there in float64 only")


def save_packed(base, folder, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), quantization_config=nf4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "backends"), [("float32", ["both"]), ("bfloat16", ["jax", "torch"])])
def test_a_base_that_bitsandbytes_packed_before_is_compared_in_float32(sides, tmp_path, dtype, backends):
    packed = save_packed(sides.base, tmp_path / "packed", dtype)
    save_adapter(random_adapter(open_base(packed), PARITY_ADAPTER), tmp_path / "adapter")
    for backend in backends:
        report = check_parity(tmp_path / "adapter", packed, backend=backend, train=0, length=32)
        assert report.passed, figures(report)
        assert figures(report)["decoded weights"] == 0


def in_bfloat16(adapter: Adapter) -> Adapter:
    layers = {
        path: LayerFactors.from_tensors(
            layer.plan,
            adapter.config,
            {name: array.astype(ml_dtypes.bfloat16) for name, array in layer.tensors()},
        )
        for path, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "settings", "quantise"),
    [
        (
            {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
            {"r": 4, "identity": "a", "block_entries": 512, "target_modules": ("q_proj", "up_proj")},
            "none",
        ),
        (
            {"rope_parameters": LINEAR, "head_dim": 16, "num_key_value_heads": 1},
            {"r": 4, "num_shapes": 2, "gate": "uniform", "scaling": "stable", "target_modules": ("k_proj", "o_proj")},
            "nf4",
        ),
    ],
    ids=["llama3 rope, biases, untied, MoKA_s, bfloat16 adapter, dense", "linear rope, ungated, one kv head, nf4"],
)
def test_one_backend_agrees_with_float64_on_other_models_and_adapters(tmp_path, fields, settings, quantise):
    folder = save_tiny_llama(tmp_path / "base", **fields)
    if fields.get("attention_bias"):
        give_biases(folder)
    adapter = random_adapter(open_base(folder), MokaConfig(**settings))
    save_adapter(in_bfloat16(adapter) if quantise == "none" else adapter, tmp_path / "adapter")
    for backend in ("jax", "torch"):
        report = check_parity(tmp_path / "adapter", folder, backend=backend, quantise=quantise, batch_size=2, length=48)
        assert report.passed, (figures(report), report.diagnosis)
        assert report.diagnosis is None
        assert report.sides == ({"jax": "JAX", "torch": "PyTorch"}[backend], "float64")
        assert report.notes == (
            "gradients and optimiser steps: not compared with one backend, as the float64 side has none",
        )
        assert not any("gradients" in row.name for row in report.rows)


def give_biases(folder) -> None:
    """Replace the zeros that transformers starts biases with."""
    file = folder / "model.safetensors"
    rng = np.random.default_rng(0)
    tensors = load_file(file)
    for name, array in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = rng.normal(size=array.shape).astype(array.dtype)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("backend", "absent"), [("torch", "jax"), pytest.param("jax", "torch", marks=pytest.mark.slow)]
)
def test_one_backend_needs_only_its_own_packages(sides, backend, absent):
    script = (
        f"import sys; sys.modules[{absent!r}] = None; from conversion.parity import check_parity; "
        f"report = check_parity({str(sides.folder)!r}, {str(sides.base)!r}, backend={backend!r}, quick=True); "
        f"assert report.passed, report.rows"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def test_a_backend_that_is_not_installed_is_named_with_the_way_out(monkeypatch, sides):
    monkeypatch.setitem(sys.modules, "moka_torch.probe", None)
    with pytest.raises(
        ConfigError, match=r"PyTorch's side needs the package .*; install moka\[torch\], or compare the "
    ):
        check_parity(sides.folder, sides.base, backend="torch", quick=True)


def test_the_base_is_held_as_the_adapter_was_trained_unless_asked_otherwise(monkeypatch, sides):
    trained = dataclasses.replace(load_adapter(sides.folder), base_quantisation="none")
    monkeypatch.setattr(conversion.parity, "load_adapter", lambda folder: trained)
    report = check_parity(sides.folder, sides.base, backend="torch", quick=True)
    assert report.passed
    assert "NF4 codes" not in figures(report)
    report = check_parity(sides.folder, sides.base, backend="torch", quick=True, quantise="nf4")
    assert report.passed
    assert "NF4 codes" in figures(report)
    assert "the adapter was trained on a base held as none; here it is nf4" in report.notes


@pytest.mark.parametrize("options", [{"train": -1}, {"batch_size": 0}, {"length": 1}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(sides, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected at least"):
        check_parity(sides.folder, sides.base, **options)


def test_settings_that_cannot_be_compared_are_refused(sides, tmp_path):
    with pytest.raises(ConfigError, match="backend: expected both, jax or torch; got 'tpu'"):
        check_parity(sides.folder, sides.base, backend="tpu")
    with pytest.raises(ConfigError, match="train: expected 0 with one backend"):
        check_parity(sides.folder, sides.base, backend="jax", train=5)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    other = save_tiny_llama(tmp_path / "yarn", rope_parameters=yarn)
    with pytest.raises(ModelError, match=r"does not know this model's rope type; compare both .* \(--backend both\)"):
        check_parity(sides.folder, other, backend="torch", allow_other_base=True)


def test_an_adapter_for_another_base_is_refused_unless_that_is_allowed(sides, tmp_path):
    other = save_tiny_llama(
        tmp_path / "other", seed=1, num_hidden_layers=3, tie_word_embeddings=False, rope_parameters=ROPE
    )
    stages: list[str] = []
    with pytest.raises(AdapterError, match="trained on another base model"):
        check_parity(sides.folder, other, train=0, on_stage=stages.append)
    assert stages == ["telling the base"], "no backend is loaded for a base that is refused"
    assert check_parity(sides.folder, other, backend="jax", batch_size=2, length=32, allow_other_base=True).passed


def test_peft_hears_of_another_base_only_where_it_is_allowed(monkeypatch, sides):
    given = []

    class Told(Exception):
        pass

    def from_pretrained(model, path, **options):
        given.append(options)
        raise Told

    monkeypatch.setattr(moka_torch.probe.PeftModel, "from_pretrained", from_pretrained)
    for allowed in (False, True):
        with pytest.raises(Told):
            TorchProbe(sides.base, sides.folder, allow_other_base=allowed)
    assert given == [{"is_trainable": True}, {"is_trainable": True, "allow_other_base": True}]


def test_an_adapter_on_a_tied_head_agrees_with_its_definition(tmp_path):
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    config = MokaConfig(r=3, num_shapes=2, target_modules=("q_proj", "lm_head"))
    save_adapter(random_adapter(open_base(base), config), tmp_path / "adapter")
    report = check_parity(tmp_path / "adapter", base, backend="torch", quick=True)
    assert report.passed, report.rows
