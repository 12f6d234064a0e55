"""`moka inspect`: what it prints, the JSON's keys, the pictures, and what it refuses before any work."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from matplotlib.figure import Figure

from conversion import load_adapter, save_adapter
from moka_cli.inspect import _labels
from moka_cli.main import main
from moka_cli.pictures import plot_gates
from moka_core import Adapter, LayerFactors, MokaConfig, architecture, plan_layer, plan_model
from moka_core.oracle import dense_delta, term_gates
from tests.cases import random_factors

CONFIG = MokaConfig(r=4, num_shapes=2, target_modules=("q_proj", "v_proj"))
LAYERS = {
    f"model.layers.{number}.self_attn.{kind}": (out, 48)
    for number in (0, 2, 10)
    for kind, out in (("q_proj", 48), ("v_proj", 16))
}
FIRST = "model.layers.0.self_attn.q_proj"


def example(config: MokaConfig = CONFIG, *, dtype: type = np.float32) -> Adapter:
    """Six layers of two kinds; their gates and factors are random."""
    rng = np.random.default_rng(0)
    layers = {}
    for path, dims in LAYERS.items():
        own = config.for_layer(path, *dims)
        layer = random_factors(plan_layer(own, *dims), own, rng)
        tensors = {name: array.astype(dtype) for name, array in layer.tensors()}
        layers[path] = LayerFactors.from_tensors(layer.plan, own, tensors)
    return Adapter(
        config=config,
        layers=layers,
        base_fingerprint="0123456789abcdef" * 4,
        base_model="tiny",
        base_quantisation="nf4",
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    return save_adapter(example(), tmp_path / "adapter")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *map(str, arguments)])
    return int(stop.value.code or 0)


def printed(capsys) -> str:
    """What was printed, without table lines, each run of white space as one space."""
    text = "".join(" " if character in "│┃" else character for character in capsys.readouterr().out)
    return " ".join(text.split())


def test_the_json_has_these_keys_and_the_oracles_figures(folder, capsys):
    assert call(folder, "--json", "-") == 0
    values = json.loads(capsys.readouterr().out)
    keys = "adapter format_version checksum base config trainable dtypes bytes bounds untrained dead repeated layers"
    assert list(values) == keys.split()
    adapter = load_adapter(folder)
    assert values["base"] == {"model": "tiny", "fingerprint": "0123456789abcdef" * 4, "quantisation": "nf4"}
    assert values["trainable"] == adapter.trainable == sum(values["dtypes"].values())
    assert values["bytes"] == {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    assert values["bounds"] == {"dead": 2**-9, "repeats": 2**-7}
    assert MokaConfig.from_dict(values["config"]) == adapter.config
    assert "execution" not in values["config"]
    assert (values["untrained"], values["dead"], values["repeated"]) == (0, 0, 0)
    assert list(values["layers"]) == list(LAYERS), "in the model's order, which the file does not keep"
    assert list(adapter.layers) != list(LAYERS)
    for path, found in values["layers"].items():
        keys = "out_features in_features norm spectral_norm stable_rank effective_rank rank untrained cosine terms"
        assert list(found) == keys.split()
        exact = np.linalg.svd(dense_delta(adapter.layers[path], adapter.layer_config(path)), compute_uv=False)
        shares = exact / exact.sum()
        expected = {
            "norm": np.sqrt((exact**2).sum()),
            "spectral_norm": exact[0],
            "stable_rank": (exact**2).sum() / exact[0] ** 2,
            "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
            "rank": len(exact),
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert (found["out_features"], found["in_features"]) == LAYERS[path]
        assert [list(term) for term in found["terms"]] == [["shape", "gate", "norm", "share", "dead", "repeats"]] * 4
        assert sum(term["share"] for term in found["terms"]) == pytest.approx(1)
        rows = [shape for group in adapter.layers[path].plan.groups for shape in [group.to_list()[1:]] * group.copies]
        assert [term["shape"] for term in found["terms"]] == rows


def test_the_tables_say_what_the_json_says(folder, capsys):
    assert call(folder, "--json", "-") == 0
    values = json.loads(capsys.readouterr().out)
    assert call(folder, "--layers") == 0
    text = printed(capsys)
    assert f"format version 2, checksum {values['checksum'][:12]}… right" in text
    assert "base tiny, fingerprint 0123456789ab… without linear weights, held as nf4" in text
    assert f"trained {values['trainable']:,} parameters of 6 layers, {values['trainable']:,} in float32" in text
    assert f"adapter_model.safetensors {values['bytes']['adapter_model.safetensors']:,} bytes" in text
    kinds = {
        kind: [row for path, row in values["layers"].items() if path.endswith(kind)] for kind in ("q_proj", "v_proj")
    }
    for kind, rows in kinds.items():
        row = [f"{np.median([layer[name] for layer in rows]):.3g}" for name in ("norm", "spectral_norm", "stable_rank")]
        assert f"{kind} 3 {' '.join(row)} " in text
        assert f"model.layers.*.self_attn.{kind}, {rows[0]['out_features']}x48" in text
    last = values["layers"]["model.layers.10.self_attn.v_proj"]
    figures = [f"{last[name]:.3g}" for name in ("norm", "spectral_norm", "stable_rank", "effective_rank")]
    spans = [
        f"{min(numbers):.3f}–{max(numbers):.3f}"
        for numbers in ([term[name] for term in last["terms"]] for name in ("gate", "share"))
    ]
    assert f"10 {' '.join(figures)} {' '.join(spans)} 0 0" in text
    assert "0 dead terms (" in text


def test_without_ranks_everything_else_is_there(folder, capsys):
    assert call(folder, "--no-rank", "--json", "-") == 0
    quick = json.loads(capsys.readouterr().out)
    assert call(folder, "--json", "-") == 0
    whole = json.loads(capsys.readouterr().out)
    for layer in whole["layers"].values():
        for name in ("spectral_norm", "stable_rank", "effective_rank", "rank"):
            del layer[name]
    assert quick == whole
    assert call(folder, "--no-rank", "--layers") == 0
    assert "effective" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, gate="uniform", dropout=0.0),
        dataclasses.replace(CONFIG, identity="a", block_entries=24),
        MokaConfig(r=4, num_shapes=2, r_pattern={FIRST: 3}, scale_pattern={FIRST: -2.5}),
        MokaConfig(r=1, num_shapes=1),
    ],
    ids=["uniform", "moka-s", "patterns", "one term"],
)
def test_adapters_of_every_kind(config, tmp_path, capsys):
    adapter = example(config, dtype=ml_dtypes.bfloat16)
    folder = save_adapter(adapter, tmp_path / "adapter")
    assert call(folder, "--layers") == 0
    assert " in bfloat16" in printed(capsys)
    assert call(folder, "--json", "-") == 0
    values = json.loads(capsys.readouterr().out)
    for path, layer in adapter.layers.items():
        found, own = values["layers"][path], adapter.layer_config(path)
        assert found["norm"] == pytest.approx(np.linalg.norm(dense_delta(layer, own)), rel=1e-12)
        assert [term["gate"] for term in found["terms"]] == pytest.approx(list(term_gates(layer, own)))


def test_dead_and_repeated_terms_and_untrained_layers_are_named(tmp_path, capsys):
    adapter = example()
    for number, (path, layer) in enumerate(adapter.layers.items()):
        if number == 0:
            layer.gate_logits[1] = -30
            layer.factor_b[1][0] = 0
        elif number == 1:
            layer.factor_a[0][1], layer.factor_b[0][1] = layer.factor_a[0][0], -3 * layer.factor_b[0][0]
        elif number == 2:
            untrained = path
            for factor in layer.factor_b:
                factor[:] = 0
    folder = save_adapter(adapter, tmp_path / "adapter")
    assert call(folder) == 0
    text = printed(capsys)
    shapes = adapter.layers[FIRST].plan.term_shapes()
    assert f"1 untrained layers (ΔW = 0: every term is zero): {untrained} 2 dead terms (" in text
    assert f"{FIRST} term 1, {shapes[1]}: gate; gate " in text
    assert f"{FIRST} term 2, {shapes[2]}: factor_b is zero; gate " in text
    v_proj = FIRST.replace("q_proj", "v_proj")
    assert "1 repeated terms (" in text
    assert f"{v_proj} term 1, {adapter.layers[v_proj].plan.term_shapes()[1]}: as term 0" in text
    assert call(folder, "--json", "-") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["untrained"], values["dead"], values["repeated"]) == (1, 2, 1)


def test_a_long_list_of_dead_terms_is_cut_unless_every_layer_is_asked_for(tmp_path, capsys):
    adapter = example()
    for layer in adapter.layers.values():
        for group in (0, 1):
            layer.factor_b[group][1] = 0
    folder = save_adapter(adapter, tmp_path / "adapter")
    assert call(folder) == 0
    text = printed(capsys)
    assert text.count("factor_b is zero") == 10
    assert "and 2 more: --layers lists them" in text
    assert call(folder, "--layers") == 0
    text = printed(capsys)
    assert text.count("factor_b is zero") == 12
    assert "--layers lists them" not in text


def test_both_pictures_are_written_whole_and_alone(folder, tmp_path):
    gates, shares = tmp_path / "gates.png", tmp_path / "shares"
    assert call(folder, "--png", gates, "--shares-png", shares, "--no-rank") == 0
    for file in (gates, shares):
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_mode & 0o777 == 0o644
    assert {file.name for file in tmp_path.iterdir()} == {"adapter", "gates.png", "shares"}


def test_a_picture_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def broken(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("disk on fire")

    monkeypatch.setattr(Figure, "savefig", broken)
    assert call(folder, "--png", tmp_path / "gates.png", "--no-rank") == 1
    assert "disk on fire" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_the_rows_of_a_picture_are_in_the_models_order(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    adapter = load_adapter(folder)
    plot_gates(adapter, tmp_path / "gates.png")
    panel = drawn[0].axes[0]
    assert panel.get_title() == "q_proj 48x48"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "2", "10"]
    order = [path for path in LAYERS if path.endswith("q_proj")]
    expected = [term_gates(adapter.layers[path], adapter.config) for path in order]
    np.testing.assert_array_equal(panel.images[0].get_array(), expected)


def test_layers_of_one_kind_with_other_shapes_get_a_panel_of_their_own(tmp_path):
    adapter = example(MokaConfig(r=4, num_shapes=2, r_pattern={FIRST: 3}))
    plot_gates(adapter, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--png", "adapter"],
            "--png adapter: expected a file that does not exist yet; choose another name or remove it",
        ),
        (["--shares-png", "no/where.png"], "no/where.png: expected an existing folder; no is none"),
        (["--png", "a.png", "--shares-png", "a.png"], "--png and --shares-png: expected two files; both are a.png"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_first(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("moka_cli.inspect.layer_figures", None)  # nothing is computed
    assert call("adapter", *arguments) == 1
    assert capsys.readouterr().err == f"moka: error: {message}\n"


def test_an_ungated_adapter_has_shares_but_no_gates_to_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_adapter(example(dataclasses.replace(CONFIG, gate="uniform")), "adapter")
    assert call("adapter", "--png", "gates.png") == 1
    message = "--png: adapter has a uniform gate, so there are none to draw; --shares-png draws its terms"
    assert capsys.readouterr().err == f"moka: error: {message}\n"
    assert call("adapter", "--no-rank", "--shares-png", "shares.png") == 0
    assert Path("shares.png").stat().st_size > 10_000


def test_what_is_no_adapter_is_refused_and_a_run_is_sent_to_export(tmp_path, capsys):
    assert call(tmp_path) == 1
    assert "an adapter folder has adapter_config.json and adapter_model.safetensors" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert call(tmp_path) == 1
    assert "is a training run: moka export writes its adapter" in capsys.readouterr().err


def test_neither_backend_is_needed_and_matplotlib_for_pictures_only(folder):
    blocked = ("jax", "flax", "torch", "transformers", "peft", "matplotlib")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        "from moka_cli.main import main; main(['inspect', *sys.argv[1:]])"
    )
    root = Path(__file__).parents[2]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(folder), *map(str, arguments)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)

    plain = run("--json", "-")
    assert plain.returncode == 0, plain.stderr
    assert set(json.loads(plain.stdout)["layers"]) == set(LAYERS)
    drawn = run("--png", folder.parent / "gates.png")
    assert drawn.returncode == 1
    message = "--png: needs matplotlib, which is not installed; run: pip install matplotlib"
    assert drawn.stderr == f"moka: error: {message}\n"


@pytest.mark.parametrize(
    ("paths", "title", "labels"),
    [
        (["m.0.a.q", "m.10.a.q"], "m.*.a.q", ["0", "10"]),
        (["m.0.a.q"], "q", ["m.0.a.q"]),
        (["enc.0.q", "dec.0.q"], "*.0.q", ["enc", "dec"]),
        (["q", "m.q"], "q", ["q", "m.q"]),
        (["m.q", "m.m.q"], "q", ["m.q", "m.m.q"]),
    ],
)
def test_layers_are_named_by_what_their_paths_do_not_share(paths, title, labels):
    assert _labels(paths) == (title, labels)


def test_tables_of_a_7b_models_shapes_are_whole_at_80_columns(tmp_path, capsys, monkeypatch):
    layers = architecture("llama2-7b").linear_layers()
    names = [f"model.layers.{number}.{name}" for number in (0, 31) for name in ("self_attn.q_proj", "mlp.down_proj")]
    config = MokaConfig(target_modules=tuple(names))
    plans = plan_model(config, layers)
    rng = np.random.default_rng(0)
    own = {path: random_factors(plan, config, rng) for path, plan in plans.items()}
    save_adapter(Adapter(config=config, layers=own), tmp_path / "adapter")
    monkeypatch.setenv("COLUMNS", "80")
    assert call(tmp_path / "adapter", "--no-rank", "--layers") == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for plan in plans.values():
        for group in plan.groups:
            row = next(line for line in lines if f" {group.copies} x {group.shape} " in line)
            assert re.search(r" 0\.\d{3} +0\.\d{3} +\d +\d *$", row), row
    assert "…" not in printed.partition("median and range")[2]


def test_help_has_an_example(capsys):
    assert call("--help") == 0
    assert "Example: moka inspect report/adapter" in " ".join(capsys.readouterr().out.split())
