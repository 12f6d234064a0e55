"""Each hypothesis about the cause of a difference: it is named where it holds, and only there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from conversion import causes
from moka_core import Architecture, LayerFactors, MokaConfig, dequantise_nf4, quantise_nf4
from moka_core.nf4 import NestedScales
from moka_core.oracle import dense_delta
from moka_core.oracle_llama import OracleRope, attend, rms_norm, silu
from moka_core.probe import FrozenTensor
from tests.cases import CASES, LayerCase, random_layer

RNG = np.random.default_rng(0)
CASE = LayerCase(name="many", out_features=32, in_features=48, settings={"r": 6, "num_shapes": 3, "scale": 0.5})


def changed(layer: LayerFactors, **tensors: np.ndarray) -> LayerFactors:
    """The layer with some of its tensors replaced, under their names with "_" for "."."""
    own = {name: tensors.get(name.replace(".", "_"), array) for name, array in layer.tensors()}
    return LayerFactors.from_tensors(layer.plan, CASE.config, own)


def cause(found: np.ndarray, layer: LayerFactors, config: MokaConfig = CASE.config) -> str:
    return causes.delta_cause(found.astype(np.float32), layer, config)


def test_a_multiple_of_delta_is_the_scale():
    layer = random_layer(CASE)
    right = dense_delta(layer, CASE.config)
    assert cause(2 * right, layer) == "the scale: ΔW is 2 times what it should be"
    assert cause(-0.25 * right, layer) == "the scale: ΔW is -0.25 times what it should be"


def test_no_delta_is_an_adapter_that_is_not_there():
    layer = random_layer(CASE)
    assert cause(np.zeros((32, 48)), layer) == "ΔW is 0: no adapter is there"
    assert cause(np.full((32, 48), np.nan), layer) == "ΔW has NaN or infinite entries"
    assert "shape (48, 32) in place of (32, 48)" in cause(np.ones((48, 32)), layer)


@pytest.mark.parametrize("order", [(1, 0, 3, 2), (0, 1, 3, 2), (1, 0, 2, 3)])
def test_another_order_of_the_product_is_named(order):
    layer = random_layer(CASE)
    weights = causes.term_coefficients(layer, CASE.config)
    found = sum(
        weight * np.einsum("pq,ij->piqj", term.a, term.b).transpose(order).reshape(32, 48)
        for weight, term in zip(weights, causes._terms(layer, CASE.config), strict=True)
    )
    assert cause(found, layer) == causes._ORDERS[order]


def test_one_gate_is_named_with_both_shares():
    layer = random_layer(CASE)
    logits = layer.gate_logits.copy()
    logits[4] += 0.5
    softmax = [np.exp(values) / np.exp(values).sum() for values in (logits, layer.gate_logits)]
    found = cause(dense_delta(changed(layer, gate_logits=logits), CASE.config), layer)
    assert found.startswith(
        f"the gate of term 4: it counts {softmax[0][4]:.4g} in place of {softmax[1][4]:.4g}, and every other"
    )


@pytest.mark.parametrize("times", [-1.0, 2.0, 0.999])
def test_a_factor_that_is_negated_or_scaled_is_not_taken_for_a_gate(times):
    """Gates are positive and sum to 1; these coefficients are not, or do not."""
    layer = random_layer(CASE)
    one, group = layer.factor_b[1].copy(), layer.factor_a[2] * np.float32(times)
    one[0] *= times
    assert cause(dense_delta(changed(layer, factor_b_1=one), CASE.config), layer) == (
        f"a factor, or the scale, of term 2: {times:g} times what it should be; every other term is right"
    )
    assert cause(dense_delta(changed(layer, factor_a_2=group), CASE.config), layer) == (
        f"a factor, or the scale, of terms 4, 5: {times:g} times what it should be; every other term is right"
    )
    both = changed(layer, factor_b_1=one, factor_a_2=-2 * group)
    assert cause(dense_delta(both, CASE.config), layer).startswith(
        "the scale, factors, or gates that are no softmax: the terms count "
        f"1, 1, {times:g}, 1, {-2 * times:g}, {-2 * times:g} times what they"
    )


@pytest.mark.parametrize(
    ("gates", "told"),
    [
        (np.ones_like, "the gates: they are all 1"),
        (lambda logits: logits, "the gates: they are the logits themselves, without a softmax"),
        (lambda logits: 1 / (1 + np.exp(-logits)), "the gates: they are the logistic function of each logit"),
    ],
    ids=["ones", "logits", "logistic"],
)
def test_gates_without_their_softmax_are_named(gates, told):
    layer = random_layer(CASE)
    shares = gates(layer.gate_logits.astype(np.float64))
    right = np.exp(layer.gate_logits) / np.exp(layer.gate_logits).sum()
    factors = [
        group * (shares / right)[2 * index : 2 * index + 2, None, None] for index, group in enumerate(layer.factor_a)
    ]
    weighted = changed(layer, **{f"factor_a_{index}": group for index, group in enumerate(factors)})
    assert cause(dense_delta(weighted, CASE.config), layer).startswith(told)


def test_a_term_that_is_left_out_and_a_transpose_are_named():
    layer = random_layer(CASE)
    one = layer.factor_b[1].copy()
    one[0] = 0
    found = cause(dense_delta(changed(layer, factor_b_1=one), CASE.config), layer)
    assert found == "term 2: left out; every other term is right"
    square = dataclasses.replace(CASE, in_features=32)
    layer = random_layer(square)
    assert cause(dense_delta(layer, CASE.config).T, layer) == "a transpose: ΔWᵀ in place of ΔW"


def test_a_scaling_that_is_left_out_is_named():
    config = dataclasses.replace(CASE.config, scaling="stable")
    layer = random_layer(CASE)
    assert cause(dense_delta(layer, CASE.config), layer, config) == "the scale: scaling='stable' is left out"


def test_several_gates_and_no_gates_are_told_apart():
    layer = random_layer(CASE)
    mixed = changed(layer, gate_logits=layer.gate_logits[::-1].copy())
    assert cause(dense_delta(mixed, CASE.config), layer).startswith("the gates: the terms count ")
    uniform = dataclasses.replace(CASE.config, gate="uniform")
    found = cause(dense_delta(dataclasses.replace(layer, gate_logits=None), uniform), layer)
    assert found == "the gates: every term counts 1/6 = 0.1667, as without a gate"


@pytest.mark.parametrize(
    ("factor", "group", "copy", "at"), [("a", 1, 1, (0, 1)), ("b", 0, 1, (2, 1)), ("a", 2, 0, (0, 0))]
)
def test_one_entry_of_one_factor_is_named_with_both_values(factor, group, copy, at):
    layer = random_layer(CASE)
    name = f"factor_{factor}.{group}"
    array = dict(layer.tensors())[name].copy()
    before = array[(copy, *at)]
    array[(copy, *at)] += 0.25
    found = cause(dense_delta(changed(layer, **{name.replace(".", "_"): array}), CASE.config), layer)
    assert found == (
        f"a factor: entry {at} of {name}[{copy}] (term {2 * group + copy}) is {before + np.float32(0.25):.6g} in place "
        f"of {before:.6g}"
    )


def test_a_whole_factor_and_more_than_one_factor_are_told_apart():
    layer, other = random_layer(CASE), random_layer(CASE, seed=1)
    one = layer.factor_b[1].copy()
    one[0] = other.factor_b[1][0]
    assert f"{one[0].size} of {one[0].size} entries of factor_b.1[0] (term 2) differ" in cause(
        dense_delta(changed(layer, factor_b_1=one), CASE.config), layer
    )
    assert "more than one of them differs" in cause(dense_delta(other, CASE.config), layer)


def test_terms_that_depend_on_each_other_do_not_get_a_wrong_name():
    layer = random_layer(CASE)
    twice = {"factor_a_0": np.repeat(layer.factor_a[0][:1], 2, axis=0)}
    twice["factor_b_0"] = np.repeat(layer.factor_b[0][:1], 2, axis=0)
    logits = layer.gate_logits.copy()
    logits[0] += 1
    found = dense_delta(changed(layer, **twice, gate_logits=logits), CASE.config)
    assert "which cannot be told" in cause(found, changed(layer, **twice))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_scale_is_recognised_in_every_kind_of_layer(case):
    layer = random_layer(case)
    found = causes.delta_cause(3 * dense_delta(layer, case.config), layer, case.config)
    assert found == "the scale: ΔW is 3 times what it should be"


def packed(double: bool = True) -> FrozenTensor:
    weight = quantise_nf4(np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32), double=double)
    return FrozenTensor(value=dequantise_nf4(weight), packed=weight)


def with_codes(tensor: FrozenTensor, codes: np.ndarray) -> FrozenTensor:
    weight = dataclasses.replace(tensor.packed, codes=codes)
    return FrozenTensor(value=dequantise_nf4(weight), packed=weight)


def test_swapped_nibbles_are_told_from_other_codes():
    right = packed()
    codes = right.packed.codes
    swapped = ((codes << 4) | (codes >> 4)).astype(np.uint8)
    assert causes.frozen_cause(with_codes(right, swapped), right).startswith("nibble order: the NF4 codes")
    other = codes.copy()
    other[:3] ^= 1
    assert causes.frozen_cause(with_codes(right, other), right) == "the weight: 3 of 4096 bytes of NF4 codes differ"
    decoder = FrozenTensor(value=with_codes(right, swapped).value, packed=right.packed)
    assert causes.frozen_cause(decoder, right).startswith("nibble order: codes and scales are equal")
    assert causes.frozen_cause(packed(), right) is None


@pytest.mark.parametrize("double", [True, False])
def test_scales_are_told_from_codes_and_from_the_decoder(double):
    right = packed(double)
    scales = right.packed.scales
    if isinstance(scales, NestedScales):
        moved = dataclasses.replace(scales, codes=scales.codes ^ 1)
    else:
        moved = scales * np.float32(1.01)
    weight = dataclasses.replace(right.packed, scales=moved)
    found = causes.frozen_cause(FrozenTensor(value=dequantise_nf4(weight), packed=weight), right)
    assert found == "the NF4 scales (absmax): 128 entries differ, the codes are equal"
    decoder = FrozenTensor(value=right.value * np.float32(1.5), packed=right.packed)
    assert causes.frozen_cause(decoder, right).startswith("the NF4 decoder: codes and scales are equal")
    dense = FrozenTensor(value=right.value)
    assert causes.frozen_cause(dense, right) == "the weight is dense in place of packed"


def test_dense_weights_are_counted():
    right = np.ones((4, 8), np.float32)
    wrong = right.copy()
    wrong[1, 2] = 3
    assert causes.frozen_cause(FrozenTensor(value=wrong), FrozenTensor(value=right)).startswith(
        "the weight: 1 of 32 entries differ"
    )


def test_another_eps_is_measured_and_told_from_another_computation():
    x, weight = RNG.normal(size=(2, 5, 64)) * 0.1, RNG.normal(size=64)
    found = causes.norm_cause(rms_norm(x, weight, 1e-3), x, weight, 1e-5)
    assert found == "rms_norm_eps: it is as if it were 0.001 in place of 1e-05"
    assert "something else" in causes.norm_cause(rms_norm(x - x.mean(-1, keepdims=True), weight, 1e-5), x, weight, 1e-5)
    doubled = 2 * rms_norm(x, weight, 1e-5)
    assert "no rms_norm_eps explains it" in causes.norm_cause(doubled, x, weight, 1e-5)


SIZES = Architecture(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=8,
    tie_word_embeddings=True,
)
ROPE = OracleRope(
    theta=500000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frequencies": np.zeros(8)}, "no rotary embedding"),
        ({"neighbours": True}, "rotary embedding: neighbouring channels"),
        ({"causal": False}, "the mask"),
        ({"scale": 1.0}, "the scale of the softmax"),
        ({"tiled": True}, "grouped queries"),
        ({"frequencies": OracleRope(theta=500000.0).frequencies(16)}, "rope scaling: 'llama3' is left out"),
        (
            {"frequencies": dataclasses.replace(ROPE, theta=10000.0).frequencies(16)},
            "rotary settings: rope_theta is 10000 in place of 500000",
        ),
        (
            {"frequencies": dataclasses.replace(ROPE, theta=777.0).frequencies(16)},
            "rotary settings (rope_theta, rope_scaling) or the softmax's scale: position 0 is equal",
        ),
    ],
)
def test_what_attention_does_wrong_is_named(change, message):
    q, k, v = (RNG.normal(size=(2, 24, width)) for width in (64, 32, 32))
    settings = {"frequencies": ROPE.frequencies(16), **change}
    found = attend(q, k, v, sizes=SIZES, **settings)
    assert causes.attention_cause(found, q, k, v, sizes=SIZES, rope=ROPE).startswith(message)


def test_position_0_tells_rotary_settings_from_the_heads():
    q, k, v = (RNG.normal(size=(1, 6, width)) for width in (64, 32, 32))
    right = attend(q, k, v, sizes=SIZES, frequencies=ROPE.frequencies(16))
    assert causes.attention_position(right[..., ::-1], right).startswith("the heads or the mask")


def test_how_an_adapter_is_applied_is_told_from_another_product():
    frozen, change = RNG.normal(size=(2, 3, 8)), RNG.normal(size=(2, 3, 8))
    assert causes.linear_cause(frozen, frozen, change) == "the adapter is not applied, though it is there"
    assert causes.linear_cause(frozen + 2 * change, frozen, change).startswith("the adapter is applied 2 times")
    assert "something else" in causes.linear_cause(frozen**2, frozen, change)
    assert "something else" in causes.linear_cause(frozen**2, frozen, None)


def test_another_activation_is_named():
    gate, up = RNG.normal(size=(2, 3, 8)), RNG.normal(size=(2, 3, 8))
    results = {name: value * up for name, value in causes.activations(gate).items()}
    assert causes.activation_cause(np.maximum(gate, 0) * up, results) == "the activation: relu in place of silu"
    assert causes.activation_cause(silu(gate) * up, results) is None
