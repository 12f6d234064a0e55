"""LoRA folders that PEFT wrote are read as PEFT computes them; what is more than a low-rank ΔW is refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion import open_base
from conversion.lora_folder import load_lora
from moka_cli.import_ import base_layers
from moka_core import AdapterError
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def layers(base):
    return base_layers(open_base(base))


def save_lora(base, folder, **settings):
    """A LoRA whose factors are all random, as PEFT saves it, and ΔW of each layer as PEFT computes it."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name.startswith(prefix)
    }


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "lora"
    save_lora(base, folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"layers.0.*q_proj": 7, ".*1.self_attn.q_proj": 3, "model.layers.1.self_attn.v_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5, "v_proj": 11, "self_attn.v_proj": 11},
        },
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 3}},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "r": 2},
        {"target_modules": r".*\.1\..*(up|o)_proj"},
        {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda settings: ", ".join(settings) or "plain",
)
def test_what_peft_wrote_is_what_peft_computes(base, layers, tmp_path, settings):
    """Measured: at most 1.3e-7 of the largest entry, PEFT computing in float32."""
    expected = save_lora(base, tmp_path / "lora", **settings)
    found = load_lora(tmp_path / "lora", layers)
    assert expected
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path].delta(), delta, atol=3e-7 * np.abs(delta).max())
        assert found[path].parameters == found[path].rank * sum(layers[path])


def test_half_precision_is_read(plain, layers, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "half")
    tensors = {key: array.astype(np.float16) for key, array in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    for path, layer in load_lora(plain, layers).items():
        half = load_lora(folder, layers)[path]
        assert half.lora_a.dtype == np.float16
        np.testing.assert_allclose(half.delta(), layer.delta(), atol=0.02)  # measured: 0.010


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "expected peft_type 'LORA'; got 'ADALORA'"),
        ({"peft_type": "MOKA"}, "expected peft_type 'LORA'; got 'MOKA'; this is a MoKA adapter already"),
        ({"use_dora": True}, "use_dora: expected False, as DoRA also rescales"),
        ({"bias": "all"}, "bias: expected 'none', as it trains biases"),
        ({"bias": "lora_only"}, "bias: expected 'none'"),
        ({"lora_bias": True}, "lora_bias: expected False"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected None, as it trains whole modules"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: expected False"),
        ({"target_parameters": ["experts.w"]}, "target_parameters: expected None"),
        (
            {"trainable_token_indices": [3]},
            "trainable_token_indices: expected None, as it trains rows of the embedding",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: expected None"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: expected None, as aLoRA"),
        ({"use_qalora": True}, "use_qalora: expected False"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: expected None"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config: expected None"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config: expected None"),
        ({"kasa_config": {"beta": 1}}, "kasa_config: expected None, as KaSA changes the base"),
        ({"velora_config": {"scale": 1}}, "velora_config: expected None"),
        ({"megatron_config": {"a": 1}}, "megatron_config: expected None"),
        (
            {"init_lora_weights": "pissa"},
            "'pissa' trains on a base of its own, less what its start took out of it; save",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' trains on a base of its own"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "'corda' trains on a base of its own"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' trains on a base of its own"),
        ({"init_lora_weights": "loftq"}, "'loftq' trains on a base of its own, quantised to fit it"),
        ({"init_lora_weights": "novel"}, "init_lora_weights: expected true, false, gaussian"),
        ({"sparse_lora": 0.5}, "sparse_lora: unknown here, so what it changes is, too; got 0.5"),
        ({"r": 0}, "r: expected a whole number >= 1; got 0"),
        ({"r": None}, "r: expected a whole number >= 1; got None"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number; got '8'"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern[q_proj]: expected a whole number >= 1; got 1.5"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '(' is no regular expression"),
        ({"alpha_pattern": [3]}, "alpha_pattern: expected {pattern: number}; got [3]"),
        (
            {"rank_pattern": {"q_proj": 4, ".*q_proj": 3}},
            "rank_pattern: expected one value for it; got 3 and 4, and which of the patterns came first is lost",
        ),
        ({"alpha_pattern": {"v_proj": 4, ".*1.*": 3}}, "v_proj: alpha_pattern: expected one value"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false; got 'yes'"),
        ({"target_modules": None}, "target_modules: expected a list of names or a regular expression; got None"),
        ({"target_modules": ["w_proj"]}, "target_modules: ['w_proj'] matches no linear layer of the base"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": ["q_proj"]}, "model.layers.1.self_attn.v_proj: adapter_config.json does not target it"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj: lora_A: missing, expected (4, 128)"),
        ({"r": 5}, "model.layers.0.self_attn.q_proj: lora_A: expected shape (5, 128), got (4, 128)"),
    ],
)
def test_a_config_that_says_more_or_something_else_is_refused(plain, layers, tmp_path, changes, message):
    folder = shutil.copytree(plain, tmp_path / "lora")
    values = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError) as caught:
        load_lora(folder, layers)
    assert message in str(caught.value)


def test_everything_wrong_with_the_tensors_is_listed(plain, layers, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    del tensors[name.format(0, "q_proj", "A")]
    tensors[name.format(0, "v_proj", "B")] = np.zeros((3, 4), np.float32)
    tensors[name.format(1, "q_proj", "A")][0, 0] = np.nan
    tensors[name.format(1, "v_proj", "A")] = np.ones((4, 128), np.int32)
    tensors[name.format(7, "q_proj", "A")] = np.ones((4, 128), np.float32)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.ones((4, 256), np.float32)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = np.ones(128, np.float32)
    save_file(tensors, file)
    with pytest.raises(AdapterError) as caught:
        load_lora(folder, layers)
    for message in (
        "does not hold what adapter_config.json says (7 problems):",
        "model.layers.0.self_attn.q_proj: lora_A: missing, expected (4, 128)",
        "model.layers.0.self_attn.v_proj: lora_B: expected shape (64, 4), got (3, 4)",
        "model.layers.1.self_attn.q_proj: lora_A: has NaN or infinite entries",
        "model.layers.1.self_attn.v_proj: lora_A: expected dtype float32, bfloat16 or float16, got int32",
        "model.layers.7.self_attn.q_proj: the base has no such linear layer",
        "lora_embedding_A (LoRA of an embedding, which is no linear layer and cannot be imported: train",
        "lora_magnitude_vector (DoRA's)",
    ):
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "counted", "line"),
    [
        (
            {"hidden_size": 192},
            4,
            "model.layers.0.self_attn.q_proj: the LoRA is for 128x128, the base's layer is 192x192",
        ),
        ({"num_hidden_layers": 1}, 2, "model.layers.1.self_attn.q_proj: the base has no such linear layer"),
        ({"num_hidden_layers": 3}, 2, "model.layers.2.self_attn.v_proj: the LoRA has no layers of this number"),
    ],
    ids=["wider", "shallower", "deeper"],
)
def test_a_base_that_the_lora_was_not_trained_on_is_named_and_each_layer_once(
    base, plain, tmp_path, fields, counted, line
):
    other = base_layers(open_base(save_tiny_llama(tmp_path / "other", **fields)))
    with pytest.raises(AdapterError) as caught:
        load_lora(plain, other, base="the/other")
    told = str(caught.value)
    assert f"{plain}: this LoRA does not fit the base given, the/other; give the one that it was trained on" in told
    assert f"({str(base)!r}, says its adapter_config.json). {counted} layers differ:\n" in told
    assert line in told
    assert len(told.splitlines()) == 1 + counted


