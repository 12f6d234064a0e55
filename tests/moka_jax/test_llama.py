"""Our LLaMA against transformers': the same folder, the same logits; and what is refused."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion.base_weights import open_base
from moka_core import ConfigError, ModelError, Nf4Weight
from moka_core.tensor_spec import TensorSpec
from moka_jax.llama import Llama, generate, load_llama, packed_weights
from moka_jax.nf4 import Nf4Linear
from moka_jax.sites import linear_sites
from tests.moka_jax.toys import run, tiny_llama

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.moka_jax.hf_models import (  # noqa: E402
    UNDONE,
    VARIANTS,
    error_of_range,
    random_llama,
    random_tokens,
    save_llama,
    torch_greedy,
    torch_logits,
)

LIMIT = 1e-4  # of the logits' range


def load(folder: Path, quantise="none", **arguments) -> Llama:
    return load_llama(open_base(folder, quantise=quantise), **arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    changes, length = VARIANTS[variant]
    reference = save_llama(tmp_path, **changes)
    tokens = random_tokens(length)
    expected = torch_logits(reference, tokens)
    found = run(load(tmp_path), tokens)
    assert found.dtype == np.float32
    assert error_of_range(found, expected) <= LIMIT  # measured: 3.3e-7 to 7.4e-7; 6e-7 to 1.8e-6 over 160 tokens
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", UNDONE)
def test_ignoring_a_switch_would_be_noticed(name):
    variant, undone = UNDONE[name]
    changes, length = VARIANTS[variant]
    tokens = random_tokens(length)
    expected = torch_logits(random_llama(**changes), tokens)
    found = torch_logits(random_llama(**{**changes, **undone}), tokens)
    assert error_of_range(found, expected) > 100 * LIMIT  # measured: 0.39 to 0.81


def test_under_nf4_logits_are_those_of_transformers_with_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    from moka_torch import exact_on_cpu

    dense = save_llama(tmp_path, attention_bias=True, num_hidden_layers=3)
    reference = LlamaForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ).eval()
    assert exact_on_cpu(reference) == 21
    tokens = random_tokens(24)
    expected = torch_logits(reference, tokens)
    model = load(tmp_path, "nf4-double")
    assert sum(1 for _ in packed_weights(model)) == 21
    assert error_of_range(run(model, tokens), expected) <= LIMIT  # measured: 6.3e-7
    assert error_of_range(torch_logits(dense, tokens), expected) > 100 * LIMIT  # the test sees quantisation


def test_in_bfloat16_logits_are_near_and_nothing_is_promoted(tmp_path):
    reference = save_llama(tmp_path, tie_word_embeddings=True)
    tokens = random_tokens(24)
    expected = torch_logits(reference, tokens)
    theirs = error_of_range(torch_logits(reference.to(torch.bfloat16), tokens), expected)
    for quantise in ("none", "nf4-double"):
        model = load(tmp_path, quantise, dtype=jnp.bfloat16)
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))}
        assert dtypes == ({"bfloat16", "float32"} if quantise == "none" else {"bfloat16", "float32", "uint8"})
        graphdef, state = nnx.split(model)
        hidden = jax.eval_shape(
            lambda state, tokens, g=graphdef: nnx.merge(g, state).hidden(tokens),
            state,
            tokens,
        )
        assert hidden.dtype == jnp.bfloat16
    found = run(load(tmp_path, dtype=jnp.bfloat16), tokens)
    assert found.dtype == np.float32
    assert error_of_range(found, expected) <= 2 * theirs  # measured: ours 2.0e-2, theirs 2.3e-2


def test_padding_on_the_right_changes_nothing_before_it(tmp_path):
    save_llama(tmp_path)
    model, tokens = load(tmp_path), random_tokens(12)
    padded = np.concatenate([tokens, np.zeros((2, 5), np.int32)], axis=1)
    full, part = run(model, padded)[:, :12], run(model, tokens)
    assert error_of_range(full, part) <= 1e-6


def test_a_loaded_model_holds_arrays_only_and_knows_its_base(tmp_path):
    save_llama(tmp_path, attention_bias=True, mlp_bias=True)
    for quantise in ("none", "nf4"):
        base = open_base(tmp_path, quantise=quantise)
        model = load_llama(base)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
        assert (model.base_fingerprint, model.base_model) == (base.fingerprint, str(tmp_path))
        assert {name: site.dims for site in linear_sites(model) for name in site.names} == (
            model.architecture.linear_layers()
        )


# --- refusals


class Tensors:
    """A base model in memory, as `load_llama` takes it."""

    name, fingerprint = "in memory", "f" * 64

    def __init__(self, folder: Path, quantise="none") -> None:
        base = open_base(folder, quantise=quantise)
        self.config = dict(base.config)
        self.tensors = {(path, layer): tensor for path, layer, tensor in base.flax_tensors()}

    def flax_tensors(self):
        for (path, layer), tensor in self.tensors.items():
            yield path, layer, tensor

    def flax_specs(self):
        for (path, layer), tensor in self.tensors.items():
            packing = None
            if isinstance(tensor, Nf4Weight):
                packing = "nf4-double" if "nested absmax" in tensor.parts() else "nf4"
            yield path, layer, TensorSpec(shape=tensor.shape, dtype=str(tensor.dtype), packing=packing)


BLOCK = ("model", "layers", "block")
Q, NORM = (*BLOCK, "self_attn", "q_proj", "kernel"), (*BLOCK, "input_layernorm", "weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.mark.parametrize("quantise", ["none", "nf4-double"])
def test_every_tensor_that_does_not_fit_is_listed(folder, quantise):
    base = Tensors(folder, quantise)
    del base.tensors[Q, 1]
    del base.tensors[("model", "norm", "weight"), None]
    base.tensors[NORM, 0] = np.ones(1, np.float32)  # would broadcast
    base.tensors[NORM, 5] = np.ones(64, np.float32)
    base.tensors[("lm_head", "kernel"), None] = np.ones((64, 96), np.float32)
    base.tensors[(*BLOCK, "self_attn", "q_proj", "bias"), 0] = np.ones(64, np.float32)
    down = base.tensors[(*BLOCK, "mlp", "down_proj", "kernel"), 0]
    base.tensors[(*BLOCK, "mlp", "up_proj", "kernel"), 0] = down
    with pytest.raises(ModelError) as caught:
        load_llama(base)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "lm_head.kernel: expected shape (64, 97), got (64, 96)",
        "missing model.layers.1.self_attn.q_proj.kernel",
        "missing model.norm.weight",
        "model.layers.0.input_layernorm.weight: expected shape (64,), got (1,)",
        "model.layers.0.mlp.up_proj.kernel: expected shape (64, 128), got (128, 64)",
        "unexpected model.layers.5.input_layernorm.weight: config.json has 2 layers",
        "unexpected model.layers.block.self_attn.q_proj.bias",
    ]


def test_a_layer_that_is_missing_in_a_file_is_an_error_and_not_old_memory(tmp_path):
    from safetensors.torch import load_file, save_file

    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file)
    for quantise in ("none", "nf4-double"):
        with pytest.raises(ModelError, match=r"missing model\.layers\.1\.mlp\.down_proj"):
            load(tmp_path, quantise)


def test_layers_that_are_packed_in_different_ways_are_refused(folder):
    dense, packed = Tensors(folder), Tensors(folder, "nf4-double")
    assert isinstance(packed.tensors[Q, 0], Nf4Weight)
    packed.tensors[Q, 0] = dense.tensors[Q, 0]
    packed.tensors[(*BLOCK, "mlp", "up_proj", "kernel"), 1] = Tensors(folder, "nf4").tensors[
        (*BLOCK, "mlp", "up_proj", "kernel"), 1
    ]
    with pytest.raises(ModelError) as caught:
        load_llama(packed)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert f"{name}.kernel: expected every layer dense, or every layer packed in the same way" in str(caught.value)


def test_a_checkpoint_may_leave_some_places_dense(folder):
    """bitsandbytes' llm_int8_skip_modules: the layers of one name are all dense or all packed."""
    dense, packed = Tensors(folder), Tensors(folder, "nf4-double")
    packed.tensors[Q, 0], packed.tensors[Q, 1] = dense.tensors[Q, 0], dense.tensors[Q, 1]
    attention = load_llama(packed).model.layers.block.self_attn
    assert isinstance(attention.q_proj, nnx.Linear)
    assert isinstance(attention.k_proj, Nf4Linear)


