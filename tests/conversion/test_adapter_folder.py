"""The adapter folder: bits kept, bytes pinned, and nothing left half written."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion import adapter_folder, load_adapter, new_folder, save_adapter
from moka_core import Adapter, AdapterError, LayerFactors, MokaConfig, PathError, plan_layer
from moka_core.oracle import dense_delta
from tests.cases import CASES, random_factors, random_layer
from tests.conversion.golden_adapter import bits, golden

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def cast(layer: LayerFactors, config: MokaConfig, dtype: np.dtype) -> LayerFactors:
    tensors = {name: array.astype(dtype) for name, array in layer.tensors()}
    return LayerFactors.from_tensors(layer.plan, config, tensors)


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
