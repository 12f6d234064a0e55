"""What passed in silence once, with wrong numbers or with an argument ignored: now right, or refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaForCausalLM

import moka_core
from conversion import load_adapter, save_adapter
from moka_core import AdapterError, ConfigError, ModelError
from moka_core.oracle import dense_delta
from moka_torch import attach, export_adapter, import_adapter, merge, model_fingerprint
from moka_torch.loading import adapted_layers
from tests.moka_torch.conftest import IDS, logits, random_adapter, tiny_config
from tests.moka_torch.test_torch_review import adapted, config
from tests.moka_torch.tolerances import relative


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()


# ---- more than ten shapes: as text, 10 comes before 2


@pytest.mark.parametrize("changes", [{}, {"scaling": "stable"}, {"gate": "uniform", "scaling": "stable"}], ids=str)
def test_a_mixture_of_eleven_shapes_is_what_the_file_says(load, tmp_path, changes):
    core = moka_core.MokaConfig(r=12, num_shapes=11, dropout=0.0, target_modules=("down_proj",), **changes)
    adapter = random_adapter(load(), core)
    save_adapter(adapter, tmp_path / "adapter")
    for model in (PeftModel.from_pretrained(load(), tmp_path / "adapter"), import_adapter(load(), adapter)):
        again = export_adapter(model)
        for path, layer in adapted_layers(model, "default").items():
            assert len(layer.moka_plan["default"].groups) == 11
            expected = dense_delta(adapter.layers[path], adapter.layer_config(path))
            assert relative(layer.get_delta_weight("default"), torch.tensor(expected)) <= 1e-6  # measured: 9e-8
            x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
            found = (layer(x) - layer.base_layer(x)).detach()
            assert relative(found, x @ torch.tensor(expected).float().T) <= 1e-5
            for (_, one), (_, other) in zip(again.layers[path].tensors(), adapter.layers[path].tensors(), strict=True):
                assert np.array_equal(one, other)


# ---- factors that are elsewhere


def test_an_offloaded_model_computes_what_it_computed_before(load):
    model = adapted(load())
    wanted = logits(model)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(logits(offloaded), wanted)


def test_factors_without_values_are_not_computed_with(load):
    model = get_peft_model(load(), config(), low_cpu_mem_usage=True)
    for use in (
        lambda: logits(model),
        model.merge_adapter,
        lambda: merge(model, dtype=torch.float32),
        lambda: model.merge_and_unload(),
    ):
        with pytest.raises(ModelError, match="no values yet: its factors are on the meta device"):
            use()


# ---- what trains


@pytest.mark.parametrize("way", ["inference", "added", "loaded", "low memory", "combined", "imported"])
def test_on_a_bfloat16_base_only_the_active_adapter_trains(load, tmp_path, way):
    base = load(dtype=torch.bfloat16)
    if way == "inference":
        model, name = get_peft_model(base, config(inference_mode=True)), "default"
    else:
        model, name = adapted(base), "other"
        model.save_pretrained(tmp_path)
        if way == "added":
            model.add_adapter("other", config())
        elif way in ("loaded", "low memory"):
            model.load_adapter(tmp_path, "other", low_cpu_mem_usage=way == "low memory")
        elif way == "combined":
            model.add_weighted_adapter(["default"], [2.0], "other")
        else:
            import_adapter(model, export_adapter(model), "other")
    for layer in adapted_layers(model, name).values():
        assert layer.moka_gate_logits[name].dtype == torch.float32
        assert not any(tensor.requires_grad for tensor in layer.tensors(name).values())
        if name != "default":
            assert all(tensor.requires_grad for tensor in layer.tensors("default").values())


def test_a_seed_keeps_the_start_that_the_config_asks_for(load):
    models = [attach(load(), config(), seed=3) for _ in range(2)]
    deltas = [next(iter(adapted_layers(model, "default").values())).get_delta_weight("default") for model in models]
    assert deltas[0].abs().max() > 0
    assert torch.equal(*deltas)


# ---- loading and saving


def test_a_merged_adapter_takes_no_other_numbers(load, tmp_path):
    model = adapted(load())
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"is merged, and could not be unmerged .* unmerge_adapter first"):
        model.load_adapter(tmp_path, "default")


def test_a_float64_adapter_is_saved_so_that_it_can_be_loaded(load, tmp_path):
    model = adapted(load().double())
    with pytest.warns(UserWarning, match="is in float64, .* saved in float32"):
        model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = PeftModel.from_pretrained(load(), tmp_path)
    assert relative(logits(again), logits(model)) <= 1e-5


@pytest.mark.parametrize(("field", "value"), [("scale", 9.0), ("scaling", "stable"), ("gate", "uniform"), ("r", 4)])
def test_a_config_that_was_changed_later_is_not_saved(load, tmp_path, field, value):
    model = adapted(load())
    setattr(model.peft_config["default"], field, value)
    for use in (lambda: model.save_pretrained(tmp_path / "out"), lambda: export_adapter(model)):
        with pytest.raises((AdapterError, ConfigError), match=r"changed after it was attached|expected 4 terms"):
            use()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_adapter_inside_of_another_method_is_not_saved_under_a_path_of_its_own(load, tmp_path):
    base = load()
    base.add_adapter(config(), "mine")
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "theirs")
    base.set_adapter("mine")
    with pytest.raises(AdapterError, match=r"q_proj\.base_layer: lies inside an adapter of another method"):
        base.save_pretrained(tmp_path)


def test_a_merged_head_is_not_saved_beside_its_adapter(load, tmp_path):
    model = adapted(load(), target_modules=["q_proj", "lm_head"])
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"lm_head: the output head is merged, .* unmerge_adapter first"):
        model.save_pretrained(tmp_path)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)


def test_checkpoint_wrappers_are_no_part_of_a_path(load, tmp_path):
    model = adapted(load())
    wanted, fingerprint = logits(model), model_fingerprint(model)
    layers = model.base_model.model.model.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    assert model_fingerprint(model) == fingerprint
    model.save_pretrained(tmp_path)
    assert set(load_adapter(tmp_path).layers) == set(export_adapter(model).layers)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), wanted)


def test_a_compiled_base_is_refused(load):
    with pytest.raises(ConfigError, match=r"was compiled by torch.compile.* attach the adapter first"):
        get_peft_model(torch.compile(load()), config())


# ---- merging


@pytest.mark.parametrize("way", ["merge", "merge_and_unload", "merge_adapter"])
def test_merging_a_tied_head_unties_it_first(tied, way):
    embedding = tied.model.embed_tokens.weight.detach().clone()
    model = adapted(tied, target_modules=["lm_head"])
    wanted = logits(model)
    with pytest.warns(UserWarning, match="is given a weight of its own"):
        found = merge(model) if way == "merge" else getattr(model, way)() or model
    assert relative(logits(found), wanted) <= 1e-5
    assert torch.equal(tied.model.embed_tokens.weight, embedding)
    assert not tied.config.tie_word_embeddings


def test_several_adapters_are_merged_with_one_rounding(load):
    model = adapted(load(dtype=torch.bfloat16))
    model.add_adapter("two", config(scale=2.0))
    model.base_model.set_adapter(["default", "two"])
    layer = next(iter(adapted_layers(model, "default").values()))
    exact = layer.get_base_weight().double()
    for name in ("default", "two"):
        exact = exact + layer.get_delta_weight(name)
    model.merge_adapter()
    assert torch.equal(layer.get_base_weight(), exact.float().bfloat16())


def test_merging_into_float16_stops_before_anything_is_merged(load):
    model = adapted(load(dtype=torch.float16))
    last = list(adapted_layers(model, "default").values())[-1]
    with torch.no_grad():
        last.moka_factor_a["default"]["0"] *= 1e9
    with pytest.raises(AdapterError, match=r"v_proj: an entry of W \+ ΔW is .* torch.float16 cannot hold"):
        merge(model)
    assert len(adapted_layers(model, "default")) == 4
    assert not any(layer.merged for layer in adapted_layers(model, "default").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_what_no_dtype_holds_is_refused(load, dtype):
    model = adapted(load())
    for layer in adapted_layers(model, "default").values():
        with torch.no_grad():
            layer.moka_factor_a["default"]["0"] *= 1e25
            layer.moka_factor_b["default"]["0"] *= 1e25
    with pytest.raises(AdapterError, match=f"which {dtype} cannot hold"):
        merge(model, dtype=dtype)


def test_merging_drops_no_adapter_of_another_method(load):
    base = get_peft_model(load(), LoraConfig(target_modules=["k_proj"], init_lora_weights=False)).base_model.model
    with pytest.raises(AdapterError, match=r"k_proj: has an adapter of another method \(Linear\)"):
        merge(adapted(base), dtype=torch.float32)


def test_an_unknown_name_is_merged_nowhere(load):
    model = adapted(load())
    for use in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="adapter_names: expected some of default; got typo"):
            use(adapter_names=["typo"])


@pytest.mark.parametrize("execution", ["factored", "merged"])
def test_an_adapter_beside_a_merged_one_is_applied(load, execution):
    model = adapted(load(), execution=execution)
    model.add_adapter("two", config(scale=2.0, execution=execution))
    model.base_model.set_adapter(["default", "two"])
    wanted = logits(model)
    model.merge_adapter(["default"])
    assert relative(logits(model), wanted) <= 1e-5


def test_unmerging_from_four_bits_says_that_it_is_not_exact(load):
    model = adapted(load(4))
    with pytest.warns(UserWarning, match="encodes it again"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="does not bring back the weight"):
        model.unmerge_adapter()


# ---- compiled, without gradients


@pytest.mark.parametrize("bits", [None, 4])
def test_inference_is_compiled_into_one_graph(load, bits):
    model = adapted(load(bits))
    layer = next(iter(adapted_layers(model, "default").values()))
    x = torch.randn(2, 3, layer.in_features)
    for grad in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        with grad():
            torch.compiler.reset()
            for execution in ("factored", "merged"):
                found = torch.compile(layer, backend="eager", fullgraph=True)(x, execution=execution)
                assert torch.equal(found, layer(x, execution=execution))


def test_weighted_adapters_take_no_argument_that_they_would_ignore(load):
    with pytest.raises(ConfigError, match="svd_rank: belong to approximate combinations"):
        adapted(load()).add_weighted_adapter(["default"], [1.0], "sum", svd_rank=4)


def test_a_layer_of_no_method_of_ours_is_left_alone(tied):
    """`untie` touches adapted layers only."""
    model = adapted(tied, target_modules=["q_proj"])
    model.merge_adapter()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert isinstance(tied.lm_head, nn.Linear)
    assert logits(model).shape == (*IDS.shape, 96)
