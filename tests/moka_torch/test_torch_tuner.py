"""MoKA inside PEFT: config, registration, targets, names, training."""

from __future__ import annotations

import copy
import doctest
import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import LlamaForCausalLM

import moka_core
import moka_torch.config
import moka_torch.mixture
from conversion import save_adapter
from moka_core import AdapterError, ConfigError, TargetError, plan_model
from moka_torch import MokaConfig, MokaLinear, MokaModel, attach, import_adapter, model_fingerprint, register
from moka_torch.config import STATED_FIELDS, MokaPeftType
from tests.moka_torch.conftest import IDS, logits, random_adapter, tiny_config

CONFIG = {"r": 3, "num_shapes": 2, "target_modules": ["q_proj", "v_proj"]}


def adapted(model) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, MokaLinear)}


def test_registration_is_by_name_and_idempotent():
    for _ in range(2):
        register()
        assert PEFT_TYPE_TO_CONFIG_MAPPING["MOKA"] is MokaConfig  # type: ignore[index]
        assert PEFT_TYPE_TO_TUNER_MAPPING["MOKA"] is MokaModel  # type: ignore[index]
        assert PEFT_TYPE_TO_PREFIX_MAPPING["MOKA"] == "moka_"  # type: ignore[index]
    assert MokaPeftType.MOKA == "MOKA"
    assert hash(MokaPeftType.MOKA) == hash("MOKA")
    assert json.dumps({"peft_type": MokaPeftType.MOKA, "v": MokaPeftType.MOKA.value}) == (
        '{"peft_type": "MOKA", "v": "MOKA"}'
    )


def test_what_peft_reports(load):
    model = attach(load(), MokaConfig(**CONFIG))
    status = model.get_model_status()
    assert status.peft_types == {"default": "MOKA"}
    assert status.adapter_model_type == "MokaModel"
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert "moka.MokaLinear" in repr(model)
    assert "default: 2·(8x8) ⊗ (8x8)" in repr(model)


@pytest.mark.parametrize("module", [moka_torch.mixture, moka_torch.config])
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


def test_config_and_core_config_are_two_views_of_one():
    core = moka_core.MokaConfig(
        r=4, gate="uniform", scaling="stable", scale=2.0, dropout=0.0, zero_factor="a", identity="b",
        target_modules="all-linear", block_entries=16, num_shapes=1,
        shapes=moka_core.config.plans_from_dict({"8x12": [[4, 4, 6, 2, 2]]}),
    )  # fmt: skip
    config = MokaConfig.from_core(core, task_type="CAUSAL_LM", inference_mode=True)
    assert config.to_core() == core
    assert config.shapes == {"8x12": [[4, 4, 6, 2, 2]]}
    assert config.task_type == "CAUSAL_LM"
    assert MokaConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "hard"}, "gate: expected one of softmax, uniform; got 'hard'"),
        ({"r": 0}, "r: expected a whole number >= 1; got 0"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1"),
        ({"shapes": {"8x8": [[1, 2, 2, 2, 2]]}, "r": 1}, "a_out and b_out must multiply to 8"),
        ({"identity": "b"}, "zero_factor: factor 'b' is the fixed identity"),
        ({"target_modules": []}, "target_modules: expected at least one name"),
        ({"format_version": 3}, "format_version: expected 2; got 3. A later version of moka"),
        ({"base_fingerprint": 5}, "base_fingerprint: expected text or null; got 5"),
    ],
)
def test_config_is_validated_when_built(fields, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        MokaConfig(**fields)


@pytest.mark.parametrize(
    "name",
    [
        "rank_dropout",
        "use_dora",
        "target_parameters",
        "trainable_token_indices",
        "lora_alpha",
        "layer_replication",
        "init_lora_weights",
    ],
)
def test_what_is_not_supported_is_not_accepted(name, tmp_path):
    with pytest.raises(TypeError, match=name):
        MokaConfig(**{name: None})
    MokaConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: None}))
    with pytest.raises(ConfigError, match=f"adapter_config.json: unknown '{name}'"):
        MokaConfig.from_pretrained(tmp_path)


def test_config_round_trip_through_peft(tmp_path):
    config = MokaConfig(**CONFIG, shapes={"64x64": [[3, 8, 8, 8, 8]]}, base_fingerprint="ab")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MokaConfig)
    assert loaded == config


def test_a_config_is_the_models_own_until_another_model_needs_it_otherwise(load):
    config = MokaConfig(r=3, num_shapes=2)
    first = get_peft_model(load(), config)
    assert first.peft_config["default"] is config
    assert config.target_modules == ["q_proj", "v_proj"]
    assert set(config.shapes) == {"64x64", "32x64"}
    assert config.base_fingerprint == model_fingerprint(load())
    again = get_peft_model(load(), config)  # says the same there
    assert again.peft_config["default"] is config
    stated = copy.deepcopy(config)

    torch.manual_seed(5)
    other = get_peft_model(LlamaForCausalLM(tiny_config(num_hidden_layers=1, hidden_size=32)), config)
    own = other.peft_config["default"]
    assert own is not config
    assert set(own.shapes) == {"32x32", "16x32"}
    assert own.base_fingerprint == model_fingerprint(other) != config.base_fingerprint
    assert all(getattr(config, name) == getattr(stated, name) for name in STATED_FIELDS)
    fresh = config.as_given()
    assert fresh.target_modules is None
    assert fresh.shapes == fresh.layers == {}


@pytest.mark.parametrize("bits", [None, 4])
def test_training_moves_every_trainable_tensor_and_nothing_else(load, settings, bits):
    base = load(bits)
    model = import_adapter(base, random_adapter(base, settings))
    assert adapted(base) == set(plan_model(settings, linear_dims(load())))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("moka_" in name), name
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    trainable, _ = model.get_nb_trainable_parameters()
    plans = plan_model(settings, linear_dims(load()))
    assert trainable == sum(plan.trainable(settings) for plan in plans.values())


