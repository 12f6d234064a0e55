"""The fingerprint of a PyTorch model: the folder's in every precision, another after training; other bases by leave."""

from __future__ import annotations

import copy
import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from conversion import merge_folder, open_base, save_adapter
from moka_core import base_difference
from moka_core.architecture import Architecture
from moka_core.errors import AdapterError, ConfigError
from moka_core.sketch import sampled_kind
from moka_torch import MokaConfig, MokaLinear, attach, export_adapter, import_adapter, merge, model_fingerprint
from moka_torch.fingerprint import linear_weights
from tests.moka_torch.conftest import logits, random_adapter

CONFIG = {"r": 3, "num_shapes": 2, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
KINDS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def packed(folder, dtype=torch.float32, **settings):
    settings = {"bnb_4bit_quant_type": "nf4", **settings}
    quantised = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantised)


def digits(fingerprint: str) -> dict[str, str]:
    return dict(entry.split(":") for entry in fingerprint.partition(".")[2].split("/"))


@torch.no_grad()
def tune(model, size=0.1, only=("q_proj", "v_proj")):
    """Change the weights as merging an adapter would."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f"{kind}.weight" for kind in only)):
            rows, columns = parameter.shape
            delta = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
            parameter.add_(delta * (size * parameter.norm() / delta.norm()))
    return model


def test_the_layers_are_those_of_the_folder(load, base_folder):
    model = load()
    sampled = {path for path in linear_weights(model) if sampled_kind(path)}
    assert sampled == set(Architecture.from_hf_config(open_base(base_folder).config).linear_layers()) - {"lm_head"}
    assert tuple(digits(model_fingerprint(model))) == KINDS


def test_it_is_the_folders_in_every_precision(load, base_folder, tmp_path):
    wanted = open_base(base_folder).fingerprint
    assert model_fingerprint(load()) == wanted
    assert model_fingerprint(load().double()) == wanted
    for double in (False, True):
        model = packed(base_folder, bnb_4bit_use_double_quant=double)
        assert model_fingerprint(model) == wanted
        model.save_pretrained(tmp_path / str(double))
        assert open_base(tmp_path / str(double)).fingerprint == wanted
    bfloat16 = model_fingerprint(load(dtype=torch.bfloat16))
    assert bfloat16 != wanted, "rounding changes some digits"
    assert base_difference(wanted, bfloat16) is None
    assert model_fingerprint(packed(base_folder, torch.bfloat16)) == bfloat16
    float16 = model_fingerprint(load(dtype=torch.float16))  # norms are rounded twice then, and its digest is another
    assert base_difference(wanted, f"{wanted[:64]}.{float16.partition(chr(46))[2]}") is None
    stored = packed(base_folder, bnb_4bit_quant_storage=torch.bfloat16)
    assert stored.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model_fingerprint(stored) == wanted


def test_an_adapter_changes_nothing(load):
    wanted = model_fingerprint(load())
    assert model_fingerprint(attach(load(), MokaConfig(**CONFIG))) == wanted
    assert model_fingerprint(get_peft_model(load(), LoraConfig(target_modules=["q_proj"]))) == wanted
    assert model_fingerprint(attach(load(), MokaConfig(**CONFIG, modules_to_save=["k_proj"]))) == wanted
    assert model_fingerprint(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("bits", [None, 4])
def test_a_merged_adapter_leaves_its_layers_without_digits(load, settings, bits):
    base = load(bits)
    wanted = digits(model_fingerprint(base))
    model = import_adapter(base, random_adapter(base, settings))
    model.merge_adapter()
    found = digits(model_fingerprint(model))
    assert {kind for kind in KINDS if set(found[kind]) == {"."}} == {"q_proj", "v_proj", "down_proj"}
    assert all(found[kind] == wanted[kind] for kind in ("k_proj", "o_proj", "gate_proj", "up_proj"))
    model.add_adapter("two", MokaConfig(**CONFIG, base_fingerprint=model_fingerprint(load(bits))))


@pytest.mark.filterwarnings("ignore:.*encodes it again")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "act",
    [
        lambda model: merge(model),
        lambda model: merge(model, dtype=torch.bfloat16),
        lambda model: model.merge_and_unload(),
        lambda model: (model.merge_adapter(), model.unload())[1],
    ],
    ids=["merge", "merge to bfloat16", "merge_and_unload", "merge_adapter and unload"],
)
def test_a_merged_model_is_another_base_and_says_what_was_merged(load, settings, base_folder, tmp_path, bits, act):
    adapter = random_adapter(load(), dataclasses.replace(settings, scale=1e-5), fingerprint=model_fingerprint(load()))
    import_adapter(load(), adapter).save_pretrained(tmp_path / "adapter")
    model = act(PeftModel.from_pretrained(load(bits), tmp_path / "adapter"))
    merge_folder(adapter, open_base(base_folder), tmp_path / "merged")
    assert model.config.moka_merged == open_base(tmp_path / "merged").config["moka_merged"], "one merge, one mark"
    with pytest.raises(AdapterError, match="norm weights or merged adapters"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    again = import_adapter(model, adapter, allow_other_base=True).merge_and_unload()
    assert len(again.config.moka_merged) == 2


@pytest.mark.parametrize("how", ["bfloat16", "half", "trainable", "older fingerprint", "scaled"])
def test_a_mark_is_of_the_numbers_and_not_of_how_they_are_held(load, settings, base_folder, tmp_path, how):
    fingerprint = model_fingerprint(load())
    stated = fingerprint[:64] if how == "older fingerprint" else fingerprint
    adapter = random_adapter(load(), settings, fingerprint=stated)
    if how in ("bfloat16", "half"):  # numbers that are in both
        layers = {path: _rounded(layer) for path, layer in adapter.layers.items()}
        adapter = dataclasses.replace(adapter, layers=layers)
    save_adapter(adapter, tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(), tmp_path / "adapter", is_trainable=how == "trainable")
    if how == "half":
        model = model.half()
    if how == "scaled":
        model.base_model.set_scale("default", -1.0)
    merge_folder(adapter, open_base(base_folder), tmp_path / "merged")
    same = model.merge_and_unload().config.moka_merged == open_base(tmp_path / "merged").config["moka_merged"]
    assert same == (how != "scaled"), "ΔW with another sign is another merge"


def _rounded(layer):
    few = [[array.astype(ml_dtypes.bfloat16) for array in factors] for factors in (layer.factor_a, layer.factor_b)]
    logits = layer.gate_logits.astype(ml_dtypes.bfloat16)
    return dataclasses.replace(layer, factor_a=tuple(few[0]), factor_b=tuple(few[1]), gate_logits=logits)


def test_a_merge_that_fails_changes_nothing_or_is_marked(load, settings, monkeypatch):
    adapter = random_adapter(load(), settings)
    base = load()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = import_adapter(base, adapter)
    with torch.no_grad():
        last = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
        last.tensors("default")["factor_b.0"].fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    found = model.unload()
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())
    assert not hasattr(found.config, "moka_merged")

    model = import_adapter(load(), adapter)
    merged, count = MokaLinear.merge, iter(range(3))

    def stop(layer, *args, **kwargs):
        if next(count, None) is None:
            raise KeyboardInterrupt
        merged(layer, *args, **kwargs)

    monkeypatch.setattr(MokaLinear, "merge", stop)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()
    assert len(model.base_model.model.config.moka_merged) == 1


def test_nothing_is_marked_where_nothing_is_merged_or_known(load, settings):
    adapter = random_adapter(load(), settings)
    assert not hasattr(import_adapter(load(), adapter).merge_and_unload(adapter_names=[]).config, "moka_merged")
    shared = load()
    other = LlamaForCausalLM(shared.config)
    assert shared.config is other.config
    merged = import_adapter(shared, adapter).merge_and_unload()
    assert merged.config.moka_merged
    assert merged.model.config is merged.config
    assert not hasattr(other.config, "moka_merged")
    plain = nn.ModuleDict({"q_proj": nn.Linear(64, 64)})
    plain.config = {"model_type": "own"}
    own = attach(plain, MokaConfig(r=2, num_shapes=1, target_modules=["q_proj"], init_weights=False))
    assert own.merge_and_unload().config == {"model_type": "own"}


def test_a_model_that_nothing_was_merged_into_is_its_base(load, settings):
    adapter = random_adapter(load(), settings)
    model = import_adapter(load(), adapter)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not hasattr(model.unload().config, "moka_merged")


def test_what_cannot_be_looked_at_has_no_digits(load, base_folder):
    wanted = model_fingerprint(load())
    others = {
        "FP4": packed(base_folder, bnb_4bit_quant_type="fp4"),
        "blocks of 128": _reblocked(packed(base_folder)),
        "8-bit": LlamaForCausalLM.from_pretrained(
            base_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
        ),
        "offloaded": _on_meta(load()),
        "repacked": _repacked(load(bits=4)),
    }
    for name, model in others.items():
        found = model_fingerprint(model)
        assert set(digits(found)["q_proj"]) == {"."}, name
        assert base_difference(wanted, found) is None, name


def _on_meta(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.to("meta")
    return model


def _repacked(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.quant_state.packing_format_for_cpu = True
    return model


def _reblocked(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.quant_state.blocksize = 128
    return model


def test_a_fine_tuned_base_is_refused_on_every_road(load, settings, tmp_path):
    adapter = random_adapter(load(), settings, fingerprint=model_fingerprint(load()))
    model = import_adapter(load(), adapter)
    assert export_adapter(model).base_fingerprint == adapter.base_fingerprint
    model.save_pretrained(tmp_path)
    rounded = PeftModel.from_pretrained(load(dtype=torch.bfloat16), tmp_path)
    assert export_adapter(rounded).base_fingerprint == adapter.base_fingerprint, "what it was trained on"
    message = r"other linear weights: q_proj in \d+ of 64 samples, v_proj in \d+ of 64 samples"
    for act in (
        lambda: import_adapter(tune(load()), adapter),
        lambda: PeftModel.from_pretrained(tune(load()), tmp_path),
        lambda: PeftModel.from_pretrained(tune(load(dtype=torch.bfloat16)), tmp_path),
        lambda: tune(load()).load_adapter(tmp_path),
        lambda: attach(tune(load()), MokaConfig(**CONFIG)).load_adapter(tmp_path, "two"),
    ):
        with pytest.raises(AdapterError, match=message):
            act()


def test_another_base_by_leave(load, settings, tmp_path):
    adapter = random_adapter(load(), settings, fingerprint=model_fingerprint(load()))
    import_adapter(load(), adapter).save_pretrained(tmp_path / "own")
    other = model_fingerprint(tune(load()))
    model = import_adapter(tune(load()), adapter, allow_other_base=True)
    assert export_adapter(model).base_fingerprint == other
    loaded = PeftModel.from_pretrained(tune(load()), tmp_path / "own", allow_other_base=True)
    assert torch.equal(logits(loaded), logits(model.eval()))
    loaded.save_pretrained(tmp_path / "other")
    written = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert written["base_fingerprint"] == other
    assert "allow_other_base" not in written
    PeftModel.from_pretrained(tune(load()), tmp_path / "other")
    with pytest.raises(AdapterError, match="another base model"):
        PeftModel.from_pretrained(load(), tmp_path / "other")

    config = MokaConfig.from_pretrained(tmp_path / "own")
    config.allow_other_base = True
    PeftModel.from_pretrained(tune(load()), tmp_path / "own", config=copy.deepcopy(config))
    plain = nn.ModuleDict({"q_proj": nn.Linear(64, 64)})
    kept = MokaConfig(r=3, num_shapes=2, target_modules=["q_proj"], base_fingerprint="0" * 64, allow_other_base=True)
    assert get_peft_model(plain, kept).peft_config["default"].base_fingerprint is None


def test_leave_is_the_callers_and_never_a_files(load, settings, tmp_path):
    import_adapter(load(), random_adapter(load(), settings)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "allow_other_base": True}))
    with pytest.raises(ConfigError, match="unknown 'allow_other_base'"):
        PeftModel.from_pretrained(load(), tmp_path)
    with pytest.raises(ConfigError, match="allow_other_base: expected true or false; got 'yes'"):
        MokaConfig(allow_other_base="yes")


def test_a_model_that_holds_its_weights_transposed(tmp_path):
    def gpt2(seed):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4))

    found = model_fingerprint(gpt2(0))
    assert tuple(digits(found)) == ("c_attn", "c_fc", "c_proj")
    turned = gpt2(0)
    for block in turned.transformer.h:
        weight = block.mlp.c_fc.weight
        dense = nn.Linear(*weight.shape)
        dense.weight = nn.Parameter(weight.detach().T.contiguous())
        block.mlp.c_fc = dense
    assert model_fingerprint(turned) == found
    model = attach(gpt2(0), MokaConfig(r=2, num_shapes=1, target_modules=["c_attn"], init_weights=False))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(gpt2(0).bfloat16(), tmp_path)
    with pytest.raises(AdapterError, match=r"c_attn in .* c_fc in .* c_proj in"):
        PeftModel.from_pretrained(gpt2(1), tmp_path)


def test_two_models_that_differ_in_linear_weights_alone_are_two(base_folder):
    def random(seed):
        model = LlamaForCausalLM.from_pretrained(base_folder)
        generator = np.random.default_rng(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.copy_(torch.from_numpy(generator.normal(0, 0.02, parameter.shape)))
        return model_fingerprint(model)

    one, other = random(0), random(1)
    assert one.partition(".")[0] == other.partition(".")[0]
    told = base_difference(one, other)
    assert all(kind in told for kind in KINDS)
    assert base_difference(one, random(0)) is None
