"""What is read from a config.json, and what of it is refused before anything is loaded."""

from __future__ import annotations

import pytest

from conversion.base_weights import open_base
from moka_core import ModelError
from moka_jax.llama import LlamaConfig, load_llama

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.moka_jax.hf_models import (
    ROPE_LINEAR,
    ROPE_LLAMA3,
    ROPE_LONG,
    ROPE_PROPORTIONAL,
    ROPE_YARN,
    change_config,
    save_llama,
)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def rope(parameters=None, *, head_dim=None, **changes):
    fields = {"rope_parameters": {**(parameters or {}), **changes}}
    return fields if head_dim is None else {**fields, "head_dim": head_dim}


def packed(settings=None, **changes):
    return {"quantization_config": {**(settings or {}), **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window: expected none; got 4096"),
        ({"model_type": "mistral"}, "sliding_window: expected none; got 4096"),  # transformers' default
        ({"hidden_act": "gelu", "sliding_window": 8}, "hidden_act: expected silu; got 'gelu'; sliding_window"),
        ({"hidden_act": None}, "hidden_act: expected silu; got None"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: expected full_attention in every layer",
        ),
        (
            {"attention_dropout": 0.1},
            "attention_dropout: expected 0, as none is computed here (set it to 0 to go without)",
        ),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias: expected false for a Mistral; got True"),
        ({"mlp_bias": "no"}, "mlp_bias: expected true or false; got 'no'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads"),
        ({"hidden_size": None, "vocab_size": "big"}, "hidden_size: expected a positive whole number; got None"),
        ({"num_attention_heads": 3}, "head_dim: expected it, as 3 heads do not divide hidden_size (64)"),
        ({"head_dim": 15}, "head_dim: expected an even number; got 15"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected a positive number; got 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number; got nan"),
        ({"max_position_embeddings": -1}, "max_position_embeddings: expected a positive whole number; got -1"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive number; got 1000"),
        # rotary settings
        (
            rope(rope_type="su"),
            "rope_parameters: rope type 'su' is not supported; supported: default, linear, dynamic,",
        ),
        ({"rope_scaling": {"type": "mrope"}}, "rope_scaling: rope type 'mrope' is not supported"),
        ({"rope_parameters": {"full_attention": ROPE_LINEAR}}, "rope_parameters: expected one set of values for all"),
        ({"rope_parameters": [1]}, "rope_parameters: expected one set of values for all layers; got [1]"),
        (rope(rope_theta=0), "rope_parameters.rope_theta: expected a positive number; got 0"),
        (rope(rope_type="linear"), "rope_parameters.factor: expected a positive number; got None"),
        (rope(rope_type="dynamic", factor="4"), "rope_parameters.factor: expected a positive number; got '4'"),
        (rope(rope_type="dynamic", factor=4, head_dim=2), "head_dim: expected an even number above 2; got 2"),
        (rope(rope_type="llama3", factor=8.0), "rope_parameters.low_freq_factor: expected a positive number; got None"),
        (rope(ROPE_LLAMA3, high_freq_factor=1), "high_freq_factor: expected more than low_freq_factor (1.0); got 1.0"),
        (rope(ROPE_YARN, attention_factor=-1), "rope_parameters.attention_factor: expected a positive number; got -1"),
        (rope(ROPE_YARN, truncate=1), "rope_parameters.truncate: expected true or false; got 1"),
        (rope(ROPE_YARN, rope_theta=1.0), "rope_parameters.rope_theta: expected a number above 1 for rope type 'yarn'"),
        (
            rope(ROPE_LONG, long_factor=None),
            "rope_parameters.long_factor: expected a list of positive numbers; got None",
        ),
        (rope(ROPE_LONG, short_factor=[1.0, 0]), "short_factor: expected a list of positive numbers; got [1.0, 0]"),
        (
            rope(ROPE_LONG, long_factor=[1.0]),
            "long_factor: expected one number for each of the 8 pairs of a head; got 1",
        ),
        (rope(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1, as a LLaMA's rope type 'default' turns"),
        (
            {"partial_rotary_factor": 0.5},
            "config.json: partial_rotary_factor: expected 1, as a LLaMA's rope type 'default'",
        ),
        (rope(ROPE_PROPORTIONAL, partial_rotary_factor=2), "partial_rotary_factor: expected at most 1; got 2.0"),
        # quantisation
        (
            packed(quant_method="gptq", bits=4),
            "quantization_config.quant_method: expected none, or bitsandbytes' 4-bit",
        ),
        (packed(quant_method="awq"), "4-bit NF4; got 'awq'"),
        (packed(quant_method="fp8"), "4-bit NF4; got 'fp8'"),
        (packed(bits=4), "quantization_config.quant_method: expected none, or bitsandbytes' 4-bit NF4; got None"),
        ({"quantization_config": "int8"}, "quantization_config: expected none, or bitsandbytes' 4-bit NF4; got 'int8'"),
        ({"compression_config": {"format": "int"}}, "compression_config.quant_method: expected none, or bitsandbytes'"),
        (
            packed(NF4, load_in_4bit=False, load_in_8bit=True),
            "load_in_4bit: expected true, as of bitsandbytes only 4-bit",
        ),
        (
            packed(quant_method="bitsandbytes"),
            "quantization_config.load_in_4bit: expected true, as of bitsandbytes only",
        ),
        (packed(NF4, bnb_4bit_quant_type="fp4"), "bnb_4bit_quant_type: expected nf4; got 'fp4'"),
        (packed(NF4, bnb_4bit_quant_type=None), "bnb_4bit_quant_type: expected nf4; got 'fp4'"),  # the default
        (packed(NF4, bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage: expected uint8; got 'bfloat16'"),
    ],
)
def test_a_model_that_is_not_supported_is_refused(changes, message):
    assert LlamaConfig.from_hf_config(CONFIG).architecture.num_key_value_heads == 4
    with pytest.raises(ModelError) as caught:
        LlamaConfig.from_hf_config({**CONFIG, **changes})
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def test_everything_that_is_not_supported_is_in_one_error():
    with pytest.raises(ModelError) as caught:
        LlamaConfig.from_hf_config(
            {
                **CONFIG,
                "vocab_size": 0,
                "hidden_act": "gelu",
                "max_position_embeddings": 0,
                "rope_parameters": {"rope_type": "yarn", "factor": -1},
                "quantization_config": {"quant_method": "hqq"},
            }
        )
    assert str(caught.value).split("; got ")[0] == "config.json: vocab_size: expected a positive whole number"
    for name in ("vocab_size", "hidden_act", "max_position_embeddings", "rope_parameters.factor", "quant_method"):
        assert str(caught.value).count(f"{name}: expected") == 1


def test_what_is_supported_is_accepted_in_all_its_spellings():
    read = LlamaConfig.from_hf_config
    plain = read(CONFIG)
    for changes in (
        packed(NF4),
        packed(NF4, bnb_4bit_quant_storage=None),
        packed({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),  # of older transformers
        {"quantization_config": None, "sliding_window": None, "attention_dropout": 0.0, "hidden_act": "swish"},
        {"layer_types": ["full_attention"] * 2, "pretraining_tp": 4, "partial_rotary_factor": 1.0},
        {"head_dim": None, "rms_norm_eps": None, "attention_bias": None},
    ):
        assert read({**CONFIG, **changes}) == plain
    mistral = read({**CONFIG, "model_type": "mistral", "sliding_window": None, "num_attention_heads": 8})
    assert (mistral.max_position_embeddings, mistral.architecture.num_key_value_heads) == (131072, 8)
    assert plain.max_position_embeddings == 2048


def test_a_folder_that_is_not_supported_is_refused_before_its_tensors_are_read(tmp_path):
    save_llama(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "gptq"})
    base = open_base(tmp_path, quantise="none")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="quant_method: expected none"):
        load_llama(base)
