"""A model folder of transformers as our LLaMA's tensors: names, orientation, bits, packing, and bad folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from conversion import BaseFolder, open_base
from conversion.base_weights import _TABLE, FlaxPath, flax_place
from moka_core import ModelError, Nf4Weight, base_difference, dequantise_nf4, quantise_nf4

INDEX = "model.safetensors.index.json"


def tiny(**changes: Any) -> LlamaForCausalLM:
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model, held in every way that transformers saves it."""
    root = tmp_path_factory.mktemp("bases")
    paths = {name: root / name for name in ("dense", "sharded", "bf16", "tied", "biased", "nf4-double", "nf4")}
    model = tiny()
    model.save_pretrained(paths["dense"])
    model.save_pretrained(paths["sharded"], max_shard_size="100KB")
    tiny(tie_word_embeddings=True).save_pretrained(paths["tied"])
    tiny(attention_bias=True, mlp_bias=True).save_pretrained(paths["biased"])
    model.to(torch.bfloat16).save_pretrained(paths["bf16"])
    for name in ("nf4", "nf4-double"):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=name == "nf4-double"
        )
        packed = LlamaForCausalLM.from_pretrained(
            paths["dense"], quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )
        packed.save_pretrained(paths[name])
    return paths


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the dense folder to spoil."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folders["dense"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def raw_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def names_by_place(folder: Path) -> dict[tuple[FlaxPath, int | None], str]:
    """The names of a dense folder's tensors by their places in our LLaMA."""
    places = {name: flax_place(name) for name in raw_tensors(folder)}
    return {(place.path, place.layer): name for name, place in places.items() if place is not None}


def restored(folder: Path, **options: Any) -> dict[str, np.ndarray]:
    """A dense folder through our LLaMA's places, and back to a checkpoint's names."""
    found, names = {}, names_by_place(folder)
    for path, layer, value in open_base(folder, quantise="none", **options).flax_tensors():
        assert isinstance(value, np.ndarray)
        name = names[path, layer]
        place = flax_place(name)
        assert place is not None
        found[name] = np.ascontiguousarray(value.T if place.transposed else value)
    return found


@pytest.mark.parametrize("name", ["dense", "sharded", "bf16", "tied", "biased"])
def test_a_dense_folder_goes_to_flax_and_back_bit_for_bit(name: str, folders: dict[str, Path]) -> None:
    expected = raw_tensors(folders[name])
    found = restored(folders[name])
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert found[key].shape == value.shape, key
        assert found[key].tobytes() == value.tobytes(), key


def test_the_sharded_folder_is_really_sharded_and_holds_the_same_model(folders: dict[str, Path]) -> None:
    sharded = open_base(folders["sharded"], quantise="none")
    assert len(set(sharded.files.values())) > 1
    whole, parts = dict(open_base(folders["dense"], quantise="none").weights()), dict(sharded.weights())
    assert {name: value.tobytes() for name, value in whole.items()} == {  # type: ignore[union-attr]
        name: value.tobytes()  # type: ignore[union-attr]
        for name, value in parts.items()
    }


def test_a_tied_head_is_no_tensor_of_its_own_even_if_it_is_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "lm_head.weight" not in dict(open_base(folders["tied"], quantise="none").weights())
    assert "lm_head.weight" in dict(open_base(folders["dense"], quantise="none").weights())
    tensors = raw_tensors(folders["tied"])
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["tied"] / "config.json").read_bytes())
    assert set(restored(tmp_path)) == set(tensors)


def test_linear_weights_are_turned_and_nothing_else_is(folders: dict[str, Path]) -> None:
    tensors, names = raw_tensors(folders["biased"]), names_by_place(folders["biased"])
    for path, layer, value in open_base(folders["biased"], quantise="none").flax_tensors():
        stored = tensors[names[path, layer]]
        assert np.array_equal(value, stored.T if path[-1] == "kernel" else stored)  # type: ignore[arg-type]
        assert (path[-1] == "kernel") == (stored.ndim == 2 and "embed" not in path[1])


