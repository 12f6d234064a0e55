"""What a review found wrong once: each of these was a wrong number, or passed in silence."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from conversion import load_adapter, save_adapter
from moka_core import AdapterError, ConfigError, ModelError
from moka_torch import MokaConfig, attach, export_adapter, merge, model_fingerprint
from moka_torch.loading import adapted_layers
from tests.moka_torch.conftest import IDS, logits, tiny_config
from tests.moka_torch.tolerances import relative

PREFIX = "base_model.model."


def config(**changes) -> MokaConfig:
    values = {"r": 3, "num_shapes": 2, "dropout": 0.0, "init_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return MokaConfig(**{**values, **changes})


def adapted(base, **changes) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base, config(**changes)).eval()


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_merged_into_bfloat16_is_the_model_that_it_is_saved_as(load, tmp_path, bits):
    """Its rotary frequencies stay in float32: in bfloat16 the error grows with the position."""
    dense = merge(adapted(load(bits)), dtype=torch.bfloat16).eval()
    assert dense.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not getattr(dense, "is_loaded_in_4bit", False)
    dense.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.dtype == torch.bfloat16
    ids = torch.randint(0, 96, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, dense(ids).logits)


def test_merging_an_output_head_leaves_the_tied_embedding_alone(tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()
    embedding = base.model.embed_tokens.weight.detach().clone()
    model = adapted(base, target_modules=["q_proj", "lm_head"])
    wanted = logits(model)
    dense = merge(model, dtype=torch.float32)
    assert torch.equal(dense.model.embed_tokens.weight, embedding)
    assert not dense.config.tie_word_embeddings
    assert relative(logits(dense), wanted) <= 1e-5
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(dense))


def test_merging_checks_everything_before_it_touches_anything(load):
    model = adapted(load(4))
    outside = model.base_model.model.model.layers[1].mlp.up_proj
    outside.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        merge(model, dtype=torch.float32)
    assert len(adapted_layers(model, "default")) == 4
    model = adapted(load(), scale=1e8)
    before = logits(model)
    with pytest.raises(AdapterError, match=r"which torch.float16 cannot hold"):
        merge(model, dtype=torch.float16)
    assert torch.equal(logits(model), before)
    for wrong in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(ConfigError, match=r"dtype: expected one of torch\.float32, torch\.bfloat16"):
            merge(model, dtype=wrong)  # type: ignore[arg-type]


def test_merging_in_float64_rounds_nothing_to_float32(load):
    model = adapted(load().double())
    wanted = logits(model)
    assert relative(logits(merge(model, dtype=torch.float64)), wanted) <= 1e-7  # ΔW itself is float32's


def test_a_weighted_sum_on_a_bfloat16_base_is_exact_too(load):
    model = adapted(load(dtype=torch.bfloat16))
    model.add_adapter("two", config(r=4, scale=2.0))
    model.add_weighted_adapter(["default", "two"], [1.0, -0.5], "sum")
    for path, layer in adapted_layers(model, "sum").items():
        assert {tensor.dtype for tensor in layer.tensors("sum").values()} == {torch.float32}
        expected = layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("two")
        assert relative(layer.get_delta_weight("sum"), expected) <= 1e-6, path


def test_a_weighted_sum_with_terms_of_weight_0_can_be_loaded(load, tmp_path):
    model = adapted(load())
    model.add_adapter("two", config(r=4))
    with torch.no_grad():
        adapted_layers(model, "two")["model.layers.0.self_attn.q_proj"].moka_gate_logits["two"][0] = -800.0
    model.set_scale("default", 0.0)
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum")
    for path, layer in adapted_layers(model, "sum").items():
        assert relative(layer.get_delta_weight("sum"), layer.get_delta_weight("two")) <= 1e-6, path
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    PeftModel.from_pretrained(load(), tmp_path / "sum")
    with pytest.raises(ConfigError, match="the sum is 0"):
        model.add_weighted_adapter(["default"], [1.0], "nothing")


def test_a_weighted_sum_that_fails_leaves_nothing_behind(load):
    model = adapted(load())
    with torch.no_grad():
        model.base_model.model.model.norm.weight.add_(1)  # another base by its fingerprint
    with pytest.raises(AdapterError, match="another base model"):
        model.add_weighted_adapter(["default"], [2.0], "sum")
    assert set(model.peft_config) == {"default"}
    assert not adapted_layers(model, "sum")


class Nested(nn.Module):
    """Two layers, of which one's path is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.head["fc"](x))