def test_of_many_layers_that_do_not_fit_a_few_are_listed(base, tmp_path):
    save_lora(base, tmp_path / "lora", target_modules="all-linear", r=1)
    with pytest.raises(AdapterError) as caught:
        load_lora(tmp_path / "lora", base_layers(open_base(save_tiny_llama(tmp_path / "other", hidden_size=192))))
    lines = str(caught.value).splitlines()
    assert "14 layers differ" in lines[0]
    assert len(lines) == 1 + 5 + 1
    assert lines[-1] == "  and 9 more"


@pytest.mark.parametrize(
    ("tied", "settings", "saving", "message"),
    [
        (True, {}, {"save_embedding_layers": True}, "embed_tokens.weight (an embedding or head of the base"),
        (False, {"target_modules": ["q_proj", "lm_head"]}, {}, "save_pretrained(FOLDER, save_embedding_layers=False)"),
        (True, {"target_modules": ["q_proj", "lm_head"]}, {"save_embedding_layers": False}, "lm_head: the base's"),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}, {}, "embed_tokens.base_layer.weight (an embedding or"),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}, {}, "train the LoRA without it in target_modules"),
    ],
)
def test_embeddings_and_heads_are_refused_with_the_way_out(tmp_path, tied, settings, saving, message):
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "lora", **saving)
    layers = base_layers(open_base(base))
    with pytest.raises(AdapterError) as caught:
        load_lora(tmp_path / "lora", layers)
    assert message in str(caught.value)
    if not tied:  # the way out works
        model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
        assert "lm_head" in load_lora(tmp_path / "again", layers)


def test_dora_that_peft_wrote_is_refused(base, layers, tmp_path):
    save_lora(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(AdapterError, match="use_dora: expected False"):
        load_lora(tmp_path / "dora", layers)


def test_files_that_are_missing_or_not_to_be_opened(plain, layers, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"not safetensors")
    with pytest.raises(AdapterError, match="expected a safetensors file"):
        load_lora(folder, layers)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle, which can run code"):
        load_lora(folder, layers)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(AdapterError, match="expected a JSON object; got list"):
        load_lora(folder, layers)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="expected JSON"):
        load_lora(folder, layers)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no such file; a PEFT adapter has adapter_config\.json"):
        load_lora(folder, layers)