ALL_NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(
        f"model.layers.{layer}.{name}"
        for layer in (0, 7, 31)
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            *(f"self_attn.{letter}_proj.{kind}" for letter in "qkvo" for kind in ("weight", "bias")),
            *(f"mlp.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias")),
        )
    ),
]


def test_every_name_has_one_place_of_its_own() -> None:
    places = [(place.path, place.layer) for place in map(flax_place, ALL_NAMES) if place is not None]
    assert len(set(places)) == len(ALL_NAMES)
    assert len(ALL_NAMES) == 3 + 3 * (len(_TABLE) - 3)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weights",
        "xmodel.norm.weight",
        "model_norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "transformer.h.0.attn.c_attn.weight",
    ],
)
def test_a_name_that_only_looks_like_llamas_has_no_place(name: str) -> None:
    assert flax_place(name) is None


# ---- packed


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_a_folder_packed_by_transformers_is_taken_byte_for_byte(name: str, folders: dict[str, Path]) -> None:
    base = open_base(folders[name], quantise="none")
    assert base.packed
    stored = raw_tensors(folders[name])
    weights = dict(base.weights())
    packed = {key: value for key, value in weights.items() if isinstance(value, Nf4Weight)}
    assert len(packed) == 2 * 7
    for key, value in packed.items():
        assert value.codes.tobytes() == stored[key].tobytes()
        assert value.parts()["absmax"].tobytes() == stored[f"{key}.absmax"].tobytes()
        assert ("nested absmax" in value.parts()) == (name == "nf4-double")
    assert set(weights) == set(raw_tensors(folders["dense"]))


@pytest.mark.parametrize("name", ["nf4", "nf4-double"])
def test_packing_a_dense_folder_gives_the_bytes_that_transformers_wrote(name: Any, folders: dict[str, Path]) -> None:
    theirs = dict(open_base(folders[name], quantise="none").weights())
    base = open_base(folders["dense"], quantise=name)
    assert not base.packed
    ours = dict(base.weights())
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        mine = ours[key]
        if isinstance(value, Nf4Weight):
            assert isinstance(mine, Nf4Weight)
            assert {part: array.tobytes() for part, array in mine.parts().items()} == {
                part: array.tobytes() for part, array in value.parts().items()
            }
            assert (mine.shape, mine.dtype) == (value.shape, value.dtype)
        else:
            assert isinstance(mine, np.ndarray)
            assert mine.tobytes() == value.tobytes(), key


def test_packed_weights_keep_the_checkpoints_orientation(folders: dict[str, Path]) -> None:
    shapes = {
        path[-2]: value.shape
        for path, _, value in open_base(folders["dense"]).flax_tensors()
        if isinstance(value, Nf4Weight)
    }
    assert shapes["v_proj"] == (32, 64)
    assert shapes["down_proj"] == (64, 128)


def test_dense_gives_the_weight_that_the_model_computes_with(folders: dict[str, Path]) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    stored = raw_tensors(folders["dense"])[name]
    assert np.array_equal(open_base(folders["dense"], quantise="none").dense(name), stored)
    decoded = dequantise_nf4(quantise_nf4(stored))
    assert not np.array_equal(decoded, stored)
    assert np.array_equal(open_base(folders["dense"]).dense(name), decoded)
    assert np.array_equal(open_base(folders["nf4-double"]).dense(name), decoded)
    with pytest.raises(ModelError, match=r"has no tensor 'model\.layers\.9\.x'"):
        open_base(folders["dense"]).dense("model.layers.9.x")


def test_one_model_has_one_fingerprint_however_it_is_saved(folders: dict[str, Path]) -> None:
    found = {name: open_base(folders[name]).fingerprint for name in ("dense", "sharded", "bf16", "nf4", "nf4-double")}
    assert found["dense"] == found["sharded"] == found["nf4"] == found["nf4-double"]
    assert base_difference(found["dense"], found["bf16"]) is None
    digest, _, sketch = found["dense"].partition(".")
    assert len(digest) == 64
    kinds = "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    assert re.fullmatch("/".join(f"{kind}:[0-9a-f]{{64}}" for kind in kinds), sketch)