def test_a_path_that_is_the_end_of_another_means_one_layer(tmp_path):
    torch.manual_seed(1)
    settings = {"target_modules": ["fc"], "scale_pattern": {"^fc": 5.0}, "r_pattern": {"^fc": 2}}
    model = get_peft_model(Nested(), config(**settings))
    layers = adapted_layers(model, "default")
    assert {path: layer.scaling["default"] for path, layer in layers.items()} == {"fc": 5.0, "head.fc": 1.0}
    assert {path: layer.moka_plan["default"].terms for path, layer in layers.items()} == {"fc": 2, "head.fc": 3}
    model.save_pretrained(tmp_path / "peft")
    x = torch.randn(3, 8)
    assert torch.equal(PeftModel.from_pretrained(Nested(), tmp_path / "peft")(x), model.eval()(x))
    adapter = load_adapter(tmp_path / "peft")
    assert {path: adapter.layer_config(path).scale for path in adapter.layers} == {"fc": 5.0, "head.fc": 1.0}
    save_adapter(adapter, tmp_path / "ours")
    again = load_adapter(tmp_path / "ours")
    assert {path: again.layer_config(path).scale for path in again.layers} == {"fc": 5.0, "head.fc": 1.0}

    layers["fc"].set_scale("default", 4.0)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    for path, layer in layers.items():
        assert relative(layer.get_delta_weight("sum"), layer.get_delta_weight("default")) <= 1e-6, path


def test_a_pattern_in_a_file_is_a_path(load, tmp_path):
    adapted(load()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scale_pattern": {"v_proj": 7.0}}))
    with pytest.raises(ConfigError, match="scale_pattern: 'v_proj' is the path of no layer"):
        PeftModel.from_pretrained(load(), tmp_path)
    with pytest.raises(AdapterError, match="scale_pattern: 'v_proj' is the path of no layer"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tensors_without_peft_s_prefix_are_not_passed_by(load, tmp_path, low_cpu_mem_usage):
    adapted(load()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match=f"unexpected; expected it to begin with {PREFIX}"):
        PeftModel.from_pretrained(load(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    key = next(iter(tensors))
    both = {**tensors, key: torch.full_like(tensors[key], float("nan")), key.removeprefix(PREFIX): tensors[key]}
    save_file({name: tensor.clone() for name, tensor in both.items()}, file)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        PeftModel.from_pretrained(load(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_biases_that_a_config_announces_and_a_file_lacks(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    for bias, count in (("moka_only", 1), ("all", 2)):
        model = get_peft_model(base(), config(target_modules=["0"], bias=bias))
        model.save_pretrained(tmp_path / bias)
        file = tmp_path / bias / "adapter_model.safetensors"
        tensors = {key: tensor for key, tensor in load_file(file).items() if "bias" not in key}
        save_file(tensors, file)
        with pytest.raises(AdapterError, match=rf"({count} problem)[\s\S]*bias: missing, though bias is '{bias}'"):
            PeftModel.from_pretrained(base(), tmp_path / bias)


def test_what_is_changed_on_a_used_config_counts(load):
    used = config(scale_pattern={"q_proj": 2.0})
    get_peft_model(load(), used)
    used.target_modules = ["k_proj"]
    used.scale_pattern = {"k_proj": 7.0}
    again = get_peft_model(load(), used)
    layers = adapted_layers(again, "default")
    assert {path.rpartition(".")[2] for path in layers} == {"k_proj"}
    assert {layer.scaling["default"] for layer in layers.values()} == {7.0}
    for changes, count in (
        ({"target_modules": ["k_proj", "q_proj"]}, 4),
        ({"layers_to_transform": [0]}, 1),
        ({"exclude_modules": r".*\.1\..*"}, 1),
    ):
        replaced = dataclasses.replace(used, **changes)
        assert len(adapted_layers(get_peft_model(load(), replaced), "default")) == count, changes


def test_layers_to_transform_is_not_passed_by_all_linear():
    with pytest.raises(ConfigError, match="layers_to_transform: with target_modules as one string"):
        config(target_modules=["all-linear"], layers_to_transform=[0])
    with pytest.raises(ConfigError, match="'all-linear' stands for every linear layer; give it alone"):
        config(target_modules=["all-linear", "q_proj"])


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_an_adapter_cannot_be_called_like_a_parameter(load, name):
    with pytest.raises(ConfigError, match=f"adapter_name: '{name}' is also part of the path of a parameter"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(target_modules=["0"]), adapter_name=name)


def test_unmerging_takes_off_what_was_merged_whatever_the_scale_is_now(load):
    model = adapted(load())
    with model.disable_adapter():
        before = logits(model)
    model.merge_adapter()
    for layer in adapted_layers(model, "default").values():
        layer.scaling["default"] = 2.0
    model.unmerge_adapter()
    with model.disable_adapter():
        assert relative(logits(model), before) <= 1e-5


def test_scaling_there_and_back_is_no_change(load):
    model = adapted(load(), scale=3.0)
    layer = next(iter(adapted_layers(model, "default").values()))
    for tenths in range(1, 300):
        layer.scale_layer(tenths / 10)
        layer.unscale_layer(tenths / 10)
    assert layer.multiplier("default") == 1.0
    export_adapter(model)


def test_the_fingerprint_is_the_bases_while_a_norm_is_trained(load, tmp_path):
    model = attach(load(), config(modules_to_save=["norm"]))
    assert model_fingerprint(model) == model_fingerprint(load())
    model.add_adapter("two", config())
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(load(), tmp_path / "two")
    with torch.no_grad():
        assert not torch.equal(load()(IDS).logits, PeftModel.from_pretrained(load(), tmp_path / "two")(IDS).logits)
