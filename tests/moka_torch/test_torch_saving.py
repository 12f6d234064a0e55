"""Folders: exact names and shapes, bit-equal reloading, strict loading."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

import moka_core
from conversion import load_adapter, save_adapter
from moka_core import AdapterError, ConfigError, plan_model
from moka_core.adapter import expected_tensors
from moka_torch import MokaConfig, MokaLinear, export_adapter, import_adapter
from moka_torch.fingerprint import quantisation
from tests.moka_torch.conftest import logits, random_adapter
from tests.moka_torch.test_torch_tuner import linear_dims

WEIGHTS = "adapter_model.safetensors"
CONFIGS = {
    "softmax": moka_core.MokaConfig(r=5, num_shapes=2, dropout=0.0, scaling="stable"),
    "uniform, identity a": moka_core.MokaConfig(r=3, identity="a", gate="uniform", block_entries=16, dropout=0.1),
    "identity b": moka_core.MokaConfig(
        r=3, identity="b", zero_factor="a", block_entries=16, target_modules="all-linear"
    ),
}


@pytest.fixture
def folder(load, settings, tmp_path):
    base = load()
    import_adapter(base, random_adapter(base, settings)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_save_and_load(load, config, bits, tmp_path):
    base = load(bits)
    model = import_adapter(base, random_adapter(base, config)).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)

    plans = plan_model(config, linear_dims(load()))
    names = {
        f"base_model.model.{path}.moka_{name}": shape
        for path, plan in plans.items()
        for name, shape in expected_tensors(plan, config).items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()} == names
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOKA"
    assert written["format_version"] == 2
    assert written["base_quantisation"] == ("none" if bits is None else "nf4-double")
    assert load_adapter(tmp_path).base_quantisation == written["base_quantisation"]
    assert set(written["shapes"]) == {plan.key for plan in plans.values()}
    assert isinstance(written["base_fingerprint"], str)
    assert written["layers"] == {path: plan.key for path, plan in plans.items()}

    loaded = PeftModel.from_pretrained(load(bits), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    cheap = PeftModel.from_pretrained(load(bits), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(logits(cheap.eval()), expected)


def test_execution_is_given_when_a_folder_is_loaded(load, folder):
    model = PeftModel.from_pretrained(load(), folder, execution="merged")
    layers = [module for module in model.modules() if isinstance(module, MokaLinear)]
    assert {layer.moka_config["default"].execution for layer in layers} == {"merged"}
    assert model.peft_config["default"].execution == "merged"
    with pytest.raises(ConfigError, match="execution: expected one of auto, factored, merged; got 'fast'"):
        MokaConfig.from_pretrained(folder, execution="fast")
    assert MokaConfig.from_pretrained(folder, execution=None).execution == "auto"


def test_a_bfloat16_file_is_loaded_value_for_value(load, folder):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    save_adapter(load_adapter(folder, verify=False), folder, overwrite=True)
    model = PeftModel.from_pretrained(load(), folder)
    for path, layer in export_adapter(model).layers.items():
        for name, array in layer.tensors():
            assert torch.equal(torch.tensor(array), tensors[f"base_model.model.{path}.moka_{name}"].float())


def test_a_flipped_bit_of_a_tensor_is_refused_before_anything_is_loaded(load, folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-9] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match="its settings or its tensors are not the ones that were written"):
        PeftModel.from_pretrained(load(), folder)


def test_an_adapter_that_was_loaded_and_changed_is_saved_with_a_checksum_of_its_own(load, folder, tmp_path):
    model = PeftModel.from_pretrained(load(), folder, is_trainable=True)
    assert model.peft_config["default"].checksum is None
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).mul_(2)
    model.save_pretrained(tmp_path / "again")
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))  # no file: nothing to check it by
    old, new = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert {key for key in old if old[key] != new[key]} == {"checksum"}
    assert load_adapter(tmp_path / "again").trainable == load_adapter(folder).trainable


def test_a_config_that_is_saved_without_its_tensors_has_no_checksum(load, folder, tmp_path, monkeypatch):
    """The checksum of the last save is not that of what the live adapter has become since."""
    model = PeftModel.from_pretrained(load(), folder, is_trainable=True)
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path / "whole")
    config.save_pretrained(tmp_path / "alone")
    whole, alone = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("whole", "alone"))
    assert whole.pop("checksum")
    assert alone == {**whole, "inference_mode": False}  # PEFT saves a whole adapter with true

    def fails(*_, **__):
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", fails)
        with pytest.raises(OSError, match="disk on fire"):
            model.save_pretrained(tmp_path / "failed")
    config.save_pretrained(tmp_path / "alone")
    assert "checksum" not in json.loads((tmp_path / "alone" / "adapter_config.json").read_text())


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_that_is_not_trained_here_keeps_how_its_base_was_held(load, tmp_path, trainable):
    base = load(4)
    import_adapter(base, random_adapter(base, CONFIGS["softmax"])).save_pretrained(tmp_path / "nf4")
    with pytest.warns(UserWarning, match="was trained on a base held as 'nf4-double'; this one is held as 'none'"):
        model = PeftModel.from_pretrained(load(), tmp_path / "nf4", is_trainable=trainable)
    held = "none" if trainable else "nf4-double"
    assert export_adapter(model).base_quantisation == held
    model.save_pretrained(tmp_path / "again")
    assert load_adapter(tmp_path / "again").base_quantisation == held


def test_strict_loading_lists_every_problem_at_once(load, folder):
    tensors = load_file(folder / WEIGHTS)
    layer = "base_model.model.model.layers.0.self_attn.q_proj.moka_"
    del tensors[layer + "factor_a.0"]
    tensors[layer + "factor_a.9"] = torch.ones(2)
    tensors[layer + "factor_b.0"] = tensors[layer + "factor_b.0"].transpose(0, 1).contiguous()
    tensors[layer + "factor_b.1"] = tensors[layer + "factor_b.1"].double()
    tensors[layer + "gate_logits"][1] = float("nan")
    tensors["base_model.model.lm_head.moka_gate_logits"] = torch.ones(5)
    tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        PeftModel.from_pretrained(load(), folder)
    where = "model.layers.0.self_attn.q_proj: "
    assert str(caught.value).splitlines() == [
        "adapter 'default' does not fit the model, nothing was loaded (7 problems):",
        "  base_model.model.lm_head.moka_gate_logits: unexpected; the adapter has no such tensor",
        "  base_model.model.model.norm.weight: unexpected; the adapter has no such tensor",
        f"  {where}factor_b.0 expected shape (3, 8, 8), got (8, 3, 8)",
        f"  {where}factor_b.1 expected dtype float32, bfloat16 or float16, got float64",
        f"  {where}gate_logits has NaN or infinite entries",
        f"  {where}missing factor_a.0 (3, 8, 8)",
        f"  {where}unexpected factor_a.9",
    ]


def test_a_rejected_state_dict_changes_nothing(load, settings):
    base = load()
    model = import_adapter(base, random_adapter(base, settings)).eval()
    before = logits(model)
    with pytest.raises(AdapterError, match="missing"):
        set_peft_model_state_dict(model, {})
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0}, "scale: expected a number other than 0"),
        ({"gates": "softmax"}, "unknown 'gates' .did you mean 'gate'"),
        ({"gate": "uniform"}, "unexpected gate_logits"),
        ({"r": 6}, "expected 6 terms in all"),
        ({"base_fingerprint": "0" * 64}, "trained on another base model: expected 0000000000000000"),
        (
            {"layers": {"model.norm": "64x64"}},
            "model.norm: the adapter has it, but this model has no such linear layer",
        ),
        ({"layers": ["model.norm"]}, "layers: expected"),
        ({"format_version": 7}, "format_version: expected 2; got 7"),
        ({"scale": 2.0}, "adapter 'default': the checksum in adapter_config.json is"),
        ({"base_fingerprint": None}, "adapter 'default': the checksum in adapter_config.json is"),
        (
            {"checksum": "0" * 64},
            "adapter 'default': the checksum in adapter_config.json is 0000000000000000…, that of",
        ),
        ({"checksum": None}, "checksum: expected 64 hexadecimal digits; got None"),
        ({"base_quantisation": "int8"}, "base_quantisation: expected nf4-double, nf4, none or null; got 'int8'"),
    ],
    ids=str,
)
def test_a_changed_config_is_refused(load, folder, change, message):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(moka_core.MokaError, match=message):
        PeftModel.from_pretrained(load(), folder)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", ".*norm"])
def test_other_target_modules_change_nothing_since_layers_decides(load, folder, targets):
    expected = logits(PeftModel.from_pretrained(load(), folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": targets}))
    assert torch.equal(logits(PeftModel.from_pretrained(load(), folder)), expected)


def test_two_adapters_on_one_model(load, settings, tmp_path):
    """Two adapters of different kinds: each alone, both at once, and each saved without the other."""
    other = CONFIGS["identity b"]
    adapters = {"default": random_adapter(load(), settings, 1), "second": random_adapter(load(), other, 2)}
    alone = {name: logits(import_adapter(load(), adapter).eval()) for name, adapter in adapters.items()}

    model = import_adapter(load(), adapters["default"]).eval()
    import_adapter(model, adapters["second"], "second")
    model.eval()
    assert torch.equal(logits(model), alone["default"])
    model.set_adapter("second")
    assert torch.equal(logits(model), alone["second"])
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, alone["default"])
    assert not torch.allclose(both, alone["second"])

    model.save_pretrained(tmp_path)
    shutil.move(tmp_path / "second", tmp_path.parent / f"{tmp_path.name}-second")
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(loaded), alone["default"])
    loaded.load_adapter(tmp_path.parent / f"{tmp_path.name}-second", "second")
    loaded.eval()
    assert torch.equal(logits(loaded), alone["default"])
    loaded.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(loaded), both)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), alone["second"])


def spoil(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_fresh_adapter_with_the_settings_of_a_saved_one_is_held_to_no_checksum(load, folder):
    config = MokaConfig.from_pretrained(folder)
    config.inference_mode = False
    model = get_peft_model(load(), config)
    state = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)  # as a resumed Trainer does
    assert torch.equal(next(iter(get_peft_model_state_dict(model).values())), next(iter(state.values())))


def test_a_refused_adapter_leaves_nothing_of_its_name(load, folder, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    spoil(bad, scale=5.0)
    model = PeftModel.from_pretrained(load(), folder)
    before = logits(model)
    with pytest.raises(AdapterError, match="checksum"):
        model.load_adapter(bad, "two")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)
    model.load_adapter(folder, "two")
    model.set_adapter("two")
    assert torch.equal(logits(model), before)


def test_a_refused_folder_leaves_the_base_as_it_was(load, folder, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    spoil(bad, scale=5.0)
    base = load()
    with pytest.raises(AdapterError, match="checksum"):
        PeftModel.from_pretrained(base, bad)
    assert not any(isinstance(module, MokaLinear) for module in base.modules())
    expected = logits(PeftModel.from_pretrained(load(), folder))
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), expected)


def test_tensors_of_a_config_without_layers_and_checksum_are_refused(load, folder):
    spoil(folder, layers={}, checksum=None, scale=2.0)
    with pytest.raises(AdapterError, match=r"checksum: expected one in adapter_config\.json; got none"):
        PeftModel.from_pretrained(load(), folder)


def test_a_callers_own_config_needs_no_checksum(load, folder):
    """As PEFT has it: the file's config is not read then, and what does not fit is told by the tensors alone."""
    expected = PeftModel.from_pretrained(load(), folder)
    config = expected.peft_config["default"]
    assert config.checksum is None
    model = PeftModel.from_pretrained(load(), folder, config=config)
    assert model.peft_config["default"] is config
    assert torch.equal(logits(model), logits(expected))
    stated = json.loads((folder / "adapter_config.json").read_text())
    other = MokaConfig(r=stated["r"] + 1, target_modules=stated["target_modules"])
    with pytest.raises(AdapterError, match="does not fit the model"):
        PeftModel.from_pretrained(load(), folder, config=other)


