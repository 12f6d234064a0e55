"""The verbs that both backends share, and 4-bit layers on a CPU."""

from __future__ import annotations

import dataclasses

import bitsandbytes as bnb
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from moka_core import AdapterError, ConfigError, LayerFactors, ModelError
from moka_core.oracle import dense_delta
from moka_torch import MokaLinear, attach, exact_on_cpu, export_adapter, import_adapter, merge, model_fingerprint
from tests.cases import CASES
from tests.moka_torch.conftest import IDS, logits, random_adapter
from tests.moka_torch.test_torch_linear import layer_of
from tests.moka_torch.tolerances import relative


def arrays(adapter) -> dict[str, np.ndarray]:
    return {f"{path}.{name}": array for path, layer in adapter.layers.items() for name, array in layer.tensors()}


def test_attach_takes_a_config_of_either_kind_or_a_preset(load):
    model = attach(load(), "paper")
    assert model.peft_config["default"].to_core().r == 10
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert attach(load(), "paper-s", seed=1).peft_config["default"].identity == "a"
    with pytest.raises(ConfigError, match="unknown preset 'papr'; did you mean 'paper'"):
        attach(load(), "papr")
    with pytest.raises(ConfigError, match="expected a base model; got a PeftModel"):
        attach(model, "paper")


def test_seed_fixes_the_start(load, settings):
    torch.manual_seed(1)
    first = export_adapter(attach(load(), settings, seed=3))
    torch.manual_seed(2)
    second, third = (export_adapter(attach(load(), settings, seed=seed)) for seed in (3, 4))
    start = arrays(first)
    assert all(np.array_equal(array, start[name]) for name, array in arrays(second).items())
    assert any(not np.array_equal(array, start[name]) for name, array in arrays(third).items())
    assert not any(array.any() for name, array in start.items() if "factor_b" in name or "gate" in name)


@pytest.mark.parametrize("bits", [None, 4])
def test_export_and_import_are_inverse_bit_for_bit(load, settings, bits):
    base = load(bits)
    adapter = random_adapter(base, settings, fingerprint=model_fingerprint(base))
    model = import_adapter(base, adapter).eval()
    exported = export_adapter(model)
    assert exported.base_fingerprint == adapter.base_fingerprint
    assert exported.base_model
    assert exported.layers.keys() == adapter.layers.keys()
    assert "model.layers.0.self_attn.q_proj" in exported.layers
    assert {plan.key for plan in exported.config.shapes} == {"64x64", "32x64", "64x128"}
    assert dataclasses.replace(exported.config, shapes=()) == settings
    for name, array in arrays(exported).items():
        assert array.dtype == np.float32
        assert np.array_equal(array, arrays(adapter)[name]), name
    assert torch.equal(logits(import_adapter(load(bits), exported).eval()), logits(model))


def test_bfloat16_is_exported_as_it_is_and_imported_exactly(load, settings):
    base = load()
    model = import_adapter(base, random_adapter(base, settings))
    for name, parameter in model.named_parameters():
        if "moka_" in name:
            parameter.data = parameter.data.bfloat16()
    exported = arrays(export_adapter(model))
    assert {array.dtype for array in exported.values()} == {np.dtype(ml_dtypes.bfloat16)}
    again = arrays(export_adapter(import_adapter(load(), export_adapter(model))))
    for name, array in exported.items():
        assert np.array_equal(array.astype(np.float32), again[name])
    model.base_model.model.model.layers[0].self_attn.q_proj.moka_gate_logits.half()
    assert arrays(export_adapter(model))["model.layers.0.self_attn.q_proj.gate_logits"].dtype == np.float16
    model.base_model.model.model.layers[0].self_attn.q_proj.moka_gate_logits.double()
    with pytest.raises(AdapterError, match=r"q_proj: gate_logits: expected float32, .*float16; got torch\.float64"):
        export_adapter(model)


def test_export_names_the_adapters_there_are(load, settings):
    with pytest.raises(AdapterError, match="expected one of default, a MoKA adapter; got 'other'"):
        export_adapter(attach(load(), settings), "other")


@pytest.mark.parametrize("peft_first", [False, True])
def test_a_refused_import_leaves_the_model_alone(load, settings, peft_first):
    sound = random_adapter(load(), settings)
    path = "model.layers.0.self_attn.q_proj"
    q_proj, v_proj = sound.layers[path], sound.layers[path.replace("q_proj", "v_proj")]
    broken = LayerFactors(
        plan=q_proj.plan, factor_a=q_proj.factor_a, factor_b=q_proj.factor_b, gate_logits=q_proj.gate_logits * np.nan
    )
    refused = {
        "q_proj: gate_logits has NaN": {"layers": {**sound.layers, path: broken}},
        "trained on another base model": {"base_fingerprint": "f" * 64},
        "nowhere: the adapter has it, but this model has no such linear layer": {
            "layers": {**sound.layers, "nowhere": q_proj}
        },
        "q_proj: the adapter is for 32x64, the model's layer is 64x64": {"layers": {**sound.layers, path: v_proj}},
    }
    model = load()
    if peft_first:
        model = attach(model, settings)
    names = [name for name, _ in model.named_parameters()]
    for message, change in refused.items():
        with pytest.raises(AdapterError, match=message):
            import_adapter(model, dataclasses.replace(sound, **change), "new")
        assert [name for name, _ in model.named_parameters()] == names


