"""transformers' and PEFT's other ways to an adapter folder; each on a dense and on a 4-bit base."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moka_core import AdapterError
from moka_torch import MokaConfig, MokaLinear, attach, exact_on_cpu
from tests.tiny import save_tiny_llama

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(params=["dense", "4-bit"])
def settings(request):
    """What `from_pretrained` is given."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"dtype": torch.float32, **({"quantization_config": nf4} if request.param == "4-bit" else {})}


@pytest.fixture
def load(base, settings):
    def load():
        return exact(AutoModelForCausalLM.from_pretrained(base, **settings))

    return load


@pytest.fixture
def adapter(load, tmp_path):
    """The folder of an adapter that is not zero, and the logits with it."""
    targets = ["q_proj", "v_proj"]
    config = MokaConfig(r=4, num_shapes=2, init_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    model = attach(load(), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def exact(model):
    exact_on_cpu(model)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_load_adapter_on_a_transformers_model_and_delete_adapter(load, adapter):
    folder, expected = adapter
    model, base = load(), logits(load())
    info = model.load_adapter(folder)
    assert not info.missing_keys | info.unexpected_keys
    assert torch.equal(logits(model), expected)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "moka_" in name)
    model.load_adapter(folder, "second", is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("moka_" in name and ".second" in name for name in trainable)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    assert not any("moka_" in name for name, _ in model.named_parameters())
    assert not hasattr(model, "peft_config")
    # transformers leaves the empty wrappers in place, whichever the PEFT method
    assert isinstance(model.model.layers[0].self_attn.q_proj, MokaLinear)


def test_what_transformers_saves_peft_loads(load, adapter, tmp_path):
    folder, expected = adapter
    model = load()
    model.load_adapter(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "again")), expected)


def test_add_adapter_on_a_transformers_model(load):
    model = load()
    model.add_adapter(MokaConfig(r=4, num_shapes=2, target_modules=["q_proj"]), "fresh")
    assert model.active_adapters() == ["fresh"]
    assert torch.equal(logits(model), logits(load()))
    assert model.get_adapter_state_dict("fresh")


def test_auto_model_from_an_adapter_folder(adapter, settings):
    folder, expected = adapter
    model = exact(AutoModelForCausalLM.from_pretrained(folder, **settings))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(model), expected)


def test_auto_peft_model_from_an_adapter_folder(adapter, settings):
    folder, expected = adapter
    model = AutoPeftModelForCausalLM.from_pretrained(folder, **settings)
    exact(model)
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), expected)


def test_transformers_refuses_another_base_and_leaves_it_alone(adapter, tmp_path):
    folder, _ = adapter
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "other", seed=3, vocab_size=320))
    before = logits(model)
    with pytest.raises(AdapterError, match="base_fingerprint: the adapter was trained on another base model"):
        model.load_adapter(folder)
    assert torch.equal(logits(model), before)


def test_transformers_loads_by_its_own_rules_where_peft_is_strict(load, adapter, tmp_path):
    """A limit: its loader does not call the method's own, and so a damaged file is not refused."""
    folder, _ = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    for kind, value in {"missing": None, "nan": torch.full_like(tensors[name], torch.nan)}.items():
        shutil.copytree(folder, tmp_path / kind)
        changed = {**tensors, name: value} if value is not None else {k: v for k, v in tensors.items() if k != name}
        save_file(changed, tmp_path / kind / "adapter_model.safetensors")
        with pytest.raises(AdapterError):
            PeftModel.from_pretrained(load(), tmp_path / kind)
        info = load().load_adapter(tmp_path / kind)
        assert len(info.missing_keys) == (kind == "missing")


def test_transformers_holds_an_adapter_in_the_bases_dtype_and_peft_in_float32(base, adapter):
    """A limit of transformers' loader, for every PEFT method: on a bfloat16 base the adapter is rounded."""
    folder, _ = adapter

    def dtypes(model):
        return {parameter.dtype for name, parameter in model.named_parameters() if "moka_" in name}

    assert dtypes(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)) == {torch.bfloat16}
    assert dtypes(AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)) == {torch.float32}
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert dtypes(PeftModel.from_pretrained(half, folder)) == {torch.float32}
