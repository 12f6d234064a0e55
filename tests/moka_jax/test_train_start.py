"""A run that goes on from an adapter: its first loss is that adapter's, and it needs the folder only once."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

import moka_core
from conversion import load_adapter, open_base, save_adapter
from moka_cli.train import resolve_start
from moka_core import Adapter, AdapterError, Architecture, ConfigError, MokaConfig, preset
from moka_jax import import_adapter
from moka_jax.llama import load_llama
from moka_jax.train import AdapterSettings, TrainConfig, load_dataset, read_metrics
from moka_jax.train.batches import eval_batches
from moka_jax.train.saved import saved_run
from tests.moka_cli.test_commands import call
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import random_adapter, save_tiny_llama, write_run

ROOT = Path(__file__).parents[2]
CONFIG = MokaConfig(r=3, num_shapes=2, dropout=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("start") / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(base, tmp_path_factory):
    """An adapter that moves the model a lot."""
    return save_adapter(random_adapter(open_base(base), CONFIG), tmp_path_factory.mktemp("adapter") / "start")


def write(folder, base, start, **settings):
    adapter = {"start": str(start)} | settings.pop("adapter", {})
    settings = {"steps": 4, "batch_size": 4, "eval_every": 2, "checkpoint_every": 2} | settings
    return write_run(folder, base, train=12, eval=4, adapter=adapter, optimiser={"learning_rate": 3e-3}, **settings)


def held_out(folder):
    return [record["loss"] for record in read_metrics(folder / "out" / "metrics.jsonl") if record["kind"] == "eval"]


def loss_of(config: TrainConfig, base, adapter: Adapter) -> float:
    """The held-out loss of an adapter on a base, without the training loop."""
    graphdef, state = nnx.split(import_adapter(load_llama(open_base(base)), adapter))
    logits_of = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    data = load_dataset(config.data.eval, make_tokenizer(), max_length=config.data.max_length)
    total = count = 0.0
    for batch in eval_batches(data, batch_size=config.batch_size):
        logits = np.asarray(logits_of(state, batch["tokens"]), np.float64)
        likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(likely, np.asarray(batch["targets"])[..., None], -1)[..., 0]
        total -= float((picked * batch["loss_mask"]).sum())
        count += float(batch["loss_mask"].sum())
    return total / count


def same(one: Adapter, other: Adapter) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        np.array_equal(a, b)
        for path, layer in one.layers.items()
        for (_, a), (_, b) in zip(layer.tensors(), other.layers[path].tensors(), strict=True)
    )


def test_a_run_goes_on_from_the_adapter_is_resumed_and_exported_without_it(base, start, tmp_path, capsys):
    """The first held-out loss is that of the imported adapter, not of the base, and training goes on below it."""
    folder = shutil.copytree(start, tmp_path / "start")
    run = write(tmp_path, base, folder)
    assert call("train", run) == 0
    losses = held_out(tmp_path)
    assert len(losses) == 3

    adapter = load_adapter(start)
    zeroed = {
        path: dataclasses.replace(layer, factor_b=tuple(map(np.zeros_like, layer.factor_b)))
        for path, layer in adapter.layers.items()
    }
    config = TrainConfig.from_yaml(run)
    adapted, plain = (loss_of(config, base, one) for one in (adapter, dataclasses.replace(adapter, layers=zeroed)))
    assert losses[0] == pytest.approx(adapted, rel=1e-5)
    assert abs(adapted - plain) > 0.1
    assert losses[2] < losses[1] < losses[0] - 0.05

    shutil.rmtree(folder)
    capsys.readouterr()
    assert call("export", tmp_path / "out", tmp_path / "adapter") == 0
    exported = load_adapter(tmp_path / "adapter")
    assert exported.layers.keys() == load_adapter(start).layers.keys()
    assert exported.config.shapes == load_adapter(start).config.shapes
    assert not same(exported, load_adapter(start))

    shutil.rmtree(tmp_path / "out" / "checkpoints" / "4")  # as if it had been stopped after step 2
    assert call("train", run) == 0
    assert held_out(tmp_path) == losses
    assert call("export", tmp_path / "out", tmp_path / "again") == 0
    assert same(load_adapter(tmp_path / "again"), exported)

    other = random_adapter(open_base(base), CONFIG, seed=5)
    save_adapter(other, folder)
    capsys.readouterr()
    assert call("train", run) == 1
    assert "adapter.start_checksum" in capsys.readouterr().err


def test_a_run_keeps_the_values_of_its_preset_when_that_is_redefined(base, tmp_path, capsys, monkeypatch):
    run = write(tmp_path, base, None, adapter={"start": None, "preset": "recommended"}, steps=2)
    assert call("train", run) == 0
    assert call("export", tmp_path / "out", tmp_path / "adapter") == 0
    recommended = moka_core.PRESETS["recommended"]
    other = dataclasses.replace(recommended.config, r=4, scale=10.0)
    monkeypatch.setitem(moka_core.PRESETS, "recommended", dataclasses.replace(recommended, config=other))
    assert call("export", tmp_path / "out", tmp_path / "again") == 0
    assert load_adapter(tmp_path / "again").config == load_adapter(tmp_path / "adapter").config
    assert same(load_adapter(tmp_path / "again"), load_adapter(tmp_path / "adapter"))
    capsys.readouterr()
    assert call("train", run) == 1
    refused = capsys.readouterr().err
    for line in (
        "adapter.r: the checkpoint has 3, this run 4\n",
        "adapter.scale: the checkpoint has 30.0, this run 10.0\n",
    ):
        assert line in refused
    assert call("train", run, "adapter.r=3", "adapter.scale=30", "steps=2") == 0


@pytest.mark.slow
def test_a_dry_run_plans_the_start_and_a_moved_start_is_no_other_run(base, start, tmp_path, capsys):
    run = write(tmp_path, base, start, steps=2)
    assert call("train", run, "--dry-run") == 0
    assert "adapter" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert call("train", run) == 0
    shutil.copytree(start, tmp_path / "moved")
    assert call("train", run, f"adapter.start={tmp_path / 'moved'}") == 0


def test_dropout_and_execution_may_be_given_beside_it(base, start, tmp_path):
    run = write(tmp_path, base, start, adapter={"dropout": 0.25, "execution": "merged", "r": 3})
    config, adapter = resolve_start(TrainConfig.from_yaml(run))
    settings = config.adapter.moka_config()
    assert (settings.dropout, settings.execution, settings.r) == (0.25, "merged", 3)
    assert adapter.config == settings
    assert config.adapter.start_checksum == json.loads((start / "adapter_config.json").read_text())["checksum"]
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.adapter.moka_config() == settings
    assert "adapter.start" not in again.meaning()
    assert again.meaning()["adapter.start_checksum"] == config.adapter.start_checksum
    assert "adapter.start" not in again.shared()


def test_targets_that_mean_more_here_become_the_adapted_layers(base, tmp_path):
    adapter = random_adapter(open_base(base), CONFIG)
    values = {path: layer for path, layer in adapter.layers.items() if path.endswith("q_proj")}
    save_adapter(dataclasses.replace(adapter, layers=values), tmp_path / "q")
    config, found = resolve_start(TrainConfig.from_yaml(write(tmp_path, base, tmp_path / "q")))
    assert config.adapter.moka_config().target_modules == tuple(values)
    assert found.layers.keys() == values.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preset": "papper", "start": "a"},
            "adapter.preset: expected one of recommended, paper, paper-s; got 'papper'",
        ),
        ({"start": ""}, "adapter.start: expected a path; got ''"),
        ({"start": 3}, "adapter.start: expected a path; got 3"),
        ({"start_checksum": "00"}, "adapter.start_checksum: expected adapter.start"),
        ({"start": "a", "start_checksum": 3}, "adapter.start_checksum: expected text; got 3"),
        ({"start": "a", "droput": 0.1}, "unknown 'droput' (did you mean 'dropout'?)"),
        ({"start": "a", "dropout": 1.5}, "dropout: expected 0 <= dropout < 1; got 1.5"),
        ({"strat": "a"}, "unknown 'strat' (did you mean 'start'?)"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError) as caught:
        AdapterSettings.from_dict(settings)
    assert message in str(caught.value)


def test_the_shapes_of_a_start_are_not_known_before_it_is_read():
    with pytest.raises(ConfigError, match="the shapes stand in a; see"):
        AdapterSettings.from_dict({"start": "a"}).moka_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 10}, "adapter.r: the adapter in adapter.start, "),
        ({"gate": "uniform"}, "only dropout and execution can be changed, so leave adapter.gate out"),
        ({"scale": 2.0}, "adapter.scale: the adapter in adapter.start"),
        ({"target_modules": ["q_proj"]}, "adapter.target_modules: the adapter in adapter.start"),
        ({"shapes": {"128x128": [[3, 8, 8, 16, 16]]}}, "adapter.shapes: the adapter in adapter.start"),
        (
            {"preset": "paper", "gate": "uniform", "r": 3},
            "adapter.preset and adapter.gate: the adapter in adapter.start, {start}, has others; of its settings only "
            "dropout and execution can be changed, so leave adapter.preset and adapter.gate out (on the command line: "
            "adapter.preset=null adapter.gate=null)",
        ),
        ({"preset": "paper", "r": 3, "num_shapes": 2, "scale": 1.5}, "error: adapter.scale: the adapter in"),
        ({"preset": "paper-s"}, "adapter.preset: the adapter in adapter.start, "),
        ({"start_checksum": "0" * 64}, "expected the adapter that the run started from, checksum 000"),
    ],
)
def test_settings_that_contradict_the_adapter(base, start, tmp_path, settings, message, capsys):
    assert call("train", write(tmp_path, base, start, adapter=settings)) == 1
    assert message.replace("{start}", str(start)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_agree_with_the_adapter_are_taken(base, start, tmp_path):
    adapter = load_adapter(start)
    values = {key: value for key, value in adapter.config.to_dict().items() if key != "execution"}
    config, _ = resolve_start(TrainConfig.from_yaml(write(tmp_path, base, start, adapter=values)))
    assert config.adapter.moka_config() == adapter.config


@pytest.mark.parametrize(
    ("preset", "given", "settings"),
    [
        ("paper", {}, {"dropout": 0.05, "target_modules": ["v_proj", "q_proj"]}),
        ("paper", {"r": 3, "num_shapes": 2}, {"r": 3, "num_shapes": 2}),
        ("paper", {"r": 3}, {"preset": None, "r": None, "shapes": None, "target_modules": None}),
        ("paper-s", {}, {}),
    ],
)
def test_a_preset_that_makes_the_same_is_taken_and_null_leaves_a_setting_out(base, tmp_path, preset, given, settings):
    opened = open_base(base)
    config = moka_core.preset(preset, Architecture.from_hf_config(opened.config), **given)
    adapter = random_adapter(opened, config)
    layers = {path: (config, layer.plan) for path, layer in adapter.layers.items()}  # as an export writes it
    adapter = dataclasses.replace(adapter, config=MokaConfig.of_layers(layers))
    save_adapter(adapter, tmp_path / "start")
    run = write(tmp_path, base, tmp_path / "start", adapter={"preset": preset} | settings)
    found, _ = resolve_start(TrainConfig.from_yaml(run))
    dropout = settings.get("dropout", config.dropout)
    assert found.adapter.moka_config() == dataclasses.replace(adapter.config, dropout=dropout)
    assert found.adapter.preset is None


def test_a_preset_that_differs_in_its_scaling_alone_is_refused(base, tmp_path):
    adapter = random_adapter(open_base(base), MokaConfig(r=10, num_shapes=5, scaling="stable"))
    save_adapter(adapter, tmp_path / "start")
    with pytest.raises(ConfigError, match=r"^adapter\.preset: the adapter in adapter\.start"):
        resolve_start(TrainConfig.from_yaml(write(tmp_path, base, tmp_path / "start", adapter={"preset": "paper"})))


def test_the_commands_of_the_docs_work_as_written(base, tmp_path, monkeypatch, capsys):
    """With the README's config, a small model, and fewer steps."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "report/base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    lora = LoraConfig(r=2, target_modules=list(preset("recommended").target_modules), init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained("my-lora")
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1])
    short = {"steps": 2, "batch_size": 1, "eval_every": 2, "optimiser": {"learning_rate": 5e-3}}
    settings["data"]["max_length"] = 96
    write_run(tmp_path, base, train=12, eval=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | short))
    block = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "warm_start.md").read_text(), re.DOTALL)[1]
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "moka"
        assert call(*arguments) == 0, capsys.readouterr().err
    saved = TrainConfig.from_dict(saved_run("run")[0])
    assert saved.adapter.start == "warm"
    assert saved.adapter.moka_config().dropout == 0.05