def linear_dims(model) -> dict[str, tuple[int, int]]:
    return {p: (m.out_features, m.in_features) for p, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("bits", [None, 4])
def test_a_fresh_adapter_changes_nothing_and_disabling_gives_the_base_back(load, settings, bits):
    expected = logits(load(bits))
    fresh = attach(load(bits), settings).eval()
    assert torch.equal(logits(fresh), expected)
    base = load(bits)
    model = import_adapter(base, random_adapter(base, settings)).eval()
    assert (logits(model) - expected).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["model.layers.1.mlp.up_proj", "v_proj"],
        r".*\.layers\.0\.(self_attn|mlp)(\..*)?",  # matches the containers and the activation too
        "all-linear",
        ["all-linear"],
    ],
    ids=str,
)
def test_targets_are_those_of_the_core(load, targets):
    config = MokaConfig(r=2, num_shapes=1, target_modules=targets)
    base = load()
    expected = set(plan_model(config.to_core(), linear_dims(base)))
    model = get_peft_model(base, config)
    assert adapted(base) == expected == set(model.targeted_module_names)
    assert model.peft_config["default"].target_modules == targets
    assert "lm_head" not in expected


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["q_prj"]}, TargetError, "'q_prj' matches no linear layer of this model; did you mean 'q_"),
        ({"target_modules": ["q_proj", "w1"]}, TargetError, "'w1' matches no linear layer"),
        ({"target_modules": ".*nothing"}, TargetError, "'.*nothing' matches no linear layer"),
        (
            {"target_modules": ["embed_tokens"]},
            TargetError,
            "model.embed_tokens: target_modules matches it, but it is a Embedding; supported are torch.nn.Linear",
        ),
        ({"target_modules": ["q_proj", "norm"]}, TargetError, "model.norm: .* it is a LlamaRMSNorm"),
        (
            {"shapes": {"9x9": [[3, 3, 3, 3, 3]]}},
            ConfigError,
            "no targeted layer is 9x9 .out x in.; the targeted layers are 32x64, 64x64",
        ),
    ],
)
def test_bad_targets_are_refused_and_leave_the_model_alone(load, fields, error, message):
    model = load()
    with pytest.raises(error, match=message):
        get_peft_model(model, MokaConfig(**{**CONFIG, **fields}))
    assert not adapted(model)
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_another_method_underneath_is_refused(load):
    model = get_peft_model(load(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(TargetError, match="q_proj: already carries an adapter of another"),
    ):
        get_peft_model(model, MokaConfig(**CONFIG))


def test_another_base_is_refused(load):
    other = load()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    config = MokaConfig(**CONFIG, base_fingerprint=model_fingerprint(load()))
    with pytest.raises(AdapterError, match="base_fingerprint: the adapter was trained on another base model"):
        get_peft_model(other, config)
    with pytest.raises(AdapterError, match="this model has no fingerprint"):
        get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}), config)
    get_peft_model(load(), config)


def test_another_base_is_told_before_the_layers_that_it_has_not(load, settings, tmp_path):
    deep = LlamaForCausalLM(tiny_config(num_hidden_layers=5))
    folder = save_adapter(random_adapter(deep, settings, fingerprint=model_fingerprint(deep)), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"\Abase_fingerprint: the adapter was trained on another base model"):
        PeftModel.from_pretrained(load(), str(folder))
    with pytest.raises(AdapterError, match=r"does not fit the model \(9 problems\)") as caught:
        PeftModel.from_pretrained(load(), str(folder), allow_other_base=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 8 + 1
    assert lines[-1] == "  and 1 more"


@pytest.mark.parametrize("name", ["0", "1", "12", "layers", "q_proj", "base_layer", "moka_factor_a"])
def test_adapter_names_that_peft_would_confuse_are_refused(load, name):
    """PEFT finds an adapter's tensors by ".name." in their path: "0" would cut layer 0 out of other adapters."""
    with pytest.raises(ConfigError, match=f"adapter_name: '{name}' is also part of the path"):
        get_peft_model(load(), MokaConfig(**CONFIG), adapter_name=name)
    model = attach(load(), MokaConfig(**CONFIG))
    with pytest.raises(ConfigError, match=f"adapter_name: '{name}' is also part of the path"):
        model.add_adapter(name, MokaConfig(**CONFIG))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(("name", "message"), [("a.b", "without dots"), ("", "without dots"), ("keys", "a method or")])
def test_other_unusable_adapter_names(load, name, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(load(), MokaConfig(**CONFIG), adapter_name=name)


def test_a_second_tuner_on_the_same_layers_does_not_overwrite(load):
    model = load()
    attach(model, MokaConfig(**CONFIG))
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ConfigError, match="already carries an adapter 'default'"),
    ):
        get_peft_model(model, MokaConfig(**CONFIG))


def test_state_dict_injection_is_refused(load):
    with pytest.raises(ConfigError, match="state_dict: MoKA takes the layers to adapt from the config"):
        peft.inject_adapter_in_model(MokaConfig(**CONFIG), load(), state_dict={})
    assert adapted(peft.inject_adapter_in_model(MokaConfig(**CONFIG), load()))


def test_unknown_architecture_needs_targets():
    class Config:
        def to_dict(self):
            return {"model_type": "unheard-of"}

    model = nn.Sequential(nn.Linear(8, 8))
    model.config = Config()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, MokaConfig(r=2))
    with pytest.raises(ConfigError, match="got None, which only a model can resolve"):
        MokaConfig(r=2).to_core()
