"""Merging into a folder: every refusal and failure on the way is told, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import conversion.merged_folder
import conversion.shards
from conversion import merge_folder, open_base
from moka_core import Adapter, AdapterError, ConfigError, ModelError, PathError, base_difference
from tests.conversion.merged_toys import CONFIG, make_base, make_tied, mark
from tests.tiny import random_adapter, save_tiny_llama


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return make_base(root / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Adapter:
    return random_adapter(open_base(base), CONFIG)


@pytest.fixture(scope="module")
def tied(root: Path) -> tuple[Path, Adapter]:
    """A base whose head is the embedding, and an adapter on that head."""
    return make_tied(root / "tied-base")


# ---- refusals


def refused(error: type[Exception], message: str, adapter: Adapter, base: Any, out: Path, **options: Any) -> None:
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
    with pytest.raises(error, match=message):
        merge_folder(adapter, base, out, **options)
    assert (sorted(out.parent.rglob("*")) if out.parent.exists() else None) == before


def test_an_adapter_that_does_not_fit_is_refused_with_every_problem(tmp_path: Path, base: Path) -> None:
    other = open_base(save_tiny_llama(tmp_path / "other", hidden_size=192, num_hidden_layers=3, seed=1))
    trained = random_adapter(other, dataclasses.replace(CONFIG, target_modules=("q_proj", "k_proj")))
    with pytest.raises(AdapterError) as caught:
        merge_folder(trained, open_base(base), tmp_path / "out")
    text = str(caught.value)
    assert "nothing was merged (7 problems)" in text
    assert f"another base model: expected {trained.base_fingerprint[:16]}…" in text  # type: ignore[index]
    assert "model.layers.2.self_attn.k_proj: the base has no linear layer of that name" in text
    assert "model.layers.0.self_attn.q_proj: the adapter is for a layer of 192x192, the base has 128x128" in text
    assert not (tmp_path / "out").exists()
    refused(AdapterError, r"\(6 problems\)", trained, open_base(base), tmp_path / "out", allow_other_base=True)


def test_nothing_is_read_of_a_base_that_the_adapter_does_not_fit(
    tmp_path: Path, base: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = [layer for path, layer in adapter.layers.items() if path.endswith("q_proj")]
    wrong = dataclasses.replace(adapter, layers={"model.embed_tokens": norms[0], "model.norm": norms[0]})
    wrong = dataclasses.replace(wrong, base_fingerprint=None)
    monkeypatch.setattr(conversion.merged_folder, "_write", lambda *_: pytest.fail("read"))
    refused(AdapterError, r"model\.embed_tokens: the base has no linear", wrong, open_base(base), tmp_path / "out")


def test_an_adapted_head_needs_a_head(tmp_path: Path, base: Path, tied: tuple[Path, Adapter]) -> None:
    folder = shutil.copytree(tied[0], tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refused(AdapterError, "lm_head: the base has no linear layer", tied[1], open_base(folder), tmp_path / "out")


def test_another_base_is_refused_unless_it_is_allowed(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    other = open_base(make_base(tmp_path / "other", seed=4))
    refused(AdapterError, "was trained on another base model", adapter, other, tmp_path / "out")
    merge_folder(adapter, other, tmp_path / "out", allow_other_base=True)
    unknown = dataclasses.replace(adapter, base_fingerprint=None)
    merge_folder(unknown, other, tmp_path / "unknown")


def test_another_way_to_hold_the_base_is_noted(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    trained = dataclasses.replace(adapter, base_quantisation="none")
    report = merge_folder(trained, open_base(base), tmp_path / "out")
    assert report.notes == (
        "the adapter was trained on a base held as none; it was merged into one held as nf4-double, on which it "
        "computes something else",
    )
    assert merge_folder(trained, open_base(base, quantise="none"), tmp_path / "same").notes == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float64"}, ConfigError, "dtype: expected float32, bfloat16, float16; got 'float64'"),
        ({"pack": "fp4"}, ConfigError, "pack: expected nf4-double, nf4 or None; got 'fp4'"),
        ({"max_shard_bytes": 0}, ConfigError, "max_shard_bytes: expected more than 0; got 0"),
        ({"max_shard_bytes": float("nan")}, ConfigError, "max_shard_bytes: expected more than 0"),
    ],
)
def test_settings_out_of_range(
    options: Any, error: Any, message: str, tmp_path: Path, base: Path, adapter: Adapter
) -> None:
    refused(error, message, adapter, open_base(base), tmp_path / "out", **options)


def test_a_target_that_exists_is_left_alone(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        refused(PathError, "expected a folder that does not exist yet", adapter, open_base(base), tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    refused(PathError, "cannot be written; File name too long", adapter, open_base(base), tmp_path / ("x" * 300))
    refused(PathError, "cannot be written; Not a directory", adapter, open_base(base), tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("name", "pack"),
    [("model.layers.1.self_attn.q_proj", None), ("model.layers.1.self_attn.q_proj", "nf4"), ("model.norm", None)],
)
def test_what_float16_cannot_hold_is_refused(
    name: str, pack: Any, tmp_path: Path, base: Path, adapter: Adapter
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"].reshape(-1)[5] = -70000
    save_file(tensors, folder / "model.safetensors")
    opened = open_base(folder, quantise="none")
    message = (
        rf"{name}\.weight: its largest entry is 7000\d(\.\d)?, and float16 holds numbers up to 65504; choose bfloat16"
    )
    refused(ModelError, message, dataclasses.replace(adapter, base_fingerprint=None), opened, tmp_path / "out",
            dtype="float16", pack=pack)  # fmt: skip
    merge_folder(dataclasses.replace(adapter, base_fingerprint=None), opened, tmp_path / "wide")


@pytest.mark.parametrize(("value", "message"), [(np.nan, "expected finite numbers; it has NaN"), (-np.inf, "is inf")])
def test_a_base_that_is_not_finite_is_refused(
    value: float, message: str, tmp_path: Path, base: Path, adapter: Adapter
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        refused(ModelError, message, adapter, open_base(folder, quantise="none"), tmp_path / "out", dtype=dtype)


def test_merging_the_same_adapter_once_more_is_refused(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    """However small it is, and though 4 bits lose it: the linear weights alone would not tell."""
    small = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, scale=1e-5))
    for name, options in (("dense", {}), ("packed", {"pack": "nf4-double"})):
        merge_folder(small, open_base(base), tmp_path / name, **options)
        merged = open_base(tmp_path / name)
        assert base_difference(merged.fingerprint, f"{merged.fingerprint[:64]}.{small.base_fingerprint[65:]}") is None
        message = "other architecture numbers, norm weights or merged adapters"
        refused(AdapterError, message, small, merged, tmp_path / "twice")
        merge_folder(small, merged, tmp_path / f"{name}-twice", allow_other_base=True)
        config = json.loads((tmp_path / f"{name}-twice" / "config.json").read_text())
        assert config["moka_merged"] == [mark(small)] * 2
        assert open_base(tmp_path / f"{name}-twice").fingerprint[:64] != merged.fingerprint[:64]


# ---- failures on the way


@pytest.mark.parametrize("out", ["out", "new/newer/out"])
def test_nothing_is_left_after_a_failure_in_the_middle(tmp_path: Path, base: Path, adapter: Adapter, out: str) -> None:
    seen: list[str] = []

    def stop(name: str, done: int, total: int) -> None:
        assert 0 < done <= total
        assert list(tmp_path.rglob("shard-*")) or len(seen) < 3
        seen.append(name)
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folder(adapter, open_base(base), tmp_path / out, max_shard_bytes=50_000, on_tensor=stop)
    assert list(tmp_path.iterdir()) == []
    merge_folder(adapter, open_base(base), tmp_path / out)
    assert [path.name for path in (tmp_path / out).parent.iterdir()] == ["out"]


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(
    tmp_path: Path, base: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion.shards, "save_file", full)
    refused(PathError, "cannot be written; .*No space left", adapter, open_base(base), tmp_path / "out")


def test_too_small_a_disk_is_refused_first(
    tmp_path: Path, base: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(conversion.merged_folder, "_write", lambda *_: pytest.fail("begun"))
    refused(
        PathError,
        r"expected 0\.00\d+ GB of free disk space; there are 1e-05 GB",
        adapter,
        open_base(base),
        tmp_path / "new" / "out",
    )
    assert not (tmp_path / "new").exists()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, base: Path, adapter: Adapter) -> None:
    def appear(name: str, done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()

    with pytest.raises(PathError, match=r"cannot be written; .*not empty; choose another name"):
        merge_folder(adapter, open_base(base), tmp_path / "out", on_tensor=appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]
