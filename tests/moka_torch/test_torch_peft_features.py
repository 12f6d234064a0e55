"""What PEFT users do with several adapters: mixed batches, scales, weighted sums; and the layers beside nn.Linear."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from moka_core import AdapterError, ConfigError, TargetError
from moka_torch import MokaConfig, export_adapter
from moka_torch.loading import adapted_layers
from tests.moka_torch.conftest import IDS, logits
from tests.moka_torch.tolerances import relative

KINDS = {
    "one": {"r": 3, "num_shapes": 2, "scale": 2.0, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 4, "num_shapes": 2, "gate": "uniform", "scaling": "stable", "target_modules": ["v_proj", "down_proj"]},
    "blocks": {"r": 2, "identity": "a", "block_entries": 64, "target_modules": ["q_proj", "v_proj"]},
    "columns": {"r": 2, "identity": "b", "zero_factor": "a", "block_entries": 64, "target_modules": ["v_proj"]},
}
SENTENCES = torch.randint(0, 96, (6, 9), generator=torch.Generator().manual_seed(5))


def several(base, *names: str, **changes) -> PeftModel:
    torch.manual_seed(1)
    model = None
    for name in names or KINDS:
        config = MokaConfig(**{**KINDS[name], "dropout": 0.0, "init_weights": False, **changes})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return model.eval()


def alone(model, name, ids) -> torch.Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("bits", [None, 4])
def test_every_sample_of_a_batch_with_an_adapter_of_its_own(load, bits):
    model = several(load(bits=bits))
    names = ["one", "__base__", "two", "blocks", "columns", "one"]
    with torch.no_grad():
        mixed = model(SENTENCES, adapter_names=names).logits
        with model.disable_adapter():
            base = model(SENTENCES).logits
    for sample, name in enumerate(names):
        expected = base if name == "__base__" else alone(model, name, SENTENCES)
        assert relative(mixed[sample], expected[sample]) <= 1e-5, name
        if name != "__base__":
            assert relative(mixed[sample], base[sample]) > 1e-2, name


def test_generation_with_an_adapter_for_each_sample_and_beams(load):
    model = several(load())
    prompts = SENTENCES[:3, :4]
    names = ["one", "__base__", "two"]
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        mixed = model.generate(input_ids=prompts, adapter_names=names, num_beams=beams, **asked)
        for sample, name in enumerate(names):
            row = prompts[sample : sample + 1]
            if name == "__base__":
                with model.disable_adapter():
                    expected = model.generate(input_ids=row, num_beams=beams, **asked)
            else:
                model.set_adapter(name)
                expected = model.generate(input_ids=row, num_beams=beams, **asked)
            length = min(expected.shape[1], mixed.shape[1])
            assert torch.equal(mixed[sample, :length], expected[0, :length]), (beams, name)


def test_what_adapter_names_refuses(load):
    model = several(load(), "one", "two")
    with pytest.raises(
        ConfigError, match=r"non-existing adapter\(s\): three, zero. There are one, two, and '__base__'"
    ):
        model(SENTENCES, adapter_names=["one", "three", "zero", "one", "one", "one"])
    with pytest.raises(ConfigError, match="same as the number of inputs, but got 2 and 6"):
        model(SENTENCES, adapter_names=["one", "two"])
    with pytest.raises(ConfigError, match="expected a list of names, one a sample; got 'one'"):
        model(SENTENCES, adapter_names="one")
    with pytest.raises(ConfigError, match="in training mode"):
        model.train()(SENTENCES, adapter_names=["one"] * 6)
    model.eval().merge_adapter(["one"])
    with pytest.raises(ConfigError, match=r"merged adapters, .* Merged are one"):
        model(SENTENCES, adapter_names=["one"] * 6)
    model.unmerge_adapter()
    with torch.no_grad():
        again = model(SENTENCES, adapter_names=["one"] * 6).logits  # and no hook of the refused calls is left
    assert relative(again, alone(model, "one", SENTENCES)) <= 1e-5


def test_scales_are_put_on_taken_off_and_no_part_of_the_adapter(load, tmp_path):
    model = several(load(), "one", "two")
    layer = adapted_layers(model, "one")["model.layers.0.self_attn.v_proj"]
    plain = layer.get_delta_weight("one")
    before = logits(model)
    layer.set_scale("one", 3.0)
    assert layer.scaling == {"one": 6.0, "two": 1.0}
    assert torch.equal(layer.get_delta_weight("one"), 3 * plain)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for execution in ("factored", "merged"):
        with torch.no_grad():
            moved = layer(x, execution=execution) - layer.base_layer(x)
        assert relative(moved, 3 * x @ plain.T) <= 1e-5
    layer.scale_layer(0.5)
    assert layer.scaling["one"] == 3.0
    layer.unscale_layer(0.5)
    assert layer.scaling["one"] == 6.0
    with pytest.raises(AdapterError, match=r"has put the factor 3\.0 on adapter 'one'"):
        export_adapter(model, "one")
    with pytest.warns(UserWarning, match="adapter 'one' is saved as its config says, without the factor"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "one")), before)
    layer.unscale_layer()
    assert torch.equal(logits(model), before)
    model.set_scale("one", 0.0)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)
    for wrong in (float("nan"), True, "2"):
        with pytest.raises(ConfigError, match="scale: expected a finite number"):
            model.set_scale("one", wrong)
    with pytest.raises(ConfigError, match="expected one of one, two; got 'three'"):
        model.set_scale("three", 1.0)
    with pytest.raises(ConfigError, match="other than 0 to divide by"):
        layer.unscale_layer(0)
    model.set_scale("one", 1.0)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="adapter 'one' is merged; unmerge it"):
        model.set_scale("one", 2.0)


def test_an_adapter_added_to_a_model_in_eval_mode_drops_nothing(load):
    model = several(load()).eval()
    for config in model.peft_config.values():
        config.dropout = 0.5
    model.add_weighted_adapter(["one", "two"], [0.5, 1.0], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(
    "weights",
    [
        {"one": 0.7, "two": -1.3},
        {"one": 1.0},
        {"blocks": -2.0, "one": 0.5, "columns": 1.0, "two": 0.0},
        {"one": 1.0, "two": 1.0, "blocks": 1.0, "columns": 1.0},
        {"blocks": 3.0},
        {"columns": -1.0},
    ],
)
def test_the_weighted_sum_of_adapters_is_exact(load, tmp_path, weights):
    model = several(load())
    model.set_scale("two", 2.0)  # counts, as it does in a forward
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert model.active_adapters == ["one"]
    summed = adapted_layers(model, "sum")
    parts = {name: adapted_layers(model, name) for name in weights}
    assert set(summed) == {path for name, weight in weights.items() if weight for path in parts[name]}
    for path, layer in summed.items():
        expected = sum(
            weight * parts[name][path].get_delta_weight(name).double()
            for name, weight in weights.items()
            if path in parts[name]
        )
        assert relative(layer.get_delta_weight("sum"), expected) <= 1e-6, path
        assert not any(tensor.requires_grad for tensor in layer.tensors("sum").values())
    model.set_adapter("sum")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == sum(tensor.numel() for layer in summed.values() for tensor in layer.tensors("sum").values())
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "sum")), logits(model))
    assert export_adapter(model, "sum").trainable == trained


def test_what_a_weighted_sum_refuses(load):
    model = several(load(), "one", "two")
    for arguments, message in (
        ((["one", "three"], [1.0, 1.0], "sum"), "adapters: expected some of one, two; got 'three'"),
        ((["one", "one"], [1.0, 1.0], "sum"), "expected different names, with a weight each"),
        ((["one", "two"], [1.0], "sum"), "expected different names, with a weight each"),
        ((["one"], [float("inf")], "sum"), "weights: expected finite numbers"),
        ((["one", "two"], [0.0, 0.0], "sum"), "at least one that is not 0"),
        ((["one"], [1.0], "two"), "already carries an adapter 'two'"),
        ((["one"], [1.0], "a.b"), "expected a name without dots"),
        ((["one"], [1.0], "sum", "svd"), "combination_type: expected 'cat', the exact weighted sum; got 'svd'"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.add_weighted_adapter(*arguments)
        assert set(model.peft_config) == {"one", "two"}
    model.add_adapter("three", MokaConfig(**{**KINDS["one"], "dropout": 0.5}))
    with pytest.raises(ConfigError, match=r"dropout: the adapters have 0\.0 and 0\.5; say which"):
        model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["one", "three"], [1.0, 1.0], "sum", dropout=0.25)
    assert model.peft_config["sum"].dropout == 0.25
    model.add_adapter("more", MokaConfig(**KINDS["one"], modules_to_save=["lm_head"]))
    with pytest.raises(ConfigError, match="modules_to_save train more than mixtures"):
        model.add_weighted_adapter(["one", "more"], [1.0, 1.0], "both", dropout=0.0)


def test_conversion_to_lora_of_full_rank_is_the_same_model(load):
    model = several(load(), "one")
    lora, state = convert_to_lora(model, rank=64 // 2, adapter_name="one")  # v_proj is 32x64
    layers = adapted_layers(model, "one")
    for path, layer in layers.items():
        a = state[f"base_model.model.{path}.lora_A.weight"]
        b = state[f"base_model.model.{path}.lora_B.weight"]
        delta = layer.get_delta_weight("one")
        best = torch.linalg.svdvals(delta.double())[32:].square().sum().sqrt() / delta.double().norm()
        assert relative(b @ a, delta) <= float(best) + 1e-5, path
    other = load()
    inject_adapter_in_model(lora, other)
    found = set_peft_model_state_dict(other, state)
    assert not found.unexpected_keys


def test_conv1d_of_transformers_is_a_linear_layer_with_its_weight_transposed():
    torch.manual_seed(0)
    settings = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    base = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    ids = torch.arange(8)[None]
    plain = base(ids).logits
    config = MokaConfig(
        r=4, num_shapes=2, dropout=0.0, init_weights=False, scale=4.0, target_modules=["c_attn", "c_proj"]
    )
    model = get_peft_model(base, config).eval()
    layer = adapted_layers(model, "default")["transformer.h.0.attn.c_attn"]
    assert isinstance(layer.base_layer, Conv1D)
    assert (layer.out_features, layer.in_features) == (48, 16)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    expected = x @ (layer.base_layer.weight + layer.get_delta_weight("default")) + layer.base_layer.bias
    assert relative(layer(x).detach(), expected.detach()) <= 1e-6
    with torch.no_grad():
        adapted = model(ids).logits
        assert relative(adapted, plain) > 1e-2
        model.merge_adapter()
        assert relative(model(ids).logits, adapted) <= 1e-5
        model.unmerge_adapter()
        assert relative(model(ids).logits, adapted) <= 1e-5
        assert relative(model.merge_and_unload()(ids).logits, adapted) <= 1e-5
    with pytest.raises(ConfigError, match="it is a Conv1D, which multiplies in a way of its own"):
        get_peft_model(
            GPT2LMHeadModel(GPT2Config(**settings)), MokaConfig(target_modules=["c_attn"], execution="merged")
        )


@pytest.mark.parametrize("module", [nn.Embedding(8, 4), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.LayerNorm(4)])
def test_other_layers_are_refused(module):
    with pytest.raises(TargetError, match=f"it is a {type(module).__name__}; supported are torch.nn.Linear, transform"):
        get_peft_model(nn.Sequential(module, nn.Linear(4, 4)), MokaConfig(target_modules=["0"]))


def test_an_8_bit_base(base_folder, tmp_path):
    def load():
        quantised = BitsAndBytesConfig(load_in_8bit=True)
        return LlamaForCausalLM.from_pretrained(base_folder, quantization_config=quantised).eval()

    plain = logits(load())
    model = several(load(), "one")
    adapted = logits(model)
    assert relative(adapted, plain) > 1e-2
    layer = adapted_layers(model, "one")["model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(layer.base_layer.weight.dtype).float()
    with torch.no_grad():
        moved = layer(x) - layer.base_layer(x)
    assert relative(moved, x @ layer.get_delta_weight("one").T) <= 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "one")), adapted)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    with pytest.warns(UserWarning, match="encodes it again"):
        model.merge_adapter()
    assert relative(logits(model), adapted) <= 5e-2


def test_what_a_lora_could_not_stand_for_is_not_converted(load):
    model = several(load(), "blocks")
    assert not model.supports_lora_conversion("blocks")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=8, adapter_name="blocks")
