"""What would be a wrong number or no adapter at all, in silence, is refused, by a message that says what to do."""

from __future__ import annotations

import copy
import doctest
import json
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_config, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel

import moka_core
import moka_torch.targets
from conversion import load_adapter
from moka_core import AdapterError, ConfigError, TargetError
from moka_torch import MokaConfig
from moka_torch.combine import check_weights
from moka_torch.config import OPTIONAL_FIELDS, REQUIRED_FIELDS, UnknownFieldError
from moka_torch.loading import adapted_layers
from moka_torch.targets import plan_stated, plan_targets
from moka_torch.uncalled import uncalled_layers
from tests.moka_torch.conftest import logits
from tests.moka_torch.tolerances import relative

Q0 = "model.layers.0.self_attn.q_proj"


def config(**changes) -> MokaConfig:
    values = {"r": 3, "num_shapes": 2, "dropout": 0.0, "init_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return MokaConfig(**{**values, **changes})


# -- layers whose weight is read past the adapter


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.enc(x))


def mamba() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=32, **sizes)).eval()


def wavlm() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    conv = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    return WavLMModel(WavLMConfig(**sizes, **conv, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)).eval()


UNCALLED = {
    "attention": (Encoder, ["enc.self_attn.out_proj"], (2, 3, 8), "nn.MultiheadAttention reads its weight"),
    "fast path": (Encoder, ["linear1", "linear2"], (2, 3, 8), r"set_fastpath_enabled\(False\) makes it be called"),
    "mamba": (mamba, ["dt_proj"], None, "models of type 'mamba' read its weight"),
    "wavlm": (wavlm, ["k_proj", "q_proj", "v_proj", "out_proj"], (1, 400), "models of type 'wavlm' read its weight"),
}


@pytest.mark.parametrize(("make", "targets", "shape", "reason"), UNCALLED.values(), ids=UNCALLED.keys())
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers
def test_a_layer_whose_weight_is_read_and_not_called_is_refused(monkeypatch, make, targets, shape, reason):
    model = make()
    with pytest.raises(TargetError, match=rf"{re.escape(targets[0])}.*: .*{reason}.*; an adapter there would do nothi"):
        get_peft_model(model, config(target_modules=targets))
    assert not any("moka" in name for name, _ in model.named_parameters())

    monkeypatch.setattr(moka_torch.targets, "uncalled_layers", lambda model: {})  # and indeed:
    x = torch.arange(6)[None] if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(1))
    adapted = get_peft_model(model, config(target_modules=targets, scale=10.0)).eval()
    assert adapted_layers(adapted, "default")
    with torch.no_grad():
        out = adapted(x)
        with adapted.disable_adapter():
            base = adapted(x)
    assert torch.equal(
        out if isinstance(out, torch.Tensor) else out[0], base if isinstance(base, torch.Tensor) else base[0]
    )