def test_texts_in_one_row_are_computed_as_each_alone():
    model = tiny_llama()
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 40, length) for length in (4, 7, 3)]
    row = np.concatenate([*texts, [0, 0]])[None]
    positions = np.concatenate([np.arange(len(text)) for text in [*texts, [0, 0]]])[None]
    segments = np.repeat([1, 2, 3, 0], [4, 7, 3, 2])[None]
    packed = np.asarray(model(row, positions=positions, segments=segments))[0]
    start = 0
    for text in texts:
        alone = np.asarray(model(text[None]))[0]
        np.testing.assert_allclose(packed[start : start + len(text)], alone, rtol=0, atol=2e-6 * np.ptp(alone))
        start += len(text)
    without = np.asarray(model(row))[0]
    assert np.abs(without[4:14] - packed[4:14]).max() > 1e-2 * np.ptp(packed)  # they would see each other


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (jnp.float32, "an NVIDIA GPU .this is cpu., and bfloat16 .this is float32."),
        (jnp.bfloat16, "'cudnn' needs an NVIDIA GPU"),
    ],
)
def test_flash_attention_by_name_is_refused_where_there_is_none(dtype, message):
    config = tiny_llama().config
    with pytest.raises(ConfigError, match=message):
        Llama(config, dtype=dtype, attend="cudnn", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="attend: expected xla or cudnn; got 'flash'"):
        Llama(config, attend="flash", rngs=nnx.Rngs(0))


def test_smollm2_gives_the_logits_and_64_greedy_tokens_of_transformers(smollm, optimised):
    from transformers import AutoTokenizer, LlamaForCausalLM

    prompt = AutoTokenizer.from_pretrained(smollm)("The Kronecker product of two matrices is").input_ids
    reference = LlamaForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    continued = torch_greedy(reference, prompt, 64)
    tokens = np.array([prompt + continued], np.int32)
    expected = torch_logits(reference, tokens)
    del reference
    model = load(smollm)
    found = run(model, tokens)
    assert error_of_range(found, expected) <= LIMIT  # measured: 2.6e-6
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert generate(model, prompt, max_new_tokens=64) == continued
