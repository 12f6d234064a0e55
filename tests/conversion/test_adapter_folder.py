"""The adapter folder: bits kept, bytes pinned, nothing left half written, and every bad folder refused by message."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion import adapter_folder, load_adapter, new_folder, save_adapter
from moka_core import (
    Adapter,
    AdapterError,
    KronShape,
    LayerFactors,
    LayerPlan,
    MokaConfig,
    PathError,
    ShapeGroup,
    plan_layer,
)
from moka_core.oracle import dense_delta
from tests.cases import CASES, random_factors, random_layer

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def cast(layer: LayerFactors, config: MokaConfig, dtype: np.dtype) -> LayerFactors:
    tensors = {name: array.astype(dtype) for name, array in layer.tensors()}
    return LayerFactors.from_tensors(layer.plan, config, tensors)


def bits(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        f"{path}.{name}": (str(array.dtype), array.shape, array.tobytes())
        for path, layer in adapter.layers.items()
        for name, array in layer.tensors()
    }


def example(dtype: str = "float32") -> Adapter:
    """Two layers of different shape under the same config."""
    config = MokaConfig(r=3, num_shapes=2, target_modules=("q_proj", "v_proj"))
    rng = np.random.default_rng(0)
    layers = {
        f"model.layers.0.self_attn.{name}": cast(
            random_factors(plan_layer(config, out, 16), config, rng), config, DTYPES[dtype]
        )
        for name, out in (("q_proj", 16), ("v_proj", 8))
    }
    return Adapter(config=config, layers=layers, base_fingerprint="0" * 64, base_model="base")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_adapter_comes_back_with_its_bits(case: Any, dtype: str, tmp_path: Path) -> None:
    layers = {
        path: cast(random_layer(case, seed), case.config, DTYPES[dtype])
        for seed, path in enumerate(("model.layers.0.layer", "model.layers.10.layer", "layer"))
    }
    adapter = Adapter(config=case.config, layers=layers, base_fingerprint="ab", base_model="some/base é")
    back = load_adapter(save_adapter(adapter, tmp_path / "a"))
    assert bits(back) == bits(adapter)
    assert (back.base_fingerprint, back.base_model) == ("ab", "some/base é")
    assert {path: layer.plan for path, layer in back.layers.items()} == dict.fromkeys(layers, case.plan)
    stated = dataclasses.replace(case.config, shapes=(case.plan,))
    assert back.config == stated


def test_special_bits_survive(tmp_path: Path) -> None:
    adapter = example()
    layer = next(iter(adapter.layers.values()))
    layer.factor_a[0].reshape(-1)[:3] = [-0.0, 1e-45, np.finfo(np.float32).max]
    assert bits(load_adapter(save_adapter(adapter, tmp_path / "a"))) == bits(adapter)


def test_one_adapter_may_hold_both_dtypes(tmp_path: Path) -> None:
    adapter = example()
    path, layer = next(iter(adapter.layers.items()))
    logits = layer.gate_logits.astype(ml_dtypes.bfloat16)  # type: ignore[union-attr]
    mixed = dataclasses.replace(
        adapter, layers={**adapter.layers, path: dataclasses.replace(layer, gate_logits=logits)}
    )
    assert bits(load_adapter(save_adapter(mixed, tmp_path / "a"))) == bits(mixed)


def test_factors_that_are_views_are_written_in_row_major_order(tmp_path: Path) -> None:
    adapter = example()
    turned = {
        path: dataclasses.replace(layer, factor_b=tuple(np.asfortranarray(array) for array in layer.factor_b))
        for path, layer in adapter.layers.items()
    }
    assert not all(layer.factor_b[0].flags.c_contiguous for layer in turned.values())
    back = load_adapter(save_adapter(dataclasses.replace(adapter, layers=turned), tmp_path / "a"))
    assert bits(back) == bits(adapter)


def test_what_was_loaded_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    first = save_adapter(example(), tmp_path / "a")
    second = save_adapter(load_adapter(first), tmp_path / "b")
    assert contents(first) == contents(second)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


GOLDEN_CONFIG = """\
{
  "auto_mapping": null,
  "base_fingerprint": "00ff",
  "base_model_name_or_path": "tiny",
  "base_quantisation": "nf4-double",
  "block_entries": 4096,
  "checksum": "7eaab3bca7c06efc0ff6a12bc4e681ceb414e4a4874169219c4dba1a26adf773",
  "dropout": 0.0,
  "format_version": 2,
  "gate": "softmax",
  "identity": "none",
  "inference_mode": true,
  "layers": {
    "model.layers.0.self_attn.q_proj": "4x6"
  },
  "num_shapes": 2,
  "peft_type": "MOKA",
  "peft_version": null,
  "r": 3,
  "revision": null,
  "scale": 1.0,
  "scaling": "none",
  "shapes": {
    "4x6": [
      [
        2,
        2,
        3,
        2,
        2
      ],
      [
        1,
        1,
        2,
        4,
        3
      ]
    ]
  },
  "target_modules": [
    "q_proj"
  ],
  "task_type": "CAUSAL_LM",
  "zero_factor": "b"
}
"""
GOLDEN_SHA256 = {
    "adapter_config.json": "177989e84cb3deca9afdd1f6af741d3d5468d9ead64596c55a8921892c401d54",
    "adapter_model.safetensors": "7b88efa4cd594cd0a6fdf4210255d029714757cd2f47440db9a014863c404b65",
}


def golden() -> Adapter:
    """Every number is a multiple of a quarter, counted up in storage order, so that anyone can rebuild it."""
    groups = (ShapeGroup(KronShape(2, 3, 2, 2), 2), ShapeGroup(KronShape(1, 2, 4, 3), 1))
    plan = LayerPlan(out_features=4, in_features=6, groups=groups)
    config = MokaConfig(r=3, num_shapes=2, shapes=(plan,), dropout=0.0, target_modules=("q_proj",))
    layer = LayerFactors(
        plan=plan,
        factor_a=(counted(1, 2, 2, 3), counted(20, 1, 1, 2)),
        factor_b=(counted(-10, 2, 2, 2), counted(40, 1, 4, 3)),
        gate_logits=counted(-1, 3),
    )
    return Adapter(
        config=config,
        layers={"model.layers.0.self_attn.q_proj": layer},
        base_fingerprint="00ff",
        base_model="tiny",
        base_quantisation="nf4-double",
    )


def counted(start: int, *shape: int) -> np.ndarray:
    return ((np.arange(np.prod(shape)) + start) / 4).astype(np.float32).reshape(shape)


def test_the_bytes_of_the_format_are_pinned(tmp_path: Path) -> None:
    """If this fails, folders already written may no longer be read alike: raise format_version, and FORMAT.md too."""
    folder = save_adapter(golden(), tmp_path / "golden")
    assert (folder / "adapter_config.json").read_text() == GOLDEN_CONFIG
    assert {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()} == GOLDEN_SHA256
    assert bits(load_adapter(folder)) == bits(golden())


def test_the_spec_shows_the_golden_folder() -> None:
    spec = (Path(adapter_folder.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    for digest in GOLDEN_SHA256.values():
        assert digest in spec
    shown = re.findall(r"```json\n(.*?)```", spec, re.S)
    assert json.loads(GOLDEN_CONFIG) in [json.loads(block) for block in shown]
    delta = dense_delta(next(iter(golden().layers.values())), golden().config)
    assert f"ΔW[0, 0] = {delta[0, 0]:.9f} and ΔW[3, 5] = {delta[3, 5]:.9f}" in spec


def test_the_spec_names_every_field_of_the_config() -> None:
    spec = (Path(adapter_folder.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    for field in json.loads(GOLDEN_CONFIG):
        assert f"| `{field}` |" in spec


def test_the_tensors_are_named_and_oriented_as_specified(tmp_path: Path) -> None:
    tensors = load_file(save_adapter(golden(), tmp_path / "golden") / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj.moka_"
    assert {key.removeprefix(stem): array.shape for key, array in tensors.items()} == {
        "factor_a.0": (2, 2, 3),
        "factor_a.1": (1, 1, 2),
        "factor_b.0": (2, 2, 2),
        "factor_b.1": (1, 4, 3),
        "gate_logits": (3,),
    }


# ---- writing: whole or not at all


def test_an_existing_folder_is_refused_and_left_untouched(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    before = contents(folder)
    with pytest.raises(PathError, match="expected a folder that does not exist yet; choose another name"):
        save_adapter(example(), folder)
    assert contents(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_overwrite_replaces_an_adapter_folder_whole(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    (folder / "stale.txt").write_text("of the old adapter")
    save_adapter(example(), folder, overwrite=True)
    assert sorted(contents(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert bits(load_adapter(folder)) == bits(example())
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_overwrite_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert bits(load_adapter(save_adapter(golden(), tmp_path / "a", overwrite=True))) == bits(golden())


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_never_replaces_what_is_no_adapter_folder(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    kept = target / "thesis.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    with pytest.raises(PathError, match="exists and is no adapter folder; it is left as it is"):
        save_adapter(golden(), target, overwrite=True)
    assert kept.read_text() == "years of work"


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_while_writing_leaves_nothing_behind(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    before = contents(save_adapter(golden(), folder)) if overwrite else None
    monkeypatch.setattr(adapter_folder, "save_file", fail)
    with pytest.raises(
        PathError, match=f"^{folder}: cannot be written; No space left on device; make room on the disk"
    ):
        save_adapter(example(), folder, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == (["a"] if overwrite else [])
    if overwrite:
        assert contents(folder) == before


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_a_failure_while_replacing_leaves_the_old_folder(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    before = contents(folder)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "rename failed")
        return rename(self, target)

    if exchange:
        monkeypatch.setattr(new_folder, "_exchange", fail)
    else:
        monkeypatch.setattr(new_folder, "_exchange", lambda *_: False)
        monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PathError, match=r"cannot be written; (Input/output error|No space left)"):
        save_adapter(example(), folder, overwrite=True)
    assert contents(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_without_an_exchange_of_names_a_folder_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    monkeypatch.setattr(new_folder, "_exchange", lambda *_: False)
    save_adapter(example(), folder, overwrite=True)
    assert bits(load_adapter(folder)) == bits(example())
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_what_a_process_left_aside_that_died_between_the_two_steps_is_named(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    folder.rename(tmp_path / ".a.x1.old")
    with pytest.raises(AdapterError, match=r"a process died while it replaced the folder, and \S+\.a\.x1\.old is what"):
        load_adapter(folder)


def test_a_name_as_long_as_the_system_takes_and_one_with_patterns_in_it(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / ("🙂" * 63))  # 252 bytes
    assert bits(load_adapter(folder)) == bits(golden())
    save_adapter(golden(), tmp_path / "[a]").rename(tmp_path / ".[a].x1.old")
    with pytest.raises(AdapterError, match=r"a process died while it replaced the folder, and \S+\.\[a\]\.x1\.old is"):
        load_adapter(tmp_path / "[a]")


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathError, match=r"a\\x00b': cannot be written; no name has a null byte"):
        save_adapter(golden(), tmp_path / "a\0b")


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    read, replaced = adapter_folder._read_tensors, []

    def late(*arguments: Any) -> Any:
        if not replaced:
            replaced.append(save_adapter(example(), folder, overwrite=True))
        return read(*arguments)

    monkeypatch.setattr(adapter_folder, "_read_tensors", late)
    assert bits(load_adapter(folder)) == bits(example())


def test_overwriting_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "a")
    (tmp_path / "link").symlink_to(folder)
    save_adapter(example(), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert bits(load_adapter(folder)) == bits(example())


def test_an_unsound_adapter_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    adapter = example()
    next(iter(adapter.layers.values())).factor_b[0][0, 0, 0] = np.nan
    with pytest.raises(AdapterError, match=r"factor_b\.0 has NaN or infinite entries"):
        save_adapter(adapter, tmp_path / "new" / "a")
    assert os.listdir(tmp_path) == []


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"expected an Adapter, as export_adapter gives, .* got str"):
        save_adapter(str(tmp_path / "a"), tmp_path / "b")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_missing_parents_are_made_and_the_files_are_readable_by_others(tmp_path: Path) -> None:
    folder = save_adapter(golden(), tmp_path / "x" / "y" / "a")
    assert folder.stat().st_mode & 0o555 == 0o555
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


# ---- reading: strict


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
        with pytest.raises(AdapterError, match="no such file; an adapter folder has"):
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
