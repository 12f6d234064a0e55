"""Model folders that can be read in two ways: ours reads them as transformers does, or refuses them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moka_torch
from conversion import open_base
from moka_core import ModelError
from moka_jax.llama import load_llama
from tests.moka_jax.hf_models import error_of_range, random_tokens, save_llama, torch_logits

TOKENS = random_tokens(24)
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


def theirs(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moka_torch.exact_on_cpu(model)
    return torch_logits(model.eval(), TOKENS)


def ours(folder: Path, **options) -> np.ndarray:
    return np.asarray(load_llama(open_base(folder, **options))(TOKENS))


def change_tensors(path: Path, **changes: np.ndarray) -> None:
    tensors = load_file(path)
    save_file(
        {**tensors, **{name.replace("__", "."): array for name, array in changes.items()}}, path, {"format": "pt"}
    )


def packed(folder: Path, skip: list[str]) -> Path:
    """A folder that bitsandbytes packed, but for some modules."""
    save_llama(folder / "dense", intermediate_size=64)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder / "packed")
    return folder / "packed"


def test_what_bitsandbytes_left_dense_stays_dense(tmp_path):
    folder = packed(tmp_path, ["q_proj", "lm_head"])
    packings = {name: spec.packing for name, spec in open_base(folder).specs().items() if name.endswith("proj.weight")}
    assert {packing for name, packing in packings.items() if "q_proj" in name} == {None}
    assert {packing for name, packing in packings.items() if "q_proj" not in name} == {"nf4-double"}
    assert error_of_range(ours(folder), theirs(folder)) < 1e-5  # measured 6e-7; packed once more, 0.14


def test_one_layer_left_dense_is_refused_by_name(tmp_path):
    folder = packed(tmp_path, ["model.layers.1.self_attn.q_proj", "lm_head"])
    expected = r"model\.layers\.1\.self_attn\.q_proj\.kernel is dense \(llm_int8_skip_modules\)"
    with pytest.raises(ModelError, match=expected):
        ours(folder)


def test_a_head_that_is_stored_and_not_the_embedding_is_refused_where_the_config_ties_them(tmp_path):
    save_llama(tmp_path, tie_word_embeddings=True)
    head = np.random.default_rng(0).normal(size=load_file(tmp_path / "model.safetensors")[EMBEDDING].shape)
    change_tensors(tmp_path / "model.safetensors", lm_head__weight=head.astype(np.float32))
    with pytest.raises(ModelError, match=r"tie_word_embeddings: true, but lm_head\.weight is not .*; set"):
        ours(tmp_path)


def test_a_single_file_goes_before_an_index_that_was_left_behind(tmp_path):
    save_llama(tmp_path, seed=1).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).is_file()
    save_llama(tmp_path / "other", seed=2)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert error_of_range(ours(tmp_path, quantise="none"), theirs(tmp_path)) < 1e-5
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    assert error_of_range(ours(tmp_path, quantise="none"), theirs(tmp_path)) < 1e-5


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    save_llama(tmp_path).save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors").unlink()
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(tmp_path / shard for shard in places.values() if shard != places["model.norm.weight"])
    change_tensors(other, model__norm__weight=np.ones(64, np.float32))
    with pytest.raises(
        ModelError, match=rf"{other.name}: holds model\.norm\.weight, which the index takes from another"
    ):
        open_base(tmp_path).specs()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_dense_weight_that_is_not_finite_is_refused(tmp_path, dtype, bad):
    save_llama(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")[EMBEDDING].astype(dtype)
    change_tensors(tmp_path / "model.safetensors", model__embed_tokens__weight=embedding)
    ours(tmp_path)
    embedding[7, 3] = bad
    change_tensors(tmp_path / "model.safetensors", model__embed_tokens__weight=embedding)
    with pytest.raises(
        ModelError, match=r"model\.embed_tokens\.weight: expected finite numbers; it has NaN or infinity"
    ):
        ours(tmp_path)
