"""`moka lora`: what it prints and writes, and how its failures end."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from conversion import open_base, save_adapter
from conversion.logits_error import logits_error
from moka_cli.main import main
from moka_core import AdapterError, MokaConfig
from tests.tiny import random_adapter, save_tiny_llama

CONFIG = MokaConfig(r=6, num_shapes=3, dropout=0.0, scale=0.02, target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, a MoKA adapter for it, and another base."""
    folder = tmp_path_factory.mktemp("cli-lora")
    base = save_tiny_llama(folder / "base")
    save_adapter(random_adapter(open_base(base), CONFIG), folder / "adapter")
    save_tiny_llama(folder / "other", seed=3)
    return folder


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_it_writes_the_folder_and_reports_both_errors(folders, tmp_path, capsys):
    shutil.copytree(folders / "base", folders / "moved")
    options = ["--rank", 16, "--base", folders / "moved", "--quantise", "none", "--json", tmp_path / "errors.json"]
    assert call("lora", folders / "adapter", tmp_path / "lora", *options) == 0
    printed = capsys.readouterr().out
    values = json.loads((tmp_path / "errors.json").read_text())
    assert values["rank"] == 16
    assert len(values["layers"]) == 4
    assert f"{values['worst']['relative']:.3g}" in printed
    assert f"loses {values['logits']['lost']:.1%} of the adapter's effect" in printed
    assert 0 < values["logits"]["error"]["largest"] < values["logits"]["effect"]["largest"]
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"], "the base is known, and so that names suffice"
    assert config["base_model_name_or_path"] == str(folders / "moved")


def test_the_largest_error_chooses_the_rank(folders, tmp_path, capsys):
    assert call("lora", folders / "adapter", tmp_path / "lora", "--max-error", 0.4, "--dtype", "bfloat16") == 0
    rank = json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"]
    printed = capsys.readouterr().out
    assert f"LoRA of rank {rank}" in printed
    assert "in bfloat16" in printed
    assert call("lora", folders / "adapter", tmp_path / "again", "--max-error", 0.4, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["rank"] == rank
    assert call("lora", folders / "adapter", tmp_path / "none", "--max-error", 0.4, "--max-rank", rank - 1) == 1
    assert f"needs {rank}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either a rank or a largest error; got neither: --rank K or --max-error E"),
        (["--rank", 4, "--max-error", 0.1], "got both: --rank K or --max-error E"),
        (["--rank", 0], "rank: expected a whole number >= 1; got 0"),
        (["--rank", 129], "rank: expected at most 128"),
        (["--max-error", 1.5], "max_error: expected 0 < max_error < 1"),
        (
            ["--rank", 4, "--json", "nowhere/errors.json"],
            "nowhere/errors.json: expected an existing folder; nowhere is none",
        ),
        (["--rank", 4, "--base", "nowhere"], "nowhere"),
        (["--rank", 4, "--quantise", "nf4"], "--quantise nf4: says how the base is held where logits are compared"),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_one_message_and_no_folder(folders, tmp_path, capsys, options, message):
    options = [folders / "base" if option == "BASE" else option for option in options]
    assert call("lora", folders / "adapter", tmp_path / "lora", *options) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "not an error that moka foresaw" not in printed
    assert list(tmp_path.iterdir()) == []


def test_another_base_and_an_existing_folder_are_refused(folders, tmp_path, capsys):
    options = ["--rank", 4, "--base", folders / "other"]
    assert call("lora", folders / "adapter", tmp_path / "lora", *options) == 1
    assert "the adapter was trained on another base model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "lora").mkdir()
    assert call("lora", folders / "adapter", tmp_path / "lora", "--rank", 4) == 1
    assert "lora: expected a folder that does not exist yet" in capsys.readouterr().err
    assert list((tmp_path / "lora").iterdir()) == []


def test_logits_that_cannot_be_measured_leave_nothing(folders, tmp_path, capsys, monkeypatch):
    def fails(base, adapter, loras, **options):
        (lora,) = loras
        assert sorted(path.name for path in lora.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert list(tmp_path.iterdir()) == [lora], "it has its name only once it was measured"
        raise AdapterError("they are not finite")

    monkeypatch.setattr("moka_cli.lora.measure_logits", fails)
    options = ["--rank", 4, "--base", folders / "base", "--json", tmp_path / "errors.json"]
    assert call("lora", folders / "adapter", tmp_path / "lora", *options) == 1
    assert capsys.readouterr().err == "moka: error: they are not finite\n"
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_refused(folders, tmp_path, capsys):
    large = random_adapter(open_base(folders / "base"), dataclasses.replace(CONFIG, scale=1e38))
    save_adapter(large, tmp_path / "adapter")
    options = ["--rank", 4, "--base", folders / "base", "--json", tmp_path / "errors.json"]
    assert call("lora", tmp_path / "adapter", tmp_path / "lora", *options) == 1
    assert "the logits of the adapter are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("scale", [1e38, 1.2e-38])
def test_errors_of_very_large_and_very_small_updates_are_those_of_the_same_at_scale_1(scale, folders, tmp_path):
    found = {}
    for number in (1.0, scale):
        name = f"{number:g}"
        scaled = random_adapter(open_base(folders / "base"), dataclasses.replace(CONFIG, scale=number))
        save_adapter(scaled, tmp_path / name)
        options = ["--rank", 4, "--json", tmp_path / f"{name}.json"]
        assert call("lora", tmp_path / name, tmp_path / f"{name}-lora", *options) == 0
        found[number] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found[scale]["total"] == pytest.approx(found[1.0]["total"], rel=1e-4)
    for one, other in zip(found[scale]["layers"], found[1.0]["layers"], strict=True):
        assert one["relative"] == pytest.approx(other["relative"], rel=1e-4)
        assert one["norm"] == pytest.approx(other["norm"] * scale, rel=1e-9)


def test_logits_errors_are_of_the_rms_and_of_logits_that_have_a_range():
    base, adapter = np.zeros((1, 4)), np.array([[4.0, 0.0, 0.0, 0.0]])
    found = logits_error(base, adapter, np.array([[3.0, 1.0, 1.0, 1.0]]))
    assert (found.error.largest, found.effect.largest) == (0.25, 1.0)
    assert found.lost == 0.5, "√(4·1²/4) over √(4²/4); of the largest it would be 0.25"
    assert logits_error(adapter, adapter, adapter).lost == 0
    assert logits_error(adapter, adapter, base).lost is None
    with pytest.raises(AdapterError, match="logits of the adapter are all equal"):
        logits_error(adapter, base, adapter)
    for wrong in (np.nan, np.inf):
        with pytest.raises(AdapterError, match="the logits of the approximation are not finite"):
            logits_error(base, adapter, np.full((1, 4), wrong))