@pytest.mark.parametrize("make", [Encoder, mamba, wavlm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_linear_leaves_them_out_and_says_so_and_all_that_is_adapted_learns(make):
    base = make()
    uncalled = set(uncalled_layers(base))
    assert uncalled
    with pytest.warns(
        UserWarning, match=r"target_modules: 'all-linear' leaves out .* \(and \d more\): .* reads? its weig"
    ):
        model = get_peft_model(base, config(target_modules="all-linear"))
    layers = adapted_layers(model, "default")
    assert layers
    assert not uncalled & set(layers)
    x = torch.randn(1, 400) if make is wavlm else torch.arange(6)[None] if make is mamba else torch.randn(2, 3, 8)
    out = model.train()(x)
    (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()
    for path, layer in layers.items():
        for name, tensor in layer.tensors("default").items():
            assert tensor.grad is not None, (path, name)
            assert tensor.grad.abs().max() > 0, (path, name)


def test_what_is_excluded_or_called_after_all_is_not_refused(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        excluding = config(
            target_modules=r".*(fc|out_proj|linear\d)", exclude_modules=["out_proj", "enc.linear1", "linear2"]
        )
        assert set(adapted_layers(get_peft_model(Encoder(), excluding), "default")) == {"fc"}
        last = get_peft_model(Encoder(batch_first=False), config(target_modules=["linear1", "linear2"]))
        assert set(adapted_layers(last, "default")) == {"enc.linear1", "enc.linear2"}
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    x = torch.randn(2, 3, 8)
    model = get_peft_model(Encoder(), config(target_modules=["linear1", "linear2"])).eval()
    with torch.no_grad():
        moved = model(x)
        with model.disable_adapter():
            assert relative(moved, model(x)) > 1e-3


def test_a_saved_adapter_of_such_a_layer_is_refused_too():
    stated = {"enc.self_attn.out_proj": "8x8", "fc": "8x8"}
    with pytest.raises(TargetError, match=r"enc\.self_attn\.out_proj: nn\.MultiheadAttention reads its weight"):
        plan_stated(config().to_core(), stated, Encoder())
    with pytest.raises(TargetError, match="MultiheadAttention"):
        get_peft_model(Encoder(), config(layers=stated))
    with pytest.raises(TargetError, match="MultiheadAttention"):
        plan_targets(config(target_modules=["out_proj"]).to_core(), nn.MultiheadAttention(8, 2))
    assert doctest.testmod(moka_torch.targets).failed == 0


class Mixer(nn.Module):
    """A model that says it is of some type, with the layers that PEFT refuses to LoRA in Mamba."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.config = type(
            "Config", (), {"model_type": model_type, "to_dict": lambda self: {"model_type": model_type}}
        )()
        self.mixer = nn.ModuleDict(
            {"out_proj": nn.Linear(4, 4), "conv1d": nn.Conv1d(4, 4, 1), "in_proj": nn.Linear(4, 4)}
        )


@pytest.mark.parametrize("model_type", ["falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"])
@pytest.mark.parametrize("leaf", ["out_proj", "conv1d"])
def test_what_peft_refuses_to_lora_in_mamba_is_refused(model_type, leaf):
    with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
        get_peft_model(Mixer(model_type), LoraConfig(target_modules=[leaf]))
    with pytest.raises(TargetError, match=rf"mixer\.{leaf}: "):
        get_peft_model(Mixer(model_type), config(target_modules=[leaf]))
    inside = nn.ModuleDict({"language_model": Mixer(model_type)})  # as in a model of text and images
    with pytest.raises(TargetError, match=rf"language_model\.mixer\.{leaf}: "):
        get_peft_model(inside, config(target_modules=[leaf]))
    get_peft_model(Mixer(model_type), config(target_modules=["in_proj"]))


# -- files


@pytest.fixture
def folder(load, tmp_path):
    torch.manual_seed(0)
    get_peft_model(load(), config(scale=3.0)).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, remove=(), **changes) -> dict:
    file = folder / "adapter_config.json"
    values = {**json.loads(file.read_text()), **changes}
    values = {name: value for name, value in values.items() if name not in remove}
    file.write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("name", REQUIRED_FIELDS)
def test_a_file_without_a_required_field_is_refused_by_every_reader(load, folder, name):
    values = edit(folder, remove=[name])
    with pytest.raises(ConfigError, match=f"adapter_config.json: missing {name}; a saved adapter states all"):
        MokaConfig.from_pretrained(folder)
    with pytest.raises(AdapterError, match=name):
        load_adapter(folder)
    if name == "peft_type":  # PEFT asks for it before it knows whose the file is
        with pytest.raises(KeyError, match="peft_type"):
            PeftModel.from_pretrained(load(), folder)
        with pytest.raises(TypeError, match=r"missing required keys: {'peft_type'}"):
            PeftConfig.from_pretrained(folder)
        return
    for read in (
        lambda: PeftModel.from_pretrained(load(), folder),
        lambda: PeftConfig.from_pretrained(folder),  # as transformers' loader does
        lambda: get_peft_config(values),
    ):
        with pytest.raises(ConfigError, match=f"adapter_config.json: missing {name};"):
            read()


def test_every_other_field_may_be_left_out_as_the_format_says(load, folder):
    expected = logits(PeftModel.from_pretrained(load(), folder))
    others = set(edit(folder)) - set(REQUIRED_FIELDS)
    assert others == {
        "auto_mapping", "base_fingerprint", "base_model_name_or_path", "base_quantisation", "checksum",
        "inference_mode", "peft_version", "revision", "task_type",
    }  # fmt: skip
    others -= {"base_fingerprint", "base_quantisation", "checksum"}  # sealed, or the seal
    assert not set(OPTIONAL_FIELDS) & set(REQUIRED_FIELDS)
    edit(folder, remove=others)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), folder)), expected)
    assert PeftConfig.from_pretrained(folder) == MokaConfig.from_pretrained(folder)
    load_adapter(folder)


def test_all_that_is_missing_is_listed_and_the_rest_is_said_first(load, folder):
    edit(folder, remove=["scale", "gate", "layers"])
    with pytest.raises(ConfigError, match="missing gate, layers, scale;"):
        PeftModel.from_pretrained(load(), folder)
    edit(folder, scal=3.0)
    with pytest.raises(ConfigError, match=r"unknown 'scal' \(did you mean 'scale'\?\)"):
        PeftModel.from_pretrained(load(), folder)
    edit(folder, format_version=3)
    with pytest.raises(ConfigError, match=r"format_version: expected 2; got 3\. A later version of moka wrote this"):
        PeftModel.from_pretrained(load(), folder)
    edit(folder, peft_type="LORA")
    with pytest.raises(ConfigError, match="expected peft_type 'MOKA'; got 'LORA', another method"):
        MokaConfig.from_pretrained(folder)


def test_an_unknown_key_is_refused_through_peft_s_own_class_too(folder):
    edit(folder, use_dora=True)
    with pytest.raises(ConfigError, match="MokaConfig has no such field: use_dora has no counterpart"):
        PeftConfig.from_pretrained(folder)


def test_a_plan_that_is_missing_is_not_planned_anew(load, folder):
    edit(folder, shapes={"64x64": edit(folder)["shapes"]["64x64"]})
    with pytest.raises(ConfigError, match=r"shapes lacks 32x64, the plan of model\..*v_proj and of 1 more$"):
        PeftModel.from_pretrained(load(), folder)
    with pytest.raises(AdapterError, match="does not stand in shapes"):
        load_adapter(folder)


def test_a_dictionary_of_a_user_may_leave_out_what_it_likes():
    given = get_peft_config({"peft_type": "MOKA", "r": 4, "task_type": "CAUSAL_LM", "inference_mode": False})
    assert given == MokaConfig(r=4, task_type="CAUSAL_LM")
    with pytest.raises(UnknownFieldError, match="lora_alpha is scale here"):
        get_peft_config({"peft_type": "MOKA", "lora_alpha": 4})


@pytest.mark.parametrize(
    "given",
    [{"scale": 9}, {"r": 4}, {"gate": "uniform"}, {"dropout": 0.5}, {"target_modules": ("k_proj",)}, {"bias": "all"}],
    ids=str,
)
def test_a_setting_given_beside_a_file_may_not_contradict_it(load, folder, given):
    name = next(iter(given))
    for read in (MokaConfig.from_pretrained, lambda *a, **kw: PeftModel.from_pretrained(load(), *a, **kw)):
        with pytest.raises(
            ConfigError, match=rf"{name}: got .*, but adapter_config.json has .*pass that on as config="
        ):
            read(folder, **given)


def test_a_setting_given_as_it_stands_in_the_file_is_let_pass(load, folder):
    read = MokaConfig.from_pretrained(
        folder, scale=3, r=3, target_modules=("q_proj", "v_proj"), gate=None, execution="merged"
    )
    assert (read.scale, read.execution) == (3.0, "merged")
    edit(folder, remove=["scale"])
    with pytest.raises(ConfigError, match="missing scale"):  # and does not stand in for the file
        MokaConfig.from_pretrained(folder, scale=3.0)
    edit(folder, scale=3.0)
    read = MokaConfig.from_pretrained(folder)
    read.scale = 6.0  # what a caller says on the config itself counts
    plain = adapted_layers(PeftModel.from_pretrained(load(), folder), "default")
    twice = adapted_layers(PeftModel.from_pretrained(load(), folder, config=read), "default")
    assert torch.equal(twice[Q0].get_delta_weight("default"), 2 * plain[Q0].get_delta_weight("default"))


@pytest.mark.parametrize(
    "change",
    [
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"target_modules": ["k_proj"]},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_another_choice_on_a_loaded_config_is_refused(load, folder, change):
    read = MokaConfig.from_pretrained(folder)
    used = MokaConfig.from_pretrained(folder)
    get_peft_model(load(), used)
    for one in (read, used, copy.deepcopy(read)):
        for name, value in change.items():
            setattr(one, name, value)
        for go in (lambda c: get_peft_model(load(), c), lambda c: PeftModel.from_pretrained(load(), folder, config=c)):
            with pytest.raises(ConfigError, match=rf"^{', '.join(change)}: changed on a config that states its layers"):
                go(one)


def test_a_loaded_config_can_be_given_fewer_layers(load, folder):
    edit(
        folder, exclude_modules=["k_proj"], layers_to_transform=[0, 1]
    )  # as PEFT writes it; unchanged, it is no matter
    read = MokaConfig.from_pretrained(folder)
    read.layers = {path: key for path, key in read.layers.items() if "q_proj" in path}
    assert set(adapted_layers(get_peft_model(load(), read), "default")) == set(read.layers)
    read.target_modules = ("q_proj", "v_proj")  # the same, as a tuple
    get_peft_model(load(), read)


# -- names that MoKA does not have


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rank_pattern", "rank_pattern is r_pattern here"),
        ("alpha_pattern", "alpha_pattern is scale_pattern here"),
        ("lora_alpha", r"lora_alpha is scale here, which multiplies ΔW as it is \(LoRA's factor is lora_alpha / r\)"),
        ("alpha", "alpha is scale here"),
        ("lora_dropout", "lora_dropout is dropout here"),
        ("use_rslora", 'use_rslora is scaling="stable" here'),
        ("init_lora_weights", "init_lora_weights is init_weights here"),
        ("use_dora", "use_dora has no counterpart; MoKA learns no magnitudes"),
        ("target_parameters", "target_parameters has no counterpart; MoKA goes on linear layers"),
        ("trainable_token_indices", "trainable_token_indices has no counterpart; modules_to_save trains an embedding"),
        ("layer_replication", "layer_replication has no counterpart"),
        ("eva_config", "eva_config has no counterpart; such a start"),
        ("lora_bias", 'lora_bias has no counterpart; bias="moka_only"'),
        ("megatron_core", "megatron_core is LoRA's, and has no counterpart"),
        ("use_effective_conv2d", "use_effective_conv2d is LoKr's, and has no counterpart"),
        ("dropuot", r"dropuot \(did you mean dropout\?\)"),
        ("num_shape", r"num_shape \(did you mean num_shapes\?\)"),
        ("zzz", r"zzz \(known: task_type, .*layers\)"),
    ],
)
def test_names_of_other_methods_are_answered_by_ours(name, message):
    with pytest.raises(TypeError, match=f"^MokaConfig has no such field: {message}"):
        MokaConfig(r=4, **{name: None})
    with pytest.raises(ConfigError, match=message):
        MokaConfig(**{name: None})


def test_every_name_of_lora_is_answered():
    names = set(LoraConfig.__dataclass_fields__) - set(MokaConfig.__dataclass_fields__)
    assert len(names) > 20
    with pytest.raises(TypeError) as caught:
        MokaConfig(**dict.fromkeys(names))
    said = str(caught.value)
    assert all(f" {name} " in said for name in names)
    assert "did you mean" not in said
    assert "known:" not in said


def test_the_help_of_a_config_says_what_every_field_is():
    for name, field in MokaConfig.__dataclass_fields__.items():
        if field.repr and name not in PeftConfig.__dataclass_fields__:
            assert f"\n        {name}: " in (MokaConfig.__doc__ or ""), name
    core = moka_core.MokaConfig.__dataclass_fields__
    assert set(core) <= set(MokaConfig.__dataclass_fields__)


# -- weighted sums


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1.0, -2.0]),
        torch.tensor([1, -2]),
        [torch.tensor(1.0, dtype=torch.bfloat16), np.float32(-2)],
        np.array([1.0, -2.0]),
        (np.int64(1), np.array(-2.0)),
        (1, Fraction(-2)),
    ],
    ids=str,
)
def test_weights_are_real_numbers_of_any_kind(weights):
    chosen = check_weights(["a", "b"], weights, {"a": 0, "b": 0})
    assert chosen == {"a": 1.0, "b": -2.0}
    assert {type(weight) for weight in chosen.values()} == {float}


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        (["a", "b"], [1.0, float("nan")], "weights: expected finite numbers; got nan"),
        (["a", "b"], torch.tensor([1.0, float("inf")]), r"weights: expected finite numbers; got tensor\(inf\)"),
        (["a", "b"], [1.0, 10**400], "weights: expected finite numbers; got 1000"),
        (["a", "b"], [1.0, "2"], "weights: expected numbers; got '2', a str"),
        (["a", "b"], [1.0, True], "weights: expected numbers; got True, a bool"),
        (["a", "b"], [1.0, None], "weights: expected numbers; got None"),
        (["a", "b"], [1.0, torch.ones(1)], r"weights: expected numbers; got tensor\(\[1.\]\), a Tensor"),
        (["a", "b"], [1.0, 1j], "weights: expected numbers; got 1j"),
        (["a", "b"], torch.ones(2, 1), "weights: expected a list of numbers, one an adapter; got tensor"),
        (["a", "b"], 2.0, "weights: expected a list of numbers, one an adapter; got 2.0"),
        ("ab", [1.0, 1.0], r"adapters: expected a list of names; got 'ab'. Write \['ab'\]"),
    ],
    ids=str,
)
def test_weights_that_are_no_numbers_are_named(adapters, weights, message):
    with pytest.raises(ConfigError, match=message):
        check_weights(adapters, weights, {"a": 0, "b": 0})


def test_a_sum_that_is_0_in_some_layers_is_the_sum_of_the_others(load, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load(), config(scale=2.0)).eval()
    model.add_adapter("two", config(r=2, num_shapes=1, target_modules=["v_proj", "down_proj"]))
    layers = adapted_layers(model, "default")
    layers[Q0].set_scale("default", 0.0)
    model.add_weighted_adapter(["default", "two"], torch.tensor([0.5, -1.0]), "sum")
    summed = adapted_layers(model, "sum")
    assert set(summed) == (set(layers) | set(adapted_layers(model, "two"))) - {Q0}
    for path, layer in summed.items():
        parts = ((0.5, "default"), (-1.0, "two"))
        wanted = sum(weight * layer.get_delta_weight(name) for weight, name in parts if name in layer.moka_plan)
        assert relative(layer.get_delta_weight("sum"), wanted) <= 1e-6, path
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "sum")), expected)
    assert set(load_adapter(tmp_path / "sum").layers) == set(summed)

    model.set_scale("default", 0.0)
    with pytest.raises(ConfigError, match="weights: the sum is 0"):
        model.add_weighted_adapter(["default"], [1.0], "nothing")
