"""Reading an adapter folder: every bad one is refused by message, and none is read as another adapter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion import adapter_folder, load_adapter, save_adapter
from moka_core import Adapter, AdapterError
from tests.cases import CASES, random_layer
from tests.conversion.golden_adapter import bits, golden


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = save_adapter(golden(), tmp_path / "a")
    outside = save_adapter(golden(), tmp_path / "b")
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to("../b/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=rf"leads out of the folder, to {outside}/adapter_model.safetensors"):
        load_adapter(inside)
    (tmp_path / "c").symlink_to(outside)
    assert bits(load_adapter(tmp_path / "c")) == bits(golden())


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    source = save_adapter(golden(), tmp_path / "a")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert bits(load_adapter(snapshot)) == bits(golden())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused_and_does_not_hang(file: str, tmp_path: Path) -> None:
    for kind, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        folder = save_adapter(golden(), tmp_path / kind)
        (folder / file).unlink()
        make(folder / file)
        with pytest.raises(AdapterError, match=f"{file}: no such file"):
            load_adapter(folder)


def test_a_config_of_a_size_that_none_has_is_not_read(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    with open(folder / "adapter_config.json", "ab") as file:
        file.truncate(adapter_folder.LARGEST_CONFIG + 1)
    with pytest.raises(AdapterError, match="expected at most 67,108,864 bytes; got 67,108,865"):
        load_adapter(folder)


@pytest.mark.parametrize("change", ["scale", "a mantissa's bit", "no checksum", "another checksum"])
def test_what_was_changed_after_it_was_written_is_refused_by_its_checksum(change: str, tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values = json.loads(config.read_text())
    if change == "a mantissa's bit":
        data = bytearray(weights.read_bytes())
        data[-9] ^= 1
        weights.write_bytes(data)
    else:
        edit = {"scale": {"scale": 2.0}, "no checksum": {"checksum": None}, "another checksum": {"checksum": "0" * 64}}
        config.write_text(json.dumps({**values, **edit[change]}))
    with pytest.raises(AdapterError, match=r"the checksum in adapter_config\.json is .*, that of the adapter \w{16}…"):
        load_adapter(folder)
    again = save_adapter(load_adapter(folder, verify=False), tmp_path / "b")
    assert load_adapter(again).config.scale == (2.0 if change == "scale" else 1.0)


def test_how_the_config_is_written_does_not_matter_to_its_checksum(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    values |= {"scale": 1, "dropout": 0, "scale_pattern": {}, "inference_mode": False, "base_model_name_or_path": "x"}
    config.write_text(json.dumps(dict(reversed(values.items()))))
    assert bits(load_adapter(folder)) == bits(golden())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(golden(), tmp_path / "golden")


def edit(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {**values, **changes}


def drop(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {key: value for key, value in values.items() if key not in names}


LAYER = "model.layers.0.self_attn.q_proj"
BAD_CONFIGS: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda values: [values], "adapter_config.json: expected a JSON object; got list"),
    (edit(peft_type="LORA"), "expected peft_type 'MOKA'; got 'LORA'"),
    (drop("peft_type"), "expected peft_type 'MOKA'; got None"),
    (edit(format_version=3), "expected format_version 2; got 3; a higher one needs a newer version of this package"),
    (edit(format_version=True), "expected format_version 2; got True"),
    (edit(format_version=2.0), "expected format_version 2; got 2.0"),
    (edit(format_version="2"), "expected format_version 2; got '2'"),
    (
        edit(format_version=1),
        "expected format_version 2; got 1; a higher one needs a newer version of this package, a lower",
    ),
    (edit(base_quantisation="int8"), "expected base_quantisation to be nf4-double, nf4, none or null; got 'int8'"),
    (drop("format_version"), "expected format_version 2; got None"),
    (edit(gatee="softmax"), "fields: unknown 'gatee' (did you mean 'gate'?)"),
    (
        edit(modules_to_save=["lm_head"]),
        "modules_to_save make this adapter train more than mixtures; only PEFT can load",
    ),
    (edit(bias="all"), "bias make this adapter train more than mixtures; only PEFT can load"),
    (edit(r_pattern={"q_proj": 2}), "r_pattern: 'q_proj' is the path of no layer"),
    (edit(scale_pattern={"q_proj": 2.0}), "scale_pattern: 'q_proj' is the path of no layer"),
    (drop("scale"), "missing scale"),
    (drop("gate", "r", "shapes"), "missing gate, r, shapes"),
    (edit(gate="hard"), "gate: expected one of softmax, uniform; got 'hard'"),
    (edit(r=4), "shapes[4x6]: expected 4 terms in all (r); got 3"),
    (edit(scale=float("nan")), "scale: expected a finite number; got nan"),
    (edit(scale=10**400), "scale: expected a finite number; got 1000"),
    (edit(dropout=None), "dropout: expected a finite number; got None"),
    (edit(target_modules=None), "target_modules: expected names or one regular expression; got None"),
    (edit(target_modules=[]), "target_modules: expected at least one name"),
    (edit(shapes=[]), "shapes: expected {"),
    (edit(shapes={"4x6": [[3, 2, 3, 2, 3]]}), "a_in and b_in to 6 (divisors: 1, 2, 3, 6)"),
    (edit(shapes={"4x6": [["3", 2, 3, 2, 2]]}), "expected copies to be a whole number >= 1; got '3'"),
    (edit(layers={LAYER: "6x4"}), f"(1 problem):\n  {LAYER}: '6x4' does not stand in shapes"),
    (edit(layers={LAYER: ["4x6"], "b": {}, "c": 3}), f"(3 problems):\n  {LAYER}: ['4x6'] does not stand in shapes"),
    (edit(layers={}), 'expected layers {"path": "OUTxIN", ...}, at least one; got {}'),
    (edit(layers=[LAYER]), 'expected layers {"path": "OUTxIN", ...}, at least one; got ['),
    (drop("layers"), "at least one; got None"),
    (edit(base_fingerprint=5), "expected base_fingerprint to be a string or null; got 5"),
    (edit(base_model_name_or_path=["a"]), "expected base_model_name_or_path to be a string or null; got ['a']"),
)


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[message[:50] for _, message in BAD_CONFIGS])
def test_a_config_that_is_not_the_formats_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        load_adapter(folder)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"peft_type": "MOKA"',
            "expected JSON; Expecting ',' delimiter: line 1 column 21 (char 20); copy the folder again",
        ),
        (b"\xff\xfe\x00", "expected JSON; "),
        (b"", "expected JSON; "),
        (b"[" * 200_000, "expected JSON; "),
        (b'{"r": ' + b"9" * 5000 + b"}", "expected JSON; "),
        (b'{"r": 1, "r": 2}', "expected JSON; stands twice: r"),
        (b'{"layers": {"a": "1x1", "a": "2x2"}}', "expected JSON; stands twice: a"),
    ],
    ids=["cut off", "not UTF-8", "empty", "deeply nested", "long number", "a field twice", "a layer twice"],
)
def test_a_config_that_is_no_json_is_refused(data: bytes, message: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(data)
    with pytest.raises(AdapterError, match=re.escape(f"adapter_config.json: {message}")):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("instead", ["nothing", "a folder"])
def test_a_missing_file_is_named_with_what_a_folder_has(name: str, instead: str, folder: Path) -> None:
    (folder / name).unlink()
    if instead == "a folder":
        (folder / name).mkdir()
    with pytest.raises(
        AdapterError, match=f"{name}: no such file(, it is a folder)?; an adapter folder has adapter_config.json"
    ):
        load_adapter(folder)


def test_a_path_that_is_no_folder_is_refused(folder: Path) -> None:
    for path in (folder / "none", folder / "adapter_model.safetensors"):
        with pytest.raises(AdapterError, match=r"no such folder(, it is a file)?; expected an adapter folder"):
            load_adapter(path)


def test_every_problem_of_the_tensors_is_listed_at_once(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    stem = f"base_model.model.{LAYER}.moka_"
    tensors = load_file(path)
    del tensors[stem + "factor_a.1"]
    tensors[stem + "factor_a.00"] = tensors[stem + "factor_a.0"]
    tensors[stem + "factor_b.0"][0, 0, 0] = np.inf
    tensors[stem + "factor_b.1"] = tensors[stem + "factor_b.1"].reshape(1, 3, 4)
    tensors[stem + "gate_logits"] = tensors[stem + "gate_logits"].astype(np.float64)
    tensors["base_model.model.lm_head.weight"] = np.zeros(3, np.float32)
    tensors["base_model.model.other.moka_gate_logits"] = np.zeros(3, np.float32)
    tensors[f"{LAYER}.moka_gate_logits"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0].endswith("adapter_model.safetensors does not hold what adapter_config.json says (8 problems):")
    assert sorted(lines[1:]) == sorted(
        [
            "unexpected tensor base_model.model.lm_head.weight",
            f"unexpected tensor {LAYER}.moka_gate_logits",
            "unexpected layer other",
            f"{LAYER}: missing factor_a.1 (1, 1, 2)",
            f"{LAYER}: unexpected factor_a.00",
            f"{LAYER}: factor_b.0 has NaN or infinite entries",
            f"{LAYER}: factor_b.1 expected shape (1, 4, 3), got (1, 3, 4)",
            f"{LAYER}: gate_logits expected dtype float32, bfloat16 or float16, got F64",
        ]
    )


def test_a_layer_without_any_tensor_is_refused(folder: Path) -> None:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values["layers"]["model.layers.1.self_attn.q_proj"] = "4x6"
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=re.escape("(5 problems):\n  model.layers.1.self_attn.q_proj: missing")):
        load_adapter(folder)


def test_a_fixed_identity_must_not_be_stored(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "identity a")
    folder = save_adapter(Adapter(config=case.config, layers={"layer": random_layer(case)}), tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    size = case.plan.groups[0].shape.a_out
    identity = np.eye(size, dtype=np.float32)[None].repeat(case.plan.terms, 0)
    save_file({**load_file(path), "base_model.model.layer.moka_factor_a.0": identity}, path)
    with pytest.raises(AdapterError, match=re.escape("layer: unexpected factor_a.0")):
        load_adapter(folder)


@pytest.mark.parametrize("damage", ["empty", "text", "cut off", "pickle"])
def test_weights_that_are_no_safetensors_file_are_refused(damage: str, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"not tensors at all", "cut off": whole[:-4], "pickle": b"\x80\x04K\x01."}[damage]
    )
    with pytest.raises(
        AdapterError, match=r"adapter_model\.safetensors: expected a safetensors file; .*; copy the folder again"
    ):
        load_adapter(folder)


def test_a_folder_damaged_anywhere_gives_an_error_of_ours_or_the_same_adapter(folder: Path) -> None:
    """One byte of the config or of the tensors' header changed: never a foreign exception, never another structure."""
    whole = golden()
    rng = np.random.default_rng(0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        good = path.read_bytes()
        end = len(good) if name.endswith("json") else 8 + int.from_bytes(good[:8], "little")
        for position in rng.choice(end, 150, replace=False):
            bad = bytearray(good)
            bad[position] = rng.choice(np.frombuffer(b'0129{}[]",:aez\x00\xff ', np.uint8))
            path.write_bytes(bytes(bad))
            try:
                value = load_adapter(folder)
            except AdapterError:
                continue
            assert {p: layer.plan for p, layer in value.layers.items()}.popitem()[1] == whole.layers[LAYER].plan
        path.write_bytes(good)
    assert bits(load_adapter(folder)) == bits(whole)