def save_changed(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> str:
    """The fingerprint of a folder after a change of its tensors."""
    tensors = {name: change(name, value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return open_base(folder).fingerprint


def test_a_fine_tuned_base_has_another_fingerprint(folder: Path) -> None:
    before, rng = open_base(folder).fingerprint, np.random.default_rng(0)

    def merge_lora(name: str, value: np.ndarray) -> np.ndarray:
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            return value
        delta = rng.normal(size=(value.shape[0], 4)) @ rng.normal(size=(4, value.shape[1]))
        return (value + 0.05 * delta * np.linalg.norm(value) / np.linalg.norm(delta)).astype(np.float32)

    told = base_difference(before, save_changed(folder, merge_lora))
    assert told is not None
    assert re.search(r"other linear weights: q_proj in \d+ of 64 samples, v_proj in \d+ of 64 samples$", told)


def test_what_is_no_linear_layer_of_a_block_is_not_looked_at(folder: Path) -> None:
    before = open_base(folder).fingerprint

    def change(name: str, value: np.ndarray) -> np.ndarray:
        return value + 1 if name in ("lm_head.weight", "model.embed_tokens.weight") else value

    assert save_changed(folder, change) == before


def test_a_folder_that_is_packed_in_part_has_the_same_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["v_proj"])
    model = LlamaForCausalLM.from_pretrained(folders["dense"], quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert open_base(tmp_path).specs()["model.layers.0.self_attn.v_proj.weight"].packing is None
    assert open_base(tmp_path).fingerprint == open_base(folders["dense"]).fingerprint


def test_a_weight_that_is_packed_otherwise_has_no_digits(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = LlamaForCausalLM.from_pretrained(folders["dense"], quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    found = open_base(tmp_path).fingerprint
    assert f"q_proj:{'.' * 64}/" in found
    assert base_difference(open_base(folders["dense"]).fingerprint, found) is None


def test_of_the_linear_weights_only_some_blocks_are_read(folders: dict[str, Path], monkeypatch: Any) -> None:
    read: list[str] = []
    tensor = BaseFolder.tensor
    monkeypatch.setattr(BaseFolder, "tensor", lambda self, name: (read.append(name), tensor(self, name))[1])
    for name in ("dense", "bf16", "nf4"):
        assert open_base(folders[name]).fingerprint
    assert read
    assert all(name.endswith(("norm.weight", "bitsandbytes__nf4")) for name in read)


def test_blocks_that_go_over_several_rows_are_read_whole(tmp_path: Path) -> None:
    from moka_torch import model_fingerprint

    model = tiny(hidden_size=40, intermediate_size=88)  # no width is a multiple of 64, down_proj's last block is short
    model.save_pretrained(tmp_path)
    assert open_base(tmp_path).fingerprint == model_fingerprint(model)


def test_another_norm_weight_is_another_fingerprint(folder: Path) -> None:
    before = open_base(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] += 0.1
    save_file(tensors, folder / "model.safetensors")
    assert open_base(folder).fingerprint != before


def test_bfloat16_is_read_as_it_is_stored(folders: dict[str, Path]) -> None:
    value = open_base(folders["bf16"]).tensor("model.norm.weight")
    assert value.dtype == ml_dtypes.bfloat16


def test_rotary_buffers_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    before = open_base(folder, quantise="none")
    expected, fingerprint = set(dict(before.weights())), before.fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    after = open_base(folder, quantise="none")
    assert set(dict(after.weights())) == expected
    assert after.fingerprint == fingerprint


# ---- bad folders


def read_all(folder: Path) -> None:
    base = open_base(folder)
    assert base.fingerprint
    for _ in base.weights():
        pass


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def tensors(changes: dict[str, np.ndarray]) -> Callable[[Path], None]:
    """More tensors in the file, or others under the same names."""

    def change(folder: Path) -> None:
        save_file({**load_file(folder / "model.safetensors"), **changes}, folder / "model.safetensors")

    return change


def index(weight_map: Any) -> Callable[[Path], None]:
    """An index, of which the only shard is shard.safetensors."""
    return indexed(json.dumps({"weight_map": weight_map}).encode())


def indexed(data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / INDEX).write_bytes(data)

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


Q = "model.layers.0.self_attn.q_proj.weight"
BAD: tuple[tuple[Callable[[Path], None], str], ...] = (
    (remove("config.json"), "config.json: no such file; expected a Hugging Face model folder"),
    (write("config.json", b"{"), "config.json: expected JSON; "),
    (write("config.json", b"\xff\xfe\xfd"), "config.json: expected JSON; "),
    (write("config.json", b"[1]"), "config.json: expected a JSON object; got list"),
    (write("config.json", b"[" * 200_000), "config.json: expected JSON; "),
    (config(rope_parameters=["default"]), "config.json: expected the rotary settings to be a JSON object"),
    (remove("model.safetensors"), "expected model.safetensors or model.safetensors.index.json; found neither"),
    (
        both(remove("model.safetensors"), write("pytorch_model.bin", b"x")),
        "found neither; it has pytorch_model.bin, which must be converted to safetensors first",
    ),
    (write("model.safetensors", b""), "model.safetensors: expected a safetensors file; "),
    (write("model.safetensors", b"\x80\x04 not tensors"), "model.safetensors: expected a safetensors file; "),
    (index({"model.norm.weight": "gone.safetensors", "a": "gone2.safetensors"}), "gone.safetensors, "),
    (index({}), 'expected weight_map {"tensor": "file beside this one", ...}, at least one'),
    (index(["model.norm.weight"]), "expected weight_map"),
    (index({"model.norm.weight": 5}), "expected weight_map"),
    (index({"model.norm.weight": "../model.safetensors"}), "expected weight_map"),
    (indexed(b'{"metadata": {}}'), "expected weight_map"),
    (
        index({"model.norm.weights": "shard.safetensors"}),
        "no LLaMA tensor is called model.norm.weights",
    ),
    (
        index({"model.layers.9.input_layernorm.weight": "shard.safetensors"}),
        "shard.safetensors: expected a safetensors file with model.layers.9.input_layernorm.weight; ",
    ),
    (
        both(index({"model.norm.weight": "broken.safetensors"}), write("broken.safetensors", b"x")),
        "broken.safetensors: expected a safetensors file with model.norm.weight; ",
    ),
    (
        tensors({"transformer.h.0.attn.c_attn.weight": np.zeros((2, 2), np.float32), "wte": np.zeros(2, np.float32)}),
        "no LLaMA tensor is called transformer.h.0.attn.c_attn.weight, wte",
    ),
    (tensors({Q: np.zeros((64, 64), np.uint8)}), "q_proj.weight is packed, but not as NF4; only NF4 is supported"),
    (
        tensors({Q: np.zeros((2048, 1), np.uint8), f"{Q}.quant_state.bitsandbytes__fp4": np.zeros(2, np.uint8)}),
        "q_proj.weight.quant_state.bitsandbytes__fp4",
    ),
    (
        tensors({Q: np.zeros((2048, 1), np.uint8), f"{Q}.quant_state.bitsandbytes__nf4": np.zeros(2, np.uint8)}),
        "q_proj.weight.quant_state.bitsandbytes__nf4: expected JSON; ",
    ),
    (
        tensors({Q: np.full((64, 64), np.nan, np.float32)}),
        "q_proj.weight: NF4: weight of shape (64, 64) has NaN or infinite entries",
    ),
)
NAMES = [re.sub(r"\W+", " ", message)[:60] for _, message in BAD]


@pytest.mark.parametrize(("change", "message"), BAD, ids=NAMES)
def test_a_folder_that_is_not_what_it_says_is_refused(
    change: Callable[[Path], None], message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_all(folder)
    assert str(folder) in str(caught.value) or "config.json" in message


def test_a_path_that_is_no_folder_is_refused(folder: Path) -> None:
    for path in (folder / "none", folder / "config.json"):
        with pytest.raises(ModelError, match=r"no such folder(, it is a file)?; expected a Hugging Face model"):
            open_base(path)


def test_an_unknown_way_to_quantise_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="quantise: expected nf4-double, nf4 or none; got 'int8'"):
        open_base(folder, quantise="int8")  # type: ignore[arg-type]


def test_a_tensor_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tensor 'model\.no'"):
        open_base(folder).tensor("model.no")
