"""`moka import`: a LoRA adapter or a fine-tuned model becomes the nearest MoKA adapter, or is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion import load_adapter, open_base, save_adapter
from conversion.lora_folder import load_lora
from moka_cli.bases import open_held
from moka_cli.import_ import base_layers
from moka_core import ConfigError, KronShape, MokaConfig
from moka_core.oracle import dense_delta
from tests.moka_cli.test_commands import call
from tests.tiny import random_adapter, save_tiny_llama

SMALL = ("--set", "r=4", "--set", "num_shapes=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("import") / "base")


def save_lora(base, folder, **settings):
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return save_lora(base, tmp_path_factory.mktemp("lora") / "lora")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The base with a random MoKA of the preset's shapes added on q and v, so that the nearest one is exact."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("tuned") / "tuned")
    opened = open_base(base)
    adapter = random_adapter(opened, MokaConfig(r=4, num_shapes=1))
    tensors = load_file(folder / "model.safetensors")
    for path in adapter.layers:
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + 0.1 * delta_of(adapter, path).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def delta_of(adapter, path):
    return dense_delta(adapter.layers[path], adapter.layer_config(path))


def test_a_lora_becomes_the_nearest_adapter_and_its_errors_are_those_of_the_oracle(base, lora, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert call("import", lora, tmp_path / "out", "--base", base, *SMALL, "--json", figures) == 0
    printed = capsys.readouterr().out
    adapter, wanted = load_adapter(tmp_path / "out"), load_lora(lora, base_layers(open_base(base)))
    assert adapter.layers.keys() == wanted.keys()
    assert adapter.config.target_modules == ("down_proj", "q_proj")
    assert adapter.base_fingerprint == open_base(base).fingerprint
    assert adapter.base_model == str(base)
    assert adapter.base_quantisation == "nf4-double", "as it will be held by default"
    told = json.loads(figures.read_text())
    left = whole = 0.0
    for path, layer in wanted.items():
        delta = layer.delta()
        error = np.linalg.norm(delta - delta_of(adapter, path))
        left, whole = left + error**2, whole + np.linalg.norm(delta) ** 2
        assert told["layers"][path]["error"] == pytest.approx(error / np.linalg.norm(delta), abs=1e-6)
        assert 0.3 < told["layers"][path]["error"] < 1  # a random update of low rank projects badly
    assert told["total"]["error"] == pytest.approx((left / whole) ** 0.5, abs=1e-6)
    assert told["total"]["lora_parameters"] == sum(layer.parameters for layer in wanted.values())
    assert told["total"]["parameters"] == adapter.trainable
    assert f"of all layers together {told['total']['error']:.4f}" in printed
    assert call("import", lora, tmp_path / "again", "--base", base, *SMALL, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == told
    assert {(row["kind"], row["layers"]) for row in told["kinds"]} == {("q_proj", 2), ("down_proj", 2)}


SHAPES_GIVEN = 'shapes={"128x128":[[1,1,128,128,1],[3,8,16,16,8]]}'  # of q, one of its terms a LoRA's already


@pytest.mark.parametrize(("more", "of_q"), [((), [3, 2, 2]), (("--set", SHAPES_GIVEN), [4, 3])])
def test_lora_terms_hold_the_lora_exactly_and_peft_computes_the_same_with_both(base, tmp_path, more, of_q):
    import moka_torch  # noqa: F401

    source = save_lora(base, tmp_path / "lora", rank_pattern={"0.self_attn.q_proj": 3}, use_rslora=True)
    options = (*SMALL, *more, "--lora-terms", 3, "--max-error", "1e-6")
    assert call("import", source, tmp_path / "out", "--base", base, *options) == 0
    adapter = load_adapter(tmp_path / "out")
    assert (adapter.config.r, adapter.config.lora_terms) == (4 + 3, 3)
    groups = adapter.layers["model.layers.0.self_attn.q_proj"].plan.groups
    assert [group.copies for group in groups] == of_q
    assert groups[0].shape == KronShape(1, 128, 128, 1)
    tokens = torch.arange(12)[None]
    logits = []
    for folder in (source, tmp_path / "out"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            logits.append(model(tokens).logits)
            with model.disable_adapter():
                without = model(tokens).logits
    assert (logits[0] - without).abs().max() > 0.1
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)  # measured: 2.6e-6, of logits up to 3.2


def test_a_fine_tuned_model_becomes_the_adapter_that_was_merged_into_it(base, tuned, tmp_path):
    one_shape = ("--set", "r=4", "--set", "num_shapes=1")
    assert call("import", tuned, tmp_path / "out", "--base", base, *one_shape, "--quantise", "none") == 0
    adapter = load_adapter(tmp_path / "out")
    assert adapter.base_quantisation == "none"
    before, after = (open_base(folder, quantise="none") for folder in (base, tuned))
    for path in adapter.layers:
        delta = after.dense(f"{path}.weight") - before.dense(f"{path}.weight")
        error = np.linalg.norm(delta - delta_of(adapter, path)) / np.linalg.norm(delta)
        assert error < 3e-7  # measured: 1.1e-7, the rounding of W + ΔW and of the factors


def test_what_else_changed_is_refused_unless_it_is_to_be_left_behind(base, tuned, lora, tmp_path, capsys):
    other = shutil.copytree(tuned, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    arguments = ["import", other, tmp_path / "out", "--base", base, *SMALL]
    assert call(*arguments) == 1
    refusal = capsys.readouterr().err
    assert "changes more than the targeted layers" in refusal
    assert "model.norm.weight: 50.00%" in refusal
    assert "model.layers.1.mlp.up_proj.weight: " in refusal
    assert not (tmp_path / "out").exists()
    assert call(*arguments, "--only-targets") == 0
    assert "left behind: model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out

    arguments = ["import", lora, tmp_path / "less", "--base", base, *SMALL, "--set", "target_modules=[q_proj]"]
    assert call(*arguments) == 1
    refusal = capsys.readouterr().err
    norms = {
        path: np.linalg.norm(layer.delta()) for path, layer in load_lora(lora, base_layers(open_base(base))).items()
    }
    shares = {path: norm / np.linalg.norm(list(norms.values())) for path, norm in norms.items() if "down_proj" in path}
    assert len(shares) == 2
    assert all(f"{path}: {share:.2%}" in refusal for path, share in shares.items())
    assert call(*arguments, "--only-targets", "--json", tmp_path / "figures.json") == 0
    assert json.loads((tmp_path / "figures.json").read_text())["left_behind"] == pytest.approx(shares)


def test_layers_that_the_source_leaves_alone_start_fresh(base, lora, tmp_path, capsys):
    targets = "target_modules=[q_proj, down_proj, v_proj]"
    assert call("import", lora, tmp_path / "out", "--base", base, *SMALL, "--set", targets) == 0
    assert "2 layers have ΔW = 0 and a fresh start" in capsys.readouterr().out
    adapter = load_adapter(tmp_path / "out")
    path = "model.layers.0.self_attn.v_proj"
    assert not delta_of(adapter, path).any()
    assert all(array.all() for array in adapter.layers[path].factor_a)


def test_layers_of_some_depths_only_keep_their_paths(base, tmp_path):
    source = save_lora(base, tmp_path / "lora", layers_to_transform=[1])
    assert call("import", source, tmp_path / "out", "--base", base, *SMALL) == 0
    adapter = load_adapter(tmp_path / "out")
    assert set(adapter.config.target_modules) == set(adapter.layers)
    assert {path.split(".")[2] for path in adapter.layers} == {"1"}


def refused(capsys, *arguments):
    assert call("import", *arguments) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_refusals(base, lora, tuned, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "taken").mkdir()
    (tmp_path / "empty").mkdir()
    start = ("--base", base, *SMALL)
    assert "expected a folder that does not exist yet" in refused(capsys, lora, tmp_path / "taken", *start)
    assert "found neither" in refused(capsys, tmp_path / "empty", out, *start)
    assert "no such folder" in refused(capsys, lora, out, "--base", tmp_path / "nowhere")
    assert "unknown 'rr' (did you mean 'r'?)" in refused(capsys, lora, out, *start, "--set", "rr=3")
    assert "unknown preset 'papper'" in refused(capsys, lora, out, *start, "--preset", "papper")
    assert "--max-error: expected a number >= 0" in refused(capsys, lora, out, *start, "--max-error", "-1")
    nowhere = tmp_path / "nowhere" / "f.json"
    assert "f.json: expected an existing folder" in refused(capsys, lora, out, *start, "--json", nowhere)
    assert call("import", lora, out, *start, "--json", tmp_path) == 2  # a folder: typer's own refusal
    assert "is a directory" in " ".join(capsys.readouterr().err.split())
    assert "--lora-terms: expected a whole number >= 0" in refused(capsys, lora, out, *start, "--lora-terms", -1)
    identity = ("--set", "identity=a", "--set", "num_shapes=1", "--lora-terms", 1)
    assert "--lora-terms: expected identity=none" in refused(capsys, lora, out, "--base", base, *identity)
    told = refused(capsys, lora, out, *start, "--max-error", "0.2")
    assert "--max-error 0.2: 4 of 4 layers are worse; the worst is model.layers." in told
    assert "nothing to project: ΔW = 0 on all 4" in refused(
        capsys, shutil.copytree(base, tmp_path / "same"), out, *start
    )
    narrow = save_tiny_llama(tmp_path / "narrow", hidden_size=64)
    told = refused(capsys, lora, out, "--base", narrow)
    assert (
        f"this LoRA does not fit the base given, {narrow}; give the one that it was trained on ({str(base)!r}" in told
    )
    save_adapter(random_adapter(open_base(base), MokaConfig(r=2, num_shapes=1)), tmp_path / "moka")
    assert "this is a MoKA adapter already" in refused(capsys, tmp_path / "moka", out, *start)
    assert not out.exists()


def test_pairs_that_are_none_are_refused(base, tmp_path, capsys):
    out = tmp_path / "out"
    wide = save_tiny_llama(tmp_path / "wide", intermediate_size=256)
    told = refused(capsys, wide, out, "--base", base)
    assert "of the same architecture:\n  intermediate_size: 192 became 256" in told
    theta = save_tiny_llama(tmp_path / "theta", rope_theta=5e5)
    assert "the rotary settings or rms_norm_eps differ" in refused(capsys, theta, out, "--base", base)
    biased = save_tiny_llama(tmp_path / "biased", attention_bias=True)
    assert "model.layers.0.self_attn.q_proj.bias: only in one of them" in refused(capsys, biased, out, "--base", base)
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors")
    assert "q_proj.weight: expected finite numbers" in refused(capsys, broken, out, "--base", base)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((3, 128), ml_dtypes.bfloat16)
    save_file(tensors, broken / "model.safetensors")
    assert "expected (128, 128), got (3, 128)" in refused(capsys, base, out, "--base", broken)
    assert not out.exists()


def test_a_base_of_another_name_is_noted_and_progress_is_told_without_a_terminal(
    base, lora, tmp_path, capsys, monkeypatch
):
    arguments = (*SMALL, "--set", "target_modules=[q_proj]", "--only-targets")
    assert call("import", lora, tmp_path / "own", "--base", base, *arguments) == 0
    printed = capsys.readouterr().out
    assert "note" not in printed
    assert "layer 1/2" not in printed
    moved = shutil.copytree(base, tmp_path / "[moved]")
    monkeypatch.setattr("moka_cli.import_.TOLD_EVERY", 0.0)
    assert call("import", lora, tmp_path / "out", "--base", moved, *arguments) == 0
    printed = capsys.readouterr().out
    told = f"the LoRA was trained on {str(base)!r}, says its adapter_config.json; the base given is {str(moved)!r}"
    assert f"note: {told}" in " ".join(printed.split())
    assert call("import", lora, tmp_path / "again", "--base", moved, *arguments, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["notes"][0].startswith(told)
    assert repr(str(moved)) in printed
    assert "layer 1/2  left 0:00:0" in printed
    assert "layer 2/2" not in printed


def test_a_packed_base_is_taken_as_it_is_packed_or_refused(base, lora, tmp_path, capsys):
    from transformers import BitsAndBytesConfig

    packed = tmp_path / "packed"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).save_pretrained(packed)
    start = (lora, tmp_path / "out", "--base", packed, *SMALL)
    for asked in ("nf4-double", "none"):
        told = refused(capsys, *start, "--quantise", asked)
        assert f"--quantise {asked}: {packed} is packed already, as nf4, and is held so; leave --quantise out" in told
    assert call("import", *start) == 0
    adapter = load_adapter(tmp_path / "out")
    assert adapter.base_quantisation == "nf4"
    for command in (("merge", tmp_path / "merged"), ("lora", tmp_path / "as-lora", "--rank", 4), ("parity",)):
        name, *rest = command
        assert call(name, tmp_path / "out", *rest, "--base", packed, "--quantise", "none") == 1
        assert f"--quantise none: {packed} is packed already, as nf4" in capsys.readouterr().err
    trained_elsewhere = dataclasses.replace(adapter, base_quantisation="none")
    for value in (None, adapter, trained_elsewhere):
        assert open_held(packed, None, value).quantisation == open_held(packed, "nf4", value).quantisation == "nf4"
        with pytest.raises(ConfigError, match="is packed already, as nf4"):
            open_held(packed, "nf4-double", value)
    assert open_held(base, None).quantisation == "nf4-double"
    assert open_held(base, None, trained_elsewhere).quantisation == "none"


def test_a_packed_folder_is_no_half_of_a_pair(base, tmp_path, capsys):
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).save_pretrained(tmp_path / "packed")
    told = refused(capsys, base, tmp_path / "out", "--base", tmp_path / "packed")
    assert "expected dense weights; these are NF4" in told


def test_an_alpha_or_a_scale_beyond_float32_is_refused_by_the_layers_name(base, lora, tmp_path, capsys):
    large = shutil.copytree(lora, tmp_path / "large")
    config = json.loads((large / "adapter_config.json").read_text())
    (large / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e200}))
    told = refused(capsys, large, tmp_path / "out", "--base", base, *SMALL)
    assert "model.layers.0.mlp.down_proj: expected lora_alpha / r to be a number that float32 holds; got 5e+199" in told
    blocks = ("--set", "identity=a", "--set", "num_shapes=1", "--set", "scale=1.2e-38")
    (large / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e6}))
    told = refused(capsys, large, tmp_path / "out", "--base", base, "--set", "r=2", *blocks)
    assert "_proj: its factors do not fit into float32 with scale 1.2e-38; ‖ΔW‖ is " in told
    assert not (tmp_path / "out").exists()
    for scale in ("1.0e+38", "1.2e-38"):
        out, figures = tmp_path / scale, tmp_path / f"{scale}.json"
        assert call("import", lora, out, "--base", base, *SMALL, "--set", f"scale={scale}", "--json", figures) == 0
        assert 0.3 < json.loads(figures.read_text())["total"]["error"] < 1


def test_changes_too_large_to_be_squared_in_float32_have_a_finite_share(base, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, other / "model.safetensors")
    told = refused(capsys, other, tmp_path / "out", "--base", base, *SMALL)
    share = 1e30 / np.linalg.norm(load_file(base / "model.safetensors")["model.norm.weight"].astype(np.float64))
    assert float(re.search(r"model\.norm\.weight: (\S+)%", told)[1]) == pytest.approx(100 * share)


def test_a_merged_model_is_a_fine_tuned_one(base, tmp_path, capsys):
    """Though it is another base by what its config.json says was merged; and its name may hold a bracket."""
    adapter = random_adapter(open_base(base), MokaConfig(r=4, num_shapes=1))
    save_adapter(adapter, tmp_path / "adapter")
    merged = tmp_path / "[/b]m"
    dense = ("--quantise", "none", "--dtype", "float32")
    assert call("merge", tmp_path / "adapter", merged, "--base", base, *dense) == 0
    assert str(merged) in capsys.readouterr().out
    assert call("import", merged, tmp_path / "out", "--base", base, "--set", "r=4", "--set", "num_shapes=1") == 0
    found = load_adapter(tmp_path / "out")
    for path in adapter.layers:
        delta = delta_of(adapter, path)
        assert np.linalg.norm(delta_of(found, path) - delta) <= 1e-4 * np.linalg.norm(delta)  # float32's rounding of W