def test_merge_gives_a_plain_model_with_the_same_answers(load, settings):
    base = load()
    adapter = random_adapter(base, settings)
    weight = base.model.layers[0].mlp.down_proj.weight.detach().clone()
    model = import_adapter(base, adapter).eval()
    expected = logits(model)
    merged = merge(model)
    assert not any(isinstance(module, MokaLinear) for module in merged.modules())
    # measured over 5 seeds: 6.6e-7 of the largest logit
    assert (logits(merged) - expected).abs().max() <= 5e-6 * expected.abs().max()
    path = "model.layers.0.mlp.down_proj"
    delta = dense_delta(adapter.layers[path], settings)
    assert relative(merged.get_submodule(path).weight.detach(), weight.double().numpy() + delta) <= 1e-7


def test_merge_checks_before_it_touches(load, settings):
    base = load()
    model = import_adapter(base, random_adapter(base, settings)).eval()
    before = logits(base)
    last = base.model.layers[1].mlp.down_proj
    with torch.no_grad():
        keep = last.moka_gate_logits["default"][0].clone()
        last.moka_gate_logits["default"][0] = float("inf")
    with pytest.raises(
        AdapterError, match=r"layers\.1\.mlp.down_proj: gate_logits of adapter 'default' has NaN or inf"
    ):
        merge(model)
    with torch.no_grad():
        last.moka_gate_logits["default"][0] = keep
    assert torch.equal(logits(base), before)


def test_four_bit_layer_is_exact(load):
    """ΔW on top of a 4-bit layer, in float32, and its merge up to NF4's own rounding."""
    case = CASES[0]
    base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer, delta = layer_of(case, base=base.to("cpu"))
    assert exact_on_cpu(layer) == 1
    weight = layer.get_base_weight()
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = x.double().numpy() @ (weight.double().numpy() + delta).T
        assert relative(layer(x), expected) <= 1e-6
        assert torch.equal(layer.get_base_weight(), weight), "a forward must not change the weight"
        with pytest.warns(UserWarning, match="merging into a bnb 4bit layer encodes it again"):
            layer.merge()
    assert 0.01 < relative(layer.get_base_weight(), weight.double().numpy() + delta) < 0.2  # measured 0.09


def test_four_bit_merge_of_a_model_warns(load, settings):
    base = load(bits=4)
    model = import_adapter(base, random_adapter(base, settings)).eval()
    with pytest.warns(UserWarning, match="encodes it again"):
        merged = merge(model)
    assert torch.isfinite(logits(merged)).all()


def test_exact_on_cpu_refuses_what_it_cannot_make_exact():
    def layer(out, in_):
        made = bnb.nn.Linear4bit(in_, out, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
        return made.eval()

    model = nn.Sequential(layer(64, 96), layer(96, 64))
    model[1].weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes leaves it on an AVX512-BF16 CPU
    with pytest.raises(ModelError) as caught:
        exact_on_cpu(model)
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  0: expected in_features to be a multiple of 64; got 96")
    assert lines[2].startswith("  1: its weight has been repacked for bfloat16 already; load the model again")
    case = dataclasses.replace(CASES[0], out_features=96)
    adapted, _ = layer_of(case, base=model[1])
    with pytest.raises(ModelError, match="repacked by bitsandbytes"):
        adapted.merge()
    assert exact_on_cpu(nn.Linear(2, 2)) == 0


@pytest.mark.skipif(
    not bnb.nn.Linear4bit(64, 64, bias=False).support_avx512bf16_for_cpu, reason="needs a CPU with AVX512-BF16"
)
def test_the_trap_is_real():
    """Without exact_on_cpu an eval-mode forward rewrites the weight; if this fails, bitsandbytes has changed."""
    made = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    before = made.weight.data.clone()
    with torch.no_grad():
        made(torch.randn(2, 64))
    assert not torch.equal(made.weight.data.reshape(-1), before.reshape(-1))
    with pytest.raises(ModelError, match="repacked"):
        exact_on_cpu(made)


def test_generation_works_with_the_adapter(load, settings):
    base = load()
    model = import_adapter(base, random_adapter(base, settings)).eval()
    tokens = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, IDS.shape[1] + 3)
    full = model(tokens).logits[0, -2]
    assert int(full.argmax()) == int(tokens[0, -1])


def test_the_adapters_own_layers_decide_and_not_its_target_modules(load, settings):
    sound = random_adapter(load(), settings)
    few = {path: layer for path, layer in sound.layers.items() if path.startswith("model.layers.0.")}
    model = import_adapter(load(), dataclasses.replace(sound, layers=few))
    assert set(export_adapter(model).layers) == set(few)