def test_a_base_held_in_another_way_is_told(load, folder):
    with pytest.warns(UserWarning, match="was trained on a base held as 'none'; this one is held as 'nf4-double'"):
        PeftModel.from_pretrained(load(4), folder)


def test_a_base_that_was_never_known_is_not_made_up_by_saving_again(load, folder, tmp_path):
    anonymous = dataclasses.replace(load_adapter(folder), base_fingerprint=None, base_quantisation=None)
    save_adapter(anonymous, tmp_path / "anonymous")
    for trainable, known in ((False, (None, None)), (True, (load_adapter(folder).base_fingerprint, "none"))):
        model = PeftModel.from_pretrained(load(), tmp_path / "anonymous", is_trainable=trainable)
        model.save_pretrained(tmp_path / "again")
        again = load_adapter(tmp_path / "again")
        assert (again.base_fingerprint, again.base_quantisation) == known
        exported = export_adapter(model)
        assert (exported.base_fingerprint, exported.base_quantisation) == known


def test_a_sum_of_adapters_trained_on_bases_held_in_different_ways_states_none(load, folder, tmp_path):
    """And the base's fingerprint as far as it is known."""
    own = load_adapter(folder)
    for name, changes in {
        "other": {"base_quantisation": "nf4-double"},
        "unknown": {"base_fingerprint": None, "base_quantisation": None},
        "same": {},
    }.items():
        save_adapter(dataclasses.replace(own, **changes), tmp_path / name)
    model = PeftModel.from_pretrained(load(), tmp_path / "unknown", "unknown")
    with pytest.warns(UserWarning, match="held as 'nf4-double'"):
        model.load_adapter(tmp_path / "other", "other")
    model.load_adapter(tmp_path / "same", "same")
    model.load_adapter(folder, "own")
    for names, fingerprint, way in (
        (["own", "same"], own.base_fingerprint, "none"),
        (["own", "other"], own.base_fingerprint, None),
        (["unknown", "own"], own.base_fingerprint, None),
        (["unknown"], None, None),
    ):
        model.add_weighted_adapter(names, [1.0] * len(names), "-".join([*names, "sum"]))
        summed = export_adapter(model, "-".join([*names, "sum"]))
        assert (summed.base_fingerprint, summed.base_quantisation) == (fingerprint, way), names


@pytest.mark.parametrize("kind", ["float8", "packed under another name"])
def test_how_a_base_is_held_is_unknown_where_it_is_not_dense(kind):
    layer = torch.nn.Linear(4, 4)
    if kind == "float8":
        layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    else:
        del layer.weight
        layer.qweight = torch.zeros(2, dtype=torch.int32)
    assert quantisation(torch.nn.Sequential(torch.nn.Linear(4, 4), layer)) is None
    assert quantisation(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))) == "none"
