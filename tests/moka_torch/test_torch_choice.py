"""What a MokaConfig of PEFT chooses: layers, their own settings, and what else is trained."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from conversion.adapter_folder import load_adapter
from moka_core import AdapterError, ConfigError, TargetError, plan_layer
from moka_torch import MokaConfig, MokaLinear, export_adapter, import_adapter
from moka_torch.loading import adapted_layers
from tests.moka_torch.conftest import IDS, logits, tiny_config

Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def config(**changes) -> MokaConfig:
    values = {"r": 4, "num_shapes": 2, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    return MokaConfig(**{**values, **changes})


def listed(value):
    return value if isinstance(value, str | int) else sorted(value)


def adapted(load, **changes) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(load(), config(**changes)).eval()


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"exclude_modules": ["v_proj"]}, {"0.q", "1.q"}),
        ({"exclude_modules": r".*\.0\..*"}, {"1.q", "1.v"}),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"0.v", "1.q", "1.v"}),
        ({"layers_to_transform": 0}, {"0.q", "0.v"}),
        ({"layers_to_transform": 1}, {"1.q", "1.v"}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"0.q", "0.v"}),
        ({"layers_to_transform": (0, 1), "exclude_modules": {"q_proj"}}, {"0.v", "1.v"}),
        ({"layers_to_transform": range(1, 2)}, {"1.q", "1.v"}),
        ({"layers_to_transform": 1, "target_modules": [Q0, V1]}, {"1.v"}),
        ({"layers_to_transform": [1, 0], "layers_pattern": ["layers"], "target_modules": ["q_proj"]}, {"0.q", "1.q"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*(mlp|k_proj|o_proj|\.0\.).*"}, {"1.q", "1.v"}),
        ({"modules_to_save": ["model.layers.1.self_attn.v_proj"]}, {"0.q", "0.v", "1.q"}),
    ],
)
def test_the_layers_that_are_chosen(load, changes, layers, tmp_path):
    model = adapted(load, **changes)
    found = {path.split(".")[2] + "." + path.rpartition(".")[2][0] for path in adapted_layers(model, "default")}
    assert found == layers
    kept = model.peft_config["default"]
    given = config(**changes)
    for name in changes:
        assert getattr(kept, name) == getattr(given, name)
    model.save_pretrained(tmp_path)
    read = MokaConfig.from_pretrained(tmp_path)
    for name in set(changes) - {"target_modules"}:  # of a saved adapter these are its layers' paths
        assert listed(getattr(read, name)) == listed(getattr(given, name))


def test_an_exclusion_that_excludes_nothing_is_noticed_and_one_that_excludes_all_is_refused(load):
    with pytest.warns(UserWarning, match=r"exclude_modules=\['x_proj'\] but no modules were excluded"):
        adapted(load, exclude_modules=["x_proj"])
    with pytest.raises(TargetError, match=r"all of the 4 .* excluded, by exclude_modules=\['q_proj', 'v_proj'\]$"):
        adapted(load, exclude_modules=["q_proj", "v_proj"])
    with pytest.raises(TargetError, match=r"by exclude_modules='.*' and layers_to_transform=\[0\]$"):
        adapted(load, exclude_modules=r".*\.0\..*", layers_to_transform=[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": [5]}, r"layers_to_transform: expected some of 0-1, .*layers\.0\.self_attn.*; got 5$"),
        ({"layers_to_transform": [1, 5, 9]}, "layers_to_transform: expected some of 0-1, .*; got 5, 9$"),
        ({"layers_to_transform": 2}, "layers_to_transform: expected some of 0-1, .*; got 2$"),
        (
            {"layers_to_transform": [0], "layers_pattern": "blocks"},
            "layers_pattern: 'blocks' is no numbered list on the paths of .*, such as 'model.layers.0.self_attn",
        ),
        ({"layers_to_transform": [0], "layers_pattern": ["layers", "h"]}, "layers_pattern: 'h' is no numbered list"),
    ],
)
def test_numbers_of_layers_that_are_not_there_are_named(load, changes, message):
    with pytest.raises(TargetError, match=message):
        adapted(load, **changes)


def test_layers_without_a_number_cannot_be_chosen_by_one():
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    with pytest.raises(TargetError, match=r"found no number of a layer on the paths of .*such as 'q_proj'; name what"):
        get_peft_model(model, config(target_modules=["q_proj"], layers_to_transform=[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude_modules": [""]}, "exclude_modules: expected names, none of them empty"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save: expected a list of names; got 'lm_head'. Write \['lm_head"),
        ({"modules_to_save": [""]}, "modules_to_save: expected names, none of them empty"),
        ({"layers_to_transform": [True]}, "layers_to_transform: expected whole numbers >= 0"),
        ({"layers_to_transform": -1}, "layers_to_transform: expected whole numbers >= 0"),
        ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "with target_modules as one string"),
        ({"layers_pattern": "layers"}, "layers_pattern: says which layers layers_to_transform counts"),
        ({"bias": "lora_only"}, "bias: expected one of none, all, moka_only; got 'lora_only'"),
        ({"init_weights": "gaussian"}, "init_weights: expected true or false"),
        ({"r_pattern": {"q_proj": 0}}, r"r_pattern\[q_proj\]: expected a whole number >= 1"),
        ({"r_pattern": [("q_proj", 2)]}, "r_pattern: expected {pattern: value"),
        ({"scale_pattern": {"q_proj": 0.0}}, r"scale_pattern\[q_proj\]: expected a number other than 0"),
        ({"scale_pattern": {"(": 2.0}}, "scale_pattern: '\\(' is no regular expression"),
        ({"scale_pattern": {"": 2.0}}, "scale_pattern: expected a layer's path"),
        ({"shapes_pattern": {"q_proj": []}}, r"shapes_pattern\[q_proj\]: expected at least one"),
        ({"shapes_pattern": {"q_proj": [[1, 2]]}}, r"shapes_pattern\[q_proj\]: expected \[copies"),
        (
            {"shapes_pattern": {"q_proj": [[1, 4, 8, 2, 2]]}, "identity": "a"},
            "identity='a' needs a square factor_a",
        ),
    ],
)
def test_what_a_config_refuses(fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


PATTERNS = {
    "r_pattern": {"v_proj": 3},
    "shapes_pattern": {r"layers\.1\..*q_proj": [[1, 64, 8, 1, 8], [1, 2, 4, 32, 16]]},
    "scale_pattern": {Q0: 0.5, "v_proj": 3.0},
}


def test_patterns_give_layers_terms_shapes_and_scales_of_their_own(load):
    model = adapted(load, **PATTERNS)
    layers = adapted_layers(model, "default")
    plain = config(scale=1.0).to_core()
    assert layers[Q0].moka_plan["default"] == plan_layer(plain, 64, 64)
    assert layers[Q0].scaling == {"default": 0.5}
    assert layers[V1].moka_plan["default"] == plan_layer(dataclasses.replace(plain, r=3), 32, 64)
    assert layers[V1].scaling == {"default": 3.0}
    own = layers["model.layers.1.self_attn.q_proj"]
    assert [group.to_list() for group in own.moka_plan["default"].groups] == PATTERNS["shapes_pattern"][
        r"layers\.1\..*q_proj"
    ]
    assert own.scaling == {"default": 1.0}
    # and the scale is in what is computed
    twice = adapted(load, **{**PATTERNS, "scale_pattern": {"q_proj": 2.0, "v_proj": 3.0}})
    other = adapted_layers(twice, "default")[Q0]
    other.load_state_dict(layers[Q0].state_dict())
    torch.testing.assert_close(other.get_delta_weight("default"), 4 * layers[Q0].get_delta_weight("default"))


def test_an_adapter_with_patterns_goes_through_a_folder_bit_for_bit(load, tmp_path):
    model = adapted(load, **PATTERNS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    adapter = load_adapter(tmp_path)
    exported = export_adapter(model)
    assert adapter.config == exported.config
    assert torch.equal(logits(import_adapter(load(), adapter).eval()), logits(model))
    assert adapter.layer_config(V1).r == 3
    assert adapter.layer_config(V1).scale == 3.0


def test_patterns_that_match_nothing_or_contradict_are_refused(load):
    for name, value in (("r_pattern", 2), ("scale_pattern", 2.0), ("shapes_pattern", [[4, 8, 8, 8, 8]])):
        with pytest.raises(ConfigError, match=f"{name}: 'k_proj' matches none of the 4 adapted layers"):
            adapted(load, **{name: {"k_proj": value}})
    with pytest.raises(ConfigError, match=r"r_pattern: expected one pattern for a layer; q_proj and self_attn.q_proj"):
        adapted(load, r_pattern={"q_proj": 2, "self_attn.q_proj": 3})
    with pytest.raises(ConfigError, match=r"the shapes for .*v_proj multiply to 64x64; the layer is 32x64"):
        adapted(load, shapes_pattern={"v_proj": [[4, 8, 8, 8, 8]]})
    with pytest.raises(ConfigError, match="r_pattern gives it 2 terms, shapes_pattern 4"):
        adapted(load, shapes_pattern={"q_proj": [[4, 8, 8, 8, 8]]}, r_pattern={"q_proj": 2})


@pytest.mark.parametrize("bias", ["all", "moka_only"])
def test_biases_are_trained_saved_and_loaded(tmp_path, bias):
    def base():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))

    model = get_peft_model(base(), MokaConfig(r=2, num_shapes=1, target_modules=["0"], bias=bias, dropout=0.0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name}
    assert len(trained) == (2 if bias == "all" else 1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    optimiser.step()
    assert {n for n, p in model.named_parameters() if "bias" in n and not torch.equal(p, before[n])} == trained
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), model.eval()(x))
    with pytest.raises(AdapterError, match="bias make it train more than mixtures"):
        export_adapter(model)
    with pytest.raises(AdapterError, match="bias make this adapter train more than mixtures; only PEFT can load it"):
        load_adapter(tmp_path)


def test_modules_to_save_are_trained_saved_and_loaded_and_stay_with_peft(load, tmp_path):
    model = adapted(load, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    assert [p.requires_grad for p in head.modules_to_save["default"].parameters()] == [True]
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    again = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load()))
    with pytest.raises(AdapterError, match="modules_to_save make it train more than mixtures"):
        export_adapter(model)
    with pytest.raises(AdapterError, match="modules_to_save make this adapter train more than mixtures"):
        load_adapter(tmp_path)


def test_modules_to_save_that_are_not_there_are_refused(load, tmp_path):
    with pytest.raises(
        TargetError, match="modules_to_save: 'lm_haed' matches no module of this model; did you mean 'lm_h"
    ):
        adapted(load, modules_to_save=["lm_haed"])
    with pytest.raises(TargetError, match="modules_to_save: 'scorer' matches no module of this model"):
        adapted(load, modules_to_save=["lm_head", "scorer"])
    adapted(load).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modules_to_save": ["scorer"]}))
    with pytest.raises(TargetError, match="modules_to_save: 'scorer' matches no module"):
        PeftModel.from_pretrained(load(), tmp_path)


def test_the_heads_that_peft_saves_by_task_need_not_all_be_there(tmp_path):
    def base():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny_config(pad_token_id=0)).eval()

    model = get_peft_model(base(), config(task_type="SEQ_CLS")).eval()
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(
        TargetError, match="modules_to_save: 'scorer' matches no module of this model; did you mean 'sc"
    ):
        get_peft_model(base(), config(task_type="SEQ_CLS", modules_to_save=["scorer"]))


def test_a_bias_that_is_not_there_is_not_trained_in_silence(load):
    with pytest.warns(UserWarning, match="bias='all': this model has no bias, so that none is trained"):
        adapted(load, bias="all")
    with pytest.warns(UserWarning, match="bias='moka_only': the adapted layers have no bias, so that none is trained"):
        adapted(load, bias="moka_only")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config(target_modules=["0"], bias="moka_only"))


def test_the_start_at_random_is_no_start_at_zero(load):
    torch.manual_seed(0)
    for layer in adapted_layers(get_peft_model(load(), config()), "default").values():
        assert isinstance(layer, MokaLinear)
        assert layer.get_delta_weight("default").abs().max() > 1e-3
        assert all(tensor.abs().max() > 0 for tensor in layer.tensors("default").values())
    model = get_peft_model(load(), config(init_weights=True)).eval()
    assert torch.equal(model(IDS).logits, load()(IDS).logits)


def test_a_config_survives_pickle_and_deepcopy_before_and_after_it_was_used(load):
    given = config(**PATTERNS, exclude_modules=["k_proj"], bias="moka_only")
    used = config(**PATTERNS)
    get_peft_model(load(), used)
    for one in (given, used):
        for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert again == one
            assert vars(again) == vars(one)
            assert again.as_given() == one.as_given()
    fresh = used.as_given()
    fresh.base_model_name_or_path = None  # written by PEFT
    assert fresh == config(**PATTERNS)


def test_a_model_of_mixed_methods_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'MOKA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(model, config(target_modules=["0"]), mixed=True)
    mixed = get_peft_model(model, LoraConfig(target_modules=["0"]), mixed=True)
    with pytest.raises(ValueError, match="'MOKA' is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("other", config(target_modules=["1"]))


def test_biases_and_embeddings_that_a_file_brings_along_are_named_and_loaded(load, tmp_path):
    model = adapted(load)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight.mul_(2)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"brings lm_head\.weight, model\.embed_tokens\.weight of the base"):
        again = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterError, match=r"unexpected tensor .*embed_tokens"):
        load_adapter(tmp_path)