def test_another_way_to_hold_the_base_is_told(base, start, tmp_path, capsys):
    adapter = dataclasses.replace(load_adapter(start), base_quantisation="nf4-double")
    save_adapter(adapter, tmp_path / "start")
    run = write(tmp_path, base, tmp_path / "start")
    assert call("train", run, "--dry-run") == 0
    assert "note" not in capsys.readouterr().out
    assert call("train", run, "--dry-run", "quantise=none") == 0
    told = "note: the adapter in adapter.start was trained on a base held as nf4-double; this run holds it as none"
    assert told in capsys.readouterr().out


def test_without_the_folder_an_older_checkpoint_is_gone_on_from_while_there_is_one(base, start, tmp_path, capsys):
    folder = shutil.copytree(start, tmp_path / "start")
    run = write(tmp_path, base, folder)
    assert call("train", run) == 0
    losses = held_out(tmp_path)
    shutil.rmtree(folder)
    newest, older = (tmp_path / "out" / "checkpoints" / step for step in ("4", "2"))
    (newest / "_CHECKPOINT_METADATA").write_text("{}")
    capsys.readouterr()
    assert call("train", run) == 0
    assert "going on from step 2 of 4" in capsys.readouterr().out
    assert held_out(tmp_path) == losses

    for checkpoint in (newest, older):
        (checkpoint / "_CHECKPOINT_METADATA").write_text("{}")
    assert call("train", run) == 1
    told = capsys.readouterr().err
    assert (
        f"adapter.start: no such folder: {folder}; expected the adapter folder that the run started from, as " in told
    )
    assert "all 2 checkpoints are damaged:\n  4: its description is missing or cut off\n  2: " in told
    assert (
        f"put that folder back and delete {tmp_path / 'out' / 'checkpoints'} to start again from the beginning" in told
    )


def test_an_adapter_of_another_base_or_none_at_all_is_refused_before_the_base_is_read(base, start, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=3, vocab_size=320)
    with pytest.raises(AdapterError, match=r"adapter\.start: .* was trained on another base .* set base to the"):
        resolve_start(TrainConfig.from_yaml(write(tmp_path, other, start)))
    anonymous = dataclasses.replace(load_adapter(start), base_fingerprint=None)
    save_adapter(anonymous, tmp_path / "anonymous")
    small = save_tiny_llama(tmp_path / "small", num_hidden_layers=1)
    with pytest.raises(
        AdapterError, match=r"layers\.1\.self_attn\.q_proj: it is for 128x128, the base's layer is none"
    ):
        resolve_start(TrainConfig.from_yaml(write(tmp_path, small, tmp_path / "anonymous")))
    with pytest.raises(ConfigError, match=r"adapter\.start: no such folder: .*nowhere"):
        resolve_start(TrainConfig.from_yaml(write(tmp_path, base, tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config\.json: no such file"):
        resolve_start(TrainConfig.from_yaml(write(tmp_path, base, tmp_path / "empty")))
