"""`moka merge`: what it prints and writes, and how its failures end."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import conversion
from conversion import MergeError, load_adapter, open_base, save_adapter
from moka_cli.main import main
from moka_cli.merge import _cells
from moka_core import MokaConfig
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import random_adapter, save_tiny_llama

CONFIG = MokaConfig(r=6, num_shapes=3, scale=0.02, target_modules=("q_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("merge") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(random_adapter(open_base(base), CONFIG), tmp_path_factory.mktemp("merge") / "adapter")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_merge_prints_what_was_lost_and_writes_it_as_json(base, adapter, tmp_path, capsys):
    assert call("merge", adapter, tmp_path / "out", "--base", base, "--json", tmp_path / "report.json") == 0
    printed = words(capsys.readouterr().out)
    assert "W + ΔW, rounded to bfloat16" in printed
    assert "the 5 worst of 6 layers" in printed
    assert "all 6 layers with an adapter" in printed
    assert f"or moka generate --base {tmp_path / 'out'} --quantise none --prompt TEXT" in printed
    assert "taken over as they are: generation_config.json" in printed
    assert "warning" not in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["base_quantisation"] == "nf4-double"
    assert 1e-3 < report["total"]["relative_error"] < 2e-3  # a rounding to 8 bits: 2⁻⁹ at most, 1.7e-3 measured
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(base / "model.safetensors"))


def test_the_table_is_whole_at_80_columns(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("merge", adapter, tmp_path / "out", "--base", base) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 5 + 1
    assert all(re.match(r"│ model\.layers\.\d\.[a-z_]+\.[a-z]+_proj +│ +\S+ │ +\S+ │ +\S+ │$", row) for row in rows[:5])


@pytest.mark.parametrize(
    ("lost", "told"),
    [(None, "–"), (-0.0007, "none"), (4e-5, "none"), (6e-5, "0.01%"), (0.98, "98.00%"), (-0.2, "-20.00%")],
)
def test_rounding_that_goes_a_little_too_far_is_no_loss(lost, told):
    update = 0.0 if lost is None else 4.0
    error = MergeError(total=100.0, error=1.0, update=update, moved=update * (1 - (lost or 0.0)))
    assert _cells(error)[-1] == told


def test_the_example_in_the_docs_answers_from_the_merged_folder(adapter, tmp_path, capsys, monkeypatch):
    base = save_tiny_llama(tmp_path / "base", vocab_size=320)
    make_tokenizer().save_pretrained(base)
    save_adapter(random_adapter(open_base(base), CONFIG), tmp_path / "adapter")
    assert call("merge", tmp_path / "adapter", tmp_path / "merged", "--base", base) == 0
    docs = (Path(__file__).parents[2] / "docs/merging.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", docs, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    assert names["tokens"].shape[1] > names["asked"]["input_ids"].shape[1]


def test_a_packed_merge_warns_of_what_was_lost(base, adapter, tmp_path, capsys):
    assert call("merge", adapter, tmp_path / "out", "--base", base, "--pack", "nf4", "--max-shard-gb", 1e-4) == 0
    printed = words(capsys.readouterr().out)
    assert "W + ΔW, quantised again as nf4" in printed
    assert "of the update was lost" in printed
    assert "A dense merge, without --pack, is recommended" in printed
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_an_update_below_the_dtypes_resolution_warns(base, tmp_path, capsys):
    """On a dense bfloat16 base W is a bfloat16 number, and what is less than half a unit is rounded away."""
    coarse = tmp_path / "base"
    coarse.mkdir()
    (coarse / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}, coarse / "model.safetensors")
    small = random_adapter(open_base(coarse), dataclasses.replace(CONFIG, scale=1e-5))
    save_adapter(small, tmp_path / "adapter")
    arguments = (tmp_path / "adapter", tmp_path / "out", "--base", coarse, "--quantise", "none")
    assert call("merge", *arguments) == 0
    assert "is below what bfloat16 resolves and was rounded away. --dtype float32 keeps it" in words(
        capsys.readouterr().out
    )
    assert call("merge", *arguments[:1], tmp_path / "fine", *arguments[2:], "--dtype", "float32") == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("said", "expected"), [("none", "none"), ("nf4", "nf4"), (None, "nf4-double")])
def test_the_base_is_held_as_the_adapter_says(said, expected, base, adapter, tmp_path, capsys, monkeypatch):
    trained = dataclasses.replace(load_adapter(adapter), base_quantisation=said)
    monkeypatch.setattr(conversion, "load_adapter", lambda folder: trained)
    report = tmp_path / "report.json"
    assert call("merge", adapter, tmp_path / "out", "--base", base, "--json", report) == 0
    assert json.loads(report.read_text())["base_quantisation"] == expected
    assert call("merge", adapter, tmp_path / "other", "--base", base, "--json", report, "--quantise", "none") == 0
    assert json.loads(report.read_text())["base_quantisation"] == "none"
    capsys.readouterr()
    again = ("merge", adapter, tmp_path / "other2", "--base", base, "--quantise", "none", "--json", "-")
    assert call(*again) == 0
    assert json.loads(capsys.readouterr().out)["base_quantisation"] == "none", "and nothing beside the JSON"
    assert bool(json.loads(report.read_text())["notes"]) == (said == "nf4")


def test_another_base_must_be_allowed(adapter, tmp_path, capsys):
    other = save_tiny_llama(tmp_path / "other", seed=7)
    assert call("merge", adapter, tmp_path / "out", "--base", other) == 1
    assert "was trained on another base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call("merge", adapter, tmp_path / "out", "--base", other, "--allow-other-base") == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert np.array_equal(merged, load_file(other / "model.safetensors")["model.norm.weight"].astype(merged.dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-shard-gb", "0"), "--max-shard-gb: expected more than 0; got 0.0"),
        (("--json", "nowhere/report.json"), "nowhere/report.json: expected an existing folder; nowhere is none"),
        (("--base", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_settings_out_of_range_end_with_one_message(options, message, base, adapter, tmp_path, capsys):
    assert call("merge", adapter, tmp_path / "out", "--base", base, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("moka: error: ")
    assert message in error
    assert "Traceback" not in error
    assert list(Path(tmp_path).iterdir()) == []


def test_a_target_that_exists_is_refused(base, adapter, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert call("merge", adapter, tmp_path / "out", "--base", base) == 1
    assert "out: expected a folder that does not exist yet" in capsys.readouterr().err
    assert call("merge", base, tmp_path / "other", "--base", base) == 1
    assert "adapter_config.json: no such file" in capsys.readouterr().err
    assert call("merge", tmp_path / "gone", tmp_path / "other", "--base", base) == 1
    assert "gone: no such folder; expected an adapter folder, as moka export" in capsys.readouterr().err


def save_scaled(base, folder, scale, factor=1.0):
    """An adapter of that scale, the factors B of which are `factor` times random ones."""
    adapter = random_adapter(open_base(base), dataclasses.replace(CONFIG, scale=scale))
    for layer in adapter.layers.values():
        for array in layer.factor_b:
            array *= factor
    return save_adapter(adapter, folder)


@pytest.mark.parametrize("options", [(), ("--dtype", "float32"), ("--pack", "nf4-double")])
def test_an_update_that_no_dtype_holds_is_refused_by_the_layers_name(options, base, tmp_path, capsys):
    adapter = save_scaled(base, tmp_path / "adapter", 3e38, factor=1e3)
    assert call("merge", adapter, tmp_path / "out", "--base", base, *options) == 1
    told = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj.weight: its largest entry is " in told
    assert "e+41, and " in told
    assert "holds numbers up to 3." in told
    assert "the update is not usable" in told
    assert not (tmp_path / "out").exists()


def test_an_update_that_nf4_does_not_hold_is_refused_by_the_layers_name(base, tmp_path, capsys):
    adapter = save_scaled(base, tmp_path / "adapter", 3e38)
    assert call("merge", adapter, tmp_path / "out", "--base", base, "--pack", "nf4-double") == 1
    told = capsys.readouterr().err
    assert "model.layers.0.mlp.down_proj.weight: cannot be packed as nf4-double; NF4 weight of shape" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1e36, 1.2e-38])
@pytest.mark.parametrize("options", [("--dtype", "float32"), ("--pack", "nf4-double")])
def test_figures_of_very_large_and_very_small_updates_are_finite_and_right(scale, options, base, tmp_path):
    adapter = save_scaled(base, tmp_path / "adapter", scale)
    report = tmp_path / "report.json"
    assert call("merge", adapter, tmp_path / "out", "--base", base, *options, "--json", report) == 0
    total = json.loads(report.read_text())["total"]
    packed = options[0] == "--pack"
    if scale > 1:
        assert total["update"] == pytest.approx(1)
        assert 1e-8 < total["relative_error"] < (0.2 if packed else 1e-7)
        assert abs(total["update_lost"]) < 0.02
    else:
        assert 0 < total["update"] < 1e-35
        assert packed or 0.8 < total["update_lost"] < 1, "it arrives where W is 0, a level of NF4, and nowhere else"
        assert total["error_of_update"] > 0.9
    assert all(map(math.isfinite, total.values()))
