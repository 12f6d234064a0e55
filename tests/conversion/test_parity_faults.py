"""A fault planted in each stage: the check fails, names the first module that differs, and says why.

Most are planted in one model's numbers, which are put back afterwards, so that everything is compiled once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from conversion.oracle_probe import OracleProbe
from conversion.parity import ParityReport, compare_with_oracle

# as in test_parity.py
pytestmark = pytest.mark.usefixtures("optimised")


@contextlib.contextmanager
def planted_in_jax(sides, fault: Callable[[nnx.Module], None]) -> Iterator[None]:
    before = jax.tree.map(lambda leaf: leaf, nnx.state(sides.jax.model))
    try:
        fault(sides.jax.model)
        yield
    finally:
        nnx.update(sides.jax.model, before)


@contextlib.contextmanager
def planted_in_torch(sides, fault: Callable[[torch.nn.Module], Callable[[], None]]) -> Iterator[None]:
    undo = fault(sides.torch.model.get_base_model())
    try:
        yield
    finally:
        undo()


def change(variable: nnx.Variable, at, value) -> None:
    """Set variable[at] to value(what is there)."""
    array = np.array(variable[...])
    array[at] = value(array[at])
    # as it was there, by name: a function is compiled anew for an array that is on its device by default only
    variable.set_value(jax.device_put(array, variable.get_value().sharding))


def block(model):
    return model.model.layers.block


def a_base_weight(model):
    change(block(model).self_attn.o_proj.codes, (1, 0, slice(3)), lambda codes: codes ^ 0x11)


def nibble_order(model):
    change(block(model).mlp.gate_proj.codes, 1, lambda codes: (codes << 4) | (codes >> 4))


def absmax(model):
    change(block(model).mlp.up_proj.absmax, (2, 0, 0), lambda codes: codes ^ 3)


def one_factor_entry(model):
    change(block(model).self_attn.q_proj.factor_a[1], (1, 0, 0, 1), lambda entry: entry + 0.5)


def one_gate(model):
    change(block(model).self_attn.v_proj.gate_logits, (1, 4), lambda logit: logit + 0.3)


def scale_of_one_layer(model):
    for factor in block(model).mlp.down_proj.factor_b:
        change(factor, 1, lambda entries: 2 * entries)


def scale_of_all_layers(model):
    for layer in (block(model).self_attn.q_proj, block(model).self_attn.v_proj, block(model).mlp.down_proj):
        for factor in layer.factor_b:
            change(factor, slice(None), lambda entries: -2 * entries)


def a_negated_factor(model):
    change(block(model).self_attn.v_proj.factor_b[1], (2, 0), lambda entries: -entries)


def a_scaled_factor(model):
    change(block(model).mlp.down_proj.factor_b[0], 1, lambda entries: 2 * entries)


def a_norm_weight(model):
    change(block(model).post_attention_layernorm.weight, (1, 7), lambda entry: 1.5 * entry)


def the_head(model):
    change(model.lm_head.kernel, (3, 5), lambda entry: entry + 1)


def an_embedding(model):
    change(model.model.embed_tokens.embedding, slice(None), lambda table: table[::-1])


def not_a_number(model):
    change(block(model).mlp.down_proj.factor_a[0], (2, 0, 0, 0), lambda entry: np.nan)


IN_JAX = [
    (a_base_weight, "layers.1.self_attn.o_proj", "the weight: 3 of 8192 bytes of NF4 codes differ, in JAX; NF4 layers"),
    (nibble_order, "layers.1.mlp.gate_proj", "nibble order: the NF4 codes are those of the folder with the low half"),
    (absmax, "layers.2.mlp.up_proj", "the NF4 scales (absmax): 1 entries differ, the codes are equal, in JAX"),
    (one_factor_entry, "layers.1.self_attn.q_proj", "a factor: entry (0, 1) of factor_a.1[0] (term 2) is "),
    (one_gate, "layers.1.self_attn.v_proj", "the gate of term 4: it counts "),
    (
        scale_of_one_layer,
        "layers.1.mlp.down_proj",
        "the scale: ΔW is 2 times what it should be, in JAX; adapted layers: this one alone differs",
    ),
    (
        scale_of_all_layers,
        "layers.0.self_attn.q_proj",
        "the scale: ΔW is -2 times what it should be, in JAX; adapted layers: all 9 of them differ",
    ),
    (a_negated_factor, "layers.2.self_attn.v_proj", "a factor, or the scale, of term 2: -1 times what it should be"),
    (a_scaled_factor, "layers.1.mlp.down_proj", "a factor, or the scale, of terms 0, 1: 2 times what it should be"),
    (a_norm_weight, "layers.1.post_attention_layernorm", "the weight: 1 of 128 entries differ"),
    (the_head, "lm_head", "the weight: 1 of 32768 entries differ"),
    (an_embedding, "model.embed_tokens", "the weight: 32768 of 32768 entries differ"),
    (not_a_number, "layers.2.mlp.down_proj", "ΔW has NaN or infinite entries, in JAX"),
]


def names(report: ParityReport, module: str, cause: str) -> None:
    """Hold a report to the module and the beginning of the cause that it must give."""
    assert not report.passed
    found = report.diagnosis
    assert found is not None
    assert found.module.removeprefix("model.") == module.removeprefix("model."), found
    assert found.cause.startswith(cause), found
    assert not found.figure <= found.bound
    assert str(found).startswith(f"first difference: {found.module}, ")


@pytest.mark.parametrize(("fault", "module", "cause"), IN_JAX, ids=[entry[0].__name__ for entry in IN_JAX])
def test_a_fault_in_jax_is_found_against_pytorch_and_against_float64(sides, fault, module, cause):
    with planted_in_jax(sides, fault):
        names(sides.both(), module, cause)
        names(sides.alone("jax"), module, cause)


def last_bit(model):
    change(block(model).input_layernorm.weight, (2, 9), lambda entry: np.nextafter(entry, np.float32(2)))


def test_a_difference_that_no_output_shows_is_found_all_the_same(sides):
    with planted_in_jax(sides, last_bit):
        report = sides.alone("jax")
    names(report, "layers.2.input_layernorm", "the weight: 1 of 128 entries differ")
    assert report.diagnosis.cause.endswith("; its output differs by less than its bound")
    assert [row.name for row in report.rows if not row.passed] == ["dense tensors (9)"]


def set_attribute(owner, name: str, value) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def rope_base(theta: float):
    def fault(model):
        head_dim = model.config.head_dim
        other = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        return set_attribute(model.model.rotary_emb, "inv_freq", other)

    return fault


def eps(model):
    return set_attribute(model.model.layers[2].input_layernorm, "variance_epsilon", 1e-2)


def last_eps(model):
    return set_attribute(model.model.norm, "variance_epsilon", 1e-2)


def activation(model):
    return set_attribute(model.model.layers[1].mlp, "act_fn", torch.nn.ReLU())


def softmax_scale(model):
    return set_attribute(model.model.layers[1].self_attn, "scaling", 1.0)


def adapter_off(model):
    return set_attribute(model.model.layers[1].self_attn.q_proj, "_disable_adapters", True)


def torch_factor(model):
    factor = model.model.layers[2].mlp.down_proj.moka_factor_b["default"]["0"]
    before = factor.data.clone()
    factor.data[1, 0, 0] += 1

    def undo():
        factor.data = before

    return undo


def residual(model):
    handle = model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.01)
    return handle.remove


def adapter_dropout(model):
    dropout = model.model.layers[1].self_attn.v_proj.moka_dropout["default"]
    assert dropout.p > 0
    return set_attribute(dropout, "training", True)


def attention_dropout(model):
    attention = model.model.layers[0].self_attn
    undo = [set_attribute(attention, "attention_dropout", 0.1), set_attribute(attention, "training", True)]
    return lambda: [back() for back in undo]


RANDOM = "randomness, in PyTorch: the same tokens give other logits when they run again"
IN_TORCH = [
    (adapter_dropout, "layers.1.self_attn.v_proj", RANDOM),
    (attention_dropout, "layers.0.self_attn.attention", RANDOM),
    (rope_base(10000.0), "layers.0.self_attn.attention", "rotary settings: rope_theta is 10000 in place of 500000"),
    (rope_base(4321.0), "layers.0.self_attn.attention", "rotary settings (rope_theta, rope_scaling) or the softmax's"),
    (eps, "layers.2.input_layernorm", "rms_norm_eps: it is as if it were 0.01 in place of 1e-06"),
    (last_eps, "model.norm", "rms_norm_eps: it is as if it were 0.01 in place of 1e-06"),
    (activation, "layers.1.mlp.down_proj", "the activation: relu in place of silu"),
    (softmax_scale, "layers.1.self_attn.attention", "the scale of the softmax: 1 in place of 1/√head_dim"),
    (adapter_off, "layers.1.self_attn.q_proj", "the adapter is not applied, though it is there"),
    (torch_factor, "layers.2.mlp.down_proj", "a factor: entry (0, 0) of factor_b.0[1] (term 1) is "),
    (residual, "layers.1", "the residual stream"),
]


@pytest.mark.parametrize(("fault", "module", "cause"), IN_TORCH)
def test_a_fault_in_pytorch_is_found_against_jax_and_against_float64(sides, fault, module, cause):
    with planted_in_torch(sides, fault):
        for report in (sides.both(), sides.alone("torch")):
            names(report, module, cause)
            if module != "layers.1":
                assert ", in PyTorch" in report.diagnosis.cause


@pytest.mark.parametrize("fixed", [True, False], ids=["masks of a fixed key", "new masks each time"])
def test_dropout_that_the_trace_does_not_show_is_named_too(sides, fixed):
    """The model as it is used drops, its modules run one by one do not; in JAX the key may be the same each time."""
    rng = np.random.default_rng(0)

    class Dropping(OracleProbe):
        label = "JAX"

        def logits(self, tokens):
            right = super().logits(tokens)
            keep = (np.random.default_rng(0) if fixed else rng).random(right.shape) > 0.1
            return right * keep / 0.9

    other = Dropping(sides.truth.base, sides.truth.adapter)
    report = compare_with_oracle(other, sides.truth, sides.batches[0].tokens)
    names(report, "logits", "rows, in JAX" if fixed else "randomness, in JAX")
    assert "dropout is left on" in report.diagnosis.cause


def test_a_fault_of_one_row_is_not_called_randomness(sides):
    class Uneven(OracleProbe):
        label = "JAX"

        def logits(self, tokens):
            right = super().logits(tokens)
            right[1:] *= 1.1
            return right

    report = compare_with_oracle(Uneven(sides.truth.base, sides.truth.adapter), sides.truth, sides.batches[0].tokens)
    names(report, "logits", "rows, in JAX: the same tokens give other logits in another row of a batch")


def test_without_a_fault_there_is_no_diagnosis(sides):
    for report in (sides.alone("jax"), sides.alone("torch"), sides.both(trace=True)):
        assert report.passed, [row for row in report.rows if not row.passed]
        assert report.diagnosis is None
        assert len(report.modules) == 1 + 3 * 11 + 2
        # measured: 1.6e-6, the worst of all modules of five such models, in any of the three ways
        assert all(figure < 3e-6 for _, figure in report.modules)


def test_a_trace_ends_in_the_models_own_logits_and_one_that_does_not_says_so(sides):
    tokens = sides.batches[0].tokens
    for probe in (sides.jax, sides.torch):
        *_, (name, traced) = probe.trace(tokens)
        assert name == "lm_head"
        np.testing.assert_allclose(traced, probe.logits(tokens), rtol=0, atol=1e-5)

    class Elsewhere(OracleProbe):
        label = "PyTorch"

        def logits(self, tokens):
            return super().logits(tokens)[:, ::-1]

    other = Elsewhere(sides.truth.base, sides.truth.adapter)
    report = compare_with_oracle(other, sides.truth, tokens)
    names(report, "logits", "PyTorch's logits are not what its modules give one by one")
