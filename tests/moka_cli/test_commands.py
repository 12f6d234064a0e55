"""The command line from a config to an adapter that both backends agree on, and how its failures end."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import typer
from flax import nnx
from safetensors.numpy import load_file, save_file
from typer.main import get_command

import moka_cli.train
from conversion import load_adapter, open_base, save_adapter
from moka_cli.figures import write_json
from moka_cli.main import app, main
from moka_cli.train import abstract_run_model, attach_fresh, load_run_model
from moka_core import MokaConfig, plan_layer
from moka_core.execution import plan_execution
from moka_jax import MokaParam
from moka_jax.train import TrainConfig
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import random_adapter, save_tiny_llama, write_run

COMMANDS = get_command(app).commands


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("cli") / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A config file of a short run, and its output folder."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, base, train=24, eval=5, steps=6, batch_size=4, eval_every=3, checkpoint_every=3)
    return folder


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_train_export_parity_and_generate_end_to_end(run, base, capsys):
    assert call("train", run / "run.yaml", "optimiser.warmup_steps=1") == 0
    assert "moka export" in capsys.readouterr().out
    assert call("export", run / "out", run / "adapter") == 0
    assert "after step 6" in capsys.readouterr().out

    adapter = load_adapter(run / "adapter")
    assert adapter.base_fingerprint == open_base(base).fingerprint
    assert all((array != 0).any() for layer in adapter.layers.values() for _, array in layer.tensors())

    assert call("parity", run / "adapter", "--base", base, "--train", 3, "--json", run / "parity.json") == 0
    printed = capsys.readouterr().out
    assert "both backends agree" in printed
    assert "training 3 steps in PyTorch\n" in printed, "without a terminal the stages are lines"
    assert json.loads((run / "parity.json").read_text())["passed"] is True

    assert call("generate", "--base", base, "--adapter", run / "adapter", "--prompt", "add 3 3") == 0
    assert capsys.readouterr().out

    assert call("export", run / "out", run / "adapter") == 1
    assert "expected a folder that does not exist yet" in capsys.readouterr().err

    other = save_tiny_llama(run / "other", seed=5, vocab_size=320, max_position_embeddings=128)
    assert call("export", run / "out", run / "elsewhere", "--base", other) == 1
    assert "holds another model than the one that" in capsys.readouterr().err
    assert not (run / "elsewhere").exists()
    moved = shutil.copytree(base, run / "moved")
    assert call("export", run / "out", run / "elsewhere", "--base", moved) == 0
    assert load_adapter(run / "elsewhere").base_fingerprint == adapter.base_fingerprint
    half = load_file(base / "model.safetensors")
    half = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in half.items()}
    rounded = shutil.copytree(base, run / "rounded")
    save_file(half, rounded / "model.safetensors", {"format": "pt"})
    assert open_base(rounded).fingerprint != adapter.base_fingerprint
    assert call("export", run / "out", run / "of rounded", "--base", rounded) == 0
    assert call("train", run / "run.yaml", "optimiser.warmup_steps=1", f"base={moved}") == 0, "a moved base resumes"


@pytest.mark.parametrize(
    ("arch", "preset", "trainable"),
    [
        ("llama2-7b", "paper", 5_243_520),
        ("llama3-8b", "paper", 3_932_800),
        ("llama2-7b", "paper-s", 4_195_328),
        ("llama3-8b", "paper-s", 2_097_664),
    ],
)
def test_params_prints_the_published_counts_as_json(capsys, arch, preset, trainable):
    assert call("params", "--arch", arch, "--preset", preset, "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["trainable"] == trainable
    assert printed["arch"] == arch


def test_params_explains_how_each_layer_is_computed(capsys):
    """What it prints is what the layers do: the schedule of the cost model, and a named execution everywhere."""
    assert call("params", "--arch", "llama3-8b", "--explain", "--json", "-") == 0
    rows = json.loads(capsys.readouterr().out)["execution"]
    assert {row["layer"] for row in rows} == {"4096x4096", "1024x4096"}
    plan = plan_layer(MokaConfig(), 1024, 4096)
    for row in rows:
        if row["layer"] == plan.key:
            options = {"own_product": row["dropout"], "backend": row["backend"]}
            schedule = plan_execution(plan, MokaConfig(), row["tokens"], **options)
            assert (row["forward"], row["gradient"], tuple(row["first"])) == dataclasses.astuple(schedule)
    assert {row["forward"] for row in rows} == {"factored", "merged"}
    assert all(row["added"] > 0 for row in rows)
    assert call("params", "--arch", "llama3-8b", "--explain", "--set", "execution=merged") == 0
    printed = capsys.readouterr().out
    assert "merged into W" in printed
    assert "factored" not in printed.partition("How it is computed")[2]
    assert call("params", "--arch", "llama3-8b", "--explain", "--set", "execution=dense") == 1


def test_json_is_one_option_in_every_command(monkeypatch, tmp_path, capsys):
    """A file, or - for standard output, which then has nothing else; what cannot be written is refused at once."""
    commands = typer.main.get_command(app).commands
    having = [name for name in commands if any("--json" in option.opts for option in commands[name].params)]
    assert set(having) == {"lora", "parity", "merge", "generate", "eval", "params", "inspect", "import"}
    for name in having:
        assert call(name, "--json") == 2, name
        assert "'--json' requires an argument" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    arguments = ("params", "--arch", "llama3-8b", "--json")
    assert call(*arguments, "-") == 0
    alone = capsys.readouterr().out
    assert call(*arguments, "figures.json") == 0
    assert "trainable parameters" in capsys.readouterr().out
    assert Path("figures.json").read_text() == alone
    assert call(*arguments, "nowhere/figures.json") == 1
    assert "nowhere/figures.json: expected an existing folder; nowhere is none" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_a_figure_that_is_no_finite_number_is_null_in_every_json(capsys):
    write_json(Path("-"), {"lost": float("nan"), "rows": [{"error": float("inf")}, 2.5]})
    assert json.loads(capsys.readouterr().out) == {"lost": None, "rows": [{"error": None}, 2.5]}


def test_params_reads_a_model_folder_and_takes_settings(base, capsys):
    assert call("params", "--arch", base, "--set", "r=4", "--set", "gate=uniform", "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["r"] == 4
    assert sum(row[0] for row in printed["shapes"]["128x128"]) == 4
    assert call("params", "--arch", base) == 0
    assert "trainable parameters" in capsys.readouterr().out


def test_parity_exits_with_3_and_names_the_first_difference(base, tmp_path, capsys, monkeypatch):
    import moka_torch.probe

    config = MokaConfig(r=2, num_shapes=1, target_modules=("q_proj",))
    save_adapter(random_adapter(open_base(base), config), tmp_path / "adapter")
    right = moka_torch.probe.load_base

    def wrong(folder, **options):
        model = right(folder, **options)
        model.model.layers[1].self_attn.o_proj.weight.data[5] ^= 1
        return model

    arguments = ("parity", tmp_path / "adapter", "--base", base, "--backend", "torch", "--quick")
    assert call(*arguments, "--json", tmp_path / "right.json", "--trace") == 0
    printed = capsys.readouterr().out
    assert "PyTorch and float64 agree" in printed
    assert "gradients and optimiser steps: not compared with one backend" in printed
    assert "model.layers.1.mlp.down_proj" in printed
    monkeypatch.setattr(moka_torch.probe, "load_base", wrong)
    assert call(*arguments, "--json", tmp_path / "wrong.json") == 3
    printed = capsys.readouterr().out
    assert "PyTorch and float64 disagree: NF4 codes" in printed
    assert "first difference: model.layers.1.self_attn.o_proj, " in printed
    assert (
        "likely cause: the weight: 1 of 8192 bytes of NF4 codes differ, in PyTorch; NF4 layers: this one alone"
        in printed
    )
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("right", "wrong")]
    assert [report["passed"] for report in reports] == [True, False]
    assert reports[0]["diagnosis"] is None
    assert reports[1]["diagnosis"]["module"] == "model.layers.1.self_attn.o_proj"
    assert call(*arguments, "--json", "-") == 3
    assert json.loads(capsys.readouterr().out) == reports[1]
    assert reports[1]["modules"]["model.layers.0"] < 2e-5 < reports[1]["modules"]["model.layers.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["params", "--arch", "llama2-7c"], "unknown architecture 'llama2-7c'; did you mean llama2-7b"),
        (["params", "--arch", "llama2-7b", "--preset", "papper"], "unknown preset 'papper'; did you mean 'paper'?"),
        (["params", "--arch", "llama2-7b", "--set", "rr=2"], "unknown 'rr' (did you mean 'r'?)"),
        (["params", "--arch", "llama2-7b", "--set", "target_modules=[q_pro]"], "did you mean 'q_proj'"),
        (["train", "nowhere.yaml"], "nowhere.yaml: expected a YAML file that can be read"),
        (["export", "nowhere", "out"], "nowhere: expected the output folder of a training run"),
        (["parity", "nowhere", "--base", "nowhere"], "nowhere: no such folder; expected a Hugging Face model folder"),
        (["generate", "--base", "nowhere", "--prompt", "x"], "nowhere: no such folder; expected a Hugging Face model"),
        (["generate", "--base", "nowhere"], "nothing to complete: expected --prompt TEXT or --prompts FILE"),
        (
            ["generate", "--base", "nowhere", "--prompts", "no.txt"],
            "no.txt: expected a text file with one prompt a line",
        ),
        (["generate", "--base", "nowhere", "--prompt", "x", "--top-p", "0.9"], "top_p: expected none at temperature 0"),
        (
            ["generate", "--base", "nowhere", "--prompt", "x", "--temperature", "-1"],
            "temperature: expected 0 (the most",
        ),
        (
            ["generate", "--base", "nowhere", "--prompt", "x", "--batch-size", "0"],
            "batch-size: expected at least 1; got 0",
        ),
        (
            ["generate", "--base", "nowhere", "--prompt", "x", "--prompt", "a \udcff"],
            "--prompt, number 2: holds half of a surrogate pair",
        ),
        (["demo", "--steps", "0"], "steps: expected at least 1; got 0"),
    ],
)
def test_bad_input_ends_with_one_message_and_no_traceback(arguments, message, capsys):
    assert call(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("moka: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.max_length=129"], "data.max_length: expected at most the base model's context of 128; got 129"),
        (["mesh={data: 2}", "batch_size=3"], "batch_size: expected a multiple of mesh.data · mesh.fsdp, 2; got 3"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: expected a JSON-lines file that can be read; "),
        (["data.eval=nowhere.jsonl"], "nowhere.jsonl: expected a JSON-lines file that can be read; "),
        (["data.train=nowhere.jsonl"], "data.train and data.eval name such files, relative to where the command runs"),
        (["data.eval=HERE/bad"], "bad:2: unknown key 'completio' (did you mean 'completion'?)"),
        (["data.train=HERE/bad"], "bad: 1 of 2 examples cannot be used; correct these lines or take them out"),
        (["data.train=HERE/empty"], "empty: expected at least one line with an example; the file has none"),
        (["adapter.r=1000000"], "r: expected at most 81,920 terms on a layer 128x128, for each of its shapes (5) as"),
        (["output=HERE/empty"], "output: expected a folder that can be made and written into, "),
        (["output=HERE/empty/x"], "output: expected a folder that can be made and written into, "),
        (["output=/proc/nowhere/x"], "output: expected a folder that can be made and written into, /proc/nowhere/x; "),
        ([f"output={'x' * 300}"], "File name too long"),
        (["output=HERE/swapped"], "swapped/metrics.jsonl to be a file, as a run writes it, or not to be there; it is"),
        (["base=HERE/no_tokenizer"], "no_tokenizer: expected a tokenizer (tokenizer.json or tokenizer.model)"),
    ],
)
def test_what_a_run_refuses_its_dry_run_refuses_and_nothing_is_loaded(
    run, base, tmp_path, capsys, monkeypatch, changes, message, dry
):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad").write_text('{"text": "a"}\n{"prompt": "a", "completio": "b"}\n')
    (tmp_path / "swapped" / "metrics.jsonl").mkdir(parents=True)
    shutil.copytree(base, tmp_path / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(moka_cli.train, "load_run_model", None)
    changes = [change.replace("HERE", str(tmp_path)) for change in changes]
    if not changes[0].startswith("output="):
        changes.append(f"output={tmp_path / 'new' / 'out'}")
    assert call("train", run / "run.yaml", *changes, *dry) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "foresaw" not in told
    assert sorted(tmp_path.rglob("*")) == before


def test_planning_makes_no_array_and_tells_where_each_will_be(run):
    config = TrainConfig.from_yaml(run / "run.yaml", ["mesh={fsdp: 2}"])
    _, adapter, frozen = nnx.split(abstract_run_model(config), MokaParam, ...)
    assert len(jax.tree.leaves(adapter)) == 2 * (2 * 5 + 1)  # of q_proj and v_proj, five shapes and the gate
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((adapter, frozen)))
    model = load_run_model(config)
    attach_fresh(model, config)
    _, _, loaded = nnx.split(model, MokaParam, ...)
    assert [leaf.sharding for leaf in jax.tree.leaves(frozen)] == [leaf.sharding for leaf in jax.tree.leaves(loaded)]
    assert any(any(leaf.sharding.spec) for leaf in jax.tree.leaves(frozen))


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("quantise", "int8", "'nf4-double', 'nf4', 'none'"),
        ("dtype", "int8", "'float32', 'bfloat16', 'float16'"),
        ("pack", "fp4", "'nf4-double', 'nf4'"),
        ("checkpoint", "first", "'last', 'best'"),
    ],
)
def test_a_choice_that_there_is_none_of_is_refused_by_every_command_with_those_that_there_are(
    option, value, choices, capsys
):
    commands = [name for name, command in COMMANDS.items() if option in {each.name for each in command.params}]
    assert commands
    for name in commands:
        assert call(name, f"--{option}", value) == 2
        told = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert f"'{value}' is not one of {choices}" in told, name


@pytest.mark.parametrize("given", [("run.yaml", "--quantise", "none"), ("--quantise=none", "run.yaml")])
def test_a_setting_given_as_an_option_is_refused_with_how_it_is_given(given, capsys):
    assert call("train", *given) == 2
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "No such option: --quantise" in told
    assert "--dry-run, --schema and --help" in told
    assert told.rstrip("─╯╰ ").endswith("given without dashes: quantise=VALUE")


def test_the_version_is_that_of_the_package(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"moka {version('moka')}\n"


def test_a_folder_of_another_kind_is_refused_with_what_it_is(run, base, tmp_path, capsys):
    save_adapter(random_adapter(open_base(base), MokaConfig(r=2, num_shapes=1)), tmp_path / "adapter")
    assert call("export", tmp_path / "adapter", tmp_path / "new") == 1
    assert "it is an adapter folder already, as moka export writes it" in capsys.readouterr().err
    assert call("export", tmp_path / "nowhere", tmp_path / "new") == 1
    assert "nowhere: expected the output folder of a training run; no such folder" in capsys.readouterr().err
    assert call("train", run / "run.yaml", f"output={tmp_path / 'adapter'}") == 1
    assert "adapter holds an adapter; use another folder" in capsys.readouterr().err
    assert call("generate", "--base", run, "--prompt", "p") == 1
    assert "config.json: no such file; expected a Hugging Face model folder" in capsys.readouterr().err
    assert call("generate", "--base", "some/model", "--prompt", "p") == 1
    assert "a model of the hub is fetched first: hf download NAME --local-dir FOLDER" in capsys.readouterr().err


def test_a_dry_run_plans_and_leaves_nothing(run, tmp_path, capsys):
    assert call("train", run / "run.yaml", "--dry-run", f"output={tmp_path / 'new' / 'out'}") == 0
    printed = capsys.readouterr().out
    assert "together" in printed
    assert (
        f"data.train: the first 20 examples of {run / 'train.jsonl'} can be used, the longest of these has " in printed
    )
    assert f"data.eval: all 5 examples of {run / 'eval.jsonl'} can be used" in printed
    assert not list(tmp_path.iterdir())


def test_a_wrong_option_ends_with_usage_and_status_2(capsys):
    assert call("params", "--archh", "llama2-7b") == 2
    assert "No such option" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys):
    assert call("params", "--arch", "nothing", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(command, capsys):
    assert call(command, "--help") == 0
    assert "Example: moka " + command in " ".join(capsys.readouterr().out.split())
    paragraphs = COMMANDS[command].help.split("\n\n")
    assert [text for text in paragraphs if "\n" in text] == []  # typer would show the break within a sentence


def test_an_unforeseen_failure_ends_with_one_message_too(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise OSError("disk on fire")

    monkeypatch.setitem(sys.modules, "moka_cli.params", type(sys)("moka_cli.params"))
    monkeypatch.setattr(sys.modules["moka_cli.params"], "run_params", broken, raising=False)
    assert call("params", "--arch", "llama2-7b") == 1
    captured = capsys.readouterr()
    assert "OSError: disk on fire" in captured.err
    assert "Traceback" not in captured.err
